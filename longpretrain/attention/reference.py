"""The definition of right: dense attention with one boolean mask, differentiated by autograd.

It holds every score of every pair, so it is for reading and for tests. It follows Longformer,
section 3, and agrees with Hugging Face's ``LongformerSelfAttention``.

Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from longpretrain.attention import philox
from longpretrain.attention.pattern import AttentionPattern


def reference_attention(
    q_BNHD: Tensor,
    k_BMHD: Tensor,
    v_BMHD: Tensor,
    pattern: AttentionPattern,
    *,
    padding_BM: Tensor | None,
    document_BM: Tensor | None,
    global_index_BG: Tensor | None,
    q_global_BGHD: Tensor | None,
    k_global_BMHD: Tensor | None,
    v_global_BMHD: Tensor | None,
    dropout_seed_B: Tensor | None,
    drop_below: int,
    scale: float,
    q_offset: int,
    compute_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention as ``sliding_attention`` defines it; see there for the arguments.

    ``drop_below`` is round(256 p). ``compute_dtype`` is that of all arithmetic, by default float32,
    or float64 for float64 inputs; with it tests measure what plain PyTorch loses in low precision.
    Returns out_BNHD in the dtype of q, and lse_BNH in that of the arithmetic.
    """
    out_dtype = q_BNHD.dtype
    dtype = compute_dtype or torch.promote_types(out_dtype, torch.float32)
    batch, num_rows, num_heads, _ = q_BNHD.shape
    key_M = torch.arange(k_BMHD.shape[1], device=q_BNHD.device)
    query_N = key_M[q_offset : q_offset + num_rows]
    query_BN = query_N.expand(batch, -1)
    if padding_BM is None:
        padding_BM = torch.zeros_like(key_M, dtype=torch.bool).expand(batch, -1)
    dilations = pattern.dilation_of_heads(num_heads)

    def may_see(query_BN: Tensor) -> Tensor:
        return _may_see(query_BN, padding_BM, document_BM, pattern.causal)

    def kept(query_BN: Tensor, first_head: int) -> Tensor | None:
        if drop_below == 0:
            return None
        assert dropout_seed_B is not None
        byte_BHNM = _bytes(query_BN, key_M, dropout_seed_B, dilations, first_head)
        return byte_BHNM >= drop_below

    attend = functools.partial(
        _attend, dtype=dtype, scale=scale, kept_scale=256 / (256 - drop_below)
    )
    reach_BHNM = torch.stack([pattern.reaches(query_N[:, None], key_M, d) for d in dilations])[None]
    if global_index_BG is not None:
        is_slot_BGM = (global_index_BG[:, :, None] == key_M) & ~padding_BM[:, None]
        reach_BHNM = reach_BHNM | is_slot_BGM.any(dim=1)[:, None, None]
    out_BHND, lse_BHN = attend(
        q_BNHD, k_BMHD, v_BMHD, allowed=reach_BHNM & may_see(query_BN), kept=kept(query_BN, 0)
    )
    if global_index_BG is not None:
        assert q_global_BGHD is not None and k_global_BMHD is not None and v_global_BMHD is not None
        query_BG = global_index_BG.long().clamp(min=0)
        out_BHGD, lse_BHG = attend(
            q_global_BGHD, k_global_BMHD, v_global_BMHD,
            allowed=may_see(query_BG), kept=kept(query_BG, philox.GLOBAL_ROW),
        )  # fmt: skip
        is_slot_BGN = is_slot_BGM[:, :, query_N]
        out_BHND = _with_slots(out_BHND, out_BHGD, is_slot_BGN)
        lse_BHN = _with_slots(lse_BHN[..., None], lse_BHG[..., None], is_slot_BGN)[..., 0]

    is_padding_B1N = padding_BM[:, None, query_N]
    out_BHND = out_BHND.masked_fill(is_padding_B1N[..., None], 0.0)
    lse_BHN = lse_BHN.masked_fill(is_padding_B1N, float("inf"))
    return out_BHND.transpose(1, 2).to(out_dtype).contiguous(), lse_BHN.transpose(1, 2).contiguous()


def _may_see(
    query_BN: Tensor, padding_BM: Tensor, document_BM: Tensor | None, causal: bool
) -> Tensor:
    """What holds for local and global queries alike: bool [B, 1, N, M]."""
    key_M = torch.arange(padding_BM.shape[1], device=query_BN.device)
    see_BNM = ~padding_BM[:, None].expand(-1, query_BN.shape[1], -1)
    if document_BM is not None:
        query_document_BN = document_BM.gather(1, query_BN)
        see_BNM = see_BNM & (query_document_BN[:, :, None] == document_BM[:, None])
    if causal:
        see_BNM = see_BNM & (key_M <= query_BN[:, :, None])
    return see_BNM[:, None]


def _bytes(
    query_BN: Tensor, key_M: Tensor, seed_B: Tensor, dilations: tuple[int, ...], first_head: int
) -> Tensor:
    """The byte of dropout of every weight: [B, H, N, M]."""
    dilation_H = torch.tensor(dilations, device=key_M.device)
    head_H = first_head + torch.arange(len(dilations), device=key_M.device)
    return philox.dropout_byte(
        seed_B[:, None, None, None],
        head_H[:, None, None],
        query_BN[:, None, :, None],
        key_M,
        dilation=dilation_H[:, None, None],
    )


def _with_slots(x_BHND: Tensor, slot_BHGD: Tensor, is_slot_BGN: Tensor) -> Tensor:
    """Row n is the row of the slot that names it, if there is one."""
    is_global_B1N1 = is_slot_BGN.any(dim=1)[:, None, :, None]
    slot_B1N1 = is_slot_BGN.to(torch.int8).argmax(dim=1)[:, None, :, None]
    return torch.where(is_global_B1N1, slot_BHGD.gather(2, slot_B1N1.expand_as(x_BHND)), x_BHND)


def _attend(
    q_BNHD: Tensor,
    k_BMHD: Tensor,
    v_BMHD: Tensor,
    *,
    allowed: Tensor,
    kept: Tensor | None,
    kept_scale: float,
    scale: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Softmax-weighted mean of the values; a row with nothing allowed gives 0, and lse +inf."""
    q_BHND, k_BHMD, v_BHMD = (x.to(dtype).transpose(1, 2) for x in (q_BNHD, k_BMHD, v_BMHD))
    score_BHNM = (q_BHND * scale) @ k_BHMD.transpose(2, 3)
    score_BHNM = score_BHNM.masked_fill(~allowed, float("-inf"))
    # A softmax of nothing would be NaN, in the backward pass too: such rows get harmless scores.
    empty_BHN1 = ~allowed.any(dim=-1, keepdim=True)
    score_BHNM = score_BHNM.masked_fill(empty_BHN1, 0.0)
    weight_BHNM = score_BHNM.softmax(dim=-1).masked_fill(empty_BHN1, 0.0)
    lse_BHN = score_BHNM.detach().logsumexp(dim=-1).masked_fill(empty_BHN1[..., 0], float("inf"))
    if kept is not None:
        weight_BHNM = weight_BHNM * kept * kept_scale
    return weight_BHNM @ v_BHMD, lse_BHN
