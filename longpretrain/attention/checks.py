"""What a user may pass to ``sliding_attention``: every check of it, told as an ``InputError``.

Letters: B batch row, N query, M key (N unless keys reach further), H head, D number of a head,
G slot of a global token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from longpretrain.attention.pattern import AttentionPattern
from longpretrain.attention.philox import GLOBAL_ROW
from longpretrain.errors import InputError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
WHOLE = (torch.int32, torch.int64)
FLOATS = ("q", "k", "v", "q_global", "k_global", "v_global")
MOST_KEYS = 1 << 29  # kLargestSequence of csrc/attention.h
MASKS = ("padding_BN", "document_BN", "global_index_BG", "dropout_seed_B")


def check_kinds(
    floats: tuple[Tensor | None, ...], masks: tuple[Tensor | None, ...], pattern: AttentionPattern
) -> None:
    """Tensors are tensors and the pattern is one: what autocast and the other checks rest on.

    Args:
        floats: in the order of ``FLOATS``; only the first three are needed.
        masks: in the order of ``MASKS``; none is needed.
        pattern: of the call.

    Raises:
        InputError: (a ``ValueError``) for the first that is something else.
    """
    for name, x in zip(FLOATS[:3], floats[:3], strict=True):
        _check_kind(name, x, Tensor, "a tensor")
    for name, x in zip(FLOATS[3:] + MASKS, floats[3:] + masks, strict=True):
        if x is not None:
            _check_kind(name, x, Tensor, "a tensor or None")
    _check_kind("pattern", pattern, AttentionPattern, "an AttentionPattern")


def check_call(
    floats: tuple[Tensor | None, ...],
    masks: tuple[Tensor | None, ...],
    pattern: AttentionPattern,
    *,
    dropout_p: float,
    scale: float | None,
    q_offset: int,
) -> tuple[int, float]:
    """All other checks, of what ``check_kinds`` has passed.

    Returns:
        ``drop_below``, the dropout in 256ths, and the scale of the scores.

    Raises:
        InputError: (a ``ValueError``) that names what was got and what was wanted.
    """
    q, k, v, q_global, k_global, v_global = floats
    padding_BN, document_BN, global_index_BG, dropout_seed_B = masks
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
    # Compiled code asks at run time, in C++: here the bound would become one of its graph.
    if not torch.compiler.is_compiling() and num_keys > MOST_KEYS:
        raise InputError("keys", got=num_keys, wanted="at most 2**29", way_out="Cut the text.")
    _check_tensor("q", q, q.shape, DTYPES, q.device)
    for name, x in (("k", k), ("v", v), ("k_global", k_global), ("v_global", v_global)):
        _check_tensor(name, x, (batch, num_keys, num_heads, head_size), (q.dtype,), q.device)
    if num_heads >= GLOBAL_ROW:
        raise InputError(
            "heads", got=num_heads, wanted=f"fewer than {GLOBAL_ROW}", way_out="Split the call."
        )
    pattern.dilation_of_heads(num_heads)
    _check_offset(q_offset, num_rows, num_keys)
    _check_tensor("padding_BN", padding_BN, (batch, num_keys), (torch.bool,), q.device)
    _check_tensor("document_BN", document_BN, (batch, num_keys), WHOLE, q.device)
    _check_tensor("dropout_seed_B", dropout_seed_B, (batch,), (torch.int64,), q.device)
    if global_index_BG is None:
        _check_no_projections(q_global, k_global, v_global)
    else:
        slots = global_index_BG.shape[1] if global_index_BG.dim() == 2 else 0
        _check_tensor("global_index_BG", global_index_BG, (batch, slots), WHOLE, q.device)
        _check_tensor(
            "q_global", q_global, (batch, slots, num_heads, head_size), (q.dtype,), q.device
        )
        if _is_readable(global_index_BG):
            _check_index(global_index_BG, num_keys)
    if document_BN is not None and _is_readable(document_BN):
        _check_documents(document_BN)
    return _check_dropout(dropout_p, dropout_seed_B), _check_scale(scale, head_size, q.dtype)


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """To PyTorch the tangent of an operator without a forward-mode rule is silently 0.

    Raises:
        InputError: (a ``ValueError``) when one of them has a tangent.
    """
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


def _check_kind(name: str, x: object, kind: type, wanted: str) -> None:
    if not isinstance(x, kind):
        raise InputError(
            name,
            got="None" if x is None else type(x).__name__,
            wanted=wanted,
            way_out="See the signature of sliding_attention.",
        )


def _check_tensor(
    name: str,
    x: Tensor | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    if x is None or (
        x.shape == shape and x.dtype in dtypes and x.device == device and x.layout == torch.strided
    ):
        return
    names = " or ".join(_short(dtype) for dtype in dtypes)
    layout = "" if x.layout == torch.strided else f"{_short(x.layout)} "
    raise InputError(
        name,
        got=f"{layout}{_short(x.dtype)} {list(x.shape)} on {x.device}",
        wanted=f"{names} {list(shape)} on {device}",
        way_out="All tensors must fit the queries' batch, heads, head size, dtype and device.",
    )


def _short(name: torch.dtype | torch.layout) -> str:
    return str(name).removeprefix("torch.")


def _check_offset(q_offset: int, num_rows: int, num_keys: int) -> None:
    is_whole = isinstance(q_offset, (int, torch.SymInt)) and not isinstance(q_offset, bool)
    if not is_whole or not 0 <= q_offset <= num_keys - num_rows:
        raise InputError(
            "q_offset",
            got=f"{q_offset} with {num_rows} queries and {num_keys} keys",
            wanted=f"0 to {num_keys - num_rows}: each query sits at the position of a key",
            way_out="Pass the keys of the whole sequence.",
        )


def _check_no_projections(*own: Tensor | None) -> None:
    given = [x for x in own if x is not None]
    if given:
        raise InputError(
            "global projections",
            got=f"{len(given)} of q_global, k_global, v_global but no global_index_BG",
            wanted="the positions of the global tokens",
            way_out="Pass global_index_BG, or leave the global projections out.",
        )


def _check_dropout(dropout_p: float, dropout_seed_B: Tensor | None) -> int:
    p = _as_number(dropout_p)
    drop_below = round(256 * p) if 0.0 <= p < 1.0 else 256
    if drop_below == 256:
        raise InputError(
            "dropout_p",
            got=_shown(dropout_p),
            wanted="a number from 0 to 255/256, when rounded to 256ths",
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


def _check_scale(scale: float | None, head_size: int, dtype: torch.dtype) -> float:
    if scale is None:
        return float(head_size**-0.5)
    number = _as_number(scale)
    most = torch.finfo(torch.promote_types(dtype, torch.float32)).max
    if not abs(number) <= most:
        raise InputError(
            "scale",
            got=_shown(scale),
            wanted=f"a number from {-most:.3g} to {most:.3g}, or None",
            way_out="Multiply the queries by a factor that wants a gradient; "
            "None is the head size to the power of -0.5.",
        )
    return number


def _as_number(x: object) -> float:
    """NaN when it is no number. A tensor is none: it may want a gradient, or wait on a device."""
    if isinstance(x, str | bytes | Tensor):
        return math.nan
    try:
        return float(x)  # type: ignore[arg-type]
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):
        return math.nan


def _shown(x: object) -> str:
    """In one short line, also an integer that Python refuses to write out."""
    if isinstance(x, Tensor):
        return f"a tensor ({type(x).__name__})"
    if isinstance(x, int) and x.bit_length() > 64:
        return f"an integer of {x.bit_length()} bits"
    return repr(x)


def _is_readable(x: Tensor) -> bool:
    """Whether looking at values costs no device synchronisation and there are values at all."""
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not isinstance(x, FakeTensor)
        and x.numel() > 0
    )


def _check_index(global_index_BG: Tensor, num_keys: int) -> None:
    # Slots are few: lists of Python are ten times as quick here as operators on tensors.
    used = [[position for position in row if position != -1] for row in global_index_BG.tolist()]
    named = [position for row in used for position in row]
    if named and not 0 <= min(named) <= max(named) < num_keys:
        raise InputError(
            "global_index_BG",
            got=f"values from {min(named)} to {max(named)}",
            wanted=f"positions from 0 to {num_keys - 1}, or -1 in an unused slot",
            way_out="Positions count from the first key.",
        )
    for row in used:
        if len(set(row)) < len(row):
            twice = next(position for position in row if row.count(position) > 1)
            raise InputError(
                "global_index_BG",
                got=f"position {twice} twice in one row",
                wanted="each position once",
                way_out="Put -1 in the slots that are left over.",
            )


def _check_documents(document_BN: Tensor) -> None:
    falls = document_BN[:, 1:] < document_BN[:, :-1]
    if bool(falls.any()):
        row, position = (int(i) for i in falls.nonzero()[0])
        raise InputError(
            "document_BN",
            got=f"a smaller number after token {position} of row {row}",
            wanted="numbers that never fall along a row",
            way_out="Number the documents in order; let padding carry on the last number.",
        )
