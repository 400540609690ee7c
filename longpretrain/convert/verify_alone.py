"""What a model shows by itself: names, ties, numbers, rows of tables, ids, and its record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from longpretrain.convert.read import RECORD_NAME
from longpretrain.convert.shown import shown
from longpretrain.convert.verify_ids import check_ids
from longpretrain.convert.verify_positions import repeats
from longpretrain.convert.verify_report import TensorRow, VerifyRow
from longpretrain.convert.verify_side import Side, Stored
from longpretrain.files import sha256
from longpretrain.model.families import POOLER
from longpretrain.model.listing import listed
from longpretrain.model.weights import POSITIONS, TIED, WORDS

_SAMPLE = 4096
_PARTNER = {"weight": "bias", "bias": "weight"}
"""Parts of one module."""
_FEWEST = 16
"""Numbers of a tensor that tell something of how they were rounded."""
_KEY_BIASES = (".self.key.bias", ".self.key_global.bias")
"""Attention's softmax does not see them: their gradients are zero but for rounding."""
_MAY_STAND = (*_KEY_BIASES, "LayerNorm.weight", "layer_norm.weight")
"""What a young training may leave as it was: these, and numbers from 1 to 2, which an update of a
learning rate that still warms up is too small to move."""
_FEW_DIGITS = 8
"""Of the last place: less tells a tensor from its copy no more than a rounding does."""
_WITH_HEAD = ("ForMaskedLM", "ForPreTraining")
_SMALLEST = 1e-30
"""Of a number that a training leaves; memory that nobody filled often holds smaller ones."""
_FAR = 10


def check_alone(side: Side) -> tuple[list[VerifyRow], tuple[TensorRow, ...]]:
    """All checks that need neither another model nor transformers, and every tensor."""
    tensors = tuple(_tensor_rows(side))
    rows = [*_check_names(side), *_check_class(side), *_check_numbers(side)]
    if WORDS in side.tensors and POSITIONS in side.tensors:
        rows += _check_rows(side)
    if any("_global." in name for name in side.tensors):
        rows.append(_check_globals(side))
    rows += [*_check_record(side), *check_ids(side)]
    return rows, tensors


def _tensor_rows(side: Side) -> Iterator[TensorRow]:
    rounded = {stored.name: narrow for stored, narrow in _rounded(side)}
    for stored in side.stored:
        problem, wanted = stored.problem, stored.wanted
        if not problem:
            problem, wanted = _problem_of_numbers(stored, rounded)
        yield TensorRow(
            name=stored.name, shape=tuple(stored.tensor.shape), dtype=_name(stored.tensor.dtype),
            origin=problem or "of the file", limit=wanted, ok=not problem,
        )  # fmt: skip
    for name, shape in side.missing.items():
        yield TensorRow(
            name=name, shape=None, dtype=None, origin="missing", limit=f"shape {shape}", ok=False
        )


def _problem_of_numbers(stored: Stored, rounded: dict[str, str]) -> tuple[str, str]:
    finite = torch.isfinite(stored.tensor)
    if not finite.all():
        return f"{int((~finite).sum())} numbers are NaN or infinite", "finite"
    if stored.name in rounded:
        return f"rounded to {rounded[stored.name]}", "as exact as its weight or bias"
    return "", ""


def _check_names(side: Side) -> Iterator[VerifyRow]:
    yield VerifyRow(
        check="tensors missing", got=listed(side.missing, ", ") or "none",
        limit=f"none of a {side.title}", ok=not side.missing,
    )  # fmt: skip
    for check, limit, are_twins in (
        ("tensors too many or misshapen", "none", False),
        ("decoder tied", "weight to the words, bias to lm_head.bias", True),
    ):
        of_these = [s for s in side.stored if (s.in_memory in TIED) == are_twins]
        bad = listed([f"{s.name}: {s.problem}" for s in of_these if s.problem])
        if not are_twins or (side.config.has_lm_head and side.family):
            good = f"none of {len(of_these)}" if not are_twins else _ties(of_these)
            yield VerifyRow(check=check, got=bad or good, limit=limit, ok=not bad)


def _check_class(side: Side) -> Iterator[VerifyRow]:
    """The class that pipelines and the hub take, where `config.json` names one."""
    said = side.tree.get("architectures")
    names = [name for name in said if isinstance(name, str)] if isinstance(said, list) else []
    if names:
        has_head = any(kind in name for name in names for kind in _WITH_HEAD)
        yield VerifyRow(
            check="class in config.json", got=listed(names, ", "),
            limit="with a masked-LM head" if side.config.has_lm_head else "without one",
            ok=has_head == side.config.has_lm_head,
        )  # fmt: skip


