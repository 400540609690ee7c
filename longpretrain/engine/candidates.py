"""Which checkpoint a run goes on from: the one that ``latest`` names, or the next older whole one.

Every file is compared with its hash before a tensor is used, the files dealt out over the ranks.
What is damaged is skipped and told; a run that has checkpoints never begins anew by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from longpretrain.engine import checkpoint
from longpretrain.engine.names import LATEST, pointed_at, step_of
from longpretrain.errors import InputError

_SMALL = 1 << 24
_WAY_OUT = "Take one back from a copy, or start anew with --fresh, which moves this run aside."


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The checkpoint to go on from, and what a person should know of how it was found."""

    folder: Path | None = None
    notes: tuple[str, ...] = ()
    seen: str = ""
    """What ``latest`` and the folders were; another writer would have changed it."""


@dataclass(frozen=True, kw_only=True)
class _Order:
    pointer: str = ""
    """What ``latest`` says."""
    folders: tuple[Path, ...] = ()
    """Which to try, best first."""
    newer: tuple[Path, ...] = ()
    """Those that ``latest`` leaves out."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class _Finding:
    """What one rank found wrong with its part of a checkpoint."""

    problem: str = ""
    is_foreign: bool = False


def look(run_dir: Path) -> Choice:
    """The checkpoint to go on from, by this process alone; large files are not read. For a check
    before the ranks start: they ``choose``.

    Raises:
        InputError: there are checkpoints, and none is whole.
    """
    return _first_whole(run_dir, _order(run_dir), _Alone())


def choose(run_dir: Path) -> Choice:
    """The checkpoint that all ranks go on from, every byte of it compared. All must call it, once
    they know that they see the same folders.

    Raises:
        InputError: there are checkpoints, and none is whole; on every rank alike.
    """
    return _first_whole(run_dir, _order(run_dir), _Together())


def seen(run_dir: Path) -> str:
    """What decides: the names of the folders, and ``latest``."""
    names = ", ".join(path.name for _, path in checkpoint.folders(run_dir)) or "none"
    latest = pointed_at(run_dir)[:80]
    return f"{names}, latest {latest!r}" if latest else names


def _order(run_dir: Path) -> _Order:
    """Which checkpoints to try. ``latest`` may have been pointed back on purpose: what is newer
    than it is not tried.
    """
    pointer, named = pointed_at(run_dir), checkpoint.latest(run_dir)
    found = list(reversed(checkpoint.folders(run_dir)))
    place = run_dir / "checkpoints" / LATEST
    if named:
        step = step_of(named)  # None: a copy, under a name of somebody's own
        older = [path for number, path in found if path != named and number <= (step or number)]
        newer = [path for number, path in found if step is not None and number > step]
        return _Order(pointer=pointer, folders=(named, *older), newer=tuple(newer))
    if not found and place.exists():
        return _Order(pointer=pointer, folders=(place.parent / (pointer[:40] or LATEST),))
    note = ""
    if found:
        got = f"names {pointer[:40]!r}, which is not there" if pointer else "is empty"
        if not place.is_file():
            got = "is no file" if place.exists() else "is missing"
        note = f"{place} {got}: the newest whole checkpoint is taken"
    return _Order(pointer=pointer, folders=tuple(path for _, path in found), note=note)


class _Alone:
    """One process, which reads the small files only."""

    def findings(self, folder: Path) -> Sequence[_Finding]:
        return [_examine(folder, 0, 1, largest=_SMALL)]


class _Together:
    """All ranks, each with its share of the files."""

    def findings(self, folder: Path) -> Sequence[_Finding]:
        ranks = dist.get_world_size()
        everyone: list[_Finding] = [_Finding()] * ranks
        mine = _examine(folder, dist.get_rank(), ranks)
        dist.all_gather_object(everyone, mine)
        return everyone


def _examine(folder: Path, part: int, parts: int, *, largest: float = float("inf")) -> _Finding:
    try:
        checkpoint.verify_files(folder, part, parts, largest=largest)
    except InputError as error:
        what = error.what.removeprefix("checkpoint ").removeprefix("file ")
        problem = f"{what}: {error.got}"
        return _Finding(
            problem=problem.replace(f"{folder}/", ""), is_foreign=checkpoint.is_foreign(folder)
        )
    except OSError as error:  # a disk that does not read is no reason to end here
        return _Finding(problem=f"{error.filename}: {error.strerror or error}")
    return _Finding()


def _first_whole(run_dir: Path, order: _Order, readers: _Alone | _Together) -> Choice:
    skipped: list[str] = []
    for folder in order.folders:
        findings = readers.findings(folder)
        wrong = [(rank, found) for rank, found in enumerate(findings) if found.problem]
        if any(found.is_foreign for _, found in wrong):
            raise _foreign(folder)
        if not wrong:
            notes = [order.note] if order.note else []
            notes += [f"{text}: skipped" for text in skipped]
            notes += _remarks(folder, order, is_second=bool(skipped))
            return Choice(folder=folder, notes=tuple(notes), seen=seen(run_dir))
        rank, found = wrong[0]
        by = f" (rank {rank})" if rank else ""
        skipped.append(f"checkpoint {folder.name} is damaged, {found.problem}{by}")
    if skipped:
        raise _none_whole(run_dir, order, skipped)
    return Choice(seen=seen(run_dir))


def _remarks(folder: Path, order: _Order, *, is_second: bool) -> list[str]:
    remarks = []
    if is_second or order.note:
        remarks.append(f"going on from {folder.name}")
    if order.newer:
        names = ", ".join(path.name for path in order.newer)
        remarks.append(
            f"checkpoints/latest names {order.pointer}, though there is {names}: going on from "
            f"{folder.name}; what is newer goes when the next checkpoint is written"
        )
    if checkpoint.SEAL not in checkpoint.read_state(folder):
        remarks.append(f"{folder.name} is of format 1: its state.json has no hash of its own")
    return remarks


def _foreign(folder: Path) -> InputError:
    try:
        checkpoint.read_state(folder)
    except InputError as error:
        return error
    return InputError(
        f"{folder / checkpoint.STATE}",
        got="a file that changes while it is read",
        wanted="one writer at a time",
        way_out="Run the command again.",
    )


def _none_whole(run_dir: Path, order: _Order, skipped: Sequence[str]) -> InputError:
    if order.newer:
        names = " or ".join(path.name for path in order.newer)
        way_out = f"Write {names}, which is newer than latest says, into it; or use --fresh."
    else:
        way_out = _WAY_OUT
    return InputError(
        f"checkpoints of {run_dir}",
        got="; ".join([order.note, *skipped] if order.note else skipped),
        wanted="one that is whole, to go on from",
        way_out=way_out,
    )
