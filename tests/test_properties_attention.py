"""Attention as properties: both backends against a loop over single queries, and what must not
matter: the company in a batch, keys out of reach, layout, cuts, the order of slots.

Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Case, assert_equal_to, output_gradient
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import (
    FLAG,
    LAYOUTS,
    batch_rows,
    crop,
    laid_out,
    leaves,
    operator_cases,
    padding_of,
    query_by_query,
    reached,
    run,
    scale_of,
    slot_of,
    with_masks,
)
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from longpretrain.attention import AttentionPattern, blocks

# The limits of docs/numerics.md, against the reference in float64.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5}
TINY_BLOCKS = blocks.Limits(queries=5, scores=150, counters=300)

each_backend = pytest.mark.parametrize("backend", ["portable", "reference"])
NO_DROPOUT, WHOLE = st.just(0.0), st.just(True)


def assert_same_bits(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for name, x in right.items():
        assert torch.equal(found[name], x), name


@settings(max_examples=120)
@given(case=operator_cases(max_keys=17, max_batch=2, heads=st.integers(1, 2)))
def test_every_backend_is_the_definition_query_by_query(case: Case) -> None:
    """Values, gradients and log-sum-exp; a query without keys gives exactly 0 and +inf."""
    out, lse = query_by_query(case)
    right = {"out": out.detach(), "lse": lse} | case.gradients(out)
    nothing_BNH = lse.isinf()
    for backend in ("reference", "portable"):
        found = case.run(backend)
        assert_equal_to(found, right, TOLERANCE[torch.float64])
        assert (found["out"][nothing_BNH] == 0).all(), backend
        assert (found["dq_BNHD"][nothing_BNH] == 0).all(), backend


@settings(max_examples=150)
@given(
    case=operator_cases(),
    dtype=st.sampled_from(list(TOLERANCE)),
    layout=st.sampled_from(LAYOUTS),
    limits=st.sampled_from([blocks.CPU_LIMITS, TINY_BLOCKS]),
)
def test_portable_equals_reference(
    case: Case, dtype: torch.dtype, layout: str, limits: blocks.Limits
) -> None:
    exact = replace(case, floats=laid_out(case.floats, layout))
    ours = replace(case, floats=laid_out(case.to(dtype).floats, layout))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "CPU_LIMITS", limits)
        found = ours.run("portable")
    right = exact.run("reference")
    own_scale = [name for name in right if not name.startswith(("dq", "dk"))]
    assert_equal_to(*({k: x[k] for k in own_scale} for x in (found, right)), TOLERANCE[dtype])
    for name in right.keys() - set(own_scale):
        # What the scores' gradients lose before they cancel, to 0 where a query reaches one key.
        rounding = 4 * torch.finfo(dtype).eps * of_scores(exact)
        limit = TOLERANCE[dtype] * right[name].abs().max().item() + rounding
        assert (found[name].double() - right[name]).abs().max().item() <= limit, name
    assert found["out"].dtype == dtype and found["out"].is_contiguous()
    assert not found["lse"].requires_grad


def of_scores(case: Case) -> float:
    """How large a gradient of q or k may be before its terms cancel."""
    values = {k: x.abs().max().item() for k, x in case.floats.items()}
    value = max(x for name, x in values.items() if name.startswith("v_"))
    other = max(x for name, x in values.items() if not name.startswith("v_"))
    kept_scale = 256 / (256 - round(256 * case.masks.get("dropout_p", 0.0)))
    direction = output_gradient(case.floats["q_BNHD"]).abs().sum(dim=-1).max().item()
    return abs(scale_of(case)) * direction * value * other * kept_scale


@settings(max_examples=60)
@given(case=operator_cases(own_projections=st.just(True)))
def test_bfloat16_is_rounded_at_the_end(case: Case) -> None:
    """The output is that of float32, rounded once. Gradients lose one rounding of their own and,
    through the scores, the one of the output that was kept for them. (Without own projections
    autograd adds two rounded gradients.)
    """
    low = case.to(torch.bfloat16)
    direction = output_gradient(low.floats["q_BNHD"])
    found, middle = run(low, direction), run(low.to(torch.float32), direction.float())
    assert torch.equal(found["out"], middle["out"].to(torch.bfloat16))
    assert torch.equal(found["lse"], middle["lse"])
    right = run(low.to(torch.float64), direction.double(), "reference")
    rounding = torch.finfo(torch.bfloat16).eps / 2
    kept = rounding * (direction.double() * right["out"]).abs().sum().item()
    largest = max(x.abs().max().item() for x in low.floats.values())
    for name in right.keys() - {"out", "lse"}:
        by_scores = 0.0 if name.startswith("dv") else abs(scale_of(low)) * largest * kept
        error = (found[name].double() - right[name]).abs().max().item()
        limit = rounding * right[name].abs().max().item() + by_scores
        assert error <= 1.01 * limit + 1e-6, name


@settings(max_examples=60)
@given(
    case=operator_cases(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_batch_rows_do_not_know_each_other(case: Case, dtype: torch.dtype, data: Any) -> None:
    """Bit for bit, gradients and dropout too: in any order, in any company."""
    case = case.to(dtype)
    order = data.draw(st.permutations(range(len(case.floats["q_BNHD"]))))
    direction = output_gradient(case.floats["q_BNHD"])
    whole = run(case, direction)
    found = run(batch_rows(case, order), direction[order])
    assert_same_bits(found, {name: x[order] for name, x in whole.items()})
    cut = data.draw(st.integers(0, len(order)))
    for rows in (order[:cut], order[cut:]):
        part = run(batch_rows(case, rows), direction[rows])
        assert_same_bits(part, {name: x[rows] for name, x in whole.items()})


@settings(max_examples=60)
@given(case=operator_cases(), extra=st.integers(1, 40), more_queries=FLAG)
def test_trailing_padding_changes_no_token(case: Case, extra: int, more_queries: bool) -> None:
    at_end = case.masks["q_offset"] + case.floats["q_BNHD"].shape[1] == padding_of(case).shape[1]
    stay = {"q_global_BGHD"} if more_queries and at_end else {"q_global_BGHD", "q_BNHD"}
    floats = {
        name: x if name in stay else pad(x, (0, 0, 0, 0, 0, extra), value=3.0)
        for name, x in case.floats.items()
    }
    masks = {"padding_BN": pad(padding_of(case), (0, extra), value=True)}
    if "document_BN" in case.masks:
        document_BN = case.masks["document_BN"]
        last_BN = document_BN[:, -1:].expand(-1, extra)
        masks["document_BN"] = torch.cat([document_BN, last_BN], dim=1)
    longer = with_masks(replace(case, floats=leaves(floats)), **masks)
    direction = output_gradient(longer.floats["q_BNHD"])
    queries = case.floats["q_BNHD"].shape[1]
    right, found = run(case, direction[:, :queries]), run(longer, direction)
    real = {name: x[:, : right[name].shape[1]] for name, x in found.items()}
    assert_equal_to(real, right, TOLERANCE[torch.float64])
    for name, x in found.items():
        rest = x[:, right[name].shape[1] :]
        assert (rest == (float("inf") if name == "lse" else 0.0)).all(), name


@each_backend
@settings(max_examples=60)
@given(case=operator_cases(), data=st.data())
def test_a_query_depends_on_what_it_reaches_alone(backend: str, case: Case, data: Any) -> None:
    """All other numbers may be huge: keys outside the window, later ones of a causal pattern, those
    of other documents, padding; and nothing comes back to them.
    """
    batch, queries, heads, _ = case.floats["q_BNHD"].shape
    row, i = data.draw(st.integers(0, batch - 1)), data.draw(st.integers(0, queries - 1))
    query = case.masks["q_offset"] + i
    spoilt = {name: torch.full_like(x, 1e30) for name, x in case.floats.items()}
    slot = slot_of(case, row, query)
    for head in range(heads):
        kept = {"q_BNHD": [i], "q_global_BGHD": [] if slot is None else [slot]}
        kept |= dict.fromkeys(case.floats.keys() - kept.keys(), reached(case, row, head, query))
        for name, x in case.floats.items():
            spoilt[name][row, kept[name], head] = x[row, kept[name], head].detach()
    other = replace(case, floats=leaves(spoilt))
    out, lse = case.forward(backend)
    its_out, its_lse = other.forward(backend)
    assert torch.equal(its_out[row, i], out[row, i])
    assert torch.equal(its_lse[row, i], lse[row, i])
    wanted = case.gradients(out[row, i].sum()[None])
    found = other.gradients(its_out[row, i].sum()[None])
    assert_same_bits(found, wanted)


def assert_alone_is_the_same(case: Case, start: int, stop: int, backend: str) -> None:
    found = crop(case, start, stop).forward(backend)
    right = (x[:, start:stop] for x in case.forward(backend))
    names = ("out", "lse")
    assert_equal_to(
        dict(zip(names, found, strict=True)),
        dict(zip(names, right, strict=True)),
        TOLERANCE[torch.float64],
    )


@each_backend
@settings(max_examples=60)
@given(
    case=operator_cases(max_batch=1, whole=WHOLE, documents=st.just(True), dropout=NO_DROPOUT),
    data=st.data(),
)
def test_a_document_stands_alone(backend: str, case: Case, data: Any) -> None:
    number_N = case.masks["document_BN"][0]
    chosen = data.draw(st.sampled_from(number_N.unique().tolist()))
    inside = (number_N == chosen).nonzero().flatten().tolist()
    assert_alone_is_the_same(case, inside[0], inside[-1] + 1, backend)


@each_backend
@settings(max_examples=60)
@given(case=operator_cases(whole=WHOLE, causal=st.just(True)), data=st.data())
def test_a_causal_prefix_stands_alone(backend: str, case: Case, data: Any) -> None:
    stop = data.draw(st.integers(1, case.floats["k_BNHD"].shape[1]))
    assert_alone_is_the_same(case, 0, stop, backend)


@each_backend
@settings(max_examples=60)
@given(case=operator_cases(own_projections=st.just(False), dropout=NO_DROPOUT), beyond=FLAG)
def test_a_covering_window_is_full_attention(backend: str, case: Case, beyond: bool) -> None:
    """PyTorch's own attention is the judge; global tokens without own projections add nothing."""
    keys = case.floats["k_BNHD"].shape[1]
    pattern = AttentionPattern(keys - 1 + beyond, 1, case.pattern.causal)
    out, _ = replace(case, pattern=pattern).forward(backend)
    see_BNM = ~padding_of(case)[:, None].expand(-1, keys, -1)
    if "document_BN" in case.masks:
        document_BN = case.masks["document_BN"]
        see_BNM = see_BNM & (document_BN[:, :, None] == document_BN[:, None])
    if pattern.causal:
        see_BNM = see_BNM.tril()
    first, queries = case.masks["q_offset"], out.shape[1]
    q, k, v = (case.floats[f"{kind}_BNHD"].transpose(1, 2) for kind in "qkv")
    right = scaled_dot_product_attention(
        q, k, v, see_BNM[:, None, first : first + queries], scale=scale_of(case)
    ).transpose(1, 2)
    is_padding_BN = padding_of(case)[:, first : first + queries]
    right = right.masked_fill(is_padding_BN[:, :, None, None], 0.0)
    assert_equal_to({"out": out}, {"out": right}, TOLERANCE[torch.float64])


