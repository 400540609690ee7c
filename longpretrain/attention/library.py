"""The compiled library (``csrc/``): loaded here and nowhere else, when a call first wants it.

It brings two operators, forward and backward; here they get what torch.compile, activation
checkpointing and autograd need of them, and errors of the right kind where memory runs out.

Letters: B batch row, N query, H head, D number of a head.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longpretrain.attention.constant import constant_when_compiled
from longpretrain.attention.gradient import differentiable, differentiate, keep_for_backward
from longpretrain.attention.memory import telling_of_memory
from longpretrain.errors import InputError

_FORWARD = "longpretrain::sliding_attention_fused"
_BACKWARD = "longpretrain::sliding_attention_fused_backward"
# Called with the same arguments in the same order.
_TWINS = {
    _FORWARD: "longpretrain::sliding_attention_portable",
    _BACKWARD: "longpretrain::sliding_attention_portable_backward",
}
_one_at_a_time = threading.Lock()


@functools.cache
def kernel_facts() -> Mapping[str, str]:
    """How the compiled library was built and what of it runs here; empty when there is none.

    Its keys: compiler, torch (whose headers it was built with), largest head size; instruction
    sets: built, machine (those that the processor runs), used; cuda (chips that the CUDA kernels
    were compiled for, or none, or emulated), cuda head sizes.

    Raises:
        InputError: as ``why_no_library``.
    """
    return _facts() if why_no_library() is None else {}


def why_not_on_gpu(index: int) -> str:
    """What keeps the library's CUDA kernels from a GPU; empty if nothing does.

    Raises:
        RuntimeError: the GPU cannot be asked.
    """
    return str(torch.ops.longpretrain.cuda_why_not(index))


def _facts() -> Mapping[str, str]:
    lines = torch.ops.longpretrain.kernel_facts().splitlines()
    return {name: value for name, _, value in (line.partition(": ") for line in lines)}


@constant_when_compiled
def why_no_library() -> str | None:
    """Loads the compiled library on the first call; the reason, in words, if there is none.

    torch.compile calls it while it traces and takes the answer for a constant.

    Raises:
        InputError: for an instruction set LONGPRETRAIN_CPU_LEVEL that the library lacks or this
            processor does not run.
    """
    with _one_at_a_time:
        return _load_once()


@functools.cache
def _load_once() -> str | None:
    named, path = _named(), library_path()
    if path is None:
        way_out = _way_to_build()
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            way_out = f"install a C++ compiler (Debian: apt-get install g++), then {way_out}"
        return f"the compiled library is not built: {way_out}"
    if not path.is_file():
        return f"the compiled library is missing: there is no file {path}"
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
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


def library_path() -> Path | None:
    """The file that is the compiled library here, or would be; None where none was built."""
    named = _named()
    found = None if named else importlib.util.find_spec("longpretrain.attention._kernels")
    path = named or (found.origin if found else None)
    return Path(path) if path else None


def _named() -> str | None:
    return os.environ.get("LONGPRETRAIN_LIBRARY")


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
@telling_of_memory("forward")
def _compiled(*inputs: Any) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = torch.ops.longpretrain.sliding_attention_fused.default(*inputs)
    return found


@telling_of_memory("backward")
def _compiled_backward(*inputs: Any) -> list[Tensor]:
    found: list[Tensor]
    found = torch.ops.longpretrain.sliding_attention_fused_backward.default(*inputs)
    return found


fused_attention = differentiable(_compiled, _compiled_backward)
