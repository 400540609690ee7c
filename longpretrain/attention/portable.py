"""Sliding attention in plain PyTorch, on any device, with memory linear in the number of tokens.

Blocks of queries meet slices of keys (``blocks.py``) in one softmax (``softmax.py``); the rows of
global queries are then computed over all keys and written over their ordinary rows. The backward
pass computes the weights again from the log-sum-exp, as FlashAttention does (Dao et al., 2022), so
nothing but the inputs, the output and the log-sum-exp is kept. Blocks run in a fixed order and each
adds into its own slice, so results repeat bit for bit. All arithmetic is float32, float64 for
float64 inputs.

To PyTorch it is one opaque operator with a gradient: torch.compile, activation checkpointing and
fake tensors see shapes only.

Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token,
S stream (batch row x head of one dilation).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from longpretrain.attention.blocks import HeadGroup, Problem
from longpretrain.attention.gradient import differentiate, keep_for_backward
from longpretrain.attention.softmax import (
    NO_KEYS,
    NOTHING,
    SIXTEEN,
    Source,
    attend,
    attend_backward,
)


@torch.library.custom_op("longpretrain::sliding_attention_portable", mutates_args=())
def portable_attention(  # noqa: PLR0917 - the schema of an operator is flat
    q_BNHD: Tensor,
    k_BMHD: Tensor,
    v_BMHD: Tensor,
    q_global_BGHD: Tensor | None,
    k_global_BMHD: Tensor | None,
    v_global_BMHD: Tensor | None,
    padding_BM: Tensor | None,
    document_BM: Tensor | None,
    global_index_BG: Tensor | None,
    dropout_seed_B: Tensor | None,
    one_sided_window: int,
    dilation_of_heads: Sequence[int],
    causal: bool,
    drop_below: int,
    scale: float,
    q_offset: int,
) -> tuple[Tensor, Tensor]:
    """See ``sliding_attention``, which has checked the arguments; returns out_BNHD and lse_BNH."""
    inputs = (q_BNHD, k_BMHD, v_BMHD, q_global_BGHD, k_global_BMHD, v_global_BMHD)
    out_BNHD = q_BNHD.new_empty(q_BNHD.shape)
    lse_BNH = q_BNHD.new_empty(q_BNHD.shape[:3], dtype=_arithmetic(q_BNHD.dtype))
    if len(q_BNHD) == 0:
        return out_BNHD, lse_BNH
    with torch.autocast(q_BNHD.device.type, enabled=False):
        problem = _problem(
            inputs,
            padding_BM=padding_BM,
            document_BM=document_BM,
            global_index_BG=global_index_BG,
            seed_B=dropout_seed_B,
            one_sided_window=one_sided_window,
            causal=causal,
            drop_below=drop_below,
            q_offset=q_offset,
        )
        for group in _groups(problem, dilation_of_heads, q_BNHD):
            out_SND, lse_SN1 = _group_forward(group, _laid_out(inputs, group, scale))
            _from_streams(out_SND, group, out_BNHD)
            _from_streams(lse_SN1, group, lse_BNH[..., None])
        if padding_BM is not None:
            is_padding_BN = padding_BM[:, q_offset : q_offset + problem.num_rows]
            out_BNHD.masked_fill_(is_padding_BN[:, :, None, None], 0.0)
            lse_BNH.masked_fill_(is_padding_BN[:, :, None], NO_KEYS)
    return out_BNHD, lse_BNH


@torch.library.custom_op("longpretrain::sliding_attention_portable_backward", mutates_args=())
def portable_attention_backward(  # noqa: PLR0917
    dout_BNHD: Tensor,
    out_BNHD: Tensor,
    lse_BNH: Tensor,
    q_BNHD: Tensor,
    k_BMHD: Tensor,
    v_BMHD: Tensor,
    q_global_BGHD: Tensor | None,
    k_global_BMHD: Tensor | None,
    v_global_BMHD: Tensor | None,
    padding_BM: Tensor | None,
    document_BM: Tensor | None,
    global_index_BG: Tensor | None,
    dropout_seed_B: Tensor | None,
    one_sided_window: int,
    dilation_of_heads: Sequence[int],
    causal: bool,
    drop_below: int,
    scale: float,
    q_offset: int,
) -> list[Tensor]:
    """The gradients of q, k, v and, when there are global tokens, of their own projections."""
    inputs = (q_BNHD, k_BMHD, v_BMHD, q_global_BGHD, k_global_BMHD, v_global_BMHD)
    gradients = _like(inputs)
    if len(q_BNHD) == 0:
        return gradients
    with torch.autocast(q_BNHD.device.type, enabled=False):
        problem = _problem(
            inputs,
            padding_BM=padding_BM,
            document_BM=document_BM,
            global_index_BG=global_index_BG,
            seed_B=dropout_seed_B,
            one_sided_window=one_sided_window,
            causal=causal,
            drop_below=drop_below,
            q_offset=q_offset,
        )
        for group in _groups(problem, dilation_of_heads, q_BNHD):
            dout_SND = _to_streams(dout_BNHD, group, spare_rows=1)
            out_SND = _to_streams(out_BNHD, group, spare_rows=1)
            lse_SN1 = _to_streams(lse_BNH[..., None], group, spare_rows=1, multiple=1)
            lse_SN1[:, -1].fill_(NO_KEYS)
            dout_SND.masked_fill_(lse_SN1 == NO_KEYS, 0.0)
            delta_SN1 = out_SND.mul_(dout_SND).sum(dim=-1, keepdim=True)
            rows = (dout_SND.mul_(problem.kept_scale), lse_SN1, delta_SN1)
            found = _group_backward(group, _laid_out(inputs, group, scale), rows)
            for i, (gradient_SND, gradient_BNHD) in enumerate(zip(found, gradients, strict=True)):
                # Queries entered as q * scale.
                _from_streams(
                    gradient_SND.mul_(scale) if i % 3 == 0 else gradient_SND, group, gradient_BNHD
                )
    return gradients


def _group_forward(group: HeadGroup, streams: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of one dilation's heads, with a spare row at the end of each stream.

    The spare row takes what slots without a row of their own write.
    """
    problem, (q_SND, k_SMD, v_SMD) = group.problem, streams[:3]
    num_streams, num_rows, head_size = q_SND.shape
    out_SND = q_SND.new_empty(num_streams, num_rows + 1, head_size)
    lse_SN1 = q_SND.new_empty(num_streams, num_rows + 1, 1)
    band = Source(k_SMD, v_SMD)
    for work in group.local_work(band, _slots(problem, band)):
        found = attend(q_SND[work.where], work, problem.kept_scale)
        out_SND[work.where], lse_SN1[work.where] = found
    if problem.slot_row_BG is not None:
        q_SGD, k_SMD, v_SMD = streams[3:]
        out_SGD, lse_SG1 = torch.empty_like(q_SGD), torch.empty_like(q_SGD[..., :1])
        for work in group.global_work(Source(k_SMD, v_SMD)):
            found = attend(q_SGD[work.where], work, problem.kept_scale)
            out_SGD[work.where], lse_SG1[work.where] = found
        _put_rows(out_SND, problem.slot_row_BG, out_SGD)
        _put_rows(lse_SN1, problem.slot_row_BG, lse_SG1)
    return out_SND, lse_SN1


