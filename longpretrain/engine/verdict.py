"""Which rank is to blame: the sentinels' reports of all ranks in, one sentence out.

Plain data and a clock that the caller reads: nothing here waits, sends or writes. A fault is seldom
reported once: the collective of every other rank breaks, launchers end the rest, and those deaths
are reported, too. So a verdict waits a moment after the first report, and then the earliest report
of a rank that failed by itself counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["died", "failed", "stopped", "silent", "lost", "broken"]
"""What was seen of a rank: its process ended; it told an error of its own; it is stopped; its
sentinel fell silent; the sentinel's connection ended; it told an error that others may have caused.
"""

WINDOW_S: dict[Kind, float] = {
    "died": 0.3, "failed": 0.5, "stopped": 0.2, "silent": 0.2, "lost": 1.0, "broken": 3.0,
}  # fmt: skip
"""How long a report waits for an earlier cause to show."""
ROLL_CALL_S = 2.5
"""Silence that counts as a fault once another rank has told trouble; above two beats."""
GONE = "is gone, and its node or its watchdog with it,"
"""Said of a rank whose sentinel's connection ended."""
START_S = 3 * 3600.0
"""The least that counts as standing still before the run folder is opened."""
_NAMED = 4
"""Ranks that a sentence names one by one."""


@dataclass
class Seen:
    """A rank as its sentinel tells of it."""

    rank: int
    host: str
    pid: int
    heard_at: float
    count: int = 0
    """Marks that its main thread has made."""
    age_s: float = 0.0
    """Since the last of them, or the end of a pause after it, as of ``heard_at``."""
    mark: str = "its start"
    stopped_s: float = 0.0
    has_left: bool = False
    trouble: Kind | None = None
    detail: str = ""

    @property
    def name(self) -> str:
        """As people know it."""
        return f"rank {self.rank} (process {self.pid} on {self.host})"


