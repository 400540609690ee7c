"""Signals that ask a run to stop, at random moments: a checkpoint, ``preempted``, and the same bits
in the end.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from faults import whole
from faults.attempt import PATIENCE_S, PLAIN
from faults.kills import MOMENTS, Chains, Kill, Watch, went_on_from
from faults.nursery import Nursery
from faults.table import Row

SECTION = "Signals: 2 ranks, asked to stop; then the same command again, until the run is done"
SIGNALS = ("SIGUSR1", "SIGTERM", "SIGUSR2")
PREEMPTED = 75


def make_plan(seed: str, stops: int) -> list[tuple[str, Kill]]:
    """Which signal to whom, at which moment. One rank asked is enough for all."""
    draw = random.Random(seed)
    plan = []
    for _ in range(stops):
        moment = draw.choice(list(MOMENTS))
        kill = Kill(
            victim=draw.choice((0, 1, -1)),
            moment=moment,
            nth=draw.randint(1, 2),
            after_s=draw.uniform(0, MOMENTS[moment]),
            way=PLAIN,
        )
        plan.append((draw.choice(SIGNALS), kill))
    return plan


class Stops(Chains):
    """Chains whose attempts are asked to stop, not killed."""

    def __init__(self, work: Path, recipe: Path, nursery: Nursery, setting: str) -> None:
        super().__init__(work, recipe, nursery, setting)
        self.row = Row(
            section=SECTION,
            fault=f"{', '.join(SIGNALS)}, {setting}",
            wanted="ends (in so long) with a checkpoint of the step it came to, preempted, exit "
            "code 75; goes on to the same bits",
        )

    def chain_of_stops(self, name: str, plan: Sequence[tuple[str, Kill]]) -> None:
        """One run through all the stops of a plan, then to its end."""
        run_dir = self._work / name / "run"
        self.reference()
        for number, (signal_name, stop) in enumerate(plan):
            problems = self._stopped(run_dir, number, signal_name, stop)
            if problems is None:
                break
            told = f"{name}, stop {number + 1}, {signal_name} to {stop}"
            self.row.count([f"{told}: {text}" for text in problems])
            if problems:
                return
        self.go_to_the_end(name, run_dir, len(plan))

    def _stopped(
        self, run_dir: Path, number: int, signal_name: str, stop: Kill
    ) -> list[str] | None:
        """One attempt, asked to stop; what is wrong afterwards. None if it was done before."""
        before = whole.pointed_at(run_dir)
        with self._attempt(run_dir, number, PLAIN) as attempt:
            watch = Watch(attempt)
            if not watch.wait_for(stop):
                if whole.status_of(run_dir).get("state") == "done":
                    return None
                return [f"the moment did not come: {attempt.said()[-800:]}"]
            hit = watch.going_on()
            lines = whole.train_lines(run_dir)
            for rank, process in attempt.processes().items():
                if stop.victim in (rank, -1):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.Signals[signal_name])
            asked_at = time.monotonic()
            ended = attempt.wait()
            took_s = time.monotonic() - asked_at
            codes, said = attempt.codes(), attempt.said()
        self._hit[hit] += 1
        self.row.worst_s = max(self.row.worst_s or 0, took_s)
        if not ended:
            return [f"did not end in {PATIENCE_S:.0f} s"]
        problems = went_on_from(said, before)
        status = whole.status_of(run_dir)
        point = whole.pointed_at(run_dir)
        came_to = lines[-1]["step"] if lines and hit != "while it starts" else before
        if status.get("state") == "done" and codes == [0, 0]:
            return problems
        if codes != [PREEMPTED, PREEMPTED] or status.get("state") != "preempted":
            problems.append(f"exit codes {codes}, status {status}: {said[-600:]}")
        if point < came_to or status.get("step") != point:
            problems.append(f"the checkpoint is of step {point}, it was at {came_to}: {status}")
        if point and not whole.is_whole(run_dir / "checkpoints" / f"step-{point:06d}"):
            problems.append(f"latest names step {point}, which is not whole")
        self.row.lost += max(0, came_to - point)
        return problems
