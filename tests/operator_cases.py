"""Any call of the operator, drawn by hypothesis, and its definition as a loop over queries.

Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from attention_cases import Case
from hypothesis import strategies as st
from test_attention_philox import byte_in_plain_python
from torch import Tensor

from longpretrain.attention import AttentionPattern

GLOBAL_ROW = 1 << 16
LAYOUTS = ["plain", "heads_first", "gaps", "one_row_for_all"]

FLAG = st.booleans()
HEADS = st.integers(1, 3)
DROPOUT = st.sampled_from([0.0, 0.1, 0.5, 255 / 256])
SLOTS = st.sampled_from([0, 0, 1, 3, 20])


class Drawn(Case):
    """Shows, where a test fails, what matters of it: all but the numbers."""

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        shapes = {name: [*x.shape] for name, x in self.floats.items()}
        masks = {k: x.tolist() if isinstance(x, Tensor) else x for k, x in self.masks.items()}
        printer.text(f"{self.pattern} {shapes} {masks}")


@st.composite
def operator_cases(
    draw: st.DrawFn,
    *,
    max_keys: int = 70,
    max_batch: int = 3,
    heads: st.SearchStrategy[int] = HEADS,
    whole: st.SearchStrategy[bool] = FLAG,
    causal: st.SearchStrategy[bool] = FLAG,
    documents: st.SearchStrategy[bool] = FLAG,
    dropout: st.SearchStrategy[float] = DROPOUT,
    own_projections: st.SearchStrategy[bool] = FLAG,
    slots: st.SearchStrategy[int] = SLOTS,
) -> Case:
    """All that one call takes, in float64. ``whole``: as many queries as keys."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    num_heads, batch, keys = draw(heads), draw(st.integers(1, max_batch)), draw(_keys(max_keys))
    q_offset, queries, head_size = 0, keys, draw(st.sampled_from([1, 3, 4, 5, 16, 17]))
    if not draw(whole):
        q_offset = draw(st.integers(0, keys - 1))
        queries = draw(st.integers(1, keys - q_offset))
    dilation = st.integers(1, 5) | st.just(keys + 3)
    pattern = AttentionPattern(
        draw(st.integers(0, 8) | st.integers(0, keys + 1)),
        draw(dilation | st.tuples(*[dilation] * num_heads)),
        draw(causal),
    )

    def normal(tokens: int) -> Tensor:
        shape = (batch, tokens, num_heads, head_size)
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    floats = {"q_BNHD": normal(queries), "k_BNHD": normal(keys), "v_BNHD": normal(keys)}
    masks: dict[str, Any] = {"q_offset": q_offset, "scale": draw(st.sampled_from([None, 0.7, -1]))}
    if draw(FLAG):
        masks["padding_BN"] = torch.stack([_padding(draw, keys, generator) for _ in range(batch)])
    if num_slots := draw(slots):
        masks["global_index_BG"] = _slots(draw, batch, keys, num_slots, generator)
        if draw(own_projections):
            floats["q_global_BGHD"] = normal(num_slots)
            floats |= {"k_global_BNHD": normal(keys), "v_global_BNHD": normal(keys)}
    if draw(documents):
        starts_BN = torch.rand(batch, keys, generator=generator) < draw(st.sampled_from([0.1, 0.5]))
        masks["document_BN"] = 2 * starts_BN.cumsum(dim=1) - 3  # any rising numbers will do
    if dropout_p := draw(dropout):
        masks["dropout_p"] = dropout_p
        masks["dropout_seed_B"] = torch.randint(-(2**63), 2**63 - 1, (batch,), generator=generator)
    return Drawn(pattern, floats, masks)


def _keys(most: int) -> st.SearchStrategy[int]:
    # Left alone, hypothesis draws 1 or 2 keys in most cases, of which masks leave nothing to test.
    usual = [n for n in (9, 17, 12, 40, 16, 33, 5, 2, 1) if n <= most]
    return st.sampled_from(usual) | st.integers(1, most)


def _padding(draw: st.DrawFn, keys: int, generator: torch.Generator) -> Tensor:
    padding_N = torch.zeros(keys, dtype=torch.bool)
    start = draw(st.integers(0, keys - 1))
    match draw(st.sampled_from(["scattered", "trailing", "middle", "none", "all"])):
        case "scattered":
            padding_N = torch.rand(keys, generator=generator) < 0.3
        case "trailing":
            padding_N[start:] = True
        case "middle":
            padding_N[start : draw(st.integers(start + 1, keys))] = True
        case "all":
            padding_N[:] = True
    return padding_N


def _slots(
    draw: st.DrawFn, batch: int, keys: int, slots: int, generator: torch.Generator
) -> Tensor:
    """Ragged: distinct positions in any order and, anywhere between them, unused slots."""
    dtype = draw(st.sampled_from([torch.int32, torch.int64]))
    index_BG = torch.full((batch, slots), -1, dtype=dtype)
    for index_G in index_BG:
        named = torch.randperm(keys, generator=generator)[: draw(st.integers(0, slots))]
        index_G[torch.randperm(slots, generator=generator)[: len(named)]] = named.to(dtype)
    return index_BG


def with_masks(case: Case, **changes: Any) -> Case:
    return replace(case, masks={**case.masks, **changes})


def leaves(floats: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().clone().requires_grad_() for name, x in floats.items()}


def batch_rows(case: Case, rows: list[int]) -> Case:
    floats = leaves({name: x[rows] for name, x in case.floats.items()})
    masks = {k: x[rows] if isinstance(x, Tensor) else x for k, x in case.masks.items()}
    return Case(case.pattern, floats, masks)


