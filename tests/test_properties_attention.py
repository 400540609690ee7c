"""Attention as properties: every backend against a loop over single queries, and what must not
matter: the company in a batch, keys out of reach, layout, cuts, the order of slots.

The fused backend knows no float64: it gets each case rounded to float32.

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

from longpretrain.attention import AttentionPattern, blocks, why_not

F32, F64 = torch.float32, torch.float64
# The limits of docs/numerics.md, against the reference in float64.
TOLERANCE = {F64: 1e-11, F32: 1e-5}
TINY_BLOCKS = blocks.Limits(queries=5, scores=150, counters=300)

NO_DROPOUT, WHOLE = st.just(0.0), st.just(True)


@pytest.fixture(scope="module")
def backend(request: pytest.FixtureRequest) -> str:
    """Of the module, so that hypothesis can run many examples with one."""
    if reason := why_not(request.param):
        pytest.skip(reason)
    return str(request.param)


def backends(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("backend", names, indirect=True, scope="module")


each_backend = backends("portable", "reference", "fused")
each_operator = backends("portable", "fused")


def suited(case: Case, backend: str) -> Case:
    """In the widest dtype that the backend knows."""
    return case.to(F32) if backend == "fused" else case


def of_float32(case: Case) -> Case:
    """Numbers that float32 holds too: all backends get the same ones."""
    return case.to(F32).to(F64)


def assert_same_bits(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    for name, x in right.items():
        assert torch.equal(found[name], x), name


@settings(max_examples=120)
@given(case=operator_cases(max_keys=17, max_batch=2, heads=st.integers(1, 2)))
def test_every_backend_is_the_definition_query_by_query(case: Case) -> None:
    """Values, gradients and log-sum-exp; a query without keys gives exactly 0 and +inf."""
    case = of_float32(case)
    out, lse = query_by_query(case)
    right = {"out": out.detach(), "lse": lse} | case.gradients(out)
    nothing_BNH = lse.isinf()
    for backend in ("reference", "portable", "fused"):
        if why_not(backend):
            continue  # test_attention_seam.py tells
        found = suited(case, backend).run(backend)
        assert_close(found, right, case)
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
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "CPU_LIMITS", limits)
        assert_equals_reference(case, "portable", dtype, layout)


@backends("fused")
@settings(max_examples=200)
@given(case=operator_cases(max_keys=200), layout=st.sampled_from(LAYOUTS))
def test_fused_equals_reference(backend: str, case: Case, layout: str) -> None:
    assert_equals_reference(case, backend, F32, layout)


def assert_equals_reference(case: Case, backend: str, dtype: torch.dtype, layout: str) -> None:
    case = of_float32(case)
    found = replace(case, floats=laid_out(case.to(dtype).floats, layout)).run(backend)
    right = replace(case, floats=laid_out(case.floats, layout)).run("reference")
    assert_close(found, right, case)
    assert found["out"].dtype == dtype and found["out"].is_contiguous()
    assert not found["lse"].requires_grad


def assert_close(found: dict[str, Tensor], right: dict[str, Tensor], case: Case) -> None:
    """Within the limit of the dtype of ``found``: in float32 1e-5, of sums of at most 220 terms,
    each rounded by at most 6e-8. A gradient of q or k may besides be off by what the scores'
    gradients lose before they cancel, to 0 where a query reaches one key: a few roundings (``eps``
    is two) of the size that they had.
    """
    dtype = found["out"].dtype
    assert not any(x.isnan().any() for x in found.values())
    own_scale = [name for name in right if not name.startswith(("dq", "dk"))]
    assert_equal_to(*({k: x[k] for k in own_scale} for x in (found, right)), TOLERANCE[dtype])
    for name in right.keys() - set(own_scale):
        rounding = 4 * torch.finfo(dtype).eps * of_scores(case)
        limit = TOLERANCE[dtype] * right[name].abs().max().item() + rounding
        error = (found[name].double() - right[name].double()).abs().max().item()
        assert error <= limit, f"{name}: off by {error:.3g}, allowed {limit:.3g}"


def of_scores(case: Case) -> float:
    """How large a gradient of q or k may be before its terms cancel."""
    values = {k: x.abs().max().item() for k, x in case.floats.items()}
    value = max(x for name, x in values.items() if name.startswith("v_"))
    other = max(x for name, x in values.items() if not name.startswith("v_"))
    kept_scale = 256 / (256 - round(256 * case.masks.get("dropout_p", 0.0)))
    direction = output_gradient(case.floats["q_BNHD"]).abs().sum(dim=-1).max().item()
    return abs(scale_of(case)) * direction * value * other * kept_scale


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("portable", torch.bfloat16), ("portable", torch.float16), ("fused", torch.float16)],
    indirect=["backend"],
    ids=["portable_bf16", "portable_fp16", "fused_fp16"],
)
@settings(max_examples=40)
@given(
    case=operator_cases(
        own_projections=st.just(True),
        dropout=st.sampled_from([0.0, 0.1, 0.5]),  # more would go beyond float16
    )
)
def test_16_bits_are_rounded_at_the_end(backend: str, dtype: torch.dtype, case: Case) -> None:
    """The output is that of float32, rounded once. Gradients lose one rounding of their own and,
    through the scores, the one of the output that was kept for them. (Without own projections
    autograd adds two rounded gradients. The fused backend multiplies bfloat16 as it is, where the
    processor can: see test_attention_levels.py.)
    """
    low = case.to(dtype)
    direction = output_gradient(low.floats["q_BNHD"])
    found, middle = run(low, direction, backend), run(low.to(F32), direction.float(), backend)
    assert torch.equal(found["out"], middle["out"].to(dtype))
    assert torch.equal(found["lse"], middle["lse"])
    right = run(low.to(F64), direction.double(), "reference")
    rounding = torch.finfo(dtype).eps / 2
    kept = rounding * (direction.double() * right["out"]).abs().sum().item()
    largest = max(x.abs().max().item() for x in low.floats.values())
    for name in right.keys() - {"out", "lse"}:
        by_scores = 0.0 if name.startswith("dv") else abs(scale_of(low)) * largest * kept
        error = (found[name].double() - right[name]).abs().max().item()
        limit = rounding * right[name].abs().max().item() + by_scores
        assert error <= 1.01 * limit + 1e-6, name


@each_operator
@settings(max_examples=60)
@given(
    case=operator_cases(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    data=st.data(),
)
def test_batch_rows_do_not_know_each_other(
    backend: str, case: Case, dtype: torch.dtype, data: Any
) -> None:
    """Bit for bit, gradients and dropout too: in any order, in any company."""
    case = case.to(dtype)
    order = data.draw(st.permutations(range(len(case.floats["q_BNHD"]))))
    direction = output_gradient(case.floats["q_BNHD"])
    whole = run(case, direction, backend)
    found = run(batch_rows(case, order), direction[order], backend)
    assert_same_bits(found, {name: x[order] for name, x in whole.items()})
    cut = data.draw(st.integers(0, len(order)))
    for rows in (order[:cut], order[cut:]):
        part = run(batch_rows(case, rows), direction[rows], backend)
        assert_same_bits(part, {name: x[rows] for name, x in whole.items()})


@each_operator
@settings(max_examples=60)
@given(case=operator_cases(), extra=st.integers(1, 40), more_queries=FLAG)
def test_trailing_padding_changes_no_token(
    backend: str, case: Case, extra: int, more_queries: bool
) -> None:
    case = suited(case, backend)
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
    right, found = run(case, direction[:, :queries], backend), run(longer, direction, backend)
    real = {name: x[:, : right[name].shape[1]] for name, x in found.items()}
    assert_close(real, right, case)
    for name, x in found.items():
        rest = x[:, right[name].shape[1] :]
        assert (rest == (float("inf") if name == "lse" else 0.0)).all(), name


@each_backend
@settings(max_examples=60)
@given(case=operator_cases(), data=st.data())
def test_a_query_depends_on_what_it_reaches_alone(backend: str, case: Case, data: Any) -> None:
    """All other numbers may be huge: keys outside the window, later ones of a causal pattern, those
    of other documents, padding; and nothing comes back to them.

    To the last bit, except on the fused backend, which takes another way to the softmax of a whole
    tile of queries where the scores of one are huge. Nor may they be too huge there: an exponential
    in the backward pass is off by a rounding of the score, and float32 holds none above e**88.
    """
    case, huge = suited(case, backend), 1e3 if backend == "fused" else 1e30
    batch, queries, heads, _ = case.floats["q_BNHD"].shape
    row, i = data.draw(st.integers(0, batch - 1)), data.draw(st.integers(0, queries - 1))
    query = case.masks["q_offset"] + i
    spoilt = {name: torch.full_like(x, huge) for name, x in case.floats.items()}
    slot, alone = slot_of(case, row, query), {k: x != x for k, x in case.floats.items()}
    for head in range(heads):
        kept = {"q_BNHD": [i], "q_global_BGHD": [] if slot is None else [slot]}
        kept |= dict.fromkeys(case.floats.keys() - kept.keys(), reached(case, row, head, query))
        for name, x in case.floats.items():
            spoilt[name][row, kept[name], head] = x[row, kept[name], head].detach()
            alone[name][row, kept[name], head] = True
    other = replace(case, floats=leaves(spoilt))
    out, lse = case.forward(backend)
    its_out, its_lse = other.forward(backend)
    right = {"out": out[row, i].detach(), "lse": lse[row, i]}
    right |= case.gradients(out[row, i].sum()[None])
    found = {"out": its_out[row, i].detach(), "lse": its_lse[row, i]}
    found |= other.gradients(its_out[row, i].sum()[None])
    if backend == "fused":
        assert_close(found, right, case)
        assert all((found[f"d{name}"][~reach] == 0).all() for name, reach in alone.items())
    else:
        assert_same_bits(found, right)


def assert_alone_is_the_same(case: Case, start: int, stop: int, backend: str) -> None:
    case = suited(case, backend)
    found = crop(case, start, stop).forward(backend)
    right = (x[:, start:stop] for x in case.forward(backend))
    names = ("out", "lse")
    assert_close(dict(zip(names, found, strict=True)), dict(zip(names, right, strict=True)), case)


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
    case, keys = of_float32(case), case.floats["k_BNHD"].shape[1]
    pattern = AttentionPattern(keys - 1 + beyond, 1, case.pattern.causal)
    out, _ = suited(replace(case, pattern=pattern), backend).forward(backend)
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
    assert_close({"out": out}, {"out": right}, case)


@each_operator
@settings(max_examples=60)
@given(case=operator_cases(heads=st.just(3)), head=st.integers(0, 2), d=st.integers(1, 6))
def test_heads_are_independent(backend: str, case: Case, head: int, d: int) -> None:
    """One dilation for all is the same as naming it for each; and a head alone is that head."""
    case = suited(case, backend)
    window, causal = case.pattern.one_sided_window, case.pattern.causal
    one, each = (
        replace(case, pattern=AttentionPattern(window, dilation, causal)).run(backend)
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
    right = {k: x[:, :, head : head + 1] for k, x in run(together, direction, backend).items()}
    found = run(alone, direction[:, :, head : head + 1], backend)
    assert_close(found, right, case)


@each_backend
@settings(max_examples=60)
@given(case=operator_cases(slots=st.sampled_from([1, 3, 20])), data=st.data())
def test_the_order_of_slots_does_not_matter(backend: str, case: Case, data: Any) -> None:
    """Nor how many are unused."""
    case = suited(case, backend)
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
    assert_close(found, right, case)


@each_backend
@settings(max_examples=60)
@given(case=operator_cases(whole=WHOLE), data=st.data())
def test_pieces_of_a_sequence_are_the_whole(backend: str, case: Case, data: Any) -> None:
    """Each piece has its rows of q and all keys; gradients add up; dropout falls alike."""
    case, keys = suited(case, backend), case.floats["k_BNHD"].shape[1]
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
    assert_close(joined, whole, case)
