"""One of the models that verify looks at: all that its files hold, right or wrong.

Where other readers refuse a folder, verify tells what is wrong with it; what cannot be a model at
all is refused here, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from longpretrain.convert.read import RECORD_NAME, has_tokenizer
from longpretrain.convert.shown import shown
from longpretrain.convert.source import Source, open_source
from longpretrain.data.tokenizer import Tokenizer, load_tokenizer
from longpretrain.errors import InputError
from longpretrain.files import read_json_object
from longpretrain.model import (
    ModelConfig,
    copy_local_to_global,
)
from longpretrain.model.families import POOLER, Family, is_left_out, is_no_weight, read_family
from longpretrain.model.weight_files import read_files
from longpretrain.model.weights import (
    DTYPES,
    POSITIONS,
    TIED,
    are_twins,
    pooler_shapes,
    shapes_in_files,
    with_padding_rows,
)

TYPES = "longformer.embeddings.token_type_embeddings.weight"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in a file."""

    name: str
    """In the file."""
    in_memory: str
    """The name that we know it by."""
    tensor: Tensor
    problem: str = ""
    """Why it is no part of the model as it stands; empty: nothing is wrong with it."""
    wanted: str = ""
    """What would have been right."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """A model folder, a checkpoint, a run's newest one, or a fairseq `.pt`."""

    source: Source
    """What the other verbs make of it."""
    family: Family | None
    """Whose names its files have; None of a fairseq checkpoint."""
    prefix: str
    """What the names of the encoder begin with in its files."""
    tree: Mapping[str, Any]
    """`config.json`; empty for a fairseq checkpoint, which has none."""
    record: Mapping[str, Any] | None
    """`conversion.json`, if a conversion made it."""
    tokenizer: Tokenizer | None
    """Its tokenizer, if it has one that reads."""
    tokenizer_problem: str
    """Why the tokenizer that it has cannot be used; empty: it can."""
    stored: tuple[Stored, ...]
    """Every tensor of its files, but what the code makes anew."""
    missing: Mapping[str, tuple[int, ...]]
    """Names in the file of what should be there, with their shapes."""
    left_out: tuple[str, ...]
    """Names in the file of what is known to be no part of the model."""
    tensors: Mapping[str, Tensor]
    """The model's, by their names in memory, as far as they are there and of the right shape."""

    @property
    def path(self) -> Path:
        """The folder, or the file."""
        return self.source.path

    @property
    def config(self) -> ModelConfig:
        """Sizes and arithmetic."""
        return self.source.config

    @property
    def title(self) -> str:
        """What it is, for people."""
        kind = self.family.title if self.family else "fairseq checkpoint"
        made = f" ({'step ' + str(self.source.state.get('step'))})" if self.source.state else ""
        head = "" if self.config.has_lm_head else " without a masked-LM head"
        return f"{kind}{made}{head}, {self.config.max_tokens:,} tokens"

    @property
    def learnt_positions(self) -> int:
        """Positions that were learnt before the model was lengthened, trained since or not."""
        block = self.tree.get("longpretrain")
        learnt = block.get("learnt_positions", 0) if isinstance(block, dict) else 0
        return learnt if isinstance(learnt, int) else 0

    @property
    def is_whole(self) -> bool:
        """Whether no tensor is missing, foreign, or of another shape."""
        return not self.missing and not any(stored.problem for stored in self.stored)

    def weights(self) -> dict[str, Tensor]:
        """As it would be converted: local projections for global ones that never learnt."""
        tensors = dict(self.tensors)
        if not self.source.has_own_globals:
            copy_local_to_global(tensors)
        return tensors


def open_side(path: Path | str) -> Side:
    """What a path holds.

    Raises:
        InputError: there is no model, or one that does not read; a checkpoint with an altered file.
    """
    source = open_source(path, allow_nonfinite=True, need_whole=False)
    return _of_folder(source) if source.path.is_dir() else _of_file(source)


def _of_file(source: Source) -> Side:
    """Of a fairseq checkpoint, which is refused unless it is complete and tied."""
    tensors = source.tensors()
    return Side(
        source=source, family=None, prefix="", tree={}, record=None,
        tokenizer=source.tokenizer(), tokenizer_problem="", missing={}, left_out=(),
        stored=tuple(Stored(name=n, in_memory=n, tensor=t) for n, t in tensors.items()),
        tensors=tensors,
    )  # fmt: skip


def _of_folder(source: Source) -> Side:
    folder, config = source.path, source.config
    family, tree = read_family(folder)
    files = read_files(folder)
    prefix = family.prefix_in(files)
    names = {stored: family.in_memory(stored, prefix) for stored in files}
    shapes = shapes_in_files(config, family)
    if not config.has_lm_head and POOLER[0] in names.values():
        shapes |= pooler_shapes(config)
    tensors = {name: files[in_file] for in_file, name in names.items()}
    stored, left_out = [], []
    found: dict[str, Tensor] = {}
    for in_file, name in names.items():
        if is_no_weight(name):
            continue
        if name not in shapes and name not in TIED and is_left_out(name):
            left_out.append(in_file)
            continue
        tensor = files[in_file]
        if name in found:
            problem, wanted = "there under another name, too", "one of them"
        else:
            problem, wanted = _problem(name, tensor, shapes, tensors)
        if not problem:
            found[name] = tensor
        stored.append(
            Stored(name=in_file, in_memory=name, tensor=tensor, problem=problem, wanted=wanted)
        )
    for twin, first in TIED.items():  # a file may hold either of a pair
        if twin in found:
            found.setdefault(first, found.pop(twin))
    present = {TIED.get(name, name) for name in names.values()}
    missing = {family.in_file(n, prefix): shape for n, shape in shapes.items() if n not in present}
    if not family.has_padding_rows and POSITIONS in found:
        found[POSITIONS] = with_padding_rows(found[POSITIONS], config.pad_id + 1)
    tokenizer, problem = _tokenizer(folder, config)
    record = folder / RECORD_NAME
    return Side(
        source=source, family=family, prefix=prefix, tree=tree, tokenizer=tokenizer,
        record=read_json_object(record) if record.is_file() else None,
        tokenizer_problem=problem, stored=tuple(stored), missing=missing,
        left_out=tuple(left_out), tensors={name: found[name] for name in shapes if name in found},
    )  # fmt: skip


def _problem(
    name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]
) -> tuple[str, str]:
    """What is wrong with a tensor among those of a file, and what would be right; empty: nothing.

    Names are those in memory.
    """
    first = TIED.get(name, name)
    if first not in shapes:
        return "no part of the model", "no such tensor"
    if tuple(tensor.shape) != shapes[first]:
        return f"shape {tuple(tensor.shape)}", f"{shapes[first]} (config.json)"
    if tensor.dtype not in DTYPES:
        return f"numbers of {tensor.dtype}", "floating-point numbers of 16 bits or more"
    if name in TIED and not are_twins(tensors.get(first, tensor), tensor):
        return f"unlike {first}", "tied to it: the same numbers"
    return "", ""


def _tokenizer(folder: Path, config: ModelConfig) -> tuple[Tokenizer | None, str]:
    """The tokenizer of a folder, and why it is of no use."""
    if not has_tokenizer(folder):
        return None, ""
    try:
        tokenizer = load_tokenizer(folder)
    except InputError as error:
        return None, shown(f"{error.what}: {error.got}")
    if tokenizer.vocab_size > config.vocab_size:
        return None, f"{tokenizer.vocab_size} ids, {config.vocab_size} word embeddings"
    return tokenizer, ""
