"""Faults planted into the inline PTX of csrc/cuda/ptx.h, which no build for the CPU executes: the
interpreter must find each of them in the forward kernel.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attention_cases import make_case
from kernel_cases import BF16, F16, right_of
from ptx.build import KEPT, nvcc, of_one_kind, ptx_of
from ptx.calls import Call, operator
from ptx.machine import Program
from ptx.parse import PtxError

from longpretrain.attention import AttentionPattern

pytestmark = pytest.mark.skipif(nvcc() is None, reason="needs nvcc 12, on PATH or in CUDACXX")

BF16_MMA, F16_MMA = (f"m16n8k16.row.col.f32.{kind}.{kind}.f32" for kind in ("bf16", "f16"))
PLAIN, TRANSPOSED = "ldmatrix.sync.aligned.m8n8.x4.shared", "ldmatrix.sync.aligned.m8n8.x4.trans"
WRONG = "wrong results"
KINDS = {BF16: "BFloat16", F16: "Float16"}

# Name -> dtype, what to replace by what, and what the interpreter says
PLANTED: dict[str, tuple[torch.dtype, str, str, str]] = {
    "halves of b swapped": (BF16, '"r"(b0), "r"(b1)', '"r"(b1), "r"(b0)', WRONG),
    "rows and columns of a swapped": (
        BF16, '"r"(a[1]), "r"(a[2])', '"r"(a[2]), "r"(a[1])', WRONG
    ),
    "one sum is forgotten": (
        F16, "{%8, %9}, {%0, %1, %2, %3};", "{%8, %9}, {%0, %1, %2, %2};", WRONG
    ),
    "bf16 taken for fp16": (BF16, BF16_MMA, F16_MMA, WRONG),
    "not transposed": (BF16, TRANSPOSED + ".shared", PLAIN, WRONG),
    "transposed": (BF16, PLAIN, TRANSPOSED + ".shared", WRONG),
    "matrices swapped": (BF16, '"=r"(r[1]), "=r"(r[2])', '"=r"(r[2]), "=r"(r[1])', WRONG),
    "half a copy": (BF16, "valid ? 16 : 0", "valid ? 8 : 0", WRONG),
    "no zeros": (BF16, "valid ? 16 : 0", "16", "and none there"),
    "no commit": (BF16, "cp.async.commit_group;", "", "still in flight"),
    "waits for all groups but one": (BF16, '"n"(kGroups)', '"n"(kGroups + 1)', "still in flight"),
    "low and high swapped, bf16": (BF16, "bf16x2.f32 %0, %1, %2", "bf16x2.f32 %0, %2, %1", WRONG),
    "low and high swapped, fp16": (F16, "f16x2.f32 %0, %1, %2", "f16x2.f32 %0, %2, %1", WRONG),
}  # fmt: skip


def forward_kernel(folder: Path, dtype: torch.dtype, old: str, new: str) -> Program:
    """With the change, for one dtype and heads of 32 numbers."""
    cuda = of_one_kind(folder, KINDS[dtype], ("ptx.h", old, new))
    return Program(ptx_of(cuda / "forward.cu", KEPT))


def verdict(changed: Program, dtype: torch.dtype) -> str:
    pattern = AttentionPattern(30, (1, 3))
    case = make_case(pattern, head_size=32, keys=150, slots=5, padding=True, dropout_p=0.2)
    case = case.to(dtype)
    try:
        found = Call(operator().with_kernels_of([changed]), case).forward()
    except PtxError as error:
        return str(error)
    right = right_of(case)["out"]
    error = (found["out"].double() - right).abs().max()
    return WRONG if not error <= 4 * torch.finfo(dtype).eps * right.abs().max() else "right"


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_found(name: str, tmp_path: Path) -> None:
    dtype, old, new, message = PLANTED[name]
    assert message in verdict(forward_kernel(tmp_path, dtype, old, new), dtype)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_nothing_is_found_without_them(dtype: torch.dtype, tmp_path: Path) -> None:
    same = forward_kernel(tmp_path, dtype, "valid ? 16 : 0", "valid ? 16 : 0")
    assert verdict(same, dtype) == "right"
