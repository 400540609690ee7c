"""The compiled kernels where rounding matters: 16 bits, large scores, and what is no number.

Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Case, make_case, output_gradient
from kernel_cases import (
    EPS,
    F32,
    F64,
    HEAD_SIZES,
    LIMIT,
    check,
    check_cancelled,
    in_16_bits,
    note,
    plain_pytorch,
    right_of,
    scaled,
    some_of_all,
    with_slots,
)
from operator_cases import leaves, with_masks
from torch import Tensor

from longpretrain.attention import AttentionPattern, sliding_attention

pytestmark = pytest.mark.usefixtures("library")

# 16 bits


@in_16_bits
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_error_in_16_bits(
    head_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most twice (gradients three times) what plain PyTorch loses in that dtype: at the worst
    number and on average.
    """
    masked = some_of_all(AttentionPattern(30, (1, 3)), head_size=head_size, seed=head_size)
    free = make_case(AttentionPattern(60), batch=1, head_size=head_size, keys=301, slots=2)
    for case in (masked.to(dtype), free.to(dtype)):
        found, right, plain = case.run("fused"), right_of(case), plain_pytorch(case, monkeypatch)
        for name, x in right.items():
            last_bit = (torch.finfo(F32) if name == "lse" else torch.finfo(dtype)).eps
            finite = x.isfinite()
            assert torch.equal(found[name][~finite].double(), x[~finite]), name
            ours, theirs = ((y.double() - x)[finite].abs() for y in (found[name], plain[name]))
            times = 2 if name in {"out", "lse"} else 3
            # Both may round every number right: then the last bit of the largest is the measure.
            least = last_bit / 2 * x[finite].abs().max().item()
            note(f"{name}, times plain PyTorch", ours.max() / max(theirs.max().item(), least))
            assert ours.max() <= times * max(theirs.max().item(), least), name
            assert ours.mean() <= times * max(theirs.mean().item(), least / 100), name


@in_16_bits
def test_16_bits_over_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What both chunks at an edge find is added up before it is rounded."""
    case = make_case(AttentionPattern(70), batch=1, heads=1, head_size=8, keys=4300, slots=3)
    case = case.to(dtype)
    found, right = case.run("fused"), right_of(case)
    for name in ("out", "dq_BNHD", "dk_BNHD", "dv_BNHD"):
        error = (found[name].double() - right[name]).abs().flatten()
        assert error.max() <= 3 * torch.finfo(dtype).eps * right[name].abs().max()
        near = (found[name].double() - right[name])[0, 1990:2110].abs().mean()
        assert near <= 1.5 * error.mean(), name


@in_16_bits
def test_results_are_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    """A mean of three values, of which only the division and the last step round anything."""
    v_BNHD = torch.randn(1, 3, 9, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    zero = torch.zeros_like(v_BNHD)
    out = sliding_attention(zero, zero, v_BNHD, AttentionPattern(2), backend="fused")
    right = v_BNHD.double().mean(dim=1, keepdim=True)
    half_a_bit = torch.finfo(dtype).eps / 2 * 2.0 ** right.abs().log2().floor()
    assert ((out.double() - right).abs() <= half_a_bit + EPS * v_BNHD.abs().max()).all()


# Large scores: where the softmax needs its running maximum


def of_scores(peak: float) -> float:
    """A weight is off by what its score is: a few roundings of the largest one."""
    return LIMIT + 4 * EPS * peak


def assert_lse(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    live = ~right["lse"].isinf()
    error = (found["lse"].double() - right["lse"])[live].abs()
    assert (error <= 8 * EPS * right["lse"][live].abs().clamp(min=1.0)).all()


@pytest.mark.parametrize("peak", [50, 300, 1e4])
@pytest.mark.parametrize("kind", ["plain", "masked"])
def test_large_scores(peak: float, kind: str) -> None:
    masks: dict[str, Any] = {}
    if kind == "masked":
        masks = {"padding": True, "slots": 3, "documents": True, "dropout_p": 0.2}
    case = make_case(AttentionPattern(40, (1, 2)), keys=300, seed=1, **masks)
    largest = max(
        (case.floats[q].norm(dim=-1).max() * case.floats[k].norm(dim=-1).max()).item() / 2
        for q, k in (("q_BNHD", "k_BNHD"), ("q_global_BGHD", "k_global_BNHD"))
        if q in case.floats
    )
    case = scaled(case, q_BNHD=peak / largest, q_global_BGHD=peak / largest)
    right, found = right_of(case.to(F32)), check(case, of_scores(peak))
    assert_lse(found, right)
    for name in ("out", "dq_BNHD", "dk_BNHD", "dv_BNHD"):
        error = (found[name].double() - right[name]).abs().max() / right[name].abs().max()
        note(f"{name}, of scale, in roundings of the largest score", error / (EPS / 2 * peak))


@pytest.mark.parametrize("peak", [1e6, 1e9, 1e14])
def test_absurd_scores_stay_finite(peak: float) -> None:
    """Float32 holds nothing of such a score's exponential but which one is the largest."""
    case = make_case(AttentionPattern(40, (1, 2)), keys=300, padding=True, slots=3)
    found = scaled(case, q_BNHD=peak, q_global_BGHD=-peak).to(F32).run("fused")
    assert not any(x.isnan().any() for x in found.values())
    largest = case.floats["v_BNHD"].abs().max(), case.floats["v_global_BNHD"].abs().max()
    assert found["out"].abs().max() <= 1.001 * max(largest)
    for name in ("dv_BNHD", "dv_global_BNHD"):
        assert found[name].abs().max() <= 300 * output_gradient(found["out"]).abs().max()
    assert all(x.isfinite().all() for name, x in found.items() if name != "lse")


