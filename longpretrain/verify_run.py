"""``longpretrain verify RUN``: all checkpoints byte by byte, and what else a resume reads.

It only reads. A run may go on meanwhile: a checkpoint that it removes is left out.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from longpretrain.engine import checkpoint, names, retention
from longpretrain.errors import InputError
from longpretrain.recipe import from_tree
from longpretrain.report.metrics import read_metrics

_THREADS = 8


@dataclass(frozen=True, kw_only=True)
class RunReport:
    """What was found; ``ok`` where nothing is wrong."""

    ok: bool
    lines: Sequence[str]
    checks: Sequence[tuple[bool, str]]

    def __str__(self) -> str:
        return "\n".join(self.lines)

    def tree(self, run_dir: Path) -> dict[str, Any]:
        """All of it as plain data, in the form that a model's report has."""
        parts = [(ok, *line.partition(": ")[::2]) for ok, line in self.checks[1:]]
        return {
            "ok": self.ok,
            "a": str(run_dir),
            "b": None,
            "relation": None,
            "checks": [
                {"check": check, "got": got or check, "limit": "whole", "ok": ok}
                for ok, check, got in parts
            ],
            "tensors": [],
            "notes": [],
        }


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's, not a model's."""
    return (folder / names.CONFIG).is_file() and not (folder / "config.json").is_file()


def verify_run(
    run_dir: Path, progress: Callable[[int, int], None] = lambda done, total: None
) -> RunReport:
    """Reads all checkpoints of a run, copies under other names too.

    Args:
        run_dir: a run folder.
        progress: told how many checkpoints of how many were read.
    """
    found = [(True, f"run {run_dir}"), *_status(run_dir)]
    places = [
        path
        for path in sorted((run_dir / "checkpoints").glob("*"))
        if path.is_dir()
        and not path.name.startswith(".")
        and (names.step_of(path) is not None or (path / checkpoint.STATE).is_file())
    ]
    whole: list[str] = []
    for number, folder in enumerate(places):
        progress(number, len(places))
        problem = _problem(folder)
        if problem and not folder.exists():
            continue
        if not problem:
            whole.append(folder.name)
        found.append((not problem, f"{folder.name}: {problem or _size(folder)}"))
    progress(len(places), len(places))
    found += [*_latest(run_dir, places, whole), *_metrics(run_dir), *_left_overs(run_dir)]
    ok = all(is_right for is_right, _ in found)
    lines = [line for _, line in found]
    summary = "whole" if ok else "NOT whole: see above"
    return RunReport(ok=ok, lines=[*lines, summary], checks=found)


def _problem(folder: Path) -> str:
    """What is wrong with a checkpoint; nothing if it is whole. All files at once: disks like it."""
    parts = min(_THREADS, os.cpu_count() or 1)

    def check(part: int) -> str:
        try:
            checkpoint.verify_files(folder, part, parts)
        except InputError as error:
            return f"DAMAGED: {error.what}: got {error.got}; wanted {error.wanted}"
        except OSError as error:
            return f"CANNOT BE READ: {error}"
        return ""

    with ThreadPoolExecutor(parts) as pool:
        return next(filter(None, pool.map(check, range(parts))), "")


def _size(folder: Path) -> str:
    state = checkpoint.read_state(folder)
    size = sum((folder / name).stat().st_size for name in state["files"])
    note = "" if checkpoint.SEAL in state else "; of format 1, state.json has no hash of its own"
    return f"whole, {len(state['files'])} files, {size / 1e6:,.1f} MB{note}"


def _status(run_dir: Path) -> list[tuple[bool, str]]:
    found = []
    try:
        told = names.read_status(run_dir)
        state = f"{told.get('state')} at step {told.get('step')}, {told.get('reason')}"
        found.append((True, f"{names.STATUS}: {state if told else 'none yet'}"))
    except InputError as error:
        found.append((False, f"{names.STATUS}: DAMAGED: {error.got}"))
    try:
        text = (run_dir / names.CONFIG).read_text(encoding="utf-8")
        from_tree(yaml.safe_load(text))
    except (OSError, ValueError, yaml.YAMLError) as error:
        found.append((False, f"{names.CONFIG}: DAMAGED: {' '.join(str(error).split())}"))
    return found


def _latest(run_dir: Path, places: Sequence[Path], whole: Sequence[str]) -> list[tuple[bool, str]]:
    name = names.pointed_at(run_dir)
    if not name and not places:
        return [(True, "no checkpoint yet")]
    if name in whole:
        return [(True, f"latest: {name}")]
    got = f"names {name[:40]!r}" if name else "is missing or empty"
    return [(False, f"latest: DAMAGED: {got}, which is no whole checkpoint")]


def _metrics(run_dir: Path) -> list[tuple[bool, str]]:
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return [(True, f"{path.name}: none yet")]
    try:
        lines = read_metrics(path)
    except (InputError, OSError) as error:
        return [(False, f"{path.name}: DAMAGED: {error}")]
    zeros = path.read_bytes().rpartition(b"\n")[2].count(0)
    if zeros:  # half a line there is no damage: the next start leaves it out
        told = f"{zeros} zero bytes at its end, as a power cut leaves; the next start cuts them off"
        return [(False, f"{path.name}: DAMAGED: {told}")]
    kinds = Counter(line["kind"] for line in lines)
    last = max((line["step"] for line in lines if line["kind"] == "train"), default=0)
    counts = ", ".join(f"{kinds[kind]} of {kind}" for kind in ("train", "evaluation", "event"))
    return [(True, f"{path.name}: {counts}; to step {last}")]


def _left_overs(run_dir: Path) -> list[tuple[bool, str]]:
    """No damage: a save under way, or one that was killed."""
    readable = [
        path.name
        for pattern in retention.LEFT_OVERS
        for path in sorted((run_dir / "checkpoints").glob(pattern))
    ]
    told = "of a save that goes on or was killed; the next start removes it"
    return [(True, f"{name}: {told}") for name in readable]