@dataclass
class Judge:
    """Collects reports of all ranks; ``verdict`` is asked now and then."""

    world_size: int
    dead_after_s: float
    hung_after_s: float
    watched: dict[int, Seen] = field(default_factory=dict)
    is_opened: bool = True
    """Before the run folder is, a rank may read a whole corpus without a mark."""
    _order: list[int] = field(default_factory=list)
    _decide_at: float | None = None
    _first_left_at: float | None = None
    _all_told: bool = False

    def hello(self, rank: int, host: str, pid: int, now: float) -> None:
        """A rank's sentinel is there; nobody is judged before."""
        self.watched[rank] = Seen(rank=rank, host=host, pid=pid, heard_at=now)

    def beat(
        self, rank: int, *, count: int, age_s: float, mark: str, stopped_s: float, now: float
    ) -> None:
        """A sign of life, with what its main thread did last."""
        seen = self.watched[rank]
        seen.heard_at, seen.count, seen.age_s = now, count, age_s
        seen.mark, seen.stopped_s = mark, stopped_s

    def trouble(self, rank: int, kind: Kind, detail: str, now: float) -> None:
        """A report; of each rank the first counts, what follows from it does not."""
        seen = self.watched.get(rank)
        if seen is None or seen.has_left:
            return
        if seen.trouble == "died" and kind in ("failed", "broken"):  # on the way when it ended
            seen.trouble, seen.detail = kind, detail
        if seen.trouble:
            return
        seen.trouble, seen.detail = kind, detail
        self._order.append(rank)
        at = now + WINDOW_S[kind]
        self._decide_at = at if self._decide_at is None else min(at, self._decide_at)

    def left(self, rank: int, now: float) -> None:
        """A rank is through, and nothing that happens to it matters any more."""
        seen = self.watched[rank]
        if seen.trouble in ("failed", "broken"):
            return
        seen.has_left = True
        self._first_left_at = self._first_left_at or now
        if seen.trouble:  # its end was reported before its leave
            seen.trouble = None
            self._order.remove(rank)
            self._decide_at = self._decide_at if self._order else None

    def forget_pause(self, now: float) -> None:
        """This process itself was stopped for a while: that time says nothing, neither by silence
        nor by marks that were not made.
        """
        for seen in self.watched.values():
            seen.heard_at, seen.stopped_s, seen.age_s = now, 0.0, 0.0

    def verdict(self, now: float) -> str | None:
        """The sentence to end the run with, or None."""
        self._listen(now, self.dead_after_s)
        if self._all_told or self._decide_at is None or now < self._decide_at:
            return None
        self._listen(now, min(self.dead_after_s, ROLL_CALL_S))
        # Ranks that run into the same error, each by itself, need nobody to tell them.
        self._all_told = all(
            seen.trouble == "failed" for seen in self.watched.values() if not seen.has_left
        )
        return None if self._all_told else self._sentence()

    def is_over(self, now: float, farewell_s: float) -> bool:
        """Whether all ranks end by themselves: then nobody is judged any more."""
        through = sum(seen.has_left for seen in self.watched.values())
        if self._all_told or through == self.world_size:
            return True
        return self._first_left_at is not None and now - self._first_left_at > farewell_s

    def is_hung(self, now: float) -> bool:
        """Whether no rank has made a mark for too long."""
        here = self.here()
        if not self.hung_after_s or not here or self._decide_at is not None:
            return False
        return all(seen.age_s + now - seen.heard_at > self.patience_s for seen in here)

    @property
    def patience_s(self) -> float:
        """How long all ranks may be without a mark."""
        return self.hung_after_s if self.is_opened else max(self.hung_after_s, START_S)

    def opened(self, now: float) -> None:
        """The run folder is; how long that took says nothing about what comes next."""
        self.is_opened = True
        for seen in self.watched.values():
            seen.age_s, seen.heard_at = 0.0, now

    def here(self) -> list[Seen]:
        """Ranks that run, as far as known."""
        return [seen for seen in self.watched.values() if not seen.has_left and not seen.trouble]

    def behind(self) -> list[Seen]:
        """Ranks that stand at an earlier mark than the others; none where all stand at the same."""
        here = self.here()
        most = max(seen.count for seen in here)
        found = [seen for seen in here if seen.count < most]
        return found if len({seen.mark for seen in here}) > 1 else []

    def hung_sentence(self, stacks: str) -> str:
        """Who is behind the others, and where the stacks are."""
        here, behind = self.here(), self.behind()
        ahead = max(here, key=lambda seen: seen.count)
        who = ahead.name if len(here) == 1 else "no rank stands out, all"
        told = f"{who} {_stands(here)} at {ahead.mark}"
        if behind:
            told = f"{_listed(behind)} {_stands(behind)} at {behind[0].mark}, "
            told += f"the others at {ahead.mark}"
        return f"no progress for {self.patience_s:g} s: {told}; stacks of all ranks in {stacks}"

    def _listen(self, now: float, patience_s: float) -> None:
        for seen in self.here():
            if seen.stopped_s + now - seen.heard_at > patience_s and seen.stopped_s > 0:
                detail = f"does not answer (stopped for {seen.stopped_s:.0f} s)"
                self.trouble(seen.rank, "stopped", detail, now)
            elif now - seen.heard_at > patience_s:
                detail = f"gave no sign of life for {now - seen.heard_at:.0f} s"
                self.trouble(seen.rank, "silent", detail, now)

    def blamed(self) -> int | None:
        """The rank that the verdict names first; None where no rank is lost."""
        causes = [rank for rank in self._order if self.watched[rank].trouble != "broken"]
        return next(iter(causes or self._unheard()), None)

    def _unheard(self) -> list[int]:
        """Ranks whose sentinels never came, or were lost before they could."""
        return [rank for rank in range(self.world_size) if rank not in self.watched]

    def _sentence(self) -> str:
        told = [self.watched[rank] for rank in self._order]
        causes = [seen for seen in told if seen.trouble != "broken"]
        if not causes:
            unheard = ", ".join(map(str, self._unheard()[:_NAMED]))
            lost = f"rank {unheard} never reported, and" if unheard else "no rank is lost, but"
            return f"{lost} {told[0].name} failed {_after(told[0])} {told[0].detail}"
        first = causes[0]
        if first.trouble == "failed":
            return f"{first.name} failed {_after(first)} {first.detail}"
        if first.trouble == "died":  # the launcher ends the others: those deaths are no cause
            return f"{first.name} {first.detail} {_after(first).removesuffix(':')}"
        alike = [seen for seen in causes if seen.trouble == first.trouble]
        detail = first.detail if len(alike) == 1 else _of_several(first.detail)
        return f"{_listed(alike)} {detail} {_after(first).removesuffix(':')}"


def _after(seen: Seen) -> str:
    return f"after {seen.mark}:"


def _stands(ranks: list[Seen]) -> str:
    return "stands" if len(ranks) == 1 else "stand"


def _of_several(detail: str) -> str:
    detail = detail.replace(GONE, "are gone, and their nodes or watchdogs with them,")
    return detail.replace("does not", "do not")


def _listed(ranks: list[Seen]) -> str:
    names = [seen.name for seen in ranks[:_NAMED]]
    more = len(ranks) - len(names)
    return " and ".join([", ".join(names), f"{more} more"] if more else _last_two(names))


def _last_two(names: list[str]) -> list[str]:
    return [", ".join(names[:-1]), names[-1]] if len(names) > 1 else names