@pytest.mark.parametrize("score", [-200, -88, -45, -42, -41, -20, 20, 27, 28, 38, 45, 88, 128, 200])
def test_all_scores_alike(score: float) -> None:
    """Around what sums of bare exponentials hold, of one key and of many."""
    for window in (0, 60):
        case = make_case(AttentionPattern(window), batch=1, keys=200, slots=2)
        case = scaled(case, v_BNHD=1e22) if window else case
        floats = {name: x.detach() for name, x in case.floats.items()}
        for name, x in floats.items():
            if not name.startswith("v"):
                x.mul_(0.01).add_(1.0 if name.startswith("q") else score / 4)
        case = with_masks(replace(case, floats=leaves(floats)), scale=1.0)
        assert_lse(check_cancelled(case, of_scores(abs(score))), right_of(case.to(F32)))


@pytest.mark.parametrize("where", ["q_BNHD", "k_BNHD", "q_global_BGHD", "k_global_BNHD"])
@pytest.mark.parametrize("row", [0, 2], ids=["first", "later"])
def test_one_outlier(where: str, row: int) -> None:
    """All of its tile, and all after it, go the other way; the numbers are the same."""
    case = make_case(AttentionPattern(40, (1, 2)), keys=300, slots=4, padding=True, seed=3)
    case = with_slots(case, [5, 200, 77, 150], [77, 3, 299, 0])
    factor = torch.ones_like(case.floats[where])
    factor[:, row if where == "q_global_BGHD" else 100 * row + 1] = 500.0
    check(scaled(case, **{where: factor}), of_scores(500 * 16 / 2))


@in_16_bits
def test_large_scores_in_16_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(AttentionPattern(40), keys=300, head_size=16, slots=3, dropout_p=0.1)
    case = scaled(case, q_BNHD=30.0).to(dtype)
    found, right, plain = case.run("fused"), right_of(case), plain_pytorch(case, monkeypatch)
    for name, x in right.items():
        ours, theirs = ((y[name].double() - x).abs().max() for y in (found, plain))
        least = torch.finfo(dtype).eps * x.abs().max()
        assert ours <= 3 * max(theirs, least), name


@pytest.mark.parametrize("scale", [-1.3, 0.0, 1e-4, 20.0])
def test_any_scale(scale: float) -> None:
    case = make_case(AttentionPattern(20, (1, 2)), keys=150, slots=3, padding=True)
    found = check(with_masks(case, scale=scale), of_scores(abs(scale) * 16))
    if scale == 0.0:
        assert all((x == 0).all() for name, x in found.items() if name.startswith(("dq", "dk")))


def test_the_exponential() -> None:
    """A single key's log-sum-exp is its score: off by the exponential's relative error, of 3e-7 at
    most, and by roundings on both ways.
    """
    score_N = torch.linspace(-40.0, 44.0, 8001)
    one = torch.ones(1, 8001, 1, 1)
    q_BNHD = score_N.view_as(one)
    _, lse = sliding_attention(
        q_BNHD, one, one, AttentionPattern(0), scale=1.0, return_lse=True, backend="fused"
    )
    error = (lse.double().flatten() - score_N.double()).abs()
    note("log-sum-exp of one score below 1", error[score_N.abs() < 1].max())
    assert (error <= 3e-7 + EPS * (1 + score_N.abs())).all(), error.max()


# What is no number


SICK = make_case(AttentionPattern(10), batch=1, heads=1, keys=300, dtype=F32)


def reaches(n: int, window: int = 10) -> Tensor:
    return (torch.arange(300) - n).abs() <= window


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q_BNHD", "k_BNHD"])
def test_no_finite_answer_to_infinite_scores(where: str, value: float) -> None:
    """Nor any harm to queries that do not reach them. A key of score -inf has a weight of 0."""
    spoilt = {name: x.detach().clone() for name, x in SICK.floats.items()}
    spoilt[where][0, 150, 0, 1] = value
    case = Case(SICK.pattern, leaves(spoilt))
    out, lse = (x.detach()[0, :, 0] for x in case.forward("fused"))
    right, right_lse = (x.detach()[0, :, 0] for x in case.to(F64).forward("reference"))
    assert torch.equal(out.isfinite(), right.isfinite())
    assert not right.isfinite().all()
    sound = right.isfinite().all(dim=-1)
    assert (out - right)[sound].abs().max() <= LIMIT
    assert (lse - right_lse)[sound].abs().max() <= LIMIT
    found = case.gradients(case.forward("fused")[0])
    if where == "q_BNHD":
        assert not found["dq_BNHD"][0, 150].isfinite().any()
        assert not found["dv_BNHD"][0, reaches(150)].isfinite().any()
    healthy, apart = SICK.run("fused"), ~reaches(150, 130)  # other tiles, other blocks
    for name in ("dq_BNHD", "dk_BNHD", "dv_BNHD"):
        error = (found[name] - healthy[name])[0, apart].abs().max()
        assert error <= LIMIT * healthy[name].abs().max(), name


def test_a_value_that_is_no_number_reaches_all_who_attend() -> None:
    """Neighbours may get it too: they multiply it by 0."""
    spoilt = {name: x.detach().clone() for name, x in SICK.floats.items()}
    spoilt["v_BNHD"][0, 150, 0, 1] = math.nan
    out, _ = Case(SICK.pattern, leaves(spoilt)).forward("fused")
    healthy, _ = SICK.forward("fused")
    assert out[0, reaches(150), 0, 1].isnan().all()
    assert torch.equal(out[..., [0, 2, 3]], healthy[..., [0, 2, 3]])
    assert torch.equal(out[:, :20], healthy[:, :20])
