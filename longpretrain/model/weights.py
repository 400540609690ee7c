"""Weights between files and memory: names, completeness, ties, and the writing of them.

In memory names begin with ``longformer.`` for every model type. We write the type's name there for
a masked-LM model, and nothing for a bare encoder, as transformers does.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from longpretrain.errors import InputError
from longpretrain.model import families
from longpretrain.model.encoder import ModelConfig
from longpretrain.model.families import POOLER, Family, read_family
from longpretrain.model.listing import listed
from longpretrain.model.lm_head import LongformerForMaskedLM
from longpretrain.model.skeleton import without_values
from longpretrain.model.weight_files import (
    INDEX_NAME,
    PICKLED_INDEX_NAME,
    PICKLED_NAME,
    WEIGHTS_NAME,
    names_in_files,
    only_globals,
    read_files,
)
from longpretrain.safetensors_file import save_tensors

__all__ = [
    "DTYPES",
    "INDEX_NAME",
    "PICKLED_INDEX_NAME",
    "PICKLED_NAME",
    "POSITIONS",
    "SHARD_BYTES",
    "TIED",
    "WEIGHTS_NAME",
    "WORDS",
    "StoredWeights",
    "are_twins",
    "copy_local_to_global",
    "has_lm_head",
    "only_globals",
    "open_weights",
    "pooler_shapes",
    "read_weights",
    "shapes_in_files",
    "stored_names",
    "with_padding_rows",
    "write_weights",
]

SHARD_BYTES = 5_000_000_000

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Of weights that are read; the 8-bit ones have scales elsewhere."""

POSITIONS = "longformer.embeddings.position_embeddings.weight"
"""The position table, by its name in memory."""

WORDS = "longformer.embeddings.word_embeddings.weight"
"""The word embeddings, by their name in memory."""

TIED = {"lm_head.decoder.weight": WORDS, "lm_head.decoder.bias": "lm_head.bias"}
"""What a file may hold twice, by the names in memory: the twin -> the one that is counted."""
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StoredWeights:
    """What the weights files of a folder hold of a model."""

    tensors: dict[str, Tensor]
    """By their names in memory, complete, of the right shapes; they may be mapped from the file."""
    left_out: tuple[str, ...]
    """Names in the file of what is known to be no part of the model: a pooler, another head."""


def stored_names(model: LongformerForMaskedLM | ModelConfig) -> dict[str, str]:
    """What is stored, tied twins left out: name in memory -> name in a file."""
    if isinstance(model, ModelConfig):
        model = _skeleton(model)
    config = model.config
    prefix = f"{config.model_type}." if config.has_lm_head else ""
    return {
        name: name.replace("longformer.", prefix, 1) if name.startswith("longformer.") else name
        for name, _ in model.named_parameters()
        if config.has_lm_head or not families.is_of_a_head(name)
    }


def copy_local_to_global(state: dict[str, Tensor]) -> None:
    """Makes the global projections those of the local attention, in place (paper, section 3.1).

    Args:
        state: tensors by their names in memory. Every ``*_global`` name gets its local twin's
            tensor, the very same one: that costs no memory; names that are not there are not made.
    """
    for name in state:
        if "_global." in name:
            state[name] = state[name.replace("_global.", ".")]


def has_lm_head(folder: Path, family: Family) -> bool | None:
    """Whether the weights of a folder hold a masked-LM head, or parts of one; None: no weights.

    Raises:
        InputError: a damaged file.
    """
    names = names_in_files(folder)
    if names is None:
        return None
    prefix = family.prefix_in(names)
    return any(families.is_of_a_head(family.in_memory(name, prefix)) for name in names)


