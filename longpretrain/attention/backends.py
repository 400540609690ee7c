"""Which backend runs: what each can do on this machine, and the choice for a call.

Letters: B batch row, N query, H head, D number of a head.
"""

from __future__ import annotations

import contextlib
import functools
import logging

import torch
from torch import Tensor

from longpretrain.attention.constant import constant_when_compiled
from longpretrain.attention.library import kernel_facts, why_no_library, why_not_on_gpu
from longpretrain.errors import InputError

BACKENDS = ("auto", "fused", "portable", "reference")
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_log = logging.getLogger(__name__)
_able_gpus: set[int] = set()


def why_not(backend: str, device: torch.device | str | None = None) -> str | None:
    """Why a backend cannot run here, as a sentence; None when it can.

    Args:
        backend: auto, fused, portable or reference.
        device: where the tensors would be, such as ``cuda`` or ``cuda:1``; None: on the CPU. A GPU
            is asked, which makes a CUDA context on it.

    Raises:
        InputError: for a name that is no backend or no device; for auto and fused also for an
            instruction set LONGPRETRAIN_CPU_LEVEL that the library lacks or this processor does
            not run.
    """
    _check_name(backend)
    where = _as_device(device)
    reason: str | None = why_no_library() if backend in {"auto", "fused"} else None
    if backend != "fused":
        return None
    return reason or _why_not_on(where)


def choose(backend: str, q_BNHD: Tensor) -> str:
    """The backend that runs a call; all its tensors are like q.

    Raises:
        InputError: for a name that is no backend, and for one that cannot run the call.
    """
    _check_name(backend)
    if backend in {"portable", "reference"}:
        return backend
    reason = why_no_library() or _call_beyond(q_BNHD)
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


def _check_name(backend: str) -> None:
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise InputError(
            "backend", got=repr(backend), wanted=" or ".join(BACKENDS), way_out="Leave it at auto."
        )


def _as_device(device: torch.device | str | None) -> torch.device:
    found = None
    with contextlib.suppress(RuntimeError, TypeError):
        found = torch.device("cpu" if device is None else device)
    # Of a number torch keeps eight bits: cuda:256 would be cuda:0.
    if found is None or (isinstance(device, str) and str(found) != device):
        raise InputError(
            "device",
            got=repr(device),
            wanted="a torch.device or its name, such as cuda:1",
            way_out="Leave it out for the CPU.",
        )
    return found


def _call_beyond(q_BNHD: Tensor) -> str | None:
    """Why the compiled kernels cannot take a call like this."""
    device, dtype, head_size = q_BNHD.device, q_BNHD.dtype, q_BNHD.shape[3]
    reason = _why_not_on(device)
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


def _why_not_on(device: torch.device) -> str | None:
    """Why the library, which is there, has no kernels for a device."""
    if device.type not in {"cpu", "cuda", "meta"}:
        return f"the compiled kernels run on the CPU and on CUDA, not on {device.type}"
    if device.type == "cuda":
        reason: str | None = _why_not_on_gpu(device.index)
        return reason
    return None


@constant_when_compiled
def _why_not_on_gpu(index: int | None) -> str | None:
    """Only that a GPU can run the kernels is remembered: what keeps it from it may pass, such as
    another process that has its memory.
    """
    if index is None:
        index = torch.cuda.current_device() if torch.cuda.is_available() else 0
    if index in _able_gpus:
        return None
    try:
        found = why_not_on_gpu(index)
    except RuntimeError as error:
        words = str(error).partition("\n")[0].partition(" (originally from")[0]
        return f"cuda:{index} cannot be asked: {words}"
    if not found:
        _able_gpus.add(index)
    return found or None


@constant_when_compiled
def _largest_head_size() -> int:
    return int(kernel_facts()["largest head size"])


@constant_when_compiled
def _cuda_head_sizes(device: str) -> tuple[int, ...]:
    """Nothing where the CPU's kernels run."""
    facts = kernel_facts()
    # The test-only library runs the CUDA kernels on the CPU, by emulation.
    if device == "cuda" or (device == "cpu" and facts["cuda"] == "emulated"):
        return tuple(map(int, facts["cuda head sizes"].split(", ")))
    return ()


@constant_when_compiled
def _announce(reason: str) -> None:
    _announce_once(reason)


@functools.cache
def _announce_once(reason: str) -> None:
    _log.warning("attention runs on the portable backend: %s", reason)