def _ties(twins: list[Stored]) -> str:
    return "stored twice, equal" if twins else "stored once"


def _check_numbers(side: Side) -> Iterator[VerifyRow]:
    bad = [s.name for s in side.stored if not s.problem and not torch.isfinite(s.tensor).all()]
    yield VerifyRow(
        check="weights finite", got=listed(bad, ", ") or f"{len(side.stored)} tensors",
        limit="no NaN or infinity", ok=not bad,
    )  # fmt: skip
    counts = Counter(_name(stored.tensor.dtype) for stored in side.stored)
    named = side.tree.get("dtype") or side.tree.get("torch_dtype")
    named = shown(named) if isinstance(named, str) else None
    most = counts.most_common(1)[0][0] if counts else None
    odd = [s.name for s in side.stored if _name(s.tensor.dtype) != most]
    got = ", ".join(counts) + (f" ({listed(odd, ', ')})" if odd else "")
    yield VerifyRow(
        check="dtype of the weights", got=got or "none",
        limit=f"{named} (config.json)" if named else "one", ok=[*counts] == [named or most],
    )  # fmt: skip
    rounded = [f"{stored.name} to {narrow}" for stored, narrow in _rounded(side)]
    yield VerifyRow(
        check="rounding of the weights", got=listed(rounded, ", ") or "alike",
        limit="a weight and its bias alike", ok=not rounded,
    )  # fmt: skip


def _rounded(side: Side) -> list[tuple[Stored, str]]:
    """Tensors whose numbers all fit a narrower type, where others' do not.

    A part that stood still in a training may be all that is left of a file in 16 bits: tables, the
    pooler (MiniLM's is so), global projections, ``_MAY_STAND``. Another weight may not whose own
    bias has more digits.
    """
    narrow = {
        stored.in_memory: (stored, _narrowest(stored.tensor))
        for stored in side.stored
        if not stored.problem and stored.in_memory.endswith((".weight", ".bias"))
    }
    found = []
    for name, (stored, named) in narrow.items():
        module, _, part = name.rpartition(".")
        partner = narrow.get(f"{module}.{_PARTNER[part]}")
        stands = name in POOLER or "_global." in name or name.endswith(_MAY_STAND)
        if partner is None or stands:
            continue
        if named and _is_drawn(stored.tensor) and not partner[1] and _is_drawn(partner[0].tensor):
            found.append((stored, named))
    return found


def _is_near(tensor: Tensor, other: Tensor) -> bool:
    """Whether a few last digits tell them apart."""
    apart = (tensor.double() - other.double()).norm()
    return bool(apart <= _FEW_DIGITS * torch.finfo(tensor.dtype).eps * other.double().norm())


def _is_drawn(tensor: Tensor) -> bool:
    """Whether its numbers are more than zeros, ones and the like."""
    sample = tensor.flatten()[-_SAMPLE:]
    return sample.numel() >= _FEWEST and len(set(sample.tolist())) >= _FEWEST


def _narrowest(tensor: Tensor) -> str:
    """The 16-bit type that holds all numbers of a wider tensor; empty: none."""
    for narrow in (torch.float16, torch.bfloat16):
        for part in (tensor.flatten()[-_SAMPLE:], tensor):
            if part.dtype.itemsize <= 2 or not torch.equal(part.to(narrow).to(part.dtype), part):
                break
        else:
            return _name(narrow)
    return ""


def _check_rows(side: Side) -> Iterator[VerifyRow]:
    """Tables of words and positions. Rows that nobody filled hold whatever was in memory."""
    config = side.config
    kept = config.pad_id + 1
    words_VC, table_PC = side.tensors[WORDS].float(), side.tensors[POSITIONS].float()
    norms = words_VC.norm(dim=1)
    norms[config.pad_id] = 0
    yield _check_padding("word row of padding", words_VC[config.pad_id : kept], float(norms.max()))
    largest = float(table_PC[kept:].norm(dim=1).max())
    yield _check_padding("position rows of padding", table_PC[:kept], largest)
    yield _check_tokens_rows(table_PC, kept)
    found = repeats(side.tensors[POSITIONS][kept:], learnt=side.learnt_positions)
    yield VerifyRow(check="position rows repeat", got=found.told, limit=found.limit, ok=found.ok)