@settings(max_examples=60)
@given(case=operator_cases(heads=st.just(3)), head=st.integers(0, 2), d=st.integers(1, 6))
def test_heads_are_independent(case: Case, head: int, d: int) -> None:
    """One dilation for all is the same as naming it for each; and a head alone is that head."""
    window, causal = case.pattern.one_sided_window, case.pattern.causal
    one, each = (
        replace(case, pattern=AttentionPattern(window, dilation, causal)).run()
        for dilation in (d, (d,) * 3)
    )
    assert_same_bits(one, each)
    own = case.pattern.dilation_of_heads(3)[head]
    floats = leaves({name: x[:, :, head : head + 1] for name, x in case.floats.items()})
    # Dropout knows a head by its number.
    masks = {name: x for name, x in case.masks.items() if name != "dropout_p"}
    alone = Case(AttentionPattern(window, own, causal), floats, masks)
    together = replace(case, masks=masks)
    direction = output_gradient(case.floats["q_BNHD"])
    right = {k: x[:, :, head : head + 1] for k, x in run(together, direction).items()}
    found = run(alone, direction[:, :, head : head + 1])
    assert_equal_to(found, right, TOLERANCE[torch.float64])


@each_backend
@settings(max_examples=60)
@given(case=operator_cases(slots=st.sampled_from([1, 3, 20])), data=st.data())
def test_the_order_of_slots_does_not_matter(backend: str, case: Case, data: Any) -> None:
    """Nor how many are unused."""
    index_BG = case.masks["global_index_BG"]
    slots, more = index_BG.shape[1], data.draw(st.integers(0, 5))
    order = data.draw(st.permutations(range(slots)))
    padded_BG = pad(index_BG[:, order], (0, more), value=-1)
    floats = {k: x.detach() for k, x in case.floats.items()}
    if "q_global_BGHD" in floats:
        fill = (0, 0, 0, 0, 0, more)
        floats["q_global_BGHD"] = pad(floats["q_global_BGHD"][:, order], fill)
    other = with_masks(replace(case, floats=leaves(floats)), global_index_BG=padded_BG)
    found, right = other.run(backend), case.run(backend)
    if "dq_global_BGHD" in found:
        assert (found["dq_global_BGHD"][:, slots:] == 0).all()
        found["dq_global_BGHD"] = found["dq_global_BGHD"][:, :slots]
        right["dq_global_BGHD"] = right["dq_global_BGHD"][:, order]
    assert_equal_to(found, right, TOLERANCE[torch.float64])


