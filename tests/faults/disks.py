"""Disks that are full, refuse, or do not answer: training goes on where it can, and nothing that
was whole is lost.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
from small_disk import fill, small_disk

from faults import whole
from faults.attempt import PATIENCE_S, Attempt, saving, until
from faults.nursery import Nursery
from faults.table import Row

SECTION = "Disks"
STEPS, EVERY = 40, 4
KIB = 72 * 1024
"""Room for three checkpoints of the small model."""
FAILED_SAVE = "could NOT be written"
HUNG_AFTER_S = 15


class Disks:
    """One run per trouble, and one without any."""

    def __init__(self, work: Path, recipe: Path, nursery: Nursery) -> None:
        self._work, self._nursery = work, nursery
        hung = f"watchdog.hung_after_s={HUNG_AFTER_S}"
        self._words = saving(recipe, STEPS, EVERY, "checkpoint.keep=1", hung)
        self._reference = work / "reference" / "run"
        with self._attempt(self._reference) as attempt:
            assert attempt.wait(), attempt.said()[-3000:]

    def rows(self) -> list[Row]:
        """All of it; a small file system cannot be mounted by everyone."""
        return [
            self._row(
                "full during a save, free again before the next (a tmpfs)",
                "a loud line, training goes on, to the same bits",
                self._full_for_a_while,
            ),
            self._row(
                "full up to the end (a tmpfs)",
                "failed, exit code 1; the old checkpoint stays; with room it goes on, same bits",
                self._full_to_the_end,
            ),
            self._row(
                f"does not answer, watchdog.hung_after_s={HUNG_AFTER_S}",
                f"ends within {HUNG_AFTER_S + 15} s; failed, rank named, stacks of both ranks; "
                "goes on to the same bits",
                self._no_answer,
            ),
        ]

    def _row(self, fault: str, wanted: str, attempt: Callable[[Row], list[str]]) -> Row:
        row = Row(section=SECTION, fault=fault, wanted=wanted)
        try:
            problems = attempt(row)
        except pytest.skip.Exception as skipped:
            row.notes.append(f"not tried: {skipped}")
            row.is_skipped = True
            return row
        row.count(problems)
        row.lost += len(problems)
        return row

    def _full_for_a_while(self, row: Row) -> list[str]:
        with small_disk(self._work / "a-while", kib=KIB) as disk:
            run_dir = disk / "run"
            with self._attempt(run_dir) as attempt:
                until(lambda: whole.pointed_at(run_dir) >= EVERY, PATIENCE_S, 0.002)
                ballast = fill(disk)
                came = until(lambda: FAILED_SAVE in attempt.said(), PATIENCE_S)
                at = whole.pointed_at(run_dir)
                is_there = whole.is_whole(run_dir / "checkpoints" / f"step-{at:06d}")
                ballast.unlink()
                ended, codes, said = attempt.wait(), attempt.codes(), attempt.said()
            problems = [] if came else ["no line about the full disk"]
            problems += [] if is_there else [f"the checkpoint of step {at} is not whole"]
            if not ended or codes != [0, 0]:
                return [*problems, f"ended with {codes}: {said[-800:]}"]
            return problems + self._same(run_dir)

    def _full_to_the_end(self, row: Row) -> list[str]:
        with small_disk(self._work / "the-end", kib=KIB) as disk:
            run_dir = disk / "run"
            with self._attempt(run_dir) as attempt:
                until(lambda: whole.pointed_at(run_dir) >= EVERY, PATIENCE_S, 0.002)
                ballast = fill(disk)
                ended, codes, said = attempt.wait(), attempt.codes(), attempt.said()
            status, at = whole.status_of(run_dir), whole.pointed_at(run_dir)
            problems = []
            if not ended or codes != [1, 1] or status.get("state") != "failed":
                problems.append(f"ended with {codes}, {status}: {said[-800:]}")
            if "Traceback" in said:
                problems.append(f"a traceback: {said[-800:]}")
            if not whole.is_whole(run_dir / "checkpoints" / f"step-{at:06d}"):
                problems.append(f"the checkpoint of step {at} is not whole")
            ballast.unlink()
            with self._attempt(run_dir) as attempt:
                ended, codes, said = attempt.wait(), attempt.codes(), attempt.said()
            if not ended or codes != [0, 0]:
                return [*problems, f"did not go on: {codes}: {said[-800:]}"]
            return problems + self._same(run_dir)

    def _no_answer(self, row: Row) -> list[str]:
        run_dir = self._work / "no-answer" / "run"
        # In the second save: the first is through, so there is something to go on from.
        fault = {"within": "/checkpoints/", "at": 35, "errors": -1, "errno": errno.EIO}
        with self._attempt(run_dir, {0: fault}) as attempt:
            ended, codes, said = attempt.wait(), attempt.codes(), attempt.said()
            status = whole.status_of(run_dir)
        problems = []
        if not ended or codes != [1, 1] or status.get("state") != "failed":
            problems.append(f"ended with {codes}, {status}: {said[-800:]}")
        stacks = sorted(path.name for path in (run_dir / "stacks").glob("rank-*.txt"))
        if len(stacks) != 2:
            problems.append(f"stacks: {stacks}")
        if not str(status.get("reason")).partition(": rank ")[2].startswith("0 "):
            problems.append(f"rank 0 hung, and it says: {status.get('reason')}")
        row.notes.append(str(status.get("reason", "no reason")).replace(f"{run_dir.parent}/", ""))
        with self._attempt(run_dir) as attempt:
            ended, codes, said = attempt.wait(), attempt.codes(), attempt.said()
        if not ended or codes != [0, 0]:
            return [*problems, f"did not go on: {codes}: {said[-800:]}"]
        return problems + self._same(run_dir)

    def _same(self, run_dir: Path) -> list[str]:
        different = [f"not the same: {t}" for t in whole.not_the_same(run_dir, self._reference)]
        return different + [f"left over: {path.name}" for path in whole.half_written(run_dir)]

    def _attempt(
        self, run_dir: Path, faults: dict[int, dict[str, object]] | None = None
    ) -> Attempt:
        number = len(list(run_dir.parent.glob("*.txt")))
        output = self._work / f"{run_dir.parent.name}-{number}.txt"
        while output.exists():
            output = output.with_name(f"{output.stem}-again.txt")
        return Attempt(
            run_dir=run_dir,
            words=self._words,
            nursery=self._nursery,
            output=output,
            faults=faults or {},
        )
