"""The parts of the benchmark that take times: who runs on which shapes, and rows of results.

A row is plain data, one case of one shape and call:
``section, case, dtype, tokens, heads, attention_window, call, median_ms, min_ms, samples,
disturbed_samples, is_disturbed``; ``attention_cells`` adds the condition of memory. Times of
modules hold their projections, which ``attention_results`` subtracts.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from attention_ours import VARIANTS, Runnable, Shape, build_ours, our_inputs
from attention_peers import NET_OF, PEERS
from timing import OUT_OF_MEMORY, Case, Pace, Timing, is_out_of_memory, take_samples

CALLS = ("forward", "forward+backward")

Made = dict[tuple[str, Shape], Runnable]
Row = dict[str, Any]


_BEGIN = time.perf_counter()


def say(text: str) -> None:
    """Progress, apart from the results, with the seconds since the start."""
    print(f"{time.perf_counter() - _BEGIN:6.0f} s  {text}", file=sys.stderr, flush=True)


def headline(
    shape: Shape, peers: Sequence[str], *, variants: bool, backend: str, pace: Pace
) -> tuple[list[Row], list[Row]]:
    """All peers, and the variants of ours, at one shape.

    Returns:
        Rows of times, and a row (case, shape, why) for whoever cannot run it.
    """
    inputs = our_inputs(shape)
    made: Made = {("ours", shape): build_ours(inputs, backend=backend)}
    skipped: list[Row] = []
    if "portable" in peers and backend != "portable":
        made["portable", shape] = build_ours(inputs, backend="portable")
    if variants:
        for variant in VARIANTS:
            made[f"ours, {variant}", shape] = build_ours(inputs, backend=backend, variant=variant)
    for peer in [name for name in peers if name in PEERS]:
        reason = PEERS[peer].why_not(shape)
        if reason:
            skipped.append({"case": peer, **asdict(shape), "why": reason})
            continue
        say(f"headline {shape.dtype}: {peer}")
        try:
            found = PEERS[peer].build(shape)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            skipped += _no_memory(shape, _attentions(peer))
            continue
        made |= {(case, shape): runnable for case, runnable in found.items()}
    say(f"headline {shape.dtype}: {len(made)} cases, {pace.seconds:.0f} s")
    rows, failed = _time_all("headline", made, pace)
    return rows, skipped + failed


def growth(
    shapes: Sequence[Shape], peers: Sequence[str], *, backend: str, pace: Pace, limit_s: float
) -> tuple[list[Row], list[Row]]:
    """Ours at all lengths; each peer up to the length where one forward would pass ``limit_s``.

    Args:
        shapes: of one dtype, ever longer.
        peers: their names.
        backend: of ours.
        pace: of the samples.
        limit_s: what a peer's longest forward may take, as judged by the length before.

    Returns:
        As ``headline``.
    """
    made: Made = {}
    skipped: list[Row] = []
    forward_s: dict[str, tuple[int, float]] = {}
    longest = our_inputs(shapes[-1])
    for shape in shapes:
        inputs = longest.shortened(shape)
        made["ours", shape] = build_ours(inputs, backend=backend)
        for peer in [name for name in peers if name in PEERS or backend != name]:
            why = _why_not(peer, shape, forward_s, limit_s)
            skipped += [{"case": case, **asdict(shape), "why": why[case]} for case in why]
            if set(why) >= _attentions(peer):
                continue
            try:
                if peer in PEERS:
                    found = PEERS[peer].build(shape)
                else:
                    found = {"portable": build_ours(inputs, backend="portable")}
                for case in [name for name in found if name not in why]:
                    forward_s[case] = (shape.tokens, _forward_s(found[case]))
                    made[case, shape] = found[case]
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                skipped += _no_memory(shape, _attentions(peer) - set(why))
    first = shapes[0]
    say(
        f"growth {first.dtype}, {first.heads} heads, window {first.attention_window}:"
        f" {len(made)} cases, {pace.seconds:.0f} s"
    )
    rows, failed = _time_all("growth", made, pace)
    return rows, skipped + failed


def _forward_s(runnable: Runnable) -> float:
    """The quicker of two runs: the first may compile."""
    times_s = []
    for _ in range(2):
        begin = time.perf_counter()
        runnable.run_forward()
        times_s.append(time.perf_counter() - begin)
    return min(times_s)


def _attentions(peer: str) -> set[str]:
    """The cases of a peer that are not there only to be subtracted."""
    return set(PEERS[peer].cases) - set(NET_OF.values()) if peer in PEERS else {peer}


def _why_not(
    peer: str, shape: Shape, forward_s: dict[str, tuple[int, float]], limit_s: float
) -> dict[str, str]:
    """The cases of a peer that cannot run, or would take too long as they grew so far, and why."""
    reason = PEERS[peer].why_not(shape) if peer in PEERS else None
    if reason:
        return dict.fromkeys(_attentions(peer), reason)
    slow = {}
    for case in sorted(_attentions(peer) & set(forward_s)):
        tokens, seconds = forward_s[case]
        # Whatever fills n^2 numbers grows with the square.
        power = 2 if case in {"sdpa", "bigbird"} else 1
        expected_s = seconds * (shape.tokens / tokens) ** power
        if expected_s > limit_s:
            slow[case] = f"about {expected_s:.1f} s for one forward, limit {limit_s:g} s"
    return slow


def _no_memory(shape: Shape, cases: Iterable[str]) -> list[Row]:
    return [{"case": case, **asdict(shape), "why": OUT_OF_MEMORY} for case in sorted(cases)]


def _time_all(section: str, made: Made, pace: Pace) -> tuple[list[Row], list[Row]]:
    """Rows of times, and a row for each case whose first run found too little memory."""
    cases = []
    for (name, shape), runnable in made.items():
        cases.append(Case((name, shape, CALLS[0]), runnable.run_forward, runnable.reset))
        if runnable.outputs_grad:
            cases.append(Case((name, shape, CALLS[1]), runnable.run_both, runnable.reset))
    timings = take_samples(cases, pace)
    rows = [_row(section, key, timing) for key, timing in timings.items() if not timing.failure]
    failed: list[Row] = []
    for key, timing in timings.items():
        if timing.failure:
            assert isinstance(key, tuple)
            name, shape, call = key
            failed.append({"case": f"{name} {call}", **asdict(shape), "why": timing.failure})
    return rows, failed


def _row(section: str, key: Hashable, timing: Timing) -> Row:
    assert isinstance(key, tuple)
    name, shape, call = key
    return {
        "section": section,
        "case": name,
        **asdict(shape),
        "call": call,
        "median_ms": round(timing.median_s * 1e3, 4),
        "min_ms": round(timing.min_s * 1e3, 4),
        "samples": len(timing.samples_s),
        "disturbed_samples": len(timing.dropped_s),
        "is_disturbed": timing.is_disturbed,
    }


def case_labels(peers: Iterable[str]) -> dict[str, str]:
    """Case -> label, in the order of tables."""
    labels = {"ours": "ours"} | {f"ours, {variant}": f"ours, {variant}" for variant in VARIANTS}
    if "portable" in peers:
        labels["portable"] = "our portable backend"
    for peer in [name for name in peers if name in PEERS]:
        labels |= PEERS[peer].cases
    return labels
