"""A rank that dies or stops while all of them start: no launcher ends the others."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from faults import whole
from faults.attempt import Attempt
from faults.nursery import Nursery
from faults.table import Row

SECTION = "A rank that dies or stops while 2 ranks start, without a launcher"
IN_TIME_S = 60.0
"""Far below the ten minutes that ranks wait for one that never came, and far above what a busy
machine takes."""
DEAD_AFTER_S = 3


@dataclass(frozen=True)
class Moment:
    """Where a rank is struck, and what the other says, of rank N."""

    call: str
    when: str
    told: str


_WATCHED = r"rank N \(process PID on \S+\) (died( of SIGKILL)?|does not answer \(.*\)) after "
_MEETING, _GROUP = (
    _WATCHED + "the meeting of the ranks",
    _WATCHED + "the start of the process group",
)
_MET = "rank N: got (its end|it left) .*while ranks met"
_WATCH = "longpretrain.engine.watchdog:Watchdog"
MOMENTS = {
    "its number is known": Moment(f"{_WATCH}.begin", "before", _MET),
    # The other may see its end before its watchdog can tell it.
    "its watchdog starts": Moment(f"{_WATCH}.begin", "after", f"{_MEETING}|{_GROUP}|{_MET}"),
    "they have met": Moment("longpretrain.engine.zero:meet", "after", _GROUP),
    "the group is formed": Moment(
        "torch.distributed.distributed_c10d:_set_pg_timeout", "before", _GROUP
    ),
    "it checks its recipe": Moment(
        "longpretrain.start:run_facts.of_program",
        "before",
        _WATCHED + "the check of recipe, data and model",
    ),
    "the run folder is open": Moment(
        f"{_WATCH}.telling", "before", _WATCHED + "the start of training"
    ),
}


class Starts:
    """Each try is a run of its own, which comes to nothing."""

    def __init__(self, work: Path, recipe: Path, nursery: Nursery) -> None:
        self._work, self._nursery = work, nursery
        self._words = [str(recipe), f"watchdog.dead_after_s={DEAD_AFTER_S}"]

    def killed(self, moments: Sequence[str] = tuple(MOMENTS)) -> Row:
        """Each of two ranks, at each moment."""
        row = Row(
            section=SECTION,
            fault="kill -9 from the ranks' meeting to the first update",
            wanted="the other ends (in so long) and names it; status.json too, once there is one",
        )
        for name in moments:
            for victim in (1, 0):
                self._strike(row, name, victim, signal.SIGKILL)
        return row

    def stopped(self, moments: Sequence[str] = ("they have met", "the group is formed")) -> Row:
        """A rank that stops is as good as dead."""
        row = Row(
            section=SECTION,
            fault="SIGSTOP there",
            wanted=f"the same, after watchdog.dead_after_s={DEAD_AFTER_S}",
        )
        for number, name in enumerate(moments):
            self._strike(row, name, (number + 1) % 2, signal.SIGSTOP)
        return row

    def _strike(self, row: Row, name: str, victim: int, number: signal.Signals) -> None:
        moment = MOMENTS[name]
        run_dir = self._work / f"{name.replace(' ', '-')}-{victim}-{number}" / "run"
        flag = str(run_dir.with_name("the-other-is-there"))
        strike = {"call": moment.call, "when": moment.when, "number": number, "flag": flag}
        signs = {"call": "longpretrain.engine.meeting:_sign", "when": "before", "number": 0}
        faults: dict[int, dict[str, object]] = {victim: strike, 1 - victim: signs | {"flag": flag}}
        with Attempt(
            run_dir=run_dir, words=self._words, nursery=self._nursery, faults=faults
        ) as attempt:
            process = attempt.forked(victim)
            began = time.monotonic()
            ended = attempt.wait(IN_TIME_S)
            took_s = time.monotonic() - began
            codes, said = attempt.codes(), attempt.said()
        told = moment.told.replace("rank N", f"rank {victim}").replace("PID", str(process))
        problems = [] if ended else [f"did not end in {IN_TIME_S:.0f} s"]
        if codes[victim] != -signal.SIGKILL or codes[1 - victim] != 1:
            problems.append(f"exit codes {codes}")
        if not re.search(f"^longpretrain train[^:]*: ({told})", said, flags=re.MULTILINE):
            problems.append(f"it says: {said[-800:]}")
        if "Traceback" in said:
            problems.append(f"a traceback: {said[-800:]}")
        problems += _of_status(run_dir, told, is_open=name == "the run folder is open")
        row.count([f"rank {victim} when {name}: {text}" for text in problems], took_s=took_s)


def _of_status(run_dir: Path, told: str, *, is_open: bool) -> list[str]:
    """Before the run folder is open it is another's, or nobody's, and nothing is written there."""
    status = whole.status_of(run_dir)
    if not is_open:
        return [f"status {status}"] if status else []
    is_told = status.get("state") == "failed" and re.match(told, str(status.get("reason")))
    return [] if is_told else [f"status {status}"]
