"""The numbers that the operator is to reach, beside those of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from attention_results import Results
from attention_runs import CALLS

FORWARD, BOTH = CALLS
LONGEST_TOKENS = 65_536


@dataclass(frozen=True)
class Target:
    """One number and its limit.

    Args:
        name: what it says.
        value: as measured, under default memory; None: not measured in this run.
        limit: to be reached, or kept.
        at_least: whether more is better.
        form: how to write them.
        kept: the value where freed memory is kept, which is shown and not judged.
    """

    name: str
    value: float | None
    limit: float
    at_least: bool
    form: str
    kept: float | None = None

    @property
    def is_met(self) -> bool | None:
        """None: not measured."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def texts(self) -> tuple[str, str, str, str]:
        """Value, value with kept memory, limit and verdict."""
        value, kept = (
            "-" if number is None else self.form.format(number)
            for number in (self.value, self.kept)
        )
        limit = f"{'>=' if self.at_least else '<='} {self.form.format(self.limit)}"
        verdict = {None: "not measured", True: "met", False: "NOT MET"}[self.is_met]
        return value, kept, limit, verdict


def targets(results: Results) -> list[Target]:
    """All of them, in the order of the report; none is measured where a backend stands in."""
    made = [
        *_ratios(results), *_peak(results), *_variants(results), *_growth(results),
        *_memory(results),
    ]  # fmt: skip
    chosen = results.data["settings"]
    found = [target for dtype, target in made if dtype in chosen["dtypes"]]
    if chosen["backend"] != "fused":
        return [replace(target, value=None, kept=None) for target in found]
    return found


def summary(results: Results) -> dict[str, Any]:
    """What follows from the times, for readers of the JSON: ratios and targets."""
    ratios = []
    for section, case in dict.fromkeys(
        (row["section"], row["case"])
        for row in results.data["timings"]
        if row["section"] != "growth" and row["case"] != "ours"
    ):
        for dtype in results.data["settings"]["dtypes"]:
            for call in CALLS:
                of_both = {
                    condition: results.ratio(section, case, dtype, call, condition=condition)
                    for condition in ("default", "kept")
                }
                where = {"section": section, "case": case, "dtype": dtype, "call": call}
                ratios.append({**where, **of_both})
    judged = [
        {
            "name": target.name, "default": target.value, "kept": target.kept,
            "limit": target.limit, "at_least": target.at_least, "is_met": target.is_met,
        }
        for target in targets(results)
    ]  # fmt: skip
    return {"ratios_to_ours": ratios, "targets": judged}


_ALL_TEN: dict[tuple[str, str], float] = {
    (dtype, call): 10 for dtype in ("fp32", "bf16") for call in CALLS
}
# Section, case, name, and the least ratio for each dtype and call.
_VERSUS: list[tuple[str, str, str, dict[tuple[str, str], float]]] = [
    (
        "headline", "hf", "HF Longformer minus projections",
        {("fp32", FORWARD): 18, ("bf16", FORWARD): 20, ("fp32", BOTH): 25, ("bf16", BOTH): 22},
    ),
    ("avx2", "hf", "the same, ours lowered to AVX2", _ALL_TEN),
    ("headline", "blocked", "blocked SDPA", {("fp32", BOTH): 6.5, ("bf16", BOTH): 11}),
    ("headline", "flex", "compiled FlexAttention", {("fp32", FORWARD): 3, ("bf16", FORWARD): 3}),
    ("headline", "bigbird", "HF BigBird minus projections", _ALL_TEN),
    ("headline", "bigbird lean", "the same minus its n² copy", _ALL_TEN),
]  # fmt: skip


def _ratios(results: Results) -> Iterator[tuple[str, Target]]:
    for section, case, name, limits in _VERSUS:
        for (dtype, call), limit in limits.items():
            value = results.ratio(section, case, dtype, call)
            kept = results.ratio(section, case, dtype, call, condition="kept")
            yield dtype, Target(f"vs {name}, {call} {dtype}", value, limit, True, "{:.1f}x", kept)


def _peak(results: Results) -> Iterator[tuple[str, Target]]:
    names = {
        "fp32": ("peak of multiply-adds", 0.70),
        "bf16": ("peak of dot products", 0.65),
    }
    for dtype, (name, limit) in names.items():
        for call in CALLS:
            value = results.peak_share("headline", dtype, call)
            kept = results.peak_share("headline", dtype, call, condition="kept")
            yield dtype, Target(f"{name}, {call} {dtype}", value, limit, True, "{:.0%}", kept)


def _variants(results: Results) -> Iterator[tuple[str, Target]]:
    limits = {"dropout 0.1": 1.4, "dilation 2": 1.15, "documents": 1.15, "ten global tokens": 1.15}
    for variant, limit in limits.items():
        for dtype in ("fp32", "bf16"):
            for call in CALLS:
                case = f"ours, {variant}"
                value = results.ratio("headline", case, dtype, call)
                kept = results.ratio("headline", case, dtype, call, condition="kept")
                name = f"cost of {variant}, {call} {dtype}"
                yield dtype, Target(name, value, limit, False, "{:.2f}x", kept)


def _growth(results: Results) -> Iterator[tuple[str, Target]]:
    tokens = results.data["headline_shape"]["tokens"]
    for factor, limit in ((4, 4.3), (16, 17.5)):
        for dtype in ("fp32", "bf16"):
            for call in CALLS:
                short_ms = results.time_ms("growth", "ours", dtype, call)
                long_ms = results.time_ms(
                    "growth", "ours", dtype, call, {"tokens": factor * tokens}
                )
                value = long_ms / short_ms if short_ms and long_ms else None
                name = f"time, {tokens:,} -> {factor * tokens:,} tokens, {call} {dtype}"
                yield dtype, Target(name, value, limit, False, "{:.2f}x")


def _memory(results: Results) -> Iterator[tuple[str, Target]]:
    tokens = results.data["headline_shape"]["tokens"]
    for dtype in ("fp32", "bf16"):
        row = results.memory("ours", dtype, tokens) or {}
        name = f"extra memory / (q+k+v), {BOTH} {dtype}"
        yield dtype, Target(name, row.get("multiple_of_qkv"), 3, False, "{:.2f}x")
    for dtype in ("fp32", "bf16"):
        row = results.memory("ours", dtype, LONGEST_TOKENS) or {}
        # One that ended at the limit of its address space has not kept below it.
        value = float("inf") if "error" in row else row.get("peak_rss_gib")
        name = f"resident at {LONGEST_TOKENS:,} tokens, {BOTH} {dtype}"
        yield dtype, Target(name, value, 8, False, "{:.2f} GiB")
