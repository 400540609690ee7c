"""A fairseq checkpoint's options and tensors as our model, and our model as theirs.

Two kinds are read and written: fairseq's own ``roberta`` (full attention), and our plugin's
``longformer`` as stock `fairseq-train --user-dir longpretrain` leaves it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from longpretrain.convert import fairseq_names as names
from longpretrain.convert.fairseq_file import Checkpoint
from longpretrain.convert.shown import shown
from longpretrain.data.global_tokens import parse_global_tokens
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.errors import InputError
from longpretrain.model import LongformerForMaskedLM, ModelConfig, read_config
from longpretrain.model.folder import changed
from longpretrain.model.listing import listed
from longpretrain.model.weights import DTYPES, POSITIONS, WORDS

_BIAS = "lm_head.bias"
_LARGEST = 1_000_000  # of any size: a damaged one shall not fill the memory
_EPS = 1e-5
_SPECIAL_IDS = {"bos_id": 0, "pad_id": 1, "eos_id": 2}
_WINDOW = 512  # of a new model of the plugin
_TRAIN_ONLY = ("all", "new_positions")
_AS_WRITTEN = "Give a checkpoint as fairseq-train wrote it."


@dataclass(frozen=True, kw_only=True)
class FairseqModel:
    """A checkpoint in our terms."""

    config: ModelConfig
    """Sizes and arithmetic."""
    tensors: dict[str, Tensor]
    """By their names in memory, tied twins left out, in the dtype of the file."""
    is_plugin: bool
    """Our plugin wrote it, under our names."""
    model_path: Path | None
    """The folder that such a training started from; its tokenizer and its sizes are the model's."""
    global_tokens: str | None
    """Which tokens were global in such a training."""
    train_only: str = "all"
    """What it trained, as in recipes."""
    notes: tuple[str, ...]
    """What of the file was left out, in words."""


@dataclass(frozen=True, kw_only=True)
class CheckpointParts:
    """A model in fairseq's terms, for ``write_checkpoint``."""

    tensors: dict[str, Tensor]
    model: dict[str, Any]
    task: dict[str, Any]
    notes: tuple[str, ...]
    """What is not as it was, in words."""


def from_checkpoint(checkpoint: Checkpoint) -> FairseqModel:
    """The model of a checkpoint, complete, of the sizes that its options name, and tied.

    Raises:
        InputError: options that mean another computation; tensors that are missing, foreign or of
            other shapes, all of them listed; an untied decoder.
    """
    if any(name.startswith(f"{names.PLUGIN_PREFIX}longformer.") for name in checkpoint.tensors):
        return _from_plugin(checkpoint)
    options = checkpoint.model_options
    _need_options(checkpoint.path, options)
    found = names.current_names(checkpoint.path, checkpoint.tensors)
    left_out = sorted(name for name in found if names.is_left_out(name))
    found = {name: tensor for name, tensor in found.items() if name not in left_out}
    sizes: dict[str, Any] = {
        ours: _integer(checkpoint.path, theirs, options.get(theirs, default))
        for theirs, (ours, default) in names.SIZES.items()
    }
    _need_layers(checkpoint.path, found, sizes["num_layers"])
    stored = names.fairseq_names(sizes["num_layers"])
    decoder = found.pop(names.LM_WEIGHT, None)
    _need_names(checkpoint.path, found, list(stored.values()))
    words, table = found[stored[WORDS]], found[stored[POSITIONS]]
    tables = {stored[WORDS]: words, stored[POSITIONS]: table}
    odd = [f"{n} of shape {tuple(t.shape)}" for n, t in tables.items() if t.dim() != 2]
    _need_none(checkpoint.path, odd, "tables of rows")
    config = ModelConfig(
        model_type="roberta",
        vocab_size=len(words),
        max_position_embeddings=_position_rows(checkpoint, len(table)),
        **sizes,
        **_dropouts(checkpoint.path, options),
    )
    tensors = {ours: found[theirs] for ours, theirs in stored.items()}
    tensors[names.TYPES] = words.new_zeros(1, config.hidden_size)  # fairseq has none
    _need_shapes(checkpoint.path, tensors, config, stored)
    _need_twins(checkpoint.path, decoder, words)
    return FairseqModel(
        config=config, tensors=tensors, is_plugin=False, model_path=None,
        global_tokens=None, notes=_notes(left_out, options),
    )  # fmt: skip


