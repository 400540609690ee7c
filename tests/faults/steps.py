"""A save is killed, or refused by the system, before each of its steps on the disk, one after the
other: no moment of it may lose anything.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from faults import whole
from faults.attempt import Attempt
from faults.hook import HIT
from faults.kills import went_on_from
from faults.nursery import Nursery
from faults.table import Row

SECTION = "Every step of a save on the disk: 2 ranks"
STEPS, EVERY, FROM = 6, 2, 2
"""Updates of a run, between its checkpoints, and where the attempts that suffer begin."""
MOST = 400


class Steps:
    """Each try begins from one checkpoint of a run that was whole."""

    def __init__(self, work: Path, recipe: Path, nursery: Nursery) -> None:
        self._work, self._nursery = work, nursery
        self._words = [
            str(recipe),
            f"schedule.total_steps={STEPS}",
            f"checkpoint.every_steps={EVERY}",
            "checkpoint.keep=1",
            "evaluate.every_steps=0",
            "log.sample_ids=true",
        ]
        self._reference = work / "reference" / "run"
        with self._attempt(self._reference, "checkpoint.keep=0") as attempt:
            assert attempt.wait(), attempt.said()[-3000:]

    def kills(self, *, at: Sequence[int] = range(MOST), ranks: Sequence[int] = (1, 0)) -> Row:
        """A rank dies before its n-th step, for every n of the first two saves."""
        row = Row(
            section=SECTION, fault="kill -9 before the step", wanted="goes on to the same bits"
        )
        for rank in ranks:
            for number in at:
                fault = {"within": "/checkpoints/", "at": number, "errors": 0, "errno": 0}
                run_dir = self._begin(f"kill-{rank}-{number}")
                with self._attempt(run_dir, fault={rank: fault}) as attempt:
                    ended, codes = attempt.wait(), attempt.codes()
                if ended and codes == [0, 0]:
                    break  # there were no more steps
                problems = [] if ended else ["did not end"]
                problems += self._goes_on(run_dir)
                row.count([f"rank {rank}, step {number}: {text}" for text in problems])
                row.lost += len(problems)
                if not problems:
                    shutil.rmtree(run_dir.parent)
        return row

    def refusals(self, *, at: Sequence[int] = range(MOST), ranks: Sequence[int] = (1, 0)) -> Row:
        """The system refuses three changes of the disk in a row, from the n-th of a rank on."""
        row = Row(
            section=SECTION,
            fault="refused with ENOSPC or EIO, three in a row from the step on",
            wanted="training goes on, to the same bits",
        )
        for rank in ranks:
            for number in at:
                error = (errno.ENOSPC, errno.EIO)[number % 2]
                fault = {"within": "/checkpoints/", "at": number, "errors": 3, "errno": error}
                run_dir = self._begin(f"refuse-{rank}-{number}")
                with self._attempt(run_dir, fault={rank: fault}) as attempt:
                    ended, codes, said = attempt.wait(), attempt.codes(), attempt.said()
                problems = self._as_if_nothing(run_dir, ended, codes, said)
                if not problems:
                    shutil.rmtree(run_dir.parent)
                if HIT not in said and not problems:
                    break  # there were no more steps
                row.count([f"rank {rank}, step {number}: {text}" for text in problems])
                row.lost += len(problems)
        return row

    def _as_if_nothing(
        self, run_dir: Path, ended: bool, codes: list[int | None], said: str
    ) -> list[str]:
        if not ended or codes != [0, 0]:
            return [f"ended with {codes}: {said[-800:]}"]
        problems = [f"not the same: {t}" for t in whole.not_the_same(run_dir, self._reference)]
        return problems + [f"left over: {path.name}" for path in whole.half_written(run_dir)]

    def _goes_on(self, run_dir: Path) -> list[str]:
        before = whole.pointed_at(run_dir)
        problems = [] if before >= FROM else [f"latest went back to {before}"]
        with self._attempt(run_dir) as attempt:
            ended, codes, said = attempt.wait(), attempt.codes(), attempt.said()
        if not ended or codes != [0, 0]:
            return [*problems, f"did not go on: {codes}: {said[-800:]}"]
        problems += went_on_from(said, before)
        problems += whole.not_the_same(run_dir, self._reference)
        problems += [f"left over: {path.name}" for path in whole.half_written(run_dir)]
        return problems

    def _begin(self, name: str) -> Path:
        """A run folder that stands at an early checkpoint."""
        run_dir = self._work / name / "run"
        first = f"step-{FROM:06d}"
        shutil.copytree(
            self._reference / "checkpoints" / first,
            run_dir / "checkpoints" / first,
            copy_function=os.link,
        )
        (run_dir / "checkpoints" / "latest").write_text(first + "\n", encoding="utf-8")
        for file in ("metrics.jsonl",):
            shutil.copy(self._reference / file, run_dir / file)
        config = (self._reference / "config.yaml").read_text(encoding="utf-8")
        (run_dir / "config.yaml").write_text(
            config.replace(str(self._reference), str(run_dir)).replace("keep: 0", "keep: 1"),
            encoding="utf-8",
        )
        return run_dir

    def _attempt(
        self, run_dir: Path, *more: str, fault: dict[int, dict[str, object]] | None = None
    ) -> Attempt:
        return Attempt(
            run_dir=run_dir,
            words=[*self._words, *more],
            nursery=self._nursery,
            output=run_dir.parent / ("faulty.txt" if fault else "last.txt"),
            disk_faults=fault or {},
        )