def _check_padding(check: str, rows_PC: Tensor, largest: float) -> VerifyRow:
    norm = float(rows_PC.norm(dim=1).max())
    tiny = int(((rows_PC != 0) & (rows_PC.abs() < _SMALLEST)).sum())
    got = f"norm {norm:.3g}" + (f", {tiny} numbers below {_SMALLEST:.0e}" if tiny else "")
    limit = f"{_FAR} x {largest:.3g}, numbers of a training"
    return VerifyRow(check=check, got=got, limit=limit, ok=norm <= _FAR * largest and not tiny)


def _check_tokens_rows(table_PC: Tensor, kept: int) -> VerifyRow:
    padding_PC, rows_PC = table_PC[:kept], table_PC[kept:]
    norms = rows_PC.norm(dim=1)
    typical = float(norms.nanmedian())
    far = ~((norms <= _FAR**2 * typical) & (norms * _FAR**2 >= typical))
    as_padding = torch.zeros_like(far)
    for row_C in padding_PC:
        as_padding |= (rows_PC == row_C).all(dim=1)
    got = f"norms {norms.min():.3g} to {norms.max():.3g}"
    if bad := int((far | as_padding).sum()):
        first = int((far | as_padding).nonzero()[0])
        what = "is a row of padding" if as_padding[first] else f"has norm {norms[first]:.3g}"
        got = f"{bad} of {len(rows_PC)}: row {kept + first} {what}"
    limit = f"norms {typical / _FAR**2:.2g} to {typical * _FAR**2:.2g}, no row of padding"
    return VerifyRow(check="position rows of tokens", got=got, limit=limit, ok=not bad)


def _check_globals(side: Side) -> VerifyRow:
    """All copies of the local projections, or none: half of them is a slip.

    Of a tensor that is all zeros, as new biases are, nothing can be told. A young training tells as
    little: it may leave keys' biases as they were, and others a few digits from their copies, some
    of which a rounding then undoes.
    """
    alike: list[str] = []
    own: list[str] = []
    for name, tensor in side.tensors.items():
        local = side.tensors.get(name.replace("_global.", "."))
        if "_global." in name and local is not None and _is_drawn(tensor):
            is_copy = torch.equal(tensor, local)
            if name.endswith(_KEY_BIASES) if is_copy else _is_near(tensor, local):
                continue
            (alike if is_copy else own).append(name)
    odd = own if len(own) <= len(alike) else alike
    what = "no copy" if odd is own else "a copy"
    mixed = bool(own and alike)
    got = f"{what}: {listed(odd, ', ')}" if mixed else "copies" if alike else "their own"
    if own and not alike and not side.source.has_own_globals:
        got += ", which no global token trained: export makes them copies"
    return VerifyRow(
        check="global projections", got=got, limit="all copies of the local ones, or none",
        ok=not mixed,
    )  # fmt: skip


def _check_record(side: Side) -> Iterator[VerifyRow]:
    """A conversion as its record has it."""
    if side.record is None:
        return
    files = side.record.get("files")
    files = files if isinstance(files, dict) else {RECORD_NAME: "names no files"}
    changed = [
        str(name)
        for name, wanted in files.items()
        if not (side.path / str(name)).is_file() or sha256(side.path / str(name)) != wanted
    ]
    yield VerifyRow(
        check="files since the conversion", got=listed(changed, ", ") or f"{len(files)} unchanged",
        limit=f"as {RECORD_NAME} has them", ok=not changed,
    )  # fmt: skip
    config = side.config
    found = {"positions": config.max_tokens, "attention_window": list(config.attention_window)}
    recorded = {key: side.record.get(key) for key in found}
    different = [f"{key} {value}" for key, value in found.items() if recorded[key] != value]
    wanted = ", ".join(f"{key} {_plain(value)}" for key, value in recorded.items())
    yield VerifyRow(
        check="length and windows of the conversion", got=", ".join(different) or "as converted",
        limit=f"{wanted} ({RECORD_NAME})", ok=not different,
    )  # fmt: skip


def _plain(value: object) -> str:
    """A number of somebody's file, or a list of them."""
    values = value if isinstance(value, list) else [value]
    text = ", ".join(shown(one) for one in values)
    return f"[{text}]" if isinstance(value, list) else text


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