def _group_backward(
    group: HeadGroup, streams: list[Tensor], rows: tuple[Tensor, Tensor, Tensor]
) -> list[Tensor]:
    """The gradients of the streams; ``rows`` are dout * kept_scale, lse and delta, spare row too.

    The spare row has lse +inf and so sends nothing back.
    """
    problem, slot_row_BG = group.problem, group.problem.slot_row_BG
    q_SND, k_SMD, v_SMD = streams[:3]
    local_rows = rows
    if slot_row_BG is not None:
        # A global query's ordinary row was written over.
        lse_SN1 = rows[1].clone()
        _put_rows(lse_SN1, slot_row_BG, torch.full_like(_rows(lse_SN1, slot_row_BG), NO_KEYS))
        local_rows = (rows[0], lse_SN1, rows[2])
    dq_SND, dk_SMD, dv_SMD = (torch.zeros_like(x) for x in (q_SND, k_SMD, v_SMD))
    band = Source(k_SMD, v_SMD, dk_SMD, dv_SMD)
    slots = _slots(problem, band)
    for work in group.local_work(band, slots):
        of_block = [x[work.where] for x in local_rows]
        dq_SND[work.where] = attend_backward(work, q_SND[work.where], *of_block)
    gradients = [dq_SND, dk_SMD, dv_SMD]
    if slots is not None:
        assert slots.dk_SMD is not None and slots.dv_SMD is not None
        assert slot_row_BG is not None and problem.slot_key_BG is not None
        _add_rows(dk_SMD, problem.slot_key_BG, slots.dk_SMD)
        _add_rows(dv_SMD, problem.slot_key_BG, slots.dv_SMD)
        global_rows = [_rows(x, slot_row_BG) for x in rows]
        q_SGD, k_SMD, v_SMD = streams[3:]
        dq_SGD, dk_SMD, dv_SMD = (torch.zeros_like(x) for x in streams[3:])
        for work in group.global_work(Source(k_SMD, v_SMD, dk_SMD, dv_SMD)):
            of_block = [x[work.where] for x in global_rows]
            dq_SGD[work.where] = attend_backward(work, q_SGD[work.where], *of_block)
        gradients += [dq_SGD, dk_SMD, dv_SMD]
    return gradients


