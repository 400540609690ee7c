"""The public attention operator: checks what the user passed and picks a backend.

The compiled library will be loaded here and nowhere else. Until it is built, ``auto`` means the
portable backend.

Letters: B batch row, N query, M key (N unless keys reach further), H head, D number of a head,
G slot of a global token.
"""

from __future__ import annotations

import functools
import logging
from typing import Literal, overload

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from longpretrain.attention.pattern import AttentionPattern
from longpretrain.attention.philox import GLOBAL_ROW
from longpretrain.attention.portable import portable_attention
from longpretrain.attention.reference import reference_attention
from longpretrain.errors import InputError

BACKENDS = ("auto", "fused", "portable", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_log = logging.getLogger(__name__)


def why_not(backend: str) -> str | None:
    """Why a backend cannot run here, as a sentence; None when it can.

    Raises:
        InputError: for a name that is no backend.
    """
    if backend not in BACKENDS:
        raise InputError(
            "backend", got=repr(backend), wanted=" or ".join(BACKENDS), way_out="Leave it at auto."
        )
    if backend == "fused":
        return "the compiled library is not built: this version has no compiled kernels"
    return None


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
            gives an empty output.
        k_BNHD: keys, possibly of more tokens than q. q, k, v and the global projections share one
            device and one dtype: float64, float32, bfloat16 or float16. Autocast casts them.
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
        scale: of the scores; default D ** -0.5.
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
            forward-mode derivatives, which the reference backend alone has.
    """
    q, k, v, q_global, k_global, v_global = _autocast(
        q_BNHD, k_BNHD, v_BNHD, q_global_BGHD, k_global_BNHD, v_global_BNHD
    )
    assert q is not None and k is not None and v is not None
    backend = _choose(backend)
    drop_below = _check(
        (q, k, v, q_global, k_global, v_global),
        pattern=pattern,
        padding_BN=padding_BN,
        global_index_BG=global_index_BG,
        document_BN=document_BN,
        dropout_p=dropout_p,
        dropout_seed_B=dropout_seed_B,
        q_offset=q_offset,
    )
    if global_index_BG is not None and global_index_BG.shape[1] == 0:
        global_index_BG = None
    if global_index_BG is None:
        q_global = k_global = v_global = None
    else:
        q_global = _gathered(q, global_index_BG - q_offset) if q_global is None else q_global
        k_global = k if k_global is None else k_global
        v_global = v if v_global is None else v_global
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)

    if backend == "reference":
        with torch.autocast(q.device.type, enabled=False):
            out_BNHD, lse_BNH = reference_attention(
                q, k, v, pattern,
                q_global_BGHD=q_global, k_global_BMHD=k_global, v_global_BMHD=v_global,
                padding_BM=padding_BN, document_BM=document_BN, global_index_BG=global_index_BG,
                dropout_seed_B=dropout_seed_B, drop_below=drop_below, scale=scale,
                q_offset=q_offset,
            )  # fmt: skip
    else:
        _refuse_forward_mode(q, k, v, q_global, k_global, v_global)
        out_BNHD, lse_BNH = portable_attention(
            q, k, v, q_global, k_global, v_global, padding_BN, document_BN, global_index_BG,
            dropout_seed_B, pattern.one_sided_window, list(pattern.dilation_of_heads(q.shape[2])),
            pattern.causal, drop_below, scale, q_offset,
        )  # fmt: skip
    return (out_BNHD, lse_BNH) if return_lse else out_BNHD


def _choose(backend: str) -> str:
    """The backend that runs."""
    reason = why_not("fused" if backend == "auto" else backend)
    if reason is None:
        return backend
    if backend == "auto":
        if not torch.compiler.is_compiling():
            _announce(reason)
        return "portable"
    raise InputError(
        "backend",
        got=f"{backend!r}, but {reason}",
        wanted="a backend that can run here",
        way_out="Use backend='auto'.",
    )


@functools.cache
def _announce(reason: str) -> None:
    _log.info("attention runs on the portable backend: %s", reason)


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast as autocast casts the inputs of a matrix product; float64 stays."""
    like = tensors[0]
    assert like is not None
    device = like.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or x.dtype == torch.float64 else x.to(dtype) for x in tensors]


def _refuse_forward_mode(*tensors: Tensor | None) -> None:
    """To PyTorch the tangent of an operator without a forward-mode rule is silently 0."""
    if torch.compiler.is_compiling():
        return
    given = [x for x in tensors if x is not None]
    if any(forward_ad.unpack_dual(x).tangent is not None for x in given):  # type: ignore[no-untyped-call]
        raise InputError(
            "inputs",
            got="tensors with a forward-mode tangent (torch.func.jvp)",
            wanted="reverse-mode derivatives",
            way_out="Use backward, torch.func.vjp, or backend='reference'.",
        )


def _gathered(q_BNHD: Tensor, row_BG: Tensor) -> Tensor:
    """The rows of the global queries: [B, G, H, D]; any row for a slot that has none here."""
    each_B1 = torch.arange(len(row_BG), device=row_BG.device)[:, None]
    return q_BNHD[each_B1, row_BG.long().clamp(0, q_BNHD.shape[1] - 1)]