def to_checkpoint(
    config: ModelConfig, tensors: Mapping[str, Tensor], *, global_tokens: str
) -> CheckpointParts:
    """A model as fairseq's ``roberta``, or a Longformer as our plugin's ``longformer``.

    fairseq has no token types. Ours adds one row of them to every token, and so do the position
    rows once it is added to each: fairseq then computes the same but for the rounding of one sum.
    A row of zeros, as in every model that comes from fairseq, changes no bit.
    """
    own = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    sizes = {theirs: getattr(config, ours) for theirs, (ours, _) in names.SIZES.items()}
    dropouts = {theirs: getattr(config, ours) for theirs, ours in names.DROPOUTS.items()}
    options = sizes | dropouts | {"max_positions": config.max_tokens}
    task = {"data": "", "tokens_per_sample": config.max_tokens}
    types = own[names.TYPES]
    notes = []
    if len(types) > 1:
        notes.append(f"token types: row 0 of {len(types)}, the only one that the model uses")
    if config.model_type == "longformer":
        own[names.TYPES] = types[:1].clone()
        options |= {"_name": "longformer", "attention_window": list(config.attention_window)}
        options["dilation"] = list(config.dilation)
        task |= {"_name": "long_masked_lm", "model_path": "", "global_tokens": global_tokens}
        own |= {"lm_head.decoder.weight": own[WORDS], "lm_head.decoder.bias": own[_BIAS]}
        found = {f"{names.PLUGIN_PREFIX}{name}": tensor for name, tensor in own.items()}
    else:
        if types[0].any():
            table = own[POSITIONS]
            own[POSITIONS] = (table.float() + types[0].float()).to(table.dtype)
            notes.append("token types: added to every position row, as fairseq has none")
        stored = names.fairseq_names(config.num_layers)
        found = {theirs: own[ours] for ours, theirs in stored.items()}
        found[names.LM_WEIGHT] = own[WORDS]
        found[names.VERSION] = torch.tensor([3.0])
        options |= {"_name": "roberta", "arch": "roberta", **names.FIXED_OPTIONS}
        task["_name"] = "masked_lm"
    return CheckpointParts(tensors=found, model=options, task=task, notes=tuple(notes))


def need_fairseq_expressible(where: Path, config: ModelConfig) -> None:
    """Refuses a model that fairseq, or our plugin in it, would compute otherwise.

    Raises:
        InputError: names all that is beyond it.
    """
    beyond = [] if config.has_lm_head else ["no masked-LM head"]
    if config.causal:
        beyond.append("causal attention")
    if config.model_type == "roberta" and set(config.dilation) - {1}:
        beyond.append(f"dilation {list(config.dilation)}")
    if config.layer_norm_eps != _EPS:
        beyond.append(f"layer_norm_eps {config.layer_norm_eps} (fairseq's is {_EPS})")
    if any(getattr(config, name) != number for name, number in _SPECIAL_IDS.items()):
        found = ", ".join(f"{name} {getattr(config, name)}" for name in _SPECIAL_IDS)
        beyond.append(f"{found} (fairseq's are 0, 1 and 2)")
    rows = load_tokenizer().vocab_size
    if config.model_type == "longformer" and config.vocab_size != rows:
        beyond.append(f"{config.vocab_size} tokens (RoBERTa's are {rows})")
    if beyond:
        raise InputError(
            f"model {where}", got=" and ".join(beyond),
            wanted="a model that fairseq computes alike",
            way_out="Keep it as a Hugging Face folder; fairseq-train takes one as --model-path.",
        )  # fmt: skip


def _from_plugin(checkpoint: Checkpoint) -> FairseqModel:
    path, options = checkpoint.path, checkpoint.model_options
    found = names.plugin_names(path, checkpoint.tensors)
    given = checkpoint.task_options.get("model_path") or ""
    policy = checkpoint.task_options.get("global_tokens", "none")
    train_only = checkpoint.task_options.get("train_only", "all")
    if train_only not in _TRAIN_ONLY:
        _refuse_option(path, "task.train_only", train_only, " or ".join(_TRAIN_ONLY))
    for name, value in (("model_path", given), ("global_tokens", policy)):
        if not isinstance(value, str):
            _refuse_option(path, f"task.{name}", value, "a text")
    try:
        parse_global_tokens(policy)
    except InputError as error:
        _refuse_option(path, "task.global_tokens", policy, error.wanted)
    model_path = Path(given) if given else None
    config = _plugin_config(checkpoint, model_path)
    _need_layers(path, found, config.num_layers)
    stored = {name: f"{names.PLUGIN_PREFIX}{name}" for name in _shapes(config)}
    twins = [found.pop(f"lm_head.decoder.{kind}", None) for kind in ("weight", "bias")]
    _need_names(path, found, list(stored))
    _need_shapes(path, found, config, stored)
    for twin, name in zip(twins, (WORDS, _BIAS), strict=True):
        _need_twins(path, twin, found[name])
    return FairseqModel(
        config=config, tensors=found, is_plugin=True, model_path=model_path,
        global_tokens=policy, notes=_notes([], options),
        train_only=train_only,
    )  # fmt: skip


