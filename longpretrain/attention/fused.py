"""The public attention operator: has the call checked, picks a backend, and owns the compiled one.

The compiled library (``csrc/``) is loaded here and nowhere else, when a call first wants it. It
brings two operators, forward and backward; here they get what torch.compile, activation
checkpointing and autograd need of them.

Letters: B batch row, N query, M key (N unless keys reach further), H head, D number of a head,
G slot of a global token.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import Tensor

from longpretrain.attention.checks import check_call, check_kinds, refuse_forward_mode
from longpretrain.attention.gradient import differentiable, differentiate, keep_for_backward
from longpretrain.attention.pattern import AttentionPattern
from longpretrain.attention.portable import portable_attention, portable_attention_backward
from longpretrain.attention.reference import reference_attention
from longpretrain.errors import InputError

BACKENDS = ("auto", "fused", "portable", "reference")
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_FORWARD = "longpretrain::sliding_attention_fused"
_BACKWARD = "longpretrain::sliding_attention_fused_backward"
Floats = tuple[Tensor | None, ...]
# Called with the same arguments in the same order.
_TWINS = {
    _FORWARD: "longpretrain::sliding_attention_portable",
    _BACKWARD: "longpretrain::sliding_attention_portable_backward",
}
_log = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()


def why_not(backend: str) -> str | None:
    """Why a backend cannot run on this machine, as a sentence; None when it can.

    Raises:
        InputError: for a name that is no backend; for auto and fused also for an instruction set
            LONGPRETRAIN_CPU_LEVEL that the library lacks or this processor does not run.
    """
    _check_name(backend)
    reason = _why_no_library() if backend in {"auto", "fused"} else None
    return reason if backend == "fused" else None


def _check_name(backend: str) -> None:
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise InputError(
            "backend", got=repr(backend), wanted=" or ".join(BACKENDS), way_out="Leave it at auto."
        )


@functools.cache
def kernel_facts() -> Mapping[str, str]:
    """How the compiled library was built and what of it runs here; empty when there is none.

    Its keys: compiler, torch (whose headers it was built with), largest head size; instruction
    sets: built, machine (those that the processor runs), used; cuda (chips that the CUDA kernels
    were compiled for, or none, or emulated), cuda head sizes.

    Raises:
        InputError: as ``why_not``.
    """
    return _facts() if _why_no_library() is None else {}


def _facts() -> Mapping[str, str]:
    lines = torch.ops.longpretrain.kernel_facts().splitlines()
    return {name: value for name, _, value in (line.partition(": ") for line in lines)}


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
    """
    floats: Floats = (q_BNHD, k_BNHD, v_BNHD, q_global_BGHD, k_global_BNHD, v_global_BNHD)
    masks = (padding_BN, document_BN, global_index_BG, dropout_seed_B)
    check_kinds(floats, masks, pattern)
    floats = _autocast(floats)
    drop_below, scale = check_call(
        floats, masks, pattern, dropout_p=dropout_p, scale=scale, q_offset=q_offset
    )
    q, k, v, q_global, k_global, v_global = floats
    assert q is not None and k is not None and v is not None
    backend = _choose(backend, q)
    if global_index_BG is not None and global_index_BG.shape[1] == 0:
        global_index_BG = None
    if global_index_BG is None:
        q_global = k_global = v_global = None
    else:
        q_global = _gathered(q, global_index_BG - q_offset) if q_global is None else q_global
        k_global = k if k_global is None else k_global
        v_global = v if v_global is None else v_global

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
        refuse_forward_mode(q, k, v, q_global, k_global, v_global)
        attend = _portable
        if backend == "fused":
            attend = _fused
            document_BN, global_index_BG = _as_int64(document_BN), _as_int64(global_index_BG)
        out_BNHD, lse_BNH = attend(
            q, k, v, q_global, k_global, v_global, padding_BN, document_BN, global_index_BG,
            dropout_seed_B, pattern.one_sided_window, list(pattern.dilation_of_heads(q.shape[2])),
            pattern.causal, drop_below, scale, q_offset,
        )  # fmt: skip
    return (out_BNHD, lse_BNH) if return_lse else out_BNHD


def _choose(backend: str, q_BNHD: Tensor) -> str:
    """The backend that runs."""
    _check_name(backend)
    if backend in {"portable", "reference"}:
        return backend
    reason = why_not("fused") or _beyond_the_kernels(q_BNHD)
    if reason is None:
        return "fused"
    if backend == "auto":
        _announce(reason)
        return "portable"
    raise InputError(
        "backend",
        got=f"{backend!r}, but {reason}",
        wanted="a backend that can run here",
        way_out="Use backend='auto'.",
    )


