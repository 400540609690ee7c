"""The CUDA kernels as nvcc compiled them, on the PTX interpreter: the results are right, nothing is
done that a GPU would forbid or leave to chance, and every basic block of every kernel runs.

Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case, output_gradient
from kernel_cases import BF16, F16, F32, LIMIT, assert_right, plain_pytorch, right_of
from ptx.build import nvcc
from ptx.calls import Call, operator
from ptx.cases import DTYPES, HEAD_SIZES, LARGE, OUT_OF_REACH, cases, with_a_name_twice
from ptx.machine import Program
from torch import Tensor

pytestmark = pytest.mark.skipif(nvcc() is None, reason="needs nvcc 12, on PATH or in CUDACXX")

TEMPLATE = {F32: "7Float32", BF16: "8BFloat16", F16: "7Float16"}


def row_errors(found: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    """The worst of a tensor, of its row's scale, as assert_right measures it."""
    largest = max(x.abs().max().item() for name, x in right.items() if name.startswith("d"))
    errors = {}
    for name, x in right.items():
        if name != "lse":
            scale = x.abs().amax(dim=-1).clamp(min=max(0.1 * x.abs().max().item(), 0.01 * largest))
            errors[name] = ((found[name].double() - x).abs().amax(dim=-1) / scale).max().item()
    return errors


def assert_right_in_fp32(found: dict[str, Tensor], case: Case) -> None:
    """Within 1e-5 (docs/numerics.md), or twice what the same maths in plain PyTorch is off by.

    Some rows of a gradient are small because terms cancel: dP - delta, where nearly all weight is
    on one key, is what is left of two sums of D products of about the same size, each off by some
    roundings. With D = 128 that alone can be more than 1e-5 of the row. The portable backend takes
    the same difference: in the case "everything" the worst row of dk_global is off by 1.14e-5
    there and here. (Autograd through a dense softmax takes the difference of one sum, 2.2e-6.)
    """
    right = right_of(case)
    noise = row_errors(case.run("portable"), right)
    for name, error in row_errors(found, right).items():
        assert error <= max(LIMIT, 2 * noise[name]), f"{name}: a row is off by {error:.3g}"
    assert_right(found, right, max(LIMIT, 2 * max(noise.values())))


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


def assert_right_of_large_scores(found: dict[str, Tensor], case: Case) -> None:
    """A weight is off by four roundings of the largest score (docs/numerics.md). Most gradients of
    q and k are nearly 0: what is left of terms that cancel, each off by its own rounding.
    """
    right, eps = right_of(case), torch.finfo(F32).eps
    peak, dtype = largest_score(case), found["out"].dtype
    tolerance = LIMIT + 4 * eps * peak + (0 if dtype == F32 else 4 * torch.finfo(dtype).eps)
    live = right["lse"].isfinite()
    assert torch.equal(found["lse"].isfinite(), live)
    error = (found["lse"].double() - right["lse"]).abs()[live]
    assert (error <= 8 * eps * right["lse"][live].abs().clamp(min=1.0)).all()
    size = {name: x.abs().max().item() for name, x in case.floats.items()}
    direction = output_gradient(found["out"]).abs().sum(dim=-1).max().item()
    for name in right.keys() - {"lse"}:
        limit = tolerance * right[name].abs().max().item()
        if name.startswith(("dq", "dk")):
            kind = "_global_B" if "_global" in name else "_B"
            other = next(x for x in size if x.startswith(("k" if name[1] == "q" else "q") + kind))
            value = next(x for x in size if x.startswith("v" + kind))
            term = case.masks["scale"] * size[other] * size[value] * direction
            limit += 2 * torch.finfo(dtype).eps * term
        error = (found[name].double() - right[name]).abs().max()
        assert error <= limit, f"{name}: off by {error:.3g}, the limit is {limit:.3g}"


def largest_score(case: Case) -> float:
    return case.masks["scale"] * max(
        torch.einsum("bnhd,bmhd->bhnm", case.floats[q].double(), case.floats[k].double())
        .abs()
        .max()
        .item()
        for q, k in (("q_BNHD", "k_BNHD"), ("q_global_BGHD", "k_global_BNHD"))
    )


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_kernels(dtype: torch.dtype, head_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, (layout, case) in cases(head_size, dtype).items():
        found = Call(operator(), with_a_name_twice(case), layout).run()
        print(name)
        if name.startswith(LARGE):
            assert_right_of_large_scores(found, case)
        elif dtype == F32:
            assert_right_in_fp32(found, case)
        else:
            assert_near_plain_pytorch(found, case, monkeypatch)
    missed = {
        kernel: places
        for program in operator().programs
        for kernel in program.module.kernels
        if "INS0_" not in kernel or f"INS0_{TEMPLATE[dtype]}ELi{head_size}E" in kernel
        if (places := blocks_that_never_ran(program, kernel))
    }
    assert not missed, "\n".join(f"{kernel}: {places}" for kernel, places in missed.items())


def blocks_that_never_ran(program: Program, kernel: str) -> list[str]:
    allowed = sum(count for name, (count, _) in OUT_OF_REACH.items() if name in kernel)
    missed = [f"line {x.line} ({program.source_of(x.line)})" for x in program.never_run(kernel)]
    return missed if len(missed) > allowed else []