def _problem(
    inputs: Sequence[Tensor | None],
    *,
    padding_BM: Tensor | None,
    document_BM: Tensor | None,
    global_index_BG: Tensor | None,
    seed_B: Tensor | None,
    one_sided_window: int,
    causal: bool,
    drop_below: int,
    q_offset: int,
) -> Problem:
    q_BNHD, k_BMHD = inputs[0], inputs[1]
    assert q_BNHD is not None and k_BMHD is not None
    num_rows, num_keys = q_BNHD.shape[1], k_BMHD.shape[1]

    def bias(hidden: Tensor) -> Tensor:
        zeros = q_BNHD.new_zeros(hidden.shape, dtype=_arithmetic(q_BNHD.dtype))
        return zeros.masked_fill_(hidden, NOTHING)

    padding_bias_BM = None if padding_BM is None else bias(padding_BM)
    band_bias_BM = padding_bias_BM
    slot_key_BG = slot_bias_BG = slot_row_BG = None
    num_slots = 0
    if global_index_BG is not None:
        num_slots = global_index_BG.shape[1]
        global_index_BG = pad(global_index_BG, (0, -num_slots % SIXTEEN), value=-1)
        slot_key_BG = global_index_BG.long().clamp(min=0)
        unused_BG = global_index_BG < 0
        if padding_BM is not None:
            unused_BG = unused_BG | padding_BM.gather(1, slot_key_BG)
        slot_bias_BG = bias(unused_BG)
        row_BG = slot_key_BG - q_offset
        elsewhere_BG = unused_BG | (row_BG < 0) | (row_BG >= num_rows)
        slot_row_BG = row_BG.masked_fill(elsewhere_BG, num_rows)
        # One spare key takes the marks of unused slots.
        is_global_BM = unused_BG.new_zeros(len(q_BNHD), num_keys + 1)
        is_global_BM.scatter_(1, slot_key_BG.masked_fill(unused_BG, num_keys), True)
        band_bias_BM = bias(is_global_BM[:, :num_keys])
        if padding_bias_BM is not None:
            band_bias_BM += padding_bias_BM
    return Problem(
        batch=len(q_BNHD),
        num_rows=num_rows,
        num_keys=num_keys,
        one_sided_window=one_sided_window,
        causal=causal,
        q_offset=q_offset,
        drop_below=drop_below,
        num_slots=num_slots,
        seed_B=seed_B,
        document_BM=document_BM,
        padding_bias_BM=padding_bias_BM,
        band_bias_BM=band_bias_BM,
        slot_key_BG=slot_key_BG,
        slot_bias_BG=slot_bias_BG,
        slot_row_BG=slot_row_BG,
    )


def _groups(problem: Problem, dilations: Sequence[int], like: Tensor) -> Iterator[HeadGroup]:
    # From the number of keys on, a dilation leaves each key alone in its class at place 0: the same
    # reach and the same dropout, without work that follows the dilation.
    dilations = [min(dilation, problem.num_keys) for dilation in dilations]
    for dilation in sorted(set(dilations)):
        heads = [head for head, its in enumerate(dilations) if its == dilation]
        yield HeadGroup(problem, dilation, heads, like.device)


