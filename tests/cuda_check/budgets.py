"""Limits of every kernel, in csrc/cuda/budgets.json, and whether the kernels keep them.

Numbers of registers or instructions are those of one compiler. So the limits are enforced with the
nvcc that they were read at; with another one differences are told. What must hold with every
compiler (no spills, no local memory in loops) is enforced always; but for later chips, whose code
is the driver's own and only as good as an older chip's launch bounds allow.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cuda_check.table import FROM_PTX, Row
from cuda_check.toolchain import CUDA

BUDGETS = CUDA / "budgets.json"
UPDATE = "PYTHONPATH=tests python -m cuda_check budgets --update"

# Number of a row -> whether more of it is better.
LIMITED = {
    "registers": False,
    "spill_bytes": False,
    "stack_bytes": False,
    "shared_bytes": False,
    "local_in_loops": False,
    "blocks_per_sm": True,
    "use": True,
    "use_masked": True,
    "use_least": True,
}
NEVER = ("spill_bytes", "local_in_loops")
_TOLERANCE = {"use": 0.002, "use_masked": 0.002, "use_least": 0.002}
"""An instruction more or less in a thousand is no finding."""


@dataclass(frozen=True)
class Finding:
    """A number that is not as its limit says."""

    chip: str
    kernel: str
    what: str
    is_worse: bool
    is_absolute: bool = False
    """Whether it counts with any compiler."""

    def __str__(self) -> str:
        return f"{self.chip} {self.kernel}: {self.what}"


@dataclass(frozen=True)
class Target:
    """What kernels must reach, beyond not getting worse."""

    chip: str
    kernel: str
    number: str
    least: float

    def finding(self, rows: Sequence[Row]) -> Finding | None:
        """None if it is reached."""
        for row in rows:
            if row.name == (self.chip, self.kernel):
                value = getattr(row, self.number) or 0
                if value >= self.least:
                    return None
                what = f"{self.number} is {value}, the target is at least {self.least}"
                return Finding(self.chip, self.kernel, what, is_worse=True)
        what = f"no such kernel, but a target for its {self.number}"
        return Finding(self.chip, self.kernel, what, is_worse=True)


def read_budgets(path: Path = BUDGETS) -> dict[str, Any]:
    """The file as it is; an empty one where there is none."""
    if not path.exists():
        return {"nvcc": None, "targets": [], "limits": {}}
    budgets: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return budgets


def write_budgets(
    rows: Sequence[Row], nvcc: str, nvdisasm: str, old: dict[str, Any], path: Path = BUDGETS
) -> None:
    """The rows' numbers as limits; chips that were not built keep theirs, targets stay."""
    limits: dict[str, Any] = dict(old["limits"]) if old["nvcc"] == nvcc else {}
    for chip in {row.chip for row in rows}:
        limits[chip] = {row.kernel: row.numbers() for row in rows if row.chip == chip}
    budgets = {
        "about": f"Limits of the CUDA kernels, read with this nvcc; written by `{UPDATE}`.",
        "nvcc": nvcc,
        "nvdisasm": nvdisasm,
        "targets": old["targets"],
        "limits": dict(sorted(limits.items())),
    }
    path.write_text(_as_text(budgets), encoding="utf-8")


def _as_text(budgets: dict[str, Any]) -> str:
    """JSON with a kernel or a target per line, so that a difference reads as a table."""
    lines = json.dumps({**budgets, "targets": "TARGETS", "limits": "LIMITS"}, indent=2)
    targets = ",\n".join(f"    {json.dumps(target)}" for target in budgets["targets"])
    chips = []
    for chip, kernels in budgets["limits"].items():
        rows = [f"      {json.dumps(k)}: {json.dumps(numbers)}" for k, numbers in kernels.items()]
        chips.append(f"    {json.dumps(chip)}: {{\n" + ",\n".join(rows) + "\n    }")
    lines = lines.replace('"TARGETS"', f"[\n{targets}\n  ]" if targets else "[]")
    lines = lines.replace('"LIMITS"', "{\n" + ",\n".join(chips) + "\n  }" if chips else "{}")
    return lines + "\n"


def compare(rows: Sequence[Row], budgets: dict[str, Any]) -> list[Finding]:
    """All differences; the chips that were not built are left out."""
    findings = list(_never(rows))
    if budgets["nvcc"] is None:
        return findings
    for chip in sorted({row.chip for row in rows}):
        limits = budgets["limits"].get(chip, {})
        kernels = {row.kernel: row for row in rows if row.chip == chip}
        for kernel in sorted(kernels.keys() - limits.keys()):
            findings.append(Finding(chip, kernel, "has no limits yet", is_worse=True))
        for kernel in sorted(limits.keys() - kernels.keys()):
            findings.append(Finding(chip, kernel, "has limits, but is no more", is_worse=True))
        for kernel in sorted(kernels.keys() & limits.keys()):
            findings += _differences(kernels[kernel], limits[kernel])
    targets = [Target(**target) for target in budgets["targets"]]
    chips = {row.chip for row in rows}
    missed = [target.finding(rows) for target in targets if target.chip in chips]
    return findings + [finding for finding in missed if finding is not None]


def _never(rows: Sequence[Row]) -> Iterator[Finding]:
    for row in (row for row in rows if not row.chip.endswith(FROM_PTX)):
        for number in NEVER:
            if value := getattr(row, number):
                what = f"{number} is {value}, wanted 0 with any compiler"
                yield Finding(row.chip, row.kernel, what, is_worse=True, is_absolute=True)


def _differences(row: Row, limits: dict[str, Any]) -> Iterator[Finding]:
    for number, more_is_better in LIMITED.items():
        value, limit = getattr(row, number), limits[number]
        if value == limit:
            continue
        if value is None or limit is None:
            what = f"{number} {limit} -> {value}: the main loop is found in only one of them"
            yield Finding(row.chip, row.kernel, what, is_worse=value is None)
            continue
        change = value - limit
        if abs(change) <= _TOLERANCE.get(number, 0):
            continue
        is_worse = (change < 0) == more_is_better
        word = "worse" if is_worse else "better"
        what = f"{number} {limit} -> {value} ({change:+.5g}), {word}"
        yield Finding(row.chip, row.kernel, what, is_worse)
