"""What each of the three layers has covered of every kernel, for docs/kernels.md.

Nothing here is typed in: the emulated tests wrote down what they ran (ran.py), the interpreter's
list of cases goes through the operator's own host code, and the limits are those of budgets.json.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attention_cases import Case
from ptx import cases as interpreted

from cuda_check.budgets import read_budgets
from cuda_check.launches import Call, build_recorder, record
from cuda_check.ran import DTYPES, Record, read_record
from cuda_check.report import markdown
from cuda_check.shortfall import wrapped
from cuda_check.table import FROM_PTX
from cuda_check.toolchain import CHIPS, LATER_CHIPS, Toolchain

Kinds = Mapping[str, Counter[str]]
"""Kernel -> dtype and head size, such as ``bf16 64`` -> how often."""


@dataclass(frozen=True)
class Covered:
    """Of one kernel, all of its template arguments together.

    Args:
        variants: of the template, on the first chip.
        tests: of the emulator, by dtype and head size.
        cases: of the PTX interpreter, forward and backward, the same way.
        left_out: basic blocks that the interpreter does not ask for, and why.
        chips: for which there are limits.
    """

    kernel: str
    variants: Sequence[str]
    tests: Mapping[str, int]
    cases: Mapping[str, int]
    left_out: tuple[int, str] | None
    chips: Sequence[str]


def family(kernel: str) -> str:
    """``f<BFloat16, 64>`` -> ``f``."""
    return re.split(r"[<(]", kernel)[0]


def read_coverage(tools: Toolchain) -> list[Covered]:
    """Of all kernels that have limits; the order is that of the limits."""
    return join(
        read_budgets()["limits"],
        read_record(),
        interpreted_kernels(tools),
        interpreted.OUT_OF_REACH,
    )


def join(
    limits: Mapping[str, Mapping[str, Any]],
    emulated: Record,
    cases: Kinds,
    out_of_reach: Mapping[str, tuple[int, str]],
) -> list[Covered]:
    """A line for each kernel."""
    first = f"sm_{CHIPS[0]}"
    names = dict.fromkeys(family(kernel) for kernel in limits[first])
    found = []
    for name in names:
        ran = emulated.kernels.get(name, {})
        left_out = next((why for part, why in out_of_reach.items() if part in name), None)
        found.append(
            Covered(
                name,
                [kernel for kernel in limits[first] if family(kernel) == name],
                {kind: one.tests for kind, one in ran.items()},
                cases.get(name, Counter()),
                left_out,
                [chip for chip, of in limits.items() if any(family(k) == name for k in of)],
            )
        )
    return found


def interpreted_kernels(tools: Toolchain) -> Kinds:
    """What the cases of the PTX interpreter launch."""
    calls: list[tuple[str, Call]] = []
    for dtype_name, dtype in interpreted.DTYPES.items():
        for head_size in interpreted.HEAD_SIZES:
            for _layout, case in interpreted.cases(head_size, dtype).values():
                kind = f"{dtype_name} {head_size}"
                calls += [(kind, call_of(case, backward=backward)) for backward in (False, True)]
    found: dict[str, Counter[str]] = {}
    recorded = record(build_recorder(tools), [call for _, call in calls])[1]
    for (kind, _), one in zip(calls, recorded, strict=True):
        for name in {family(launch.kernel) for launch in one.launches}:
            found.setdefault(name, Counter())[kind] += 1
    return found


def call_of(case: Case, *, backward: bool) -> Call:
    """As far as it decides what is launched: keys without a query, layouts and scales do not."""
    q_BNHD, masks = case.floats["q_BNHD"], case.masks
    B, N, H, D = q_BNHD.shape
    slots = masks["global_index_BG"].shape[1] if "global_index_BG" in masks else 0
    return Call(
        backward, DTYPES[q_BNHD.dtype], B, N, H, D, slots, case.pattern.one_sided_window,
        dilation=max(case.pattern.dilation_of_heads(H)),
        causal=case.pattern.causal,
        padding="padding_BN" in masks,
        documents="document_BN" in masks,
        drop_below=round(256 * masks.get("dropout_p", 0.0)),
    )  # fmt: skip


def all_kinds() -> list[str]:
    """What each kernel should be covered with, if it has a template argument or not."""
    return [f"{dtype} {size}" for dtype in interpreted.DTYPES for size in interpreted.HEAD_SIZES]


def all_chips() -> list[str]:
    """For which there should be limits."""
    return [f"sm_{chip}" for chip in CHIPS] + [f"sm_{chip}{FROM_PTX}" for chip in LATER_CHIPS]


def gaps(covered: Iterable[Covered], kinds: Sequence[str], chips: Sequence[str]) -> list[str]:
    """What a layer has not covered."""
    found = []
    for one in covered:
        for layer, seen, wanted in (
            ("the emulator's tests", one.tests, kinds),
            ("the PTX interpreter's cases", one.cases, kinds),
            ("the budgets", one.chips, chips),
        ):
            if lacking := [kind for kind in wanted if kind not in seen]:
                found.append(f"{one.kernel}: {layer} lack {', '.join(lacking)}")
    return found


def coverage_section(covered: Sequence[Covered], num_tests: int) -> str:
    """The table and what it leaves open."""
    kinds = all_kinds()
    head = [
        "kernel", "variants", "emulator: tests", "of dtype and head size", "PTX: calls",
        "of dtype and head size", "budgets: chips",
    ]  # fmt: skip
    rows = [
        [
            one.kernel, str(len(one.variants)), str(sum(one.tests.values())),
            _share(one.tests, kinds), str(sum(one.cases.values())), _share(one.cases, kinds),
            str(len(one.chips)),
        ]
        for one in covered
    ]  # fmt: skip
    left_out = [
        f"* {one.kernel}: {one.left_out[0]} in each variant: {one.left_out[1]}"
        for one in covered
        if one.left_out is not None
    ]
    cases = interpreted.cases(interpreted.HEAD_SIZES[0], interpreted.DTYPES["fp32"])
    names = ", ".join(f'"{name}"' for name in cases)
    sizes = ", ".join(map(str, interpreted.HEAD_SIZES))
    lines = _COVERED.format(
        tests=num_tests, cases=names, dtypes=", ".join(interpreted.DTYPES), sizes=sizes
    ).splitlines()
    parts = ["\n".join(map(wrapped, lines)) + "\n", markdown(head, rows)]
    if left_out:
        parts.append(f"{_LEFT_OUT}\n" + "\n".join(left_out) + "\n")
    return "\n".join([*parts, _UNSEEN])


def _share(seen: Mapping[str, int], kinds: Sequence[str]) -> str:
    return f"{sum(kind in seen for kind in kinds)} of {len(kinds)}"


# A line each, which is wrapped when its numbers are in it.
_COVERED = (
    "## What each layer has covered\n\n"
    "* Emulator: `make emulate` runs the kernels' source on the CPU ({tests} tests of the "
    "operator; a test counts once for each dtype and head size that it runs a kernel with), in "
    "several orders of threads and blocks; `make emulate-sanitized` runs small cases of all "
    "kernels under the address, undefined-behaviour and thread sanitizers.\n"
    "* PTX: tests/test_ptx_attention.py interprets what nvcc made of the same source, forward and "
    "backward, in {dtypes} with heads of {sizes}. Its cases: {cases}. Every basic block must run, "
    "but those below.\n"
    "* Budgets: registers, spills, blocks and loops of the machine code, on each chip.\n"
)

_LEFT_OUT = "Basic blocks that no call reaches, from the list of the same tests:\n"

_UNSEEN = """\
## What no layer can see

* The order in which real hardware makes memory visible. The emulator and the interpreter find a
  barrier or a wait that is missing by the rules of CUDA's and PTX's documentation; that a chip
  keeps the rules, and that ours are read rightly, only a chip shows.
* Rounding of the tensor cores, of ex2.approx and of lg2.approx. Products are summed here in an
  order and precision that stand for theirs, which are not published to the bit. So the last bits
  of a result will differ, and the bound against fp64 must be measured once more on a GPU.
* ptxas. The interpreter executes PTX; the machine code made of it is counted, not executed.
* Time: clocks that fall under load, latencies, contention of caches, the driver's time for a
  launch.
* Anything of several GPUs: NCCL, its streams beside ours, and how both share a device.
* What a driver makes of the PTX on a chip of its own day: budgets count what this nvcc makes of it.
* Whether it runs at all: no line of this page was written by a GPU.
"""
