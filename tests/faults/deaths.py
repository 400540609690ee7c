"""A rank that dies or stands still, under each way to start: the others end and it is named."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

from faults import whole
from faults.attempt import PATIENCE_S, Attempt, until
from faults.kills import UPDATE, Kill, Watch
from faults.nursery import Nursery
from faults.table import Row

SECTION = "A rank that dies or stands still: named in status.json, all others end"
NAMED_S = 15.0
DEAD_AFTER_S = 5
HUNG_AFTER_S = 12
DEATHS = ("SIGKILL", "SIGSEGV", "SIGSTOP")


class Deaths:
    """Runs that would go on for long, each ended by one rank."""

    def __init__(self, work: Path, recipe: Path, nursery: Nursery) -> None:
        self._work, self._nursery = work, nursery
        self._words = [
            str(recipe),
            "schedule.total_steps=100000",
            "checkpoint.every_steps=50",
            "evaluate.every_steps=0",
            f"watchdog.dead_after_s={DEAD_AFTER_S}",
        ]

    def dead(self, seed: str, way: str, count: int = len(DEATHS)) -> Row:
        """One rank killed, crashed or stopped, in an update."""
        row = Row(
            section=SECTION,
            fault=f"{', '.join(DEATHS[:count])} of a rank, {way}",
            wanted=f"named within {NAMED_S:.0f} s (the worst: all others have ended); failed",
        )
        draw = random.Random(seed)
        for number, name in enumerate(DEATHS[:count]):
            victim = draw.randrange(2)
            run_dir = self._work / f"{way.partition(' ')[0]}-{number}" / "run"
            with Attempt(run_dir=run_dir, words=self._words, nursery=self._nursery, way=way) as it:
                problems, took_s = _ended_by(it, victim, signal.Signals[name], draw)
            told = f"{seed}, {name} of rank {victim}"
            row.count([f"{told}: {text}" for text in problems], took_s=took_s)
        return row


def _ended_by(
    attempt: Attempt, victim: int, number: signal.Signals, draw: random.Random
) -> tuple[list[str], float]:
    kill = Kill(victim=victim, moment=UPDATE, nth=2, after_s=draw.uniform(0, 0.5), way=attempt.way)
    if not Watch(attempt).wait_for(kill):
        return [f"it did not train: {attempt.said()[-800:]}"], 0.0
    processes = attempt.processes()
    os.kill(processes[victim], number)
    at = time.monotonic()
    named_s = _until_named(attempt.run_dir, victim)
    ended = until(lambda: attempt.all_processes() <= {processes[victim]}, PATIENCE_S)
    took_s = time.monotonic() - at
    status = whole.status_of(attempt.run_dir)
    problems = [] if ended else [f"{len(attempt.all_processes())} processes did not end"]
    if named_s > NAMED_S:
        problems.append(f"named after {named_s:.1f} s: {status}: {attempt.said()[-800:]}")
    if status.get("state") != "failed":
        problems.append(f"status {status}")
    return problems, took_s


def _until_named(run_dir: Path, victim: int) -> float:
    """Seconds until status.json says that the rank, and no other, is the cause."""
    began = time.monotonic()

    def is_named() -> bool:
        status: dict[str, Any] = whole.status_of(run_dir)
        found = re.match(r"rank (\d+)", str(status.get("reason", "")))
        return status.get("state") == "failed" and bool(found) and found[1] == str(victim)

    return time.monotonic() - began if until(is_named, PATIENCE_S / 2) else PATIENCE_S