def _slots(problem: Problem, band: Source) -> Source | None:
    """The ordinary keys and values of the global tokens, gathered."""
    if problem.slot_key_BG is None:
        return None
    k_SGD, v_SGD = (_rows(x, problem.slot_key_BG) for x in (band.k_SMD, band.v_SMD))
    if band.dk_SMD is None:
        return Source(k_SGD, v_SGD)
    return Source(k_SGD, v_SGD, torch.zeros_like(k_SGD), torch.zeros_like(v_SGD))


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _laid_out(inputs: Sequence[Tensor | None], group: HeadGroup, scale: float) -> list[Tensor]:
    """The inputs as streams, in their order; queries scaled, all but local ones filled up."""
    fill_keys = group.num_filled - group.problem.num_keys
    fill_slots = -group.problem.num_slots % SIXTEEN
    fills = (0, fill_keys, fill_keys, fill_slots, fill_keys, fill_keys)
    streams = [
        _to_streams(x, group, spare_rows=fill)
        for x, fill in zip(inputs, fills, strict=True)
        if x is not None
    ]
    for q in streams[::3]:
        q.mul_(scale)
    return streams


def _to_streams(
    x_BNHD: Tensor, group: HeadGroup, spare_rows: int = 0, multiple: int = SIXTEEN
) -> Tensor:
    """The group's heads as contiguous [S, N + spare rows, D] in the dtype of the arithmetic.

    D is filled up to a multiple; the fill and the spare rows are 0.
    """
    batch, num_tokens, _, head_size = x_BNHD.shape
    fill = -head_size % multiple
    shape = (batch, len(group.heads), num_tokens + spare_rows, head_size + fill)
    x_BHND = x_BNHD.new_empty(shape, dtype=_arithmetic(x_BNHD.dtype))
    own_BNHD = x_BHND[:, :, :num_tokens, :head_size].transpose(1, 2)
    for own, run in group.slices():
        own_BNHD[:, :, own] = x_BNHD[:, :, run]
    x_BHND[:, :, num_tokens:].zero_()
    if fill:
        x_BHND[..., head_size:].zero_()
    return x_BHND.flatten(0, 1)


def _from_streams(x_SND: Tensor, group: HeadGroup, into_BNHD: Tensor) -> None:
    """Write the streams to the group's heads, in the dtype found there; the fill stays behind."""
    batch, num_tokens, _, head_size = into_BNHD.shape
    x_BNHD = _by_batch(x_SND, batch)[:, :, :num_tokens, :head_size].transpose(1, 2)
    for own, run in group.slices():
        into_BNHD[:, :, run] = x_BNHD[:, :, own]


def _by_batch(x_SND: Tensor, batch: int) -> Tensor:
    return x_SND.view(batch, -1, *x_SND.shape[1:])


def _by_row(x_SND: Tensor, row_BG: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The streams as [B, N, H, D], and the index that picks [B, G, H, D]."""
    batch = len(row_BG)
    each_B1 = torch.arange(batch, device=row_BG.device)[:, None]
    return _by_batch(x_SND, batch).transpose(1, 2), (each_B1, row_BG)


def _rows(x_SND: Tensor, row_BG: Tensor) -> Tensor:
    """The rows that the batch row of each stream names: [S, G, D]."""
    x_BNHD, where = _by_row(x_SND, row_BG)
    return x_BNHD[where].transpose(1, 2).flatten(0, 1)


def _put_rows(x_SND: Tensor, row_BG: Tensor, rows_SGD: Tensor) -> None:
    """Write what ``_rows`` would read; only the spare row may be named twice."""
    x_BNHD, where = _by_row(x_SND, row_BG)
    x_BNHD[where] = _by_batch(rows_SGD, len(row_BG)).transpose(1, 2)


def _add_rows(x_SND: Tensor, row_BG: Tensor, rows_SGD: Tensor) -> None:
    """Add to what ``_rows`` would read; unused slots add 0 to row 0."""
    x_BNHD, where = _by_row(x_SND, row_BG)
    rows_BGHD = _by_batch(rows_SGD, len(row_BG)).transpose(1, 2)
    x_BNHD.index_put_(where, rows_BGHD, accumulate=True)


def _like(inputs: Sequence[Tensor | None]) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs if x is not None]


@portable_attention.register_fake
def _forward_shapes(q_BNHD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_BNH = q_BNHD.new_empty(q_BNHD.shape[:3], dtype=_arithmetic(q_BNHD.dtype))
    return q_BNHD.new_empty(q_BNHD.shape), lse_BNH


@portable_attention_backward.register_fake
def _backward_shapes(
    dout_BNHD: Tensor, out_BNHD: Tensor, lse_BNH: Tensor, *inputs: Any
) -> list[Tensor]:
    return _like(inputs[:6])


def _backward(ctx: Any, dout_BNHD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return differentiate(portable_attention_backward, ctx, dout_BNHD)


portable_attention.register_autograd(_backward, setup_context=keep_for_backward)
