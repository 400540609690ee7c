"""Corrupted checkpoints: each is found before a tensor is used, and the next older whole one is
taken, or the run refuses with a message if there is none.
"""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from faults import damage, whole
from faults.attempt import Attempt
from faults.kills import announced
from faults.nursery import Nursery
from faults.table import Row
from longpretrain.engine import candidates, zero
from longpretrain.errors import InputError
from longpretrain.ranks import Ranks

SECTION = "Corrupted checkpoints: found before a tensor is used; the next older whole one is taken"
STEPS, EVERY = 8, 2
ALL = "all of them damaged"


class Corruptions:
    """Damages copies of one run that has four checkpoints."""

    def __init__(self, work: Path, recipe: Path, nursery: Nursery) -> None:
        self._work, self._nursery = work, nursery
        self._words = [
            str(recipe),
            f"schedule.total_steps={STEPS + 2}",
            f"checkpoint.every_steps={EVERY}",
            "checkpoint.keep=0",
            "evaluate.every_steps=0",
            "log.sample_ids=true",
        ]
        self._reference = work / "reference" / "run"
        with self._attempt(self._reference) as attempt:
            assert attempt.wait(), attempt.said()[-3000:]
        self._donor = work / "donor" / "run"  # the same, two updates before its end
        damage.copy_of(self._reference, self._donor)
        last = self._donor / "checkpoints" / f"step-{STEPS + 2:06d}"
        shutil.rmtree(last)
        pointer = self._donor / "checkpoints" / damage.LATEST
        pointer.unlink()
        pointer.write_text(f"step-{STEPS:06d}\n", encoding="utf-8")

    def in_process(self, seed: str, count: int) -> list[Row]:
        """Copies damaged in every way in turn, and what the choice at a resume makes of each."""
        rows = {
            kind: Row(section=SECTION, fault=kind, wanted="found; falls back to a whole one")
            for kind in damage.KINDS
        }
        rows[ALL] = Row(section=SECTION, fault=ALL, wanted="refused, naming each; nothing changed")
        with group_of_one():
            for number in range(count):
                draw = random.Random(f"{seed}/{number}")
                kind = list(rows)[number % len(rows)]
                problems = self._all(draw) if kind == ALL else self._one(kind, draw)
                rows[kind].count([f"{seed}/{number}: {text}" for text in problems])
                rows[kind].lost += len(problems)
        return [row for row in rows.values() if row.tried]

    def end_to_end(self, seed: str, count: int) -> Row:
        """The same by real ranks: they go on to the end, to the same bits."""
        row = Row(
            section=SECTION,
            fault="five kinds, 2 ranks",
            wanted="a line says so; goes on to the same bits",
        )
        kinds = random.Random(seed).sample(list(damage.KINDS), count)
        row.fault = f"by real ranks: {', '.join(kinds)}"
        for number, kind in enumerate(kinds):
            draw = random.Random(f"{seed}/{number}")
            with self._copy() as run_dir:
                what = damage.KINDS[kind](_newest(run_dir), draw)
                with self._attempt(run_dir) as attempt:
                    ended, codes, said = attempt.wait(), attempt.codes(), attempt.said()
                problems = [] if ended and codes == [0, 0] else [f"{codes}: {said[-800:]}"]
                if not problems:
                    problems = whole.not_the_same(run_dir, self._reference)
                    if announced(said) != STEPS and "going on from step-" not in said:
                        problems.append("no line says why it did not go on from the newest")
            row.count([f"{seed}/{number}, {what}: {text}" for text in problems])
            row.lost += len(problems)
        return row

    def _one(self, kind: str, draw: random.Random) -> list[str]:
        """One or two checkpoints damaged, the newest among them."""
        with self._copy() as run_dir:
            newest = _newest(run_dir)
            before = whole.step_folders(run_dir)[-2]
            what = damage.KINDS[kind](newest, draw)
            also = kind != "`latest` spoilt" and draw.random() < 0.3
            if also:
                what += f"; {before.name}: {damage.flip_a_bit(before, draw)}"
            try:
                choice = candidates.choose(run_dir)
            except InputError as error:
                return [f"{what}: refused though there are whole ones: {error}"]
            except Exception as error:
                return [f"{what}: {type(error).__name__}: {error}"]
            return [f"{what}: {text}" for text in self._judge(choice, run_dir)]

    def _judge(self, choice: candidates.Choice, run_dir: Path) -> list[str]:
        if choice.folder is None:
            return ["it would begin anew"]
        mine = {p.name: p for p in whole.step_folders(self._donor)}
        if choice.folder.name not in mine or not _same(choice.folder, mine[choice.folder.name]):
            return [f"loads {choice.folder.name}, which is damaged"]
        best = max(n for n, p in mine.items() if _same(run_dir / "checkpoints" / n, p))
        if choice.folder.name != best and not choice.notes:
            return [f"takes {choice.folder.name}, not {best}, and does not say so"]
        if choice.folder.name != _newest(self._donor).name and not choice.notes:
            return ["falls back without a line"]
        return []

    def _all(self, draw: random.Random) -> list[str]:
        with self._copy() as run_dir:
            folders = whole.step_folders(run_dir)
            for folder in reversed(folders):  # some kinds need the one before
                kind = draw.choice(("a bit flipped", "cut short", "a file missing", "emptied"))
                damage.KINDS[kind](folder, draw)
            before = _listing(run_dir)
            try:
                choice = candidates.choose(run_dir)
            except InputError as error:
                missing = [f.name for f in folders if f.name not in str(error)]
                problems = [f"does not name {name}: {error}" for name in missing]
            except Exception as error:
                problems = [f"{type(error).__name__}: {error}"]
            else:
                problems = [f"takes {choice.folder}"]
            if _listing(run_dir) != before:
                problems.append("the folder was changed")
            return problems

    @contextlib.contextmanager
    def _copy(self) -> Iterator[Path]:
        place = self._work / "copy"
        try:
            run_dir = damage.copy_of(self._donor, place / "run")
            config = run_dir / "config.yaml"
            text = config.read_text(encoding="utf-8")
            config.unlink()
            config.write_text(text.replace(str(self._reference), str(run_dir)), encoding="utf-8")
            for name in ("metrics.jsonl", "log.txt"):  # a run appends to them
                path = run_dir / name
                data = path.read_bytes()
                path.unlink()
                path.write_bytes(data)
            yield run_dir
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def _attempt(self, run_dir: Path) -> Attempt:
        return Attempt(
            run_dir=run_dir,
            words=self._words,
            nursery=self._nursery,
            output=run_dir.parent / "output.txt",
        )


@contextlib.contextmanager
def group_of_one() -> Iterator[None]:
    """A process group of this process alone: the choice is made by ranks."""
    if torch.distributed.is_initialized():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # so that what start_ranks sets is taken back
        patch.setenv("DS_ACCELERATOR", "cpu")
        zero.start_ranks(Ranks(), torch.device("cpu"))
        try:
            yield
        finally:
            zero.stop_ranks()


def _newest(run_dir: Path) -> Path:
    return run_dir / "checkpoints" / f"step-{STEPS:06d}"


def _same(folder: Path, other: Path) -> bool:
    """Whether every file of two checkpoints is the same, byte for byte."""
    try:
        names = {path.name for path in folder.iterdir()}
        return names == {path.name for path in other.iterdir()} and all(
            (folder / name).samefile(other / name)
            or (folder / name).read_bytes() == (other / name).read_bytes()
            for name in names
        )
    except OSError:
        return False


def _listing(run_dir: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(run_dir)): (path.lstat().st_ino, path.lstat().st_mtime_ns)
        for path in run_dir.rglob("*")
    }
