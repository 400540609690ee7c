"""The CUDA kernels as nvcc compiled them, on the PTX interpreter: the results are right, nothing is
done that a GPU would forbid or leave to chance, and every basic block of every kernel runs.

Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import Case, make_case
from kernel_cases import (
    BF16,
    F16,
    F32,
    INDEX,
    LIMIT,
    assert_right,
    plain_pytorch,
    right_of,
    with_slots,
)
from operator_cases import with_masks
from ptx.build import nvcc
from ptx.calls import Call, operator
from ptx.machine import Program
from torch import Tensor

from longpretrain.attention import AttentionPattern

pytestmark = pytest.mark.skipif(nvcc() is None, reason="needs nvcc; there is none on PATH")

# Basic blocks that no call can reach, of kernels whose name holds this
OUT_OF_REACH = {
    "nothing": 1,  # only asked about, to see whether the GPU is new enough
    "sum_rows": 2,  # 64-bit divisions of more than 2**32 rows
    "global_columns_kernel": 2,  # a chunk without a query: every chunk has one
    "sum_key_gradients_kernel": 2,  # no chunk at all
    "window_forward_kernel": 1,  # a block of queries without a tile of keys: each sees itself
}


def cases(head_size: int) -> dict[str, tuple[str, Case]]:
    """Layout and numbers. Tiles are of 64 queries or keys, and of 16 slots; chunks of 256."""

    def case(
        window: int,
        dilation: int | tuple[int, ...] = 1,
        *,
        causal: bool = False,
        scale: float | None = None,
        **changes: Any,
    ) -> Case:
        pattern = AttentionPattern(window, dilation, causal)
        made = make_case(pattern, head_size=head_size, **({"batch": 1, "heads": 1} | changes))
        return with_masks(made, scale=scale)

    everything = {"padding": True, "documents": True, "dropout_p": 0.2, "slots": 5}
    chunks = case(60, 2, causal=True, keys=1100, slots=20, padding=True, dropout_p=0.1)
    return {
        "everything": ("far", case(30, (1, 3), batch=2, heads=2, keys=150, **everything)),
        "tiles without a mask": ("plain", case(150, keys=320)),
        "with dropout": ("plain", case(150, keys=320, dropout_p=0.3)),
        "causal": (
            "heads_first",
            case(100, (1, 2), causal=True, scale=-0.7, heads=2, keys=300, slots=20, documents=True),
        ),
        "queries in the middle": (
            "gaps",
            case(40, keys=330, q_offset=70, queries=200, slots=40, dropout_p=0.5),
        ),
        "several chunks": ("plain", with_idle_parts(chunks)),
        "few tokens": ("plain", case(9, keys=40, q_offset=5, slots=3)),
        "many slots": ("plain", case(9, keys=60, slots=40)),
        "and dropout": ("plain", case(9, scale=-0.3, keys=40, q_offset=5, slots=3, dropout_p=0.5)),
    }


def with_idle_parts(case: Case) -> Case:
    """Tiles of nothing but padding, and queries before all global tokens."""
    padding_BN = case.masks["padding_BN"].clone()
    padding_BN[:, -450:-100] = True
    return with_slots(with_masks(case, padding_BN=padding_BN), list(range(400, 1100, 60)))


def with_a_name_twice(case: Case) -> Case:
    """An unused slot names a token that an earlier one has named: it stays unused."""
    if INDEX not in case.masks:
        return case
    index_BG = case.masks[INDEX].clone()
    for index_G in index_BG:
        used, unused = (index_G >= 0).nonzero(), (index_G < 0).nonzero()
        if len(used) and len(unused) and used[0] < unused[-1]:
            index_G[unused[-1]] = index_G[used[0]]
    return with_masks(case, **{INDEX: index_BG})


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
        found = Call(operator(), with_a_name_twice(case), layout).run()
        print(name)
        if dtype == F32:
            assert_right(found, right_of(case), 2 * LIMIT)
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
    assert not missed, "\n".join(f"{kernel}: {places}" for kernel, places in missed.items())


def blocks_that_never_ran(program: Program, kernel: str) -> list[str]:
    allowed = sum(count for name, count in OUT_OF_REACH.items() if name in kernel)
    missed = [f"line {x.line} ({program.source_of(x.line)})" for x in program.never_run(kernel)]
    return missed if len(missed) > allowed else []
