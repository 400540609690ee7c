"""What happened to a run, as parts of its page: attempts, skipped updates, checkpoints, slow ranks.

Made of the lines of metrics.jsonl alone; what a line lacks (an older run's) is left out.
"""

from __future__ import annotations

import collections
import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from longpretrain.report.console import duration_text
from longpretrain.report.page import folded, table_html
from longpretrain.report.plots import Curve, describe, plot_svg

Line = dict[str, Any]
_WIDE = (10.6, 3.0)
_PLACE = ("launcher", "device", "versions", "kernels")
_SETTINGS = ("world_size", "accumulation", "precision", "zero")
"""Fields of the event that begins an attempt; the page says which of them changed. What is set is
also compared with the checkpoint, whole, by an event with the field ``changed``."""
_MOST_RANKS = 8


def starts(events: Sequence[Line]) -> list[Line]:
    """The events that began an attempt, in order."""
    return [line for line in events if str(line.get("event")).startswith(("started", "resumed"))]


def resumes(events: Sequence[Line]) -> list[Line]:
    """Those of them that went on from an earlier attempt."""
    return [
        line
        for number, line in enumerate(starts(events))
        if number or str(line["event"]).startswith("resumed")
    ]


def lost_steps(events: Sequence[Line]) -> int:
    """Updates that were done again, over all restarts."""
    return sum(line.get("lost_steps", 0) for line in events)


def attempts_html(events: Sequence[Line]) -> str:
    """When and where the run was started, why, what changed, and what had to be done again."""
    begun = starts(events)
    if len(begun) < 2:
        return ""
    rows: list[list[str]] = []
    lost, lost_s = 0, 0.0
    before: Line = {}
    for number, line in enumerate(events):
        lost += line.get("lost_steps", 0)
        lost_s += line.get("lost_s", 0.0)
        if not any(line is start for start in begun):
            continue
        again = f"{lost:,} ({duration_text(lost_s)})" if lost else "none" if before else ""
        ended = str(line.get("after") or ("" if not before else "not known"))
        later = itertools.takewhile(lambda e: not any(e is s for s in begun), events[number + 1 :])
        told = next((str(event["changed"]) for event in later if "changed" in event), "")
        rows.append(
            [str(len(rows) + 1), clock(line.get("time")), f"{line['step']:,}",
             str(line.get("world_size", "")), again, ended, _changes(before, line, told)]
        )  # fmt: skip
        lost, lost_s, before = 0, 0.0, line
    heads = ["attempt", "began", "after step", "ranks", "updates done again",
             "how the one before ended", "what changed"]  # fmt: skip
    table = folded(f"{len(rows)} attempts", table_html(heads, rows, (1, 5, 6)), len(rows))
    total = sum(line.get("lost_s", 0.0) for line in events)
    return (
        f"<h2>Attempts</h2>\n<p>Begun {len(rows)} times; {lost_steps(events):,} updates"
        f" ({duration_text(total)} of training) were done again, because no checkpoint held"
        f" them.</p>\n{table}"
    )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], told: str) -> str:
    """What is otherwise than in the attempt before, as far as the events tell."""
    found = [told] if told else []
    for name in _PLACE if told else _SETTINGS + _PLACE:
        old, new = before.get(name), now.get(name)
        if old is None or new is None:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            keys = [key for key in old | new if old.get(key) != new.get(key)]
            found += [f"{key} {_short(old.get(key))} -> {_short(new.get(key))}" for key in keys]
        elif old != new:
            found.append(f"{name.replace('_', ' ')} {_short(old)} -> {_short(new)}")
    return "; ".join(found)


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 24 else text[:12] + "..."


def skipped_html(train: Sequence[Line], events: Sequence[Line]) -> str:
    """Updates that did not reach the weights, and where what was seen of them is written."""
    dumps = {line["step"]: line for line in events if "forensics" in line}
    counts = itertools.pairwise([0, *(line.get("skipped", 0) for line in train)])
    skipped = [line for (old, new), line in zip(counts, train, strict=True) if new > old]
    shown = {line["step"]: line for line in skipped}
    steps = sorted(shown.keys() | dumps.keys())
    if not steps:
        return ""
    rows = []
    for step in steps:
        line, dump = shown.get(step, {}), dumps.get(step, {})
        rows.append(
            [f"{step:,}", _number(line, "loss"), _number(line, "grad_norm"),
             str(dump.get("forensics") or ""), str(dump.get("event") or "")]
        )  # fmt: skip
    heads = ["step", "loss (nats)", "gradient norm", "file", "what was seen"]
    table = folded(f"{len(rows)} updates", table_html(heads, rows, (3, 4)), len(rows))
    return (
        f"<h2>Skipped updates</h2>\n<p>{len(skipped):,} updates were not applied: their loss or"
        f" gradient was not finite. Files are in the run folder.</p>\n{table}"
    )


