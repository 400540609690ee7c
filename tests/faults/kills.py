"""Random kill -9 of random ranks, several in a run: what is left must go on to the same bits.

A chain is one run that is started, killed and started again until it is done. The plan of a chain
(which rank, at which kind of moment, how long after it) follows from the seed; where exactly the
kill lands is the machine's own affair, and the table says what it hit.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from faults import whole
from faults.attempt import DEEPSPEED, PATIENCE_S, PLAIN, TORCHRUN, Attempt
from faults.nursery import Nursery
from faults.table import Row

SECTION = "kill -9: 2 ranks; then the same command again, until the run is done"
STEPS, EVERY = 20, 2
SETTINGS = {"ZeRO 1, fp32": ("zero1", "fp32"), "ZeRO 3, bf16": ("zero3", "bf16")}
START, UPDATE, GATHERS, BEGINS, SAVE, ENDS = (
    "while it starts",
    "in an update",
    "as the ranks gather what a save writes",
    "as a save begins",
    "in a save",
    "at the end of a save",
)
MOMENTS = {START: 1.8, UPDATE: 0.2, GATHERS: 0.02, BEGINS: 0.01, SAVE: 0.3, ENDS: 0.01}
"""Kinds of moments, and how many seconds after one the kill comes at most."""
BOTH = -1
"""Instead of a rank: all of them at once, as when the power goes."""


@dataclass(frozen=True)
class Kill:
    """One kill of a plan."""

    victim: int
    moment: str
    nth: int
    """Of the moments of its kind in this attempt, the first is 1."""
    after_s: float
    way: str

    def __str__(self) -> str:
        who = "both ranks" if self.victim == BOTH else f"rank {self.victim}"
        return f"{who} {self.moment} ({self.nth}) + {1000 * self.after_s:.0f} ms, {self.way}"


def make_plan(seed: str, kills: int) -> list[Kill]:
    """The kills of one chain."""
    draw = random.Random(seed)
    plan = []
    for _ in range(kills):
        moment = draw.choice((START, UPDATE, GATHERS, BEGINS, SAVE, SAVE, ENDS))
        plan.append(
            Kill(
                victim=draw.choice((0, 0, 0, 1, 1, 1, BOTH)),
                moment=moment,
                nth=draw.randint(1, 2),
                after_s=draw.uniform(0, MOMENTS[moment]),
                way=draw.choices((PLAIN, TORCHRUN, DEEPSPEED), (10, 2, 1))[0],
            )
        )
    return plan


class Chains:
    """Runs chains of one setting, and keeps the run that nobody kills to compare them with."""

    def __init__(
        self, work: Path, recipe: Path, nursery: Nursery, setting: str, *, steps: int = STEPS
    ) -> None:
        zero, precision = SETTINGS[setting]
        self._work = work / zero
        self._nursery = nursery
        self._words = [
            str(recipe),
            f"schedule.total_steps={steps}",
            f"zero.config=ds_configs/{zero}.json",
            f"precision={precision}",
            f"checkpoint.every_steps={EVERY}",
            "evaluate.every_steps=5",
            "evaluate.batches=1",
            "log.sample_ids=true",
        ]
        self.row = Row(
            section=SECTION,
            fault=f"a rank or both, {setting}",
            wanted="the others end (in so long); it goes on from the last checkpoint, to the same "
            "bits, every sample once",
        )
        self._hit: Counter[str] = Counter()
        self._repeated: list[int] = []
        self._reference: Path | None = None

    def reference(self) -> Path:
        """The run that was never killed."""
        if self._reference is None:
            run_dir = self._work / "reference"
            with self._attempt(run_dir, 0, PLAIN) as attempt:
                assert attempt.wait(), attempt.said()[-3000:]
                codes = attempt.codes()
                assert codes == [0, 0], f"{codes}: {attempt.said()[-3000:]}"
            self._reference = run_dir
        return self._reference

    def chain(self, name: str, plan: Sequence[Kill]) -> None:
        """One run through all the kills of a plan, then to its end."""
        run_dir = self._work / name / "run"
        self.reference()
        for number, kill in enumerate(plan):
            problems = self._killed(run_dir, number, kill)
            if problems is None:
                break
            self.row.count([f"{name}, kill {number + 1}, {kill}: {text}" for text in problems])
            if problems:
                return  # the folder stays for whoever looks
        self.go_to_the_end(name, run_dir, len(plan))

    def go_to_the_end(self, name: str, run_dir: Path, faults: int) -> None:
        """The last attempt, which nobody disturbs."""
        with self._attempt(run_dir, faults, PLAIN) as attempt:
            before = whole.pointed_at(run_dir)
            ended = attempt.wait()
            codes, said = attempt.codes(), attempt.said()
        if not ended or codes != [0, 0]:
            problems = [f"the last attempt ended with {codes}: {said[-800:]}"]
        else:
            problems = went_on_from(said, before)
            different = whole.not_the_same(run_dir, self.reference())
            self.row.lost += len(different)
            problems += [f"not the same: {text}" for text in different]
            problems += [f"left over: {path.name}" for path in whole.half_written(run_dir)]
        self.row.problems += [f"{name}, after {faults} faults: {text}" for text in problems]

    def finish(self) -> Row:
        """The row, with what the kills hit."""
        hits = ", ".join(f"{count} {what}" for what, count in self._hit.most_common())
        again = (
            f"{sum(self._repeated)} updates were done again, {max(self._repeated or [0])} at most"
        )
        self.row.notes.append(f"hit {hits}; {again}")
        return self.row

    def _attempt(self, run_dir: Path, number: int, way: str) -> Attempt:
        output = run_dir.parent / f"attempt-{number}.txt"
        return Attempt(
            run_dir=run_dir, words=self._words, nursery=self._nursery, way=way, output=output
        )

    def _killed(self, run_dir: Path, number: int, kill: Kill) -> list[str] | None:
        """One attempt, killed; what is wrong afterwards. None if it was done before."""
        before = whole.pointed_at(run_dir)
        with self._attempt(run_dir, number, kill.way) as attempt:
            watch = Watch(attempt)
            if not watch.wait_for(kill):
                if whole.status_of(run_dir).get("state") == "done":
                    return None
                return [f"the moment did not come: {attempt.said()[-800:]}"]
            victims = attempt.processes()
            hit, at_kill = watch.going_on(), whole.pointed_at(run_dir)
            for rank, process in victims.items():
                if kill.victim in (rank, BOTH):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
            killed_at = time.monotonic()
            ended = attempt.wait()
            took_s = time.monotonic() - killed_at
            left, said = attempt.kill_all(), attempt.said()
        self._hit[hit] += 1
        self.row.worst_s = max(self.row.worst_s or 0, took_s)
        point = whole.pointed_at(run_dir)
        self._repeated.append(max(0, len(whole.train_lines(run_dir)) - point))
        problems = [] if ended else [f"{len(left)} processes did not end in {PATIENCE_S:.0f} s"]
        problems += went_on_from(said, before)
        if point < at_kill:
            problems.append(f"latest went back from step {at_kill} to {point}")
        if point and not whole.is_whole(run_dir / "checkpoints" / f"step-{point:06d}"):
            problems.append(f"latest names step {point}, which is not whole")
        self.row.lost += len(problems)
        return problems


class Watch:
    """Looks at an attempt from outside: what is it doing?"""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._began = time.time()
        self._saves: set[str] = set()
        self._base = -1

    def wait_for(self, kill: Kill) -> bool:
        """Until the moment of a kill; False if the attempt ended before, or it did not come."""
        deadline = time.monotonic() + PATIENCE_S
        if kill.moment == START and kill.way != PLAIN:
            while len(self._attempt.processes()) < self._attempt.ranks:  # they come seconds later
                if time.monotonic() > deadline:
                    return False
                time.sleep(0.02)
        while not self._has_come(kill):
            if time.monotonic() > deadline or self._has_ended():
                return False
            time.sleep(0.0005 if self._saves else 0.002)
        time.sleep(kill.after_s)
        return True

    def going_on(self) -> str:
        """The kind of moment that it is now."""
        if not self._has_begun():
            return START
        if self._active_part() is not None:
            return SAVE
        newest = whole.step_folders(self._attempt.run_dir)[-1:]
        pointed_at = whole.pointed_at(self._attempt.run_dir)
        return ENDS if newest and newest[0].name != f"step-{pointed_at:06d}" else UPDATE

    def _has_come(self, kill: Kill) -> bool:
        if kill.moment == START:
            return True
        if not self._has_begun():
            time.sleep(0.02)
            return False
        run_dir = self._attempt.run_dir
        if kill.moment == UPDATE:
            lines = whole.train_lines(run_dir)
            return bool(lines) and lines[-1]["step"] >= self._base + kill.nth
        if kill.moment == GATHERS:  # right after the line of its update
            lines, step = whole.train_lines(run_dir), EVERY * (self._base // EVERY + kill.nth)
            return bool(lines) and lines[-1]["step"] >= step
        part = self._active_part()
        if part is not None:
            self._saves.add(part.name)
        if len(self._saves) < kill.nth:
            return False
        return (part is None) == (kill.moment == ENDS)

    def _has_begun(self) -> bool:
        """Whether rank 0 has announced the training: then the journal is this attempt's."""
        if self._base < 0:
            found = announced(self._attempt.said())
            self._base = -1 if found is None else found
        return self._base >= 0

    def _active_part(self) -> Path | None:
        """Of the save in progress, not of one that an earlier kill left."""
        for path in whole.half_written(self._attempt.run_dir):
            with contextlib.suppress(OSError):
                is_new = path.is_dir() and path.stat().st_mtime >= self._began
                if is_new and not path.name.endswith(".old.part"):
                    return path
        return None

    def _has_ended(self) -> bool:
        if self._attempt.way == PLAIN:
            return len(self._attempt.processes()) < self._attempt.ranks
        return not self._attempt.all_processes()


def announced(said: str) -> int | None:
    """The step that an attempt began at, if it came so far."""
    found = re.search(r"^step (\d+): (?:started|resumed): ", said, flags=re.MULTILINE)
    return int(found[1]) if found else None


def went_on_from(said: str, step: int) -> list[str]:
    """What is wrong if an attempt did not go on from the checkpoint that ``latest`` named."""
    found = announced(said)
    return [] if found is None or found >= step else [f"went on from step {found}, not {step}"]
