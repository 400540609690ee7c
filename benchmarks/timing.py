"""Times of calls, taken round robin in one process; only undisturbed samples count.

A machine's speed drifts, and other programs come and go. So no call is timed to the end before the
next one begins: every round times each call, and a comparison is between medians of the same
rounds. What other programs used of the processors meanwhile stands in /proc/stat; a sample during
which they used too much is dropped, and counted.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

MAX_DISTURBANCE = 0.03
"""Share of a sample's time that other programs may use: 1 is one processor, all the time."""
MIN_UNDISTURBED = 3
"""With fewer samples left, all count, and the timing says so."""
_MAX_REPEATS = 40

METHOD = (
    "One process. Every round times each case once, quick ones several times in a row (0.25 s in "
    f"the headline, 0.1 s in growth, at most {_MAX_REPEATS} calls), after one round that does not "
    "count; medians of wall time (with one thread: of processor time). Samples are dropped when "
    "other programs (all of /proc/stat but this process) used more than "
    f"{MAX_DISTURBANCE:.0%} of their time, plus two clock ticks; where fewer than "
    f"{MIN_UNDISTURBED} are left, all count, marked as disturbed. Forward runs under no_grad; "
    "gradients are cleared outside of the clock."
)


@dataclass(frozen=True)
class Pace:
    """How long to take samples.

    Args:
        seconds: of all cases together.
        min_rounds: however long they take.
        batch_s: quick calls are repeated for about as long in each round: /proc/stat counts in
            hundredths of a second.
        one_thread: the calls use one thread. The clock is the processor time of the process then,
            which other programs do not lengthen, and all samples count.
    """

    seconds: float
    min_rounds: int = MIN_UNDISTURBED
    batch_s: float = 0.25
    one_thread: bool = False


@dataclass(frozen=True)
class Case:
    """A call to time.

    Args:
        key: names it among the results.
        call: what is timed; its result is freed outside of the clock.
        reset: called after each sample, outside of the clock.
    """

    key: Hashable
    call: Callable[[], object]
    reset: Callable[[], None]


@dataclass
class Timing:
    """The samples of one case, in seconds."""

    kept_s: list[float] = field(default_factory=list)
    dropped_s: list[float] = field(default_factory=list)
    failure: str = ""
    """Why there are no samples: the first run found too little memory."""

    @property
    def is_disturbed(self) -> bool:
        """Whether the samples that should have been dropped count too, as too few were left."""
        return len(self.kept_s) < MIN_UNDISTURBED and bool(self.dropped_s)

    @property
    def samples_s(self) -> list[float]:
        """The samples that count."""
        return self.kept_s + self.dropped_s if self.is_disturbed else self.kept_s

    @property
    def median_s(self) -> float:
        """The median; NaN without samples."""
        return statistics.median(self.samples_s) if self.samples_s else float("nan")

    @property
    def min_s(self) -> float:
        """The shortest; NaN without samples."""
        return min(self.samples_s, default=float("nan"))


OUT_OF_MEMORY = "does not fit into the memory that a process may take"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; torch says so by an ordinary RuntimeError."""
    text = str(error)
    return isinstance(error, MemoryError) or "memory" in text or "bad_alloc" in text


def others_cpu_s() -> float | None:
    """Processor seconds that all but this process used since the machine started.

    None where the system does not tell (no /proc/stat).
    """
    try:
        line = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0]
        # user, nice, system, idle, iowait, irq, softirq, steal; guests are part of user.
        ticks = [int(number) for number in line.split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    used = sum(ticks) - ticks[3] - ticks[4]
    return used / os.sysconf("SC_CLK_TCK") - time.process_time()


def take_samples(cases: Sequence[Case], pace: Pace) -> dict[Hashable, Timing]:
    """Times all cases round robin, at that pace."""
    timings = {case.key: Timing() for case in cases}
    assert len(timings) == len(cases), "two cases of one name"
    repeats = {}
    for case in cases:
        try:
            repeats[case.key] = _repeats(case, pace.batch_s)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            timings[case.key].failure = OUT_OF_MEMORY
            case.reset()
    end = time.perf_counter() + pace.seconds
    rounds = 0
    while rounds < pace.min_rounds or time.perf_counter() < end:
        for case in [case for case in cases if case.key in repeats]:
            _sample(case, repeats[case.key], timings[case.key], pace.one_thread)
        rounds += 1
    return timings


def _repeats(case: Case, batch_s: float) -> int:
    """Runs the case once, which warms it up, and says how often a round is to call it."""
    begin = time.perf_counter()
    case.call()
    seconds = time.perf_counter() - begin
    case.reset()
    return max(1, min(_MAX_REPEATS, int(batch_s / max(seconds, 1e-9))))


def _sample(case: Case, repeats: int, timing: Timing, one_thread: bool) -> None:
    clock = time.process_time if one_thread else time.perf_counter
    tick_s = 1 / os.sysconf("SC_CLK_TCK")
    samples_s = []
    before_s, begin = others_cpu_s(), time.perf_counter()
    for _ in range(repeats):
        start = clock()
        result = case.call()
        samples_s.append(clock() - start)
        del result
        case.reset()
    whole_s, after_s = time.perf_counter() - begin, others_cpu_s()
    others_s = 0.0 if before_s is None or after_s is None else after_s - before_s
    is_undisturbed = one_thread or others_s <= MAX_DISTURBANCE * whole_s + 2 * tick_s
    (timing.kept_s if is_undisturbed else timing.dropped_s).extend(samples_s)