def checkpoints_html(train: Sequence[Line], events: Sequence[Line]) -> str:
    """What checkpoints cost, and those that could not be written."""
    written = [line for line in events if "checkpoint_s" in line]
    failed = [line for line in events if "checkpoint_failed" in line]
    if not written and not failed:
        return ""
    rows = [
        [f"{line['step']:,}", clock(line.get("time")),
         _seconds(line.get("checkpoint_s")), _seconds(line.get("waited_s")),
         "" if "checkpoint_s" in line else f"NOT written: {line.get('reason', 'no reason told')}"]
        for line in events
        if "checkpoint_s" in line or "checkpoint_failed" in line
    ]  # fmt: skip
    heads = ["step", "time", "seconds", "ranks waited", ""]
    table = folded(f"{len(rows)} checkpoints", table_html(heads, rows, (1, 4)), len(rows))
    said = f"{len(written):,} written"
    if written:
        middle = statistics.median(line["checkpoint_s"] for line in written)
        said += f", {middle:.1f} s each (median)"
    waits = [line["waited_s"] for line in written if line.get("waited_s") is not None]
    trained_s = sum(line.get("step_s", 0.0) for line in train)
    if waits and trained_s:
        said += f"; training waited {_span(sum(waits))} for them in all"
        said += f" ({sum(waits) / trained_s:.1%} of the time in training steps)"
    if failed:
        said += f"; {len(failed):,} could NOT be written"
    return f"<h2>Checkpoints</h2>\n<p>{said}.</p>\n{table}"


def ranks_html(train: Sequence[Line], marks: Sequence[float]) -> str:
    """Which rank the others waited for, and for how long."""
    lines = [line for line in train if isinstance(line.get("slowest_rank_s"), int | float)]
    if not lines:
        return ""
    x = [float(line["step"]) for line in lines]
    slowest = Curve("slowest rank", x, [1e3 * line["slowest_rank_s"] for line in lines])
    median = Curve("median rank", x, [1e3 * line["median_rank_s"] for line in lines])
    said = " ".join(describe(f"{c.label}, ms", c.x, c.y) for c in (slowest, median))
    svg = plot_svg(
        "ranks", said, [slowest, median], x_label="step", y_label="ms", from_zero=True,
        marks=marks, inches=_WIDE,
    )  # fmt: skip
    behind: dict[int, list[float]] = collections.defaultdict(list)
    for line in lines:
        behind[line["slowest_rank"]].append(line["slowest_rank_s"] - line["median_rank_s"])
    most = sorted(behind.items(), key=lambda entry: -sum(entry[1]))[:_MOST_RANKS]
    rows = [
        [str(rank), f"{len(late) / len(lines):.0%}", f"{1e3 * statistics.mean(late):,.1f}",
         f"{sum(late):,.1f}"]
        for rank, late in most
    ]  # fmt: skip
    heads = ["rank", "slowest in", "ms behind the median, mean", "seconds behind, in all"]
    total_s = sum(line["step_s"] for line in lines)
    lost_s = sum(sum(late) for late in behind.values())
    share = f" ({lost_s / total_s:.1%} of the time in training steps)" if total_s else ""
    return (
        f"<h2>Slowest rank</h2>\n<p>A rank's own time in an update: its wait for data and its"
        f" forward passes. The slowest was {_span(lost_s)} behind the median in"
        f" all{share}.</p>\n"
        f'{table_html(heads, rows)}\n<figure class="below"><figcaption><b>Own time</b> in each'
        f" update</figcaption>{svg}</figure>"
    )


def clock(seconds: object) -> str:
    """A moment for people; empty if it is not known."""
    if not isinstance(seconds, int | float):
        return ""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _span(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration_text(seconds)


def _seconds(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else ""


def _number(line: Mapping[str, Any], field: str) -> str:
    if field not in line:
        return ""
    value = line[field]
    return f"{value:.4g}" if isinstance(value, int | float) else "not finite"  # null in the file
