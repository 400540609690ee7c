"""Equal bits: what dropout draws, and what changes no bit of the compiled kernels' results.

Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Case, assert_equal_to, make_case, output_gradient
from kernel_cases import F32, F64, INDEX, LIMIT, each_dtype, some_of_all
from operator_cases import batch_rows, leaves, with_masks
from test_attention_fused import assert_same_bits
from torch import Tensor
from torch.nn.functional import pad
from torch.profiler import ProfilerActivity, profile

from longpretrain.attention import AttentionPattern

pytestmark = pytest.mark.usefixtures("library")

# Dropout


def uniform_case(pattern: AttentionPattern, dtype: torch.dtype, **changes: Any) -> Case:
    """Queries are 0, so that all keys of a row weigh the same; keys and values are one-hot."""
    case = make_case(pattern, head_size=128, dtype=dtype, **changes)
    floats = {name: torch.zeros_like(x) for name, x in case.floats.items()}
    for name, x in floats.items():
        if not name.startswith("q"):
            tokens = torch.arange(x.shape[1])
            x[:, tokens, :, tokens % 128] = 1.0
    return replace(case, floats=leaves(floats))


def weight_by_weight(case: Case, backend: str) -> dict[str, Tensor]:
    """What each weight brings to the output; to dv, by one-hot gradients of the output; and to the
    gradient of its score, which is less where the weight is dropped.
    """
    queries = case.floats["q_BNHD"].shape[1]
    out, lse = case.forward(backend)
    one_hot = torch.eye(128, dtype=out.dtype)[:queries, None].expand_as(out)
    inputs = list(case.floats.values())
    forward = torch.autograd.grad(out, inputs, one_hot, retain_graph=True)
    scores = torch.autograd.grad(out, inputs, torch.ones_like(out))
    found = {"out": out.detach(), "lse": lse}
    for name, of_value, of_score in zip(case.floats, forward, scores, strict=True):
        if name.startswith("v"):
            found[name] = of_value
        elif name.startswith("q"):
            found[name] = of_score
    return found


UNIFORM = {
    "near": ((1, 3), {"keys": 128, "padding": True, "slots": 20, "documents": True}),
    "dilated": ((2, 50), {"keys": 128, "padding": True, "slots": 3}),
    "far": ((1, 3), {"batch": 1, "keys": 2300, "q_offset": 2190, "queries": 100}),
}


@each_dtype
@pytest.mark.parametrize(("dilation", "changes"), UNIFORM.values(), ids=UNIFORM.keys())
def test_dropped_weights_are_those_of_the_reference(
    dilation: tuple[int, int], changes: dict[str, Any], dtype: torch.dtype
) -> None:
    """Every single one, forward and backward: no number is off by a quarter of a weight."""
    for dropout_p in (1 / 256, 0.1, 0.5, 255 / 256):
        pattern = AttentionPattern(20, dilation)
        case = uniform_case(pattern, dtype, dropout_p=dropout_p, **changes)
        if dropout_p == 0.5:
            extreme = torch.tensor([2**63 - 1, -(2**63)])[: len(case.masks["dropout_seed_B"])]
            case = with_masks(case, dropout_seed_B=extreme)
        found = weight_by_weight(case, "fused")
        right = weight_by_weight(case.to(F64), "reference")
        assert torch.allclose(found["lse"].double(), right["lse"], atol=1e-6)
        # A kept weight of each row: [B, H, N], and 0 where a row has none.
        weight = (-right["lse"]).exp().transpose(1, 2) * 256 / (256 - round(256 * dropout_p))
        for name, x in right.items():
            if name == "lse":
                continue
            error = (found[name].double() - x).abs().transpose(1, 2)
            if name.startswith("v"):  # [B, H, key, query]
                limit = pad(weight, (0, 128 - weight.shape[2]))[:, :, None]
            elif name == "q_global_BGHD":
                slot_BHG = case.masks[INDEX].long().clamp(min=0)[:, None].expand(-1, 2, -1)
                limit = 128**-0.5 * weight.gather(2, slot_BHG)[..., None]
            else:
                limit = (1.0 if name == "out" else 128**-0.5) * weight[..., None]
            is_near = bool((error <= 0.25 * limit).all())
            assert is_near, name


# Equal bits


MIXED = make_case(
    AttentionPattern(100, (1, 2, 3)), heads=3, head_size=33, keys=4300, padding=True, slots=20,
    dropout_p=0.1, dtype=F32,
)  # fmt: skip


@each_dtype
def test_threads_and_runs_change_no_bit(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    case, found = MIXED.to(dtype), []
    for number in (1, 2, 2, 3):
        threads(number)
        found.append(case.run("fused"))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@each_dtype
def test_rows_alone_have_the_same_bits(dtype: torch.dtype) -> None:
    case = MIXED.to(dtype)
    out, lse = case.forward("fused")
    direction = output_gradient(out)
    both = torch.autograd.grad(out, list(case.floats.values()), direction)
    for row in range(2):
        alone = batch_rows(case, [row])
        its_out, its_lse = alone.forward("fused")
        assert torch.equal(its_out[0], out[row])
        assert torch.equal(its_lse[0], lse[row])
        found = torch.autograd.grad(its_out, list(alone.floats.values()), direction[row : row + 1])
        assert all(torch.equal(x[0], y[row]) for x, y in zip(found, both, strict=True))


def test_split_queries_are_the_whole() -> None:
    """Each part has its rows of q and all keys; gradients of the keys add up."""
    whole, wanted = MIXED.run("fused"), list(MIXED.floats.values())
    direction = output_gradient(whole["out"])
    parts, sums = [], [torch.zeros_like(x) for x in wanted]
    for start, stop in ((0, 1000), (1000, 1001), (1001, 4300)):
        q_BNHD = MIXED.floats["q_BNHD"][:, start:stop]
        parts.append(MIXED.forward("fused", q_BNHD=q_BNHD, q_offset=start))
        found = torch.autograd.grad(parts[-1][0], wanted, direction[:, start:stop])
        sums = [total + x for total, x in zip(sums, found, strict=True)]
    out, lse = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    joined = {"out": out.detach(), "lse": lse}
    joined |= {f"d{name}": x for name, x in zip(MIXED.floats, sums, strict=True)}
    assert_equal_to(joined, whole, LIMIT)


def test_views_of_one_projection_are_read_in_place() -> None:
    qkv = torch.randn(2, 300, 3, 2, 40, generator=torch.Generator().manual_seed(0))
    views = dict(zip(("q_BNHD", "k_BNHD", "v_BNHD"), qkv.unbind(2), strict=True))
    gaps = {name: x.repeat_interleave(2, dim=-1)[..., ::2] for name, x in views.items()}
    found = []
    for floats, is_copied in ((views, False), (gaps, True)):
        case = Case(AttentionPattern(20), {name: x.requires_grad_() for name, x in floats.items()})
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            found.append(case.run("fused"))
        names = {event.name for event in seen.events()}
        assert "longpretrain::sliding_attention_fused_backward" in names
        assert ("aten::clone" in names) == is_copied
    assert_same_bits(*found)
    assert_same_bits(found[0], Case(AttentionPattern(20), leaves(views)).run("fused"))


def test_each_gradient_alone() -> None:
    case = some_of_all(AttentionPattern(9, (1, 2)), head_size=5, dtype=F32)
    right = case.run("fused")
    for name in case.floats:
        floats = {other: x.detach() for other, x in case.floats.items()}
        floats[name].requires_grad_()
        out, _ = replace(case, floats=floats).forward("fused")
        (found,) = torch.autograd.grad(out, [floats[name]], output_gradient(out))
        assert torch.equal(found, right[f"d{name}"]), name
