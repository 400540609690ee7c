"""The CUDA kernels as nvcc compiled them, on the PTX interpreter: the results are right, nothing is
done that a GPU would forbid or leave to chance, and every basic block of every kernel runs.

Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import Case, make_case
from kernel_cases import BF16, F16, F32, assert_right, plain_pytorch, right_of
from operator_cases import with_masks
from ptx.build import nvcc
from ptx.calls import Call, operator
from ptx.machine import Program
from torch import Tensor

from longpretrain.attention import AttentionPattern

pytestmark = pytest.mark.skipif(nvcc() is None, reason="needs nvcc; there is none on PATH")

NEVER_LAUNCHED = {"nothing"}  # is only asked about, to see whether the GPU is new enough


def cases(head_size: int) -> dict[str, tuple[str, Case]]:
    """Layout and numbers. Tiles are of 64 queries or keys, and of 16 slots; chunks of 256."""

    def case(pattern: AttentionPattern, scale: float | None = None, **changes: Any) -> Case:
        made = make_case(pattern, head_size=head_size, **({"batch": 1, "heads": 1} | changes))
        return with_masks(made, scale=scale)

    everything = {"padding": True, "documents": True, "dropout_p": 0.2}
    window = AttentionPattern
    return {
        "everything": (
            "far",
            case(window(30, (1, 3)), batch=2, heads=2, keys=150, slots=5, **everything),
        ),
        "tiles without a mask": ("plain", case(window(150), keys=450)),
        "causal": (
            "heads_first",
            case(window(100, (1, 2), True), -0.7, heads=2, keys=300, slots=20, documents=True),
        ),
        "queries in the middle": (
            "gaps",
            case(window(40), keys=330, q_offset=70, queries=200, slots=40, dropout_p=0.5),
        ),
        "several chunks": (
            "plain",
            case(window(60, 2, True), keys=1100, slots=20, padding=True, dropout_p=0.1),
        ),
    }


def assert_near_plain_pytorch(
    found: dict[str, Tensor], case: Case, patch: pytest.MonkeyPatch
) -> None:
    """At most twice (gradients three times) the error of plain PyTorch in 16 bits."""
    right, plain = right_of(case), plain_pytorch(case, patch)
    for name, x in right.items():
        last_bit = torch.finfo(F32 if name == "lse" else found["out"].dtype).eps
        finite = x.isfinite()
        assert torch.equal(found[name][~finite].double(), x[~finite]), name
        ours, theirs = ((y.double() - x)[finite].abs().max() for y in (found[name], plain[name]))
        least = last_bit / 2 * x[finite].abs().max()
        times = 2 if name in {"out", "lse"} else 3
        assert ours <= times * max(theirs, least), name


@pytest.mark.parametrize("head_size", [32, 64, 128])
@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
def test_kernels(dtype: torch.dtype, head_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (layout, in_float64) in cases(head_size).items():
        case = in_float64.to(dtype)
        found = Call(operator(), case, layout).run()
        print(name)
        if dtype == F32:
            assert_right(found, right_of(case))
        else:
            assert_near_plain_pytorch(found, case, monkeypatch)
    kind = {F32: "7Float32", BF16: "8BFloat16", F16: "7Float16"}[dtype]
    missed = {
        kernel: places
        for program in operator().programs
        for kernel in program.module.kernels
        if "INS0_" not in kernel or f"INS0_{kind}ELi{head_size}E" in kernel
        if (places := blocks_that_never_ran(program, kernel))
    }
    assert not missed, missed


def blocks_that_never_ran(program: Program, kernel: str) -> list[str]:
    if any(name in kernel for name in NEVER_LAUNCHED):
        return []
    return [f"line {x.line} ({program.source_of(x.line)})" for x in program.never_run(kernel)]
