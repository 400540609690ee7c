"""What else happens to runs: helpers and launchers killed, a second start, spoilt files, other
numbers of ranks.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

from faults import whole
from faults.attempt import (
    DEEPSPEED,
    PATIENCE_S,
    PLAIN,
    TORCHRUN,
    Attempt,
    of_proc,
    parent_of,
    saving,
    until,
)
from faults.kills import UPDATE, Kill, Watch
from faults.nursery import Nursery
from faults.table import Row

SECTION = "Mishaps: 2 ranks; then the same command again, until the run is done"
STEPS, EVERY = 12, 2
SAME = "goes on to the same bits"
# What a power cut, a full disk or a hand leaves at the end of metrics.jsonl, or of status.json.
TAILS = (bytes(4096), bytes(4096) + b'\n{"kind": "train"\n', b'{"kind": "tra', b"\xff\xfe\x00\n")
STATUSES = (b"", bytes(100), b"[]", b'{"state": 7, "time": "x", "step": null}')


class Mishaps:
    """One run per mishap, and one without any."""

    def __init__(self, work: Path, recipe: Path, nursery: Nursery, seed: str) -> None:
        self._work, self._nursery = work, nursery
        self._draw = random.Random(seed)
        self._words = saving(recipe, STEPS, EVERY)
        self._reference = work / "reference" / "run"
        with self._attempt("reference") as attempt:
            assert attempt.wait(), attempt.said()[-3000:]

    def rows(self) -> list[Row]:
        """All of them."""
        return [
            self._row("kill -9 of a loader worker", f"ends, failed; {SAME}", [self._loader]),
            self._row("kill -9 of a watchdog", f"ends, failed; {SAME}", [self._watchdog]),
            self._row(
                "kill -9 of the launcher: torchrun, deepspeed",
                f"the ranks end by themselves; {SAME}",
                [lambda: self._launcher(TORCHRUN), lambda: self._launcher(DEEPSPEED)],
            ),
            self.second_start(),
            self._row(
                "NULs, garbage, half a line at the end of metrics.jsonl",
                SAME,
                [lambda tail=tail: self._spoilt("metrics.jsonl", "ab", tail) for tail in TAILS],
            ),
            self._row(
                "status.json empty, NULs, of another kind",
                SAME,
                [lambda text=text: self._spoilt("status.json", "wb", text) for text in STATUSES],
            ),
            self._row(
                "kill -9, then on 1 rank, kill -9, then on 2",
                "every sample once, in order",
                [self._elastic],
            ),
        ]

    def second_start(self) -> Row:
        """The same command, and with --fresh, while the run goes on."""
        return self._row(
            "the same command while it runs, also with --fresh",
            "refused, exit code 2; the first ends as if alone",
            [self._second],
        )

    def _row(self, fault: str, wanted: str, tries: list[Callable[[], list[str]]]) -> Row:
        row = Row(section=SECTION, fault=fault, wanted=wanted)
        for attempt in tries:
            problems = attempt()
            row.count(problems)
            row.lost += len(problems)
        return row

    def _loader(self) -> list[str]:
        with self._attempt("loader", "data.loader_workers=1") as attempt:
            if not _trains(attempt):
                return [attempt.said()[-800:]]
            # A fork server per rank has forked them: its command line is theirs as well.
            forked = {
                number
                for number in attempt.all_processes()
                if b"multiprocessing.forkserver" in of_proc(number, "cmdline")
            }
            workers = sorted(number for number in forked if parent_of(number) in forked)
            if not workers:
                return ["no loader worker was found"]
            os.kill(self._draw.choice(workers), signal.SIGKILL)
            return self._failed(attempt) + self._goes_on("loader")

    def _watchdog(self) -> list[str]:
        with self._attempt("watchdog") as attempt:
            if not _trains(attempt):
                return [attempt.said()[-800:]]
            watchers = attempt.all_processes() - set(attempt.processes().values())
            if len(watchers) != 2:
                return [f"{len(watchers)} watchdogs of two ranks"]
            os.kill(self._draw.choice(sorted(watchers)), signal.SIGKILL)
            return self._failed(attempt) + self._goes_on("watchdog")

    def _launcher(self, way: str) -> list[str]:
        with self._attempt(way, way=way) as attempt:
            if not _trains(attempt):
                return [attempt.said()[-800:]]
            attempt.kill_launcher()
            ended = until(lambda: not attempt.processes(), PATIENCE_S)
            return ([] if ended else [f"{way}: ranks did not end"]) + self._goes_on(way)

    def _second(self) -> list[str]:
        problems = []
        with self._attempt("second") as first:
            if not _trains(first):
                return [first.said()[-800:]]
            for number, more in enumerate(((), ("--fresh",))):
                with self._attempt("second", *more, number=10 + number) as second:
                    ended, codes, said = second.wait(), second.codes(), second.said()
                if not ended or codes != [2, 2] or "a run that is going on" not in said:
                    problems.append(f"a second start {more}: {codes}: {said[-500:]}")
            if not first.wait() or first.codes() != [0, 0]:
                problems.append(f"the first: {first.codes()}: {first.said()[-500:]}")
        return problems + whole.not_the_same(self._work / "second" / "run", self._reference)

    def _spoilt(self, name: str, mode: str, data: bytes) -> list[str]:
        folder = f"{name}-{len(list(self._work.iterdir()))}"
        with self._attempt(folder) as attempt:
            if not _trains(attempt, 5):
                return [attempt.said()[-800:]]
            _kill_all(attempt)
        with (self._work / folder / "run" / name).open(mode) as file:
            file.write(data)
        return [f"{name}, {data[:20]!r}: {text}" for text in self._goes_on(folder)]

    def _elastic(self) -> list[str]:
        for number, ranks in enumerate((2, 1)):
            with self._attempt("elastic", number=number, ranks=ranks) as attempt:
                if not _trains(attempt, 3):
                    return [attempt.said()[-800:]]
                _kill_all(attempt)
        with self._attempt("elastic", number=9) as attempt:
            if not attempt.wait() or attempt.codes() != [0, 0]:
                return [f"{attempt.codes()}: {attempt.said()[-800:]}"]
        mine, theirs = (
            [(line["step"], line["sample_ids"]) for line in whole.train_lines(run_dir)]
            for run_dir in (self._work / "elastic" / "run", self._reference)
        )
        return [] if mine == theirs else ["samples or their order differ"]

    def _failed(self, attempt: Attempt) -> list[str]:
        if not attempt.wait():
            return ["did not end"]
        state = whole.status_of(attempt.run_dir).get("state")
        is_told = state == "failed" and 0 not in attempt.codes()
        return [] if is_told else [f"{attempt.codes()}, {state}: {attempt.said()[-500:]}"]

    def _goes_on(self, name: str) -> list[str]:
        with self._attempt(name, number=9) as attempt:
            ended, codes, said = attempt.wait(), attempt.codes(), attempt.said()
        if not ended or codes != [0, 0]:
            return [f"did not go on: {codes}: {said[-800:]}"]
        return whole.not_the_same(self._work / name / "run", self._reference)

    def _attempt(
        self, name: str, *more: str, number: int = 0, way: str = PLAIN, ranks: int = 2
    ) -> Attempt:
        return Attempt(
            run_dir=self._work / name / "run",
            words=[*self._words, *more],
            nursery=self._nursery,
            way=way,
            ranks=ranks,
            output=self._work / name / f"attempt-{number}.txt",
        )


def _trains(attempt: Attempt, nth: int = 1) -> bool:
    """Waits for the nth update of an attempt."""
    moment = Kill(victim=0, moment=UPDATE, nth=nth, after_s=0.0, way=attempt.way)
    return Watch(attempt).wait_for(moment)


def _kill_all(attempt: Attempt) -> None:
    for number in attempt.processes().values():
        os.kill(number, signal.SIGKILL)
    attempt.wait()
