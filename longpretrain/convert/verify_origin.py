"""Where every tensor of one model comes from in another."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from longpretrain.convert.verify_positions import differing_rows, lengthened
from longpretrain.convert.verify_report import TensorRow
from longpretrain.convert.verify_side import TYPES, Side
from longpretrain.model.families import POOLER, is_of_a_head
from longpretrain.model.weights import POSITIONS

Tensors = Mapping[str, Tensor]

EQUAL = "equal bit for bit"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a tensor comes from, or how it differs."""

    told: str
    """In words."""
    ok: bool
    """Whether the models' relation has it so."""
    limit: str = EQUAL
    """What it should be."""


def origins(old: Side, new: Side, *, is_lengthened: bool) -> Iterator[TensorRow]:
    """Every tensor of both.

    Args:
        old: the source; of two that are the same model, the first.
        new: the other one.
        is_lengthened: new is a longer (or shorter) model made from old; else they are the same.
    """
    one, two = old.weights(), new.weights()
    if not is_lengthened:
        one, two = _without_token_types(one, two)
    names = ("source", "new model") if is_lengthened else ("first", "second")
    for name in [*two, *(name for name in one if name not in two)]:
        a, b = one.get(name), two.get(name)
        if a is None or b is None:
            found = _of_one(name, old, new, (one, two), names)
        elif name == POSITIONS and is_lengthened:
            found = _position_origin(old, new, a, b)
        else:
            found = _difference(a, b, names)
            if not found.ok:
                found = _more(found, name, (a, b), one, names[0])
            elif "_global." in name and not (_own_globals(old) and _own_globals(new)):
                found = Origin(told=f"copies of the local projections, {found.told}", ok=True)
        present = b if b is not None else a
        assert present is not None
        yield TensorRow(
            name=name, shape=tuple(present.shape), dtype=_name(present), origin=found.told,
            limit="" if found.ok else found.limit, ok=found.ok,
        )  # fmt: skip


def _own_globals(side: Side) -> bool:
    return side.source.has_own_globals


def _of_one(
    name: str, old: Side, new: Side, both: tuple[Tensors, Tensors], names: tuple[str, str]
) -> Origin:
    """Of a tensor that only one of them has."""
    one, two = both
    local = one.get(name.replace("_global.", "."))
    if name in two and "_global." in name and local is not None:
        found = _difference(local, two[name], names)
        if found.ok:
            more = "" if found.told == EQUAL else f", {found.told}"
            return Origin(told=f"copies of the local projections{more}", ok=True)
        limit = "a copy of the source's local projection"
        return Origin(told=f"no copy, {found.told}", ok=False, limit=limit)
    where = names[name in two]
    if is_of_a_head(name) and old.config.has_lm_head != new.config.has_lm_head:
        return Origin(told=f"only in the {where}: the other has no masked-LM head", ok=True)
    if name in POOLER and old.config.has_lm_head != new.config.has_lm_head:
        return Origin(told=f"only in the {where}: a pooler, no part of a masked-LM model", ok=True)
    return Origin(told=f"only in the {where}", ok=False, limit="in both")


def _more(
    found: Origin, name: str, pair: tuple[Tensor, Tensor], one: Tensors, source: str
) -> Origin:
    """What else can be told of a tensor that differs: which rows, and whether it is another one."""
    (a, b), told = pair, found.told
    if name == POSITIONS and a.shape == b.shape and a.dtype == b.dtype:
        told += f": {differing_rows(a, b)}"
    if other := _another(name, b, one):
        told += f": it is the {source}'s {other}"
    return dataclasses.replace(found, told=told)


def _another(name: str, tensor: Tensor, one: Tensors) -> str:
    """Which other tensor of the source it is; empty: none."""
    for other, candidate in one.items():
        alike = candidate.shape == tensor.shape and candidate.dtype == tensor.dtype
        if alike and name != other and equal_bits(candidate, tensor):
            return other
    return ""


def _position_origin(old: Side, new: Side, old_PC: Tensor, new_PC: Tensor) -> Origin:
    found = lengthened(
        old_PC, new_PC, kept=old.config.pad_id + 1, record=new.record,
        deviation=old.config.initializer_range,
    )  # fmt: skip
    return Origin(told=f"position rows: {found.told}", ok=found.ok, limit=found.limit)


def _difference(a: Tensor, b: Tensor, names: tuple[str, str]) -> Origin:
    """Of two tensors that should be equal, or one of them the other rounded."""
    if a.shape != b.shape:
        told = f"shape {tuple(a.shape)} and {tuple(b.shape)}"
        return Origin(told=told, ok=False, limit="one shape")
    if a.dtype == b.dtype and equal_bits(a, b):
        return Origin(told=EQUAL, ok=True)
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    if a.dtype != b.dtype and equal_bits(a.to(narrow), b.to(narrow)):
        return Origin(told=f"{_name(a)} and {_name(b)}, equal once rounded", ok=True)
    told = f"differs by {float((a.double() - b.double()).abs().max()):.1e}"
    told += f" in {int((a != b).sum()):,} of {a.numel():,} numbers"
    if a.dtype != b.dtype:
        return Origin(told=f"{told}, {_name(a)} and {_name(b)}", ok=False)
    for rounded in (torch.float16, torch.bfloat16):
        for name, one, other in zip(names, (a, b), (b, a), strict=True):
            if one.dtype != rounded and equal_bits(other.to(rounded).to(one.dtype), one):
                told += f": the {name} is rounded to {str(rounded).removeprefix('torch.')}"
    if a.dim() == 2 and a.shape[0] == a.shape[1] and equal_bits(a.T, b):
        told += ": the one is the other transposed"
    return Origin(told=told, ok=False)


def equal_bits(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers are equal; signs of zeros count, and NaN equals the same NaN."""
    as_integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    return torch.equal(a.contiguous().view(as_integers), b.contiguous().view(as_integers))


def _without_token_types(
    one: dict[str, Tensor], two: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Both with as many token types, and with none where one has zeros.

    Row 0 is added to every token, and others are never read. fairseq has no token types: its
    position rows have that row added to each.
    """
    if TYPES not in one or TYPES not in two:
        return one, two
    sides = [dict(one), dict(two)]
    if one[TYPES].shape != two[TYPES].shape:
        for tensors in sides:
            tensors[TYPES] = tensors[TYPES][:1]
    plain = [not bool(tensors[TYPES].any()) for tensors in sides]
    if plain[0] != plain[1] and all(POSITIONS in tensors for tensors in sides):
        tensors = sides[plain.index(False)]
        table_PC, types_TC = tensors[POSITIONS], tensors[TYPES]
        tensors[POSITIONS] = (table_PC.float() + types_TC[0].float()).to(table_PC.dtype)
        tensors[TYPES] = torch.zeros_like(types_TC)
    return sides[0], sides[1]


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