def run(case: Case, direction: Tensor, backend: str = "portable") -> dict[str, Tensor]:
    """Output, log-sum-exp, and gradients for this gradient of the output."""
    out, lse = case.forward(backend)
    found = torch.autograd.grad(out, list(case.floats.values()), direction)
    return {"out": out.detach(), "lse": lse} | {
        f"d{name}": x for name, x in zip(case.floats, found, strict=True)
    }


def padding_of(case: Case) -> Tensor:
    batch, keys = case.floats["k_BNHD"].shape[:2]
    padding_BN = case.masks.get("padding_BN")
    return torch.zeros(batch, keys, dtype=torch.bool) if padding_BN is None else padding_BN


def scale_of(case: Case) -> float:
    scale = case.masks["scale"]
    return case.floats["q_BNHD"].shape[3] ** -0.5 if scale is None else scale


def slot_of(case: Case, row: int, position: int) -> int | None:
    index_BG = case.masks.get("global_index_BG")
    named = [] if index_BG is None else index_BG[row].tolist()
    return named.index(position) if position in named else None


def reached(case: Case, row: int, head: int, query: int) -> list[int]:
    """Positions that the query attends to: the sentences of ``sliding_attention``, one by one."""
    padding_N = padding_of(case)[row].tolist()
    document_BN = case.masks.get("document_BN")
    document_N = [0] * len(padding_N) if document_BN is None else document_BN[row].tolist()
    d = case.pattern.dilation_of_heads(case.floats["q_BNHD"].shape[2])[head]
    if padding_N[query]:
        return []
    found = []
    for key in range(len(padding_N)):
        in_window = abs(query - key) <= case.pattern.one_sided_window * d and (query - key) % d == 0
        is_global = slot_of(case, row, key) is not None
        sees_all = slot_of(case, row, query) is not None
        if not (in_window or is_global or sees_all):
            continue
        if padding_N[key] or document_N[key] != document_N[query]:
            continue
        if case.pattern.causal and key > query:
            continue
        found.append(key)
    return found


def query_by_query(case: Case) -> tuple[Tensor, Tensor]:
    """The definition as a loop: a plain softmax over the keys that one query reaches."""
    floats, masks = case.floats, case.masks
    batch, queries, heads, head_size = floats["q_BNHD"].shape
    drop_below = round(256 * masks.get("dropout_p", 0.0))
    nothing = sum(0 * x.sum() for x in floats.values())  # a gradient of 0 where there is no other
    dilations = case.pattern.dilation_of_heads(heads)
    outs, lses = [], []
    for row, i, head in torch.cartesian_prod(*map(torch.arange, (batch, queries, heads))).tolist():
        query = masks["q_offset"] + i
        slot, keys = slot_of(case, row, query), reached(case, row, head, query)
        if not keys:
            outs.append(torch.zeros(head_size, dtype=torch.float64))
            lses.append(torch.tensor(float("inf"), dtype=torch.float64))
            continue
        q_D, name, row_head = floats["q_BNHD"][row, i, head], "", head
        if slot is not None:
            row_head += GLOBAL_ROW
            if "q_global_BGHD" in floats:
                q_D, name = floats["q_global_BGHD"][row, slot, head], "_global"
        k_nD, v_nD = (floats[f"{kind}{name}_BNHD"][row, keys, head] for kind in "kv")
        score_n = scale_of(case) * (k_nD @ q_D)
        weight_n = score_n.softmax(dim=0)
        if drop_below:
            seed = int(masks["dropout_seed_B"][row])
            drawn = [
                byte_in_plain_python(seed, row_head, query, key, dilations[head]) for key in keys
            ]
            kept_n = torch.tensor(drawn) >= drop_below
            weight_n = weight_n * kept_n * 256 / (256 - drop_below)
        outs.append(weight_n @ v_nD)
        lses.append(score_n.detach().exp().sum().log())
    out_BNHD = torch.stack(outs).view(batch, queries, heads, head_size)
    return out_BNHD + nothing, torch.stack(lses).view(batch, queries, heads)


def laid_out(floats: dict[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The same numbers (those of row 0 for all, in ``one_row_for_all``) behind other strides."""

    def one(x_BNHD: Tensor) -> Tensor:
        match layout:
            case "heads_first":
                return x_BNHD.transpose(1, 2).contiguous().transpose(1, 2)
            case "gaps":
                holder = x_BNHD.new_full((*x_BNHD.shape[:3], 2 * x_BNHD.shape[3] + 1), 7.0)
                holder[..., 1::2] = x_BNHD
                return holder[..., 1::2]
            case "one_row_for_all":
                return x_BNHD[:1].expand_as(x_BNHD)
        return x_BNHD

    return {name: one(x.detach()).requires_grad_() for name, x in floats.items()}


def crop(case: Case, start: int, stop: int) -> Case:
    """The tokens from start to stop as a case of their own; as many queries as keys."""
    floats = {k: x if k == "q_global_BGHD" else x[:, start:stop] for k, x in case.floats.items()}
    masks = dict(case.masks)
    for name in ("padding_BN", "document_BN"):
        if name in masks:
            masks[name] = masks[name][:, start:stop]
    if "global_index_BG" in masks:
        index_BG = masks["global_index_BG"]
        inside_BG = (index_BG >= start) & (index_BG < stop)
        masks["global_index_BG"] = torch.where(inside_BG, index_BG - start, -1)
    return Case(case.pattern, leaves(floats), masks)
