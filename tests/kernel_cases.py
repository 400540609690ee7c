"""What the tests of the compiled kernels hold them against: the reference and, where that would
take long, the portable backend in float64, which test_attention_portable.py holds to the reference.

Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch
from attention_cases import Case, assert_equal_to, make_case, output_gradient
from operator_cases import leaves, with_masks
from torch import Tensor

from longpretrain.attention import fused
from longpretrain.attention.reference import reference_attention

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
EPS = torch.finfo(F32).eps
LIMIT = 1e-5  # docs/numerics.md
INDEX = "global_index_BG"
HEAD_SIZES = [1, 7, 31, 32, 33, 64, 65, 96, 127, 128]

each_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
in_16_bits = pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
some_of_all = functools.partial(
    make_case, keys=150, padding=True, slots=5, documents=True, dropout_p=0.2
)


def note(what: str, value: float | Tensor) -> None:
    """Shown by pytest -rP: the figures of docs/numerics.md."""
    print(f"{what}: {float(value):.2g}")


def right_of(case: Case) -> dict[str, Tensor]:
    """In float64, from the very numbers that the kernels get."""
    dense = case.floats["k_BNHD"].shape[1] <= 700
    return case.to(F64).run("reference" if dense else "portable")


def assert_right(
    found: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = LIMIT
) -> None:
    """Relative to the scale of the tensor, and for heads of 32 numbers and more to that of each row
    (at least a tenth of the tensor's): of fewer numbers a row may be small by chance.
    """
    assert not any(x.isnan().any() for x in found.values())
    assert_equal_to(found, right, tolerance)
    assert (found["out"][right["lse"].isinf()] == 0).all()
    assert (found["dq_BNHD"][right["lse"].isinf()] == 0).all()
    largest = max(x.abs().max().item() for name, x in right.items() if name.startswith("d"))
    for name, x in right.items():
        if name == "lse" or x.shape[-1] < 32:
            continue
        scale = x.abs().amax(dim=-1).clamp(min=max(0.1 * x.abs().max().item(), 0.01 * largest))
        error = ((found[name].double() - x).abs().amax(dim=-1) / scale).max()
        note(f"{name}, a row, of its scale", error)
        assert error <= tolerance, f"{name}: a row is off by {error:.3g} of its scale"


def check(case: Case, tolerance: float = LIMIT) -> dict[str, Tensor]:
    case = case.to(F32)
    found = case.run("fused")
    assert_right(found, right_of(case), tolerance)
    return found


def check_cancelled(case: Case, tolerance: float = LIMIT) -> dict[str, Tensor]:
    """Where gradients of q and k are small beside the terms that they are sums of (0 for a query
    that reaches one key), and measured by those terms.
    """
    case = case.to(F32)
    found, right = case.run("fused"), right_of(case)
    own_scale = [name for name in right if not name.startswith(("dq", "dk"))]
    assert_equal_to(*({name: x[name] for name in own_scale} for x in (found, right)), tolerance)
    direction = output_gradient(found["out"]).abs().sum(dim=-1).max()
    size = {name: x.abs().max() for name, x in case.floats.items()}
    scale = case.masks.get("scale", case.floats["q_BNHD"].shape[3] ** -0.5)
    for name in right.keys() - set(own_scale):
        own = "_global" in name
        value = size["v_global_BNHD" if own else "v_BNHD"]
        if name.startswith("dq"):
            other = size["k_global_BNHD" if own else "k_BNHD"]
        else:
            other = size["q_global_BGHD" if own else "q_BNHD"]
        error = (found[name].double() - right[name]).abs().max()
        assert error <= tolerance * scale * direction * value * other, name
    return found


def with_slots(case: Case, *rows: list[int]) -> Case:
    """These positions in the slots of each row; the rest are unused."""
    index_BG = torch.full_like(case.masks[INDEX], -1)
    for index_G, row in zip(index_BG, rows, strict=True):
        index_G[: len(row)] = torch.tensor(row, dtype=index_G.dtype)
    return with_masks(case, **{INDEX: index_BG})


def scaled(case: Case, **factors: float | Tensor) -> Case:
    return replace(
        case, floats=leaves({k: x.detach() * factors.get(k, 1.0) for k, x in case.floats.items()})
    )


def plain_pytorch(case: Case, patch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The dense maths with every operation in the dtype of the inputs."""
    dtype = case.floats["q_BNHD"].dtype
    with patch.context() as within:
        in_dtype = functools.partial(reference_attention, compute_dtype=dtype)
        within.setattr(fused, "reference_attention", in_dtype)
        return case.run("reference")