@each_backend
@settings(max_examples=60)
@given(case=operator_cases(whole=WHOLE), data=st.data())
def test_pieces_of_a_sequence_are_the_whole(backend: str, case: Case, data: Any) -> None:
    """Each piece has its rows of q and all keys; gradients add up; dropout falls alike."""
    keys = case.floats["k_BNHD"].shape[1]
    cuts = sorted(data.draw(st.sets(st.integers(1, keys), max_size=3)) | {0, keys})
    direction = output_gradient(case.floats["q_BNHD"])
    whole, wanted = run(case, direction, backend), list(case.floats.values())
    parts, sums = [], [torch.zeros_like(x) for x in wanted]
    for start, stop in itertools.pairwise(cuts):
        q_BNHD = case.floats["q_BNHD"][:, start:stop]
        parts.append(case.forward(backend, q_BNHD=q_BNHD, q_offset=start))
        part = torch.autograd.grad(parts[-1][0], wanted, direction[:, start:stop])
        sums = [total + x for total, x in zip(sums, part, strict=True)]
    out, lse = (torch.cat(pieces, dim=1) for pieces in zip(*parts, strict=True))
    joined = {"out": out, "lse": lse}
    joined |= {f"d{name}": x for name, x in zip(case.floats, sums, strict=True)}
    assert_equal_to(joined, whole, TOLERANCE[torch.float64])