def read_weights(folder: Path | str, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of ``open_weights`` alone; what was left out is told in the log."""
    stored = open_weights(folder, config)
    if stored.left_out:
        log.info("%s: left out %s", folder, listed(stored.left_out, ", "))
    return stored.tensors


def open_weights(folder: Path | str, config: ModelConfig) -> StoredWeights:
    """The parameters of a model folder, by their names in memory, in the dtype of the file.

    A model without a masked-LM head keeps its pooler, if it has one.

    Args:
        folder: with `config.json` and weights.
        config: what ``read_config`` makes of it.

    Raises:
        InputError: no weights, a damaged file, an untied decoder; tensors that are missing, foreign
            or misshapen, all of them listed.
    """
    folder = Path(folder)
    family, _ = read_family(folder)
    files = read_files(folder)
    prefix = family.prefix_in(files)
    found, problems = _renamed(files, family, prefix)
    found = _untied(folder, found)
    shapes = shapes_in_files(config, family)
    if not config.has_lm_head and all(name in found for name in POOLER):
        shapes |= pooler_shapes(config)
    for name, shape in shapes.items():
        stored = family.in_file(name, prefix)
        if name not in found:
            problems.append(f"no {stored}")
        elif tuple(found[name].shape) != shape:
            problems.append(f"{stored} of shape {tuple(found[name].shape)}, not {shape}")
        elif found[name].dtype not in DTYPES:
            problems.append(f"{stored} of {found[name].dtype}")
    rest = {name: family.in_file(name, prefix) for name in found if name not in shapes}
    left_out = tuple(stored for name, stored in rest.items() if families.is_left_out(name))
    problems += [
        f"{stored}, which is no part of it"
        for name, stored in rest.items()
        if not families.is_left_out(name) and not families.is_no_weight(name)
    ]
    if problems:
        head = "a masked-LM head" if config.has_lm_head else "no head"
        wanted = (
            f"the {len(shapes)} tensors of a {family.title} with {head}, of config.json's sizes"
        )
        way_out = "Is config.json this model's? Get the folder again, or save it again."
        _fail(folder, listed(problems), wanted, way_out)
    tensors = {name: found[name] for name in shapes}
    if not family.has_padding_rows:
        tensors[POSITIONS] = with_padding_rows(tensors[POSITIONS], config.pad_id + 1)
    return StoredWeights(tensors=tensors, left_out=left_out)


def write_weights(
    folder: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes `model.safetensors`, or shards and an index; the same bytes for the same values.

    Args:
        folder: an existing folder; not atomic by itself (``fresh_folder`` makes it so).
        config: decides the names.
        state: tensors by their names in memory; tied twins and foreign names are left out. One
            tensor may stand under several names.
        shard_bytes: largest size of one file, bytes.
        dtype: what the numbers are rounded to. None: they stay as they are.
    """
    names = stored_names(config)
    if not config.has_lm_head:
        names |= {name: name.removeprefix("longformer.") for name in POOLER if name in state}
    missing = [name for name in names if name not in state]
    assert not missing, f"the state lacks {missing[:3]}"
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, stored in sorted(names.items()):
        tensor = state[name].detach().cpu()
        nbytes = tensor.numel() * (dtype or tensor.dtype).itemsize
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][stored] = tensor
        size += nbytes
        total += nbytes
    if len(shards) == 1:
        save_tensors(shards[0], folder / WEIGHTS_NAME, dtype=dtype)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(shard, folder / file_name, dtype=dtype)
        weight_map |= dict.fromkeys(shard, file_name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _skeleton(config: ModelConfig) -> LongformerForMaskedLM:
    with without_values():
        return LongformerForMaskedLM(config)


def _renamed(
    files: Mapping[str, Tensor], family: Family, prefix: str
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors by their names in memory, and what stands in the files under two names."""
    found: dict[str, Tensor] = {}
    problems = []
    for stored, tensor in files.items():
        name = family.in_memory(stored, prefix)
        if name in found:
            problems.append(f"{stored} under another name, too")
        found.setdefault(name, tensor)
    return found, problems


def shapes_in_files(config: ModelConfig, family: Family) -> dict[str, tuple[int, ...]]:
    """Of the tensors in the family's files, by their names in memory."""
    skeleton = _skeleton(config)
    names = stored_names(skeleton)
    shapes = {
        name: tuple(parameter.shape)
        for name, parameter in skeleton.named_parameters()
        if name in names
    }
    if not family.has_padding_rows:
        shapes[POSITIONS] = (config.max_tokens, config.hidden_size)
    return shapes


def pooler_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of a pooler's tensors, by their names in memory."""
    width = config.hidden_size
    return dict(zip(POOLER, ((width, width), (width,)), strict=True))


def with_padding_rows(table_PC: Tensor, count: int) -> Tensor:
    """A position table after ``count`` rows of zeros, which no token of a text reads."""
    return torch.cat([table_PC.new_zeros(count, table_PC.shape[1]), table_PC])


def _untied(folder: Path, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the tied twins, once they are found to be twins; a file may hold either of a pair."""
    for twin, first in TIED.items():
        if twin not in found:
            continue
        tensor = found.pop(twin)
        if not are_twins(found.setdefault(first, tensor), tensor):
            _fail(folder, f"{twin} unlike {first}", "tied weights", "Untied decoders are not read.")
    return found


def are_twins(one: Tensor, two: Tensor) -> bool:
    """Whether values are equal in the narrower of the two types; NaN equals NaN."""
    if one.shape != two.shape:
        return False
    narrow = min(one.dtype, two.dtype, key=lambda dtype: dtype.itemsize)
    one, two = one.to(narrow), two.to(narrow)
    return torch.equal(one, two) or torch.allclose(one, two, rtol=0, atol=0, equal_nan=True)


def _fail(where: Path, got: object, wanted: object, way_out: str) -> NoReturn:
    raise InputError(str(where), got=got, wanted=wanted, way_out=way_out)
