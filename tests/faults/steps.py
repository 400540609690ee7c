"""A save is killed, or refused by the system, before each of its steps on the disk, one after the
other: no moment of it may lose anything.

A start costs seconds, so one run takes many faults: killed again and again, each attempt goes on
from what the one before it left; refused, every second save of a run that goes on. Saves that end a
run are another path, and have runs of their own.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from faults import whole
from faults.attempt import PATIENCE_S, Attempt, saving, until
from faults.hook import HIT
from faults.kills import went_on_from
from faults.nursery import Nursery
from faults.table import Row

SECTION = "Every step of a save on the disk: 2 ranks"
STEPS, EVERY = 128, 2
"""Updates of a run, and between its checkpoints."""
BEFORE, FIRST, SECOND = 0, 1, 2
"""Of the saves of an attempt; BEFORE the first, leavings are cleared away."""
MOST = 400


class Steps:
    """All runs are compared with one that nothing happened to."""

    def __init__(self, work: Path, recipe: Path, nursery: Nursery, *, steps: int = STEPS) -> None:
        self._work, self._nursery, self._steps = work, nursery, steps
        self._words = saving(recipe, steps, EVERY, "checkpoint.keep=1")
        self._attempts = 0
        self._reference = work / "reference" / "run"
        keep = f"checkpoint.keep_every_steps={steps - EVERY}"
        with self._attempt(self._reference, keep) as attempt:
            assert attempt.wait(2 * PATIENCE_S), attempt.said()[-3000:]

    def kills(self, *, at: Sequence[int] = range(MOST), ranks: Sequence[int] = (1, 0)) -> Row:
        """A rank dies before its n-th step, for every n."""
        row = Row(
            section=SECTION, fault="kill -9 before the step", wanted="goes on to the same bits"
        )
        for rank in ranks:
            run_dir = self._work / f"kill-{rank}" / "run"
            for save in (FIRST, BEFORE):
                for number in at:
                    if not self._killed(row, run_dir, rank, {save: number, save + 1: None}):
                        break  # there were no more steps
            self._count(row, f"rank {rank}, in the end", self._goes_on(run_dir), tried=False)
            self._kills_of_the_last(row, rank, at)
        return row

    def _kills_of_the_last(self, row: Row, rank: int, at: Sequence[int]) -> None:
        """In the save that ends the run, which is the first of each attempt here."""
        run_dir: Path | None = None
        for number in at:
            run_dir = run_dir or self._begin(f"kill-last-{rank}-{number}")
            if not self._killed(row, run_dir, rank, {FIRST: number}):
                return
            if whole.pointed_at(run_dir) == self._steps:
                told = f"rank {rank}, last save, step {number}"
                self._count(row, told, self._goes_on(run_dir), tried=False)
                run_dir = None
        if run_dir:
            told = f"rank {rank}, last save, to step {number}"
            self._count(row, told, self._goes_on(run_dir), tried=False)

    def refusals(self, *, at: Sequence[int] = range(MOST), ranks: Sequence[int] = (1, 0)) -> Row:
        """The system refuses three changes of the disk in a row, from the n-th of a rank on."""
        row = Row(
            section=SECTION,
            fault="refused with ENOSPC or EIO, three in a row from the step on",
            wanted="training goes on, to the same bits",
        )
        saves = self._steps // EVERY - 1
        for rank in ranks:
            plan: dict[int, int | None] = dict(zip(range(1, saves, 2), at, strict=False))
            run_dir = self._work / f"refuse-{rank}" / "run"
            problems, hits = self._refused(run_dir, rank, plan)
            if len(hits) == len(plan) < len(at):
                problems.append(f"only {len(plan)} steps of a save were tried, there are more")
            for step in hits:
                self._count(row, f"rank {rank}, step {step} of a save", [])
            self._count(row, f"rank {rank}", problems, tried=False)
            for number in at:
                run_dir = self._begin(f"refuse-last-{rank}-{number}")
                problems, hits = self._refused(run_dir, rank, {FIRST: number})
                if not hits and not problems:
                    break  # there were no more steps
                self._count(row, f"rank {rank}, last save, step {number}", problems)
                if not problems:
                    shutil.rmtree(run_dir.parent)
        return row

    def _count(self, row: Row, told: str, problems: list[str], *, tried: bool = True) -> None:
        found = [f"{told}: {text}" for text in problems]
        row.lost += len(found)
        if tried:
            row.count(found)
        else:
            row.problems += found

    def _killed(self, row: Row, run_dir: Path, rank: int, plan: dict[int, int | None]) -> list[int]:
        """One attempt; the step that it was killed at, if it came so far."""
        before = whole.pointed_at(run_dir)
        with self._attempt(run_dir, plan={rank: plan}, errors=0) as attempt:
            ended = until(lambda: None not in attempt.codes(), PATIENCE_S)
            codes, said = attempt.codes(), attempt.said()
        hits = _hits(said)
        problems = [] if ended else ["did not end"]
        problems += went_on_from(said, before)
        point = whole.pointed_at(run_dir)
        if point < before:
            problems.append(f"latest went back from step {before} to {point}")
        if point and not whole.is_whole(run_dir / "checkpoints" / f"step-{point:06d}"):
            problems.append(f"latest names step {point}, which is not whole")
        if not hits and codes != [0, 0] and codes[rank] != -9:
            problems.append(f"ended with {codes}: {said[-800:]}")
        if hits or problems:
            self._count(row, f"rank {rank}, save and step {plan}", problems)
        return hits

    def _refused(
        self, run_dir: Path, rank: int, plan: dict[int, int | None]
    ) -> tuple[list[str], list[int]]:
        """What is wrong with a run in which that was refused, and at which steps it was."""
        with self._attempt(run_dir, plan={rank: plan}, errors=3) as attempt:
            ended, codes, said = attempt.wait(2 * PATIENCE_S), attempt.codes(), attempt.said()
        if not ended or codes != [0, 0]:
            return [f"ended with {codes}: {said[-800:]}"], _hits(said)
        problems = [f"not the same: {t}" for t in whole.not_the_same(run_dir, self._reference)]
        problems += [f"left over: {path.name}" for path in whole.half_written(run_dir)]
        return problems, _hits(said)

    def _goes_on(self, run_dir: Path) -> list[str]:
        """To the end, undisturbed; what is wrong then."""
        before = whole.pointed_at(run_dir)
        with self._attempt(run_dir) as attempt:
            ended, codes, said = attempt.wait(2 * PATIENCE_S), attempt.codes(), attempt.said()
        if not ended or codes != [0, 0]:
            return [f"did not go on: {codes}: {said[-800:]}"]
        problems = went_on_from(said, before)
        problems += whole.not_the_same(run_dir, self._reference)
        return problems + [f"left over: {path.name}" for path in whole.half_written(run_dir)]

    def _begin(self, name: str) -> Path:
        """A run folder that stands at the last checkpoint but one."""
        run_dir = self._work / name / "run"
        first = f"step-{self._steps - EVERY:06d}"
        shutil.copytree(
            self._reference / "checkpoints" / first,
            run_dir / "checkpoints" / first,
            copy_function=os.link,
        )
        (run_dir / "checkpoints" / "latest").write_text(first + "\n", encoding="utf-8")
        shutil.copy(self._reference / "metrics.jsonl", run_dir / "metrics.jsonl")
        config = (self._reference / "config.yaml").read_text(encoding="utf-8")
        config = config.replace(str(self._reference), str(run_dir))
        keeps = re.compile(r"keep_every_steps: \d+")
        (run_dir / "config.yaml").write_text(keeps.sub("keep_every_steps: 0", config), "utf-8")
        return run_dir

    def _attempt(
        self,
        run_dir: Path,
        *more: str,
        plan: dict[int, dict[int, int | None]] | None = None,
        errors: int = 0,
    ) -> Attempt:
        self._attempts += 1
        common = {"errors": errors, "errnos": (errno.ENOSPC, errno.EIO)}
        common["checkpoints"] = str(run_dir / "checkpoints")
        return Attempt(
            run_dir=run_dir,
            words=[*self._words, *more],
            nursery=self._nursery,
            output=run_dir.with_name(f"attempt-{self._attempts}.txt"),
            faults={rank: {"plan": saves, **common} for rank, saves in (plan or {}).items()},
        )


def _hits(said: str) -> list[int]:
    """Steps at which an attempt was struck."""
    return [int(step) for step in re.findall(rf"{HIT}: save \d+, step (\d+): ", said)]