def _beyond_the_kernels(q_BNHD: Tensor) -> str | None:
    """Why the compiled kernels cannot take a call like this; all its tensors are like q."""
    device, dtype, head_size = q_BNHD.device, q_BNHD.dtype, q_BNHD.shape[3]
    if device.type not in {"cpu", "cuda", "meta"}:
        return f"the compiled kernels run on the CPU and on CUDA, not on {device.type}"
    if device.type == "cuda":
        reason: str | None = _why_not_on(device.index or 0)
        if reason is not None:
            return reason
    if dtype not in FUSED_DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"the compiled kernels take float32, bfloat16 and float16, not {name}"
    sizes = _cuda_head_sizes(device.type)
    if sizes and head_size not in sizes:
        return f"the CUDA kernels take heads of {', '.join(map(str, sizes))}, not {head_size}"
    if head_size > _largest_head_size():
        return f"the compiled kernels take heads of up to {_largest_head_size()}, not {head_size}"
    return None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _largest_head_size() -> int:
    return int(kernel_facts()["largest head size"])


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cuda_head_sizes(device: str) -> tuple[int, ...]:
    """Nothing where the CPU's kernels run."""
    facts = kernel_facts()
    # The test-only library runs the CUDA kernels on the CPU, by emulation.
    if device == "cuda" or (device == "cpu" and facts["cuda"] == "emulated"):
        return tuple(map(int, facts["cuda head sizes"].split(", ")))
    return ()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
@functools.cache
def _why_not_on(index: int) -> str | None:
    """Why the CUDA kernels cannot run on a GPU."""
    found: str = torch.ops.longpretrain.cuda_why_not(index)
    return found or None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _announce(reason: str) -> None:
    _announce_once(reason)


@functools.cache
def _announce_once(reason: str) -> None:
    _log.warning("attention runs on the portable backend: %s", reason)


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


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _why_no_library() -> str | None:
    """Loads the compiled library on the first call; the reason, in words, if there is none.

    torch.compile calls it while it traces and takes the answer for a constant.
    """
    with _one_at_a_time:
        return _load_once()


@functools.cache
def _load_once() -> str | None:
    named = os.environ.get("LONGPRETRAIN_LIBRARY")
    found = None if named else importlib.util.find_spec("longpretrain.attention._kernels")
    path = named or (found.origin if found else None)
    if path is None:
        way_out = _way_to_build()
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            way_out = f"install a C++ compiler (Debian: apt-get install g++), then {way_out}"
        return f"the compiled library is not built: {way_out}"
    if not Path(path).is_file():
        return f"the compiled library is missing: there is no file {path}"
    try:
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the compiled library cannot be loaded: {error.__cause__ or error}"
    if not all(_signature(fused) == _signature(portable) for fused, portable in _TWINS.items()):
        way_out = "unset LONGPRETRAIN_LIBRARY" if named else _way_to_build()
        return f"{path} is no compiled library of this version: {way_out}"
    _check_level()
    torch.library.register_fake(_FORWARD, _forward_shapes)
    torch.library.register_fake(_BACKWARD, _backward_shapes)
    torch.library.register_autograd(_FORWARD, _backward, setup_context=keep_for_backward)
    return None


def _way_to_build() -> str:
    """In words. A checkout that Python imports from is no place that ``pip install .`` fills."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "csrc").is_dir() and (checkout / "pyproject.toml").is_file():
        return (
            f"run pip install -e . (or make setup) in {checkout}, from which Python imports "
            "longpretrain here, or after pip install . start Python in another folder"
        )
    return "run pip install . once more in a checkout of longpretrain"


def _check_level() -> None:
    """A level that was asked for is the one in use, never quietly another."""
    wanted, facts = os.environ.get("LONGPRETRAIN_CPU_LEVEL"), _facts()
    if wanted and wanted != facts["used"]:
        runs_here = facts["machine"].split(", ")
        levels = [level for level in facts["built"].split(", ") if level in runs_here]
        raise InputError(
            "environment variable LONGPRETRAIN_CPU_LEVEL",
            got=wanted,
            wanted=f"{' or '.join(levels)}, which the library has and this processor runs",
            way_out="Unset it, which takes the last of these, and start anew: it is read once.",
        )


def _signature(name: str) -> str | None:
    operator = getattr(torch.ops.longpretrain, name.split("::")[1], None)
    return operator and str(operator.default._schema).partition("(")[2]


def _forward_shapes(q_BNHD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse_BNH = q_BNHD.new_empty(q_BNHD.shape[:3], dtype=torch.float32)
    return q_BNHD.new_empty(q_BNHD.shape), lse_BNH


def _backward_shapes(
    dout_BNHD: Tensor, out_BNHD: Tensor, lse_BNH: Tensor, *inputs: Any
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in inputs[:6] if x is not None]


def _backward(ctx: Any, dout_BNHD: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return differentiate(_compiled_backward, ctx, dout_BNHD)


# The operators come to be when the library is loaded.
def _compiled(*inputs: Any) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = torch.ops.longpretrain.sliding_attention_fused.default(*inputs)
    return found


def _compiled_backward(*inputs: Any) -> list[Tensor]:
    found: list[Tensor]
    found = torch.ops.longpretrain.sliding_attention_fused_backward.default(*inputs)
    return found


_fused = differentiable(_compiled, _compiled_backward)
_portable = differentiable(portable_attention, portable_attention_backward)
