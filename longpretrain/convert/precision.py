"""Weights rounded to another type: what would be lost is found first, and told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longpretrain.convert.verify_outputs import OurModel, what
from longpretrain.errors import InputError
from longpretrain.mapped import release
from longpretrain.model import ModelConfig
from longpretrain.model.listing import listed

DTYPES: Mapping[str, torch.dtype] = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32,
}  # fmt: skip
"""What the command line calls them."""
_PIECE = 1 << 20


@dataclass(kw_only=True)
class _Loss:
    """Of all numbers that are rounded."""

    numbers: int = 0
    small: int = 0
    """Those that are not zero and have fewer digits after it, below the type's normal range."""
    zeros: int = 0
    """Those among the small that become zero."""


def dtype_named(name: str | None) -> torch.dtype | None:
    """The type of a name; None for None, which keeps every tensor's own.

    Raises:
        InputError: there is no such type.
    """
    if name is not None and name not in DTYPES:
        raise InputError(
            "dtype", got=name, wanted=" or ".join(DTYPES),
            way_out="Leave it out to keep the type of the source.",
        )  # fmt: skip
    return None if name is None else DTYPES[name]


def is_rounded(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether the type lacks numbers that the tensor's own has."""
    return torch.promote_types(tensor.dtype, dtype) != dtype


def need_representable(
    where: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[str, ...]:
    """What rounding the tensors to a type loses, in words; nothing where it changes no number.

    Read piece by piece, and the memory of mapped files is given back.

    Raises:
        InputError: finite numbers would become infinite; names the tensors, and the largest number.
    """
    loss, beyond, largest, types = _Loss(), [], 0.0, set()
    for name, tensor in tensors.items():
        if tensor.dtype == dtype:
            continue
        types.add(name_of(tensor.dtype))
        if not is_rounded(tensor, dtype):
            continue
        most = max((_most_beyond(piece, dtype, loss) for piece in _pieces(tensor)), default=0.0)
        release(tensor)
        if most:
            beyond.append(f"{name} (up to {most:.5g})")
            largest = max(largest, most)
    if beyond:
        limit = torch.finfo(dtype).max
        way_out = "Say --dtype bf16, whose range is that of fp32." if limit < 1e5 else ""
        raise InputError(
            f"weights of {where} in {name_of(dtype)}",
            got=f"{largest:.6g} as the largest of {listed(beyond, ', ')}",
            wanted=f"at most {limit:.5g} in every number",
            way_out=way_out or "Keep the type that the source has: leave --dtype out.",
        )
    if not types:
        return ()
    if loss.numbers == 0:
        return (f"stored in {name_of(dtype)}, with the numbers of {' and '.join(sorted(types))}",)
    note = f"rounded to {name_of(dtype)} from {' and '.join(sorted(types))}"
    if loss.small:
        tiny = torch.finfo(dtype).tiny
        note += (
            f"; {loss.small:,} of {loss.numbers:,} numbers are smaller than {tiny:.2g} and keep"
            f" fewer digits, {loss.zeros:,} of them became 0"
        )
    return (note,)


def effect(
    config: ModelConfig,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    tokens_BN: Tensor,
) -> str:
    """How far what the model computes in fp32 moved with its weights, in words.

    Args:
        config: the model, with a masked-LM head or without.
        before: its tensors, by their names in memory.
        after: the same, rounded.
        tokens_BN: what it is computed on.
    """
    was, now = (OurModel(config, tensors).output(tokens_BN) for tensors in (before, after))
    moved, reach = float((now - was).abs().max()), float(was.abs().max())
    length = tokens_BN.shape[1]
    return (
        f"{what(config)} move by up to {moved:.1e}, where they reach {reach:.3g} ({length} tokens)"
    )


def _most_beyond(piece: Tensor, dtype: torch.dtype, loss: _Loss) -> float:
    """The largest magnitude of a piece that the type cannot hold; 0: it holds all."""
    rounded, tiny = piece.to(dtype), torch.finfo(dtype).tiny
    if torch.finfo(piece.dtype).tiny < tiny:
        small = (piece != 0) & (piece.abs() < tiny)
        loss.small += int(small.sum())
        loss.zeros += int((small & (rounded == 0)).sum())
    loss.numbers += piece.numel()
    lost = rounded.isinf() & piece.isfinite()
    return float(piece[lost].abs().max()) if bool(lost.any()) else 0.0


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    flat = tensor.detach().reshape(-1)
    return (flat[start : start + _PIECE] for start in range(0, flat.numel(), _PIECE))


def name_of(dtype: torch.dtype) -> str:
    """What people call a type: as the command line does, if it has a word for it."""
    names = {kind: name for name, kind in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))