def _plugin_config(checkpoint: Checkpoint, model_path: Path | None) -> ModelConfig:
    path, options = checkpoint.path, checkpoint.model_options
    if model_path is not None:
        if not (model_path / "config.json").is_file():
            raise InputError(
                str(path), got=f"task.model_path {shown(model_path)}, which is not here",
                wanted="the folder that the training started from: its config.json has the sizes",
                way_out="Put the folder back, or call from where this path leads to it.",
            )  # fmt: skip
        config = read_config(model_path)
    else:
        sizes: dict[str, Any] = {
            ours: _integer(path, theirs, options.get(theirs))
            for theirs, (ours, _) in names.SIZES.items()
        }
        tokenizer = load_tokenizer()
        config = ModelConfig(
            vocab_size=tokenizer.vocab_size,
            max_position_embeddings=_integer(path, "max_positions", options.get("max_positions"))
            + tokenizer.pad_id + 1,
            attention_window=(_WINDOW,) * sizes["num_layers"],
            **sizes,
        )  # fmt: skip
    changes = {}
    for name in ("attention_window", "dilation"):
        value = options.get(name)
        listed = value if isinstance(value, list) else [value]
        if value and not all(type(number) is int for number in listed):
            _refuse_option(path, name, value, "whole numbers")
        if value:
            changes[name] = value
    return dataclasses.replace(changed(config, changes), **_dropouts(path, options))


def _need_options(path: Path, options: Mapping[str, Any]) -> None:
    other = []
    for name, wanted in names.FIXED_OPTIONS.items():
        got = options.get(name, wanted)
        if got != wanted and (got or wanted):  # None and 0 are both: not at all
            other.append(f"{name} {shown(got)} (wanted {wanted})")
    if other:
        raise InputError(
            f"options in {path}", got=" and ".join(other), wanted="RoBERTa as published",
            way_out="Such a model computes something else and is not read.",
        )  # fmt: skip


def _integer(path: Path, name: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= _LARGEST:
        _refuse_option(path, name, value, f"1 to {_LARGEST:,}")
    return value


def _refuse_option(path: Path, name: str, value: object, wanted: str) -> NoReturn:
    raise InputError(
        f"{name} in the options of {path}", got=shown(value), wanted=wanted, way_out=_AS_WRITTEN
    )


def _dropouts(path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for theirs, ours in names.DROPOUTS.items():
        value = options.get(theirs)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            _refuse_option(path, theirs, value, "a number")
        found[ours] = float(value)
    return found


def _position_rows(checkpoint: Checkpoint, rows: int) -> int:
    """Rows of the position table by the options, as fairseq makes it; by the tensor without."""
    options, task = checkpoint.model_options, checkpoint.task_options
    for name, group in (
        ("max_positions", options), ("tokens_per_sample", options), ("tokens_per_sample", task),
    ):  # fmt: skip
        if group.get(name) is not None:
            return _integer(checkpoint.path, name, group[name]) + _SPECIAL_IDS["pad_id"] + 1
    return rows


def _need_layers(path: Path, found: Mapping[str, Tensor], wanted: int) -> None:
    layers = names.count_layers(found)
    if layers != wanted:
        raise InputError(
            f"layers of {path}", got=f"tensors of {layers}", wanted=f"{wanted}, as its options say",
            way_out="Give a checkpoint of a RoBERTa, as fairseq-train wrote it.",
        )  # fmt: skip


def _need_names(path: Path, found: Mapping[str, Tensor], wanted: Sequence[str]) -> None:
    problems = [f"no {name}" for name in wanted if name not in found]
    foreign = sorted(found.keys() - set(wanted))
    problems += [f"{shown(name)}, which is not RoBERTa's" for name in foreign]
    _need_none(path, problems, f"the {len(wanted)} tensors of its layers and masked-LM head")


def _need_shapes(
    path: Path, tensors: Mapping[str, Tensor], config: ModelConfig, stored: Mapping[str, str]
) -> None:
    problems = []
    for name, wanted in _shapes(config).items():
        tensor, theirs = tensors[name], stored.get(name, name)
        if tuple(tensor.shape) != wanted:
            problems.append(f"{theirs} of shape {tuple(tensor.shape)}, not {wanted}")
        elif tensor.dtype not in DTYPES:
            problems.append(f"{theirs} of {tensor.dtype}")
    _need_none(path, problems, "the shapes that its options name")


def _need_none(path: Path, problems: Sequence[str], wanted: str) -> None:
    if problems:
        raise InputError(
            str(path), got=listed(problems), wanted=wanted,
            way_out="Give a checkpoint of a RoBERTa, as fairseq-train wrote it.",
        )  # fmt: skip


def _need_twins(path: Path, decoder: Tensor | None, words: Tensor) -> None:
    if decoder is not None and (decoder.dtype != words.dtype or not torch.equal(decoder, words)):
        raise InputError(
            str(path), got="a decoder unlike the embeddings", wanted="tied weights",
            way_out="Untied decoders are not read.",
        )  # fmt: skip


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        skeleton = LongformerForMaskedLM(config)
    return {name: tuple(p.shape) for name, p in skeleton.named_parameters()}


def _notes(left_out: Sequence[str], options: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    left_out = [name for name in left_out if name != names.VERSION]  # every file has one
    if left_out:
        notes.append(f"left out, no part of a masked-LM model: {listed(left_out, ', ')}")
    used = [
        f"{name} {shown(options[name])}" for name in names.TRAINING_OPTIONS if options.get(name)
    ]
    if used:
        notes.append(f"options of its training that ours lacks: {', '.join(used)}")
    return tuple(notes)
