"""The public attention operator: has a call checked, a backend chosen, and runs it.

Letters: B batch row, N query, M key (N unless keys reach further), H head, D number of a head,
G slot of a global token.
"""

from __future__ import annotations

import functools
from typing import Literal, overload

import torch
from torch import Tensor

from longpretrain.attention.backends import choose, why_not
from longpretrain.attention.checks import check_call, check_kinds, refuse_forward_mode
from longpretrain.attention.gradient import differentiable
from longpretrain.attention.library import fused_attention, kernel_facts
from longpretrain.attention.pattern import AttentionPattern
from longpretrain.attention.portable import portable_attention, portable_attention_backward
from longpretrain.attention.reference import reference_attention

__all__ = ["kernel_facts", "sliding_attention", "why_not"]

Floats = tuple[Tensor | None, ...]  # q, k, v, then those of the global tokens
Masks = tuple[Tensor | None, ...]  # padding_BN, document_BN, global_index_BG, dropout_seed_B
_portable = differentiable(portable_attention, portable_attention_backward)


@overload
def sliding_attention(
    q_BNHD: Tensor,
    k_BNHD: Tensor,
    v_BNHD: Tensor,
    pattern: AttentionPattern,
    *,
    padding_BN: Tensor | None = None,
    global_index_BG: Tensor | None = None,
    q_global_BGHD: Tensor | None = None,
    k_global_BNHD: Tensor | None = None,
    v_global_BNHD: Tensor | None = None,
    document_BN: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed_B: Tensor | None = None,
    scale: float | None = None,
    q_offset: int = 0,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def sliding_attention(
    q_BNHD: Tensor,
    k_BNHD: Tensor,
    v_BNHD: Tensor,
    pattern: AttentionPattern,
    *,
    padding_BN: Tensor | None = None,
    global_index_BG: Tensor | None = None,
    q_global_BGHD: Tensor | None = None,
    k_global_BNHD: Tensor | None = None,
    v_global_BNHD: Tensor | None = None,
    document_BN: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed_B: Tensor | None = None,
    scale: float | None = None,
    q_offset: int = 0,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def sliding_attention(
    q_BNHD: Tensor,
    k_BNHD: Tensor,
    v_BNHD: Tensor,
    pattern: AttentionPattern,
    *,
    padding_BN: Tensor | None = None,
    global_index_BG: Tensor | None = None,
    q_global_BGHD: Tensor | None = None,
    k_global_BNHD: Tensor | None = None,
    v_global_BNHD: Tensor | None = None,
    document_BN: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed_B: Tensor | None = None,
    scale: float | None = None,
    q_offset: int = 0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention through a sliding window, plus global tokens (Longformer, section 3.1).

    A local query attends, in one softmax over the union, to the keys of its window and to every
    global key, each counted once, with the ordinary k and v. A global query attends to every key,
    with the ``*_global`` projections. Padding is out of reach for all, and beats global: a padding
    query returns exactly 0 and has zero gradient. Keys of another document are out of reach, and
    keys after the query when the pattern is causal, for global keys and global queries too.

    All numbers must be finite, also at padding and other keys out of reach: they are multiplied
    by a weight of 0.

    Args:
        q_BNHD: queries. Row i sits at position ``q_offset + i`` of the keys. A batch of no rows
            gives an empty output and empty gradients.
        k_BNHD: keys, possibly of more tokens than q, 2**29 at most. q, k, v and the global
            projections share one device and one dtype: float64, float32, bfloat16 or float16.
            Autocast casts them. Any strides will do; where those of the last dimension are not 1,
            the fused backend works on a copy.
        v_BNHD: values, shaped like k.
        pattern: window, dilation of each head, causal or not.
        padding_BN: bool, True at padding; as long as k.
        global_index_BG: int32 or int64 key positions of the global tokens; -1 in unused slots. No
            position twice in a row. A slot whose query is not among the rows of q writes nothing.
        q_global_BGHD: queries of the slots; default: gathered from q.
        k_global_BNHD: keys that global queries attend to; default: k.
        v_global_BNHD: their values; default: v.
        document_BN: int32 or int64 number of each token's document, never falling along a row (let
            padding carry on the last number); as long as k.
        dropout_p: share of attention weights dropped, in [0, 1): rounded to a multiple of 1/256.
        dropout_seed_B: int64, one seed for each batch row; needed when dropout_p > 0.
        scale: of the scores, a number (no tensor: it has no gradient); default D ** -0.5.
        q_offset: position of the first query among the keys.
        return_lse: return the log-sum-exp too.
        backend: auto, fused, portable or reference (dense, for tests).

    Returns:
        out_BNHD, contiguous, in the dtype of q; with ``return_lse`` also lse_BNH: the natural
        logarithm of the sum of exp(score) of each row, before dropout, float32 (float64 for
        float64 inputs), +inf for rows without any key, not differentiable.

    Raises:
        InputError: (a ``ValueError``) for anything that does not fit. The values of
            ``global_index_BG`` and ``document_BN`` are looked at on the CPU only. Also for
            forward-mode and second derivatives, which the reference backend alone has.
        torch.OutOfMemoryError: where results, gradients or scratch memory find no room; from the
            fused backend on the CPU too. What torch.compile has compiled raises a RuntimeError.
    """
    floats: Floats = (q_BNHD, k_BNHD, v_BNHD, q_global_BGHD, k_global_BNHD, v_global_BNHD)
    masks: Masks = (padding_BN, document_BN, global_index_BG, dropout_seed_B)
    check_kinds(floats, masks, pattern)
    floats = _autocast(floats)
    drop_below, scale = check_call(
        floats, masks, pattern, dropout_p=dropout_p, scale=scale, q_offset=q_offset
    )
    assert floats[0] is not None
    backend = choose(backend, floats[0])
    floats, masks = _with_projections(floats, masks, q_offset)
    run = _run_reference
    if backend != "reference":
        run = functools.partial(_run_blocked, is_fused=backend == "fused")
    out_BNHD, lse_BNH = run(
        floats, masks, pattern, drop_below=drop_below, scale=scale, q_offset=q_offset
    )
    return (out_BNHD, lse_BNH) if return_lse else out_BNHD


def _run_reference(
    floats: Floats,
    masks: Masks,
    pattern: AttentionPattern,
    *,
    drop_below: int,
    scale: float,
    q_offset: int,
) -> tuple[Tensor, Tensor]:
    q, k, v, q_global, k_global, v_global = floats
    padding_BN, document_BN, global_index_BG, dropout_seed_B = masks
    assert q is not None and k is not None and v is not None
    with torch.autocast(q.device.type, enabled=False):
        return reference_attention(
            q, k, v, pattern,
            q_global_BGHD=q_global, k_global_BMHD=k_global, v_global_BMHD=v_global,
            padding_BM=padding_BN, document_BM=document_BN, global_index_BG=global_index_BG,
            dropout_seed_B=dropout_seed_B, drop_below=drop_below, scale=scale,
            q_offset=q_offset,
        )  # fmt: skip


def _run_blocked(
    floats: Floats,
    masks: Masks,
    pattern: AttentionPattern,
    *,
    drop_below: int,
    scale: float,
    q_offset: int,
    is_fused: bool,
) -> tuple[Tensor, Tensor]:
    """The portable or the fused backend."""
    refuse_forward_mode(*floats)
    attend = _portable
    padding_BN, document_BN, global_index_BG, dropout_seed_B = masks
    if is_fused:
        attend = fused_attention
        document_BN, global_index_BG = _as_int64(document_BN), _as_int64(global_index_BG)
    assert floats[0] is not None
    return attend(
        *floats, padding_BN, document_BN, global_index_BG, dropout_seed_B,
        pattern.one_sided_window, list(pattern.dilation_of_heads(floats[0].shape[2])),
        pattern.causal, drop_below, scale, q_offset,
    )  # fmt: skip


def _with_projections(floats: Floats, masks: Masks, q_offset: int) -> tuple[Floats, Masks]:
    """Global tokens have all their projections, calls without any have none."""
    q, k, v, q_global, k_global, v_global = floats
    padding_BN, document_BN, global_index_BG, dropout_seed_B = masks
    if global_index_BG is None or global_index_BG.shape[1] == 0:
        return (q, k, v, None, None, None), (padding_BN, document_BN, None, dropout_seed_B)
    assert q is not None
    q_global = _gathered(q, global_index_BG - q_offset) if q_global is None else q_global
    k_global = k if k_global is None else k_global
    v_global = v if v_global is None else v_global
    return (q, k, v, q_global, k_global, v_global), masks


def _autocast(floats: Floats) -> Floats:
    """Cast as autocast casts the inputs of a matrix product; float64 stays."""
    like = floats[0]
    assert like is not None
    device = like.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return floats
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in floats)


def _as_int64(x: Tensor | None) -> Tensor | None:
    return x if x is None else x.to(torch.int64)


def _gathered(q_BNHD: Tensor, row_BG: Tensor) -> Tensor:
    """The rows of the global queries: [B, G, H, D]; any row for a slot that has none here."""
    each_B1 = torch.arange(len(row_BG), device=row_BG.device)[:, None]
    return q_BNHD[each_B1, row_BG.long().clamp(0, q_BNHD.shape[1] - 1)]