def _check(
    floats: tuple[Tensor | None, ...],
    *,
    pattern: AttentionPattern,
    padding_BN: Tensor | None,
    global_index_BG: Tensor | None,
    document_BN: Tensor | None,
    dropout_p: float,
    dropout_seed_B: Tensor | None,
    q_offset: int,
) -> int:
    """All checks of what the user passed. Returns ``drop_below``, the dropout in 256ths."""
    q, k, v, q_global, k_global, v_global = floats
    assert q is not None and k is not None and v is not None
    if q.dim() != 4 or k.dim() != 4 or 0 in q.shape[1:] or 0 in k.shape[1:]:
        raise InputError(
            "q and k",
            got=f"shapes {list(q.shape)} and {list(k.shape)}",
            wanted="[batch, tokens, heads, head size], all but the batch at least 1",
            way_out="Split the heads off before the call, and leave out empty sequences.",
        )
    batch, num_rows, num_heads, head_size = q.shape
    num_keys = k.shape[1]
    _check_tensor("q", q, q.shape, DTYPES, q.device)
    for name, x in (("k", k), ("v", v), ("k_global", k_global), ("v_global", v_global)):
        _check_tensor(name, x, (batch, num_keys, num_heads, head_size), (q.dtype,), q.device)
    if num_heads >= GLOBAL_ROW:
        raise InputError(
            "heads", got=num_heads, wanted=f"fewer than {GLOBAL_ROW}", way_out="Split the call."
        )
    pattern.dilation_of_heads(num_heads)
    if not 0 <= q_offset <= num_keys - num_rows:
        raise InputError(
            "q_offset",
            got=f"{q_offset} with {num_rows} queries and {num_keys} keys",
            wanted=f"0 to {num_keys - num_rows}: each query sits at the position of a key",
            way_out="Pass the keys of the whole sequence.",
        )
    whole = (torch.int32, torch.int64)
    _check_tensor("padding_BN", padding_BN, (batch, num_keys), (torch.bool,), q.device)
    _check_tensor("document_BN", document_BN, (batch, num_keys), whole, q.device)
    _check_tensor("dropout_seed_B", dropout_seed_B, (batch,), (torch.int64,), q.device)
    own = [x for x in (q_global, k_global, v_global) if x is not None]
    if global_index_BG is None:
        if own:
            raise InputError(
                "global projections",
                got=f"{len(own)} of q_global, k_global, v_global but no global_index_BG",
                wanted="the positions of the global tokens",
                way_out="Pass global_index_BG, or leave the global projections out.",
            )
    else:
        slots = global_index_BG.shape[1] if global_index_BG.dim() == 2 else 0
        _check_tensor("global_index_BG", global_index_BG, (batch, slots), whole, q.device)
        _check_tensor(
            "q_global", q_global, (batch, slots, num_heads, head_size), (q.dtype,), q.device
        )
    _check_values(global_index_BG, document_BN, num_keys)
    return _check_dropout(dropout_p, dropout_seed_B)


def _check_tensor(
    name: str,
    x: Tensor | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    if x is None or (x.shape == shape and x.dtype in dtypes and x.device == device):
        return
    names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    raise InputError(
        name,
        got=f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}",
        wanted=f"{names} {list(shape)} on {device}",
        way_out="All tensors must fit the queries' batch, heads, head size, dtype and device.",
    )


def _check_dropout(dropout_p: float, dropout_seed_B: Tensor | None) -> int:
    drop_below = round(256 * dropout_p) if 0.0 <= dropout_p < 1.0 else 256
    if drop_below == 256:
        raise InputError(
            "dropout_p",
            got=dropout_p,
            wanted="at least 0 and at most 255/256 when rounded to 256ths",
            way_out="Usual values are 0 to 0.2.",
        )
    if drop_below and dropout_seed_B is None:
        raise InputError(
            "dropout_seed_B",
            got=f"none with dropout_p={dropout_p}",
            wanted="int64, one seed for each batch row",
            way_out="Derive it from the run's seed, the step, the sample and the layer.",
        )
    return drop_below


def _check_values(
    global_index_BG: Tensor | None, document_BN: Tensor | None, num_keys: int
) -> None:
    """Checks that read values: only where reading is free."""
    if global_index_BG is not None and _is_readable(global_index_BG):
        low, high = -1, num_keys - 1
        if bool(((global_index_BG < low) | (global_index_BG > high)).any()):
            raise InputError(
                "global_index_BG",
                got=f"values from {int(global_index_BG.min())} to {int(global_index_BG.max())}",
                wanted=f"positions from 0 to {high}, or -1 in an unused slot",
                way_out="Positions count from the first key.",
            )
        ordered_BG = global_index_BG.sort(dim=1).values
        twice = (ordered_BG[:, 1:] == ordered_BG[:, :-1]) & (ordered_BG[:, 1:] >= 0)
        if bool(twice.any()):
            raise InputError(
                "global_index_BG",
                got=f"position {int(ordered_BG[:, 1:][twice][0])} twice in one row",
                wanted="each position once",
                way_out="Put -1 in the slots that are left over.",
            )
    if document_BN is not None and _is_readable(document_BN):
        falls = document_BN[:, 1:] < document_BN[:, :-1]
        if bool(falls.any()):
            row, position = (int(i) for i in falls.nonzero()[0])
            raise InputError(
                "document_BN",
                got=f"a smaller number after token {position} of row {row}",
                wanted="numbers that never fall along a row",
                way_out="Number the documents in order; let padding carry on the last number.",
            )


def _is_readable(x: Tensor) -> bool:
    """Whether looking at values costs no device synchronisation and there are values at all."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not isinstance(x, FakeTensor)
    )
