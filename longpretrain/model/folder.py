"""A model folder is a Hugging Face folder: `config.json` and the weights, in and out.

What Hugging Face's Longformer cannot express stands in a ``longpretrain`` block of `config.json`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from longpretrain.errors import InputError
from longpretrain.files import fresh_folder
from longpretrain.model.config_keys import KEYS, read_number, read_numbers, told_by_key
from longpretrain.model.encoder import Encoder, ModelConfig
from longpretrain.model.families import CONFIG_NAME, Family, read_family
from longpretrain.model.lm_head import LongformerForMaskedLM
from longpretrain.model.skeleton import without_values
from longpretrain.model.weights import (
    INDEX_NAME,
    SHARD_BYTES,
    WEIGHTS_NAME,
    has_lm_head,
    read_weights,
    write_weights,
)

_ARCHITECTURES = {"longformer": "Longformer", "roberta": "Roberta"}

# What the code computes whatever the file says; a file that says otherwise is another model.
_FIXED = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
# All that lies in a model folder of ours, so that replacing one deletes nobody's work.
_OUR_FILES = {
    CONFIG_NAME, WEIGHTS_NAME, INDEX_NAME, "README.md", "conversion.json",
    "model.onnx", "model.onnx.data",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt",
    "special_tokens_map.json", "added_tokens.json", "sentencepiece.bpe.model", "spiece.model",
    "tokenizer.model",
}  # fmt: skip
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_CHANGEABLE = (
    "attention_window", "dilation", "causal", "learnt_positions",
    "hidden_dropout", "attention_dropout", "attention_backend", "layer_norm_backend",
)  # fmt: skip


def read_config(folder: Path | str) -> ModelConfig:
    """The configuration in a folder's `config.json`, of any family that is read.

    Whether there is a masked-LM head is known from the names of the weights.

    Raises:
        InputError: no such file, not JSON, a model type or an arithmetic that is not ours.
    """
    folder = Path(folder)
    path = folder / CONFIG_NAME
    family, tree = read_family(folder)
    for key, value in _FIXED.items():
        if tree.get(key, value) != value:
            raise InputError(
                f"{key} in {path}", got=tree[key], wanted=value,
                way_out="Such a model computes something else and is not read.",
            )  # fmt: skip
    fields: dict[str, Any] = {"model_type": family.becomes}
    tree |= family.special_ids(folder, tree)
    fields |= read_numbers(path, tree, family)
    if family.becomes == "longformer":
        fields["attention_window"] = _windows(path, tree, fields["num_layers"])
    fields["has_lm_head"] = _has_lm_head(folder, family, tree)
    fields |= _own_block(path, tree)
    with told_by_key(path):
        return ModelConfig(**fields)


def config_json(config: ModelConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """What `config.json` holds: every field, as Hugging Face's defaults are those of another model.

    Args:
        config: the model.
        dtype: of the stored weights, by torch's name.
    """
    tree: dict[str, Any] = {key: getattr(config, name) for key, (name, _) in KEYS.items()}
    tree |= {
        "architectures": [
            _ARCHITECTURES[config.model_type] + ("ForMaskedLM" if config.has_lm_head else "Model")
        ],
        "dtype": dtype,
        "hidden_act": "gelu",
        "model_type": config.model_type,
        "sep_token_id": config.eos_id,
        "tie_word_embeddings": True,
    }
    if config.model_type == "longformer":
        tree |= {"attention_window": list(config.attention_window), "onnx_export": False}
    own: dict[str, Any] = {}
    if set(config.dilation) - {1}:
        own["dilation"] = list(config.dilation)
    if config.causal:
        own["causal"] = True
    if config.learnt_positions:
        own["learnt_positions"] = config.learnt_positions
    if own:
        tree["longpretrain"] = own
    return dict(sorted(tree.items()))


def load_model(
    folder: Path | str,
    *,
    changes: Mapping[str, object] = MappingProxyType({}),
    activation_checkpointing: bool = False,
) -> LongformerForMaskedLM:
    """The model of a folder, in fp32 on the CPU, in eval mode.

    Args:
        folder: a Hugging Face RoBERTa or Longformer folder, or a checkpoint of ours.
        changes: fields of ModelConfig to set otherwise than the folder: attention_window and
            dilation (a number for all, or one per layer or head), causal, the dropouts,
            attention_backend, layer_norm_backend.
        activation_checkpointing: recompute each layer in the backward pass.

    Raises:
        InputError: the folder does not hold such a model, or a change does not fit it.
    """
    config = changed(read_config(folder), changes)
    need_lm_head(folder, config)
    with without_values():
        model = LongformerForMaskedLM(config, activation_checkpointing=activation_checkpointing)
    model.load_state_dict(_own_tensors(folder, config), strict=False, assign=True)
    model.tie_weights()
    return model.eval()


def load_encoder(
    folder: Path | str, *, changes: Mapping[str, object] = MappingProxyType({})
) -> Encoder:
    """The encoder of a folder, with a masked-LM head in it or not: fp32 on the CPU, in eval mode.

    Args:
        folder: as of ``load_model``, or without a masked-LM head.
        changes: as of ``load_model``.

    Raises:
        InputError: the folder does not hold such a model, or a change does not fit it.
    """
    config = changed(read_config(folder), changes)
    with without_values():
        encoder = Encoder(config)
    tensors = _own_tensors(folder, config)
    names = {name: f"longformer.{name}" for name, _ in encoder.named_parameters()}
    own = {name: tensors[full] for name, full in names.items()}
    encoder.load_state_dict(own, assign=True)
    return encoder.eval()


def need_lm_head(folder: Path | str, config: ModelConfig) -> None:
    """Refuses a bare encoder, which predicts no tokens.

    Raises:
        InputError: there is no masked-LM head.
    """
    if not config.has_lm_head:
        raise InputError(
            f"model {folder}", got="no masked-LM head", wanted="a model that predicts tokens",
            way_out=f"Draw a new head for it: longpretrain convert {folder} DST --new-head.",
        )  # fmt: skip


def save_model(
    model: LongformerForMaskedLM | tuple[ModelConfig, Mapping[str, Tensor]],
    folder: Path | str,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model folder that transformers loads: whole or not at all, always the same bytes.

    Args:
        model: a model, or its configuration and its tensors by their names in memory.
        folder: made; a model folder that stands there is replaced, unless other files lie in it.
        shard_bytes: largest size of one weights file, bytes.

    Raises:
        InputError: the folder exists and is not a model's, or holds more than a model.
    """
    with fresh_folder(folder, belongs=holds_a_model_only) as fresh:
        write_model(model, fresh, shard_bytes=shard_bytes)


def write_model(
    model: LongformerForMaskedLM | tuple[ModelConfig, Mapping[str, Tensor]],
    folder: Path,
    *,
    shard_bytes: int = SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """As save_model, into a folder that exists: for callers that write more files beside.

    Args:
        model: as of save_model.
        folder: to write to.
        shard_bytes: as of save_model.
        dtype: what the numbers are rounded to. None: they stay as they are.
    """
    config, state = model if isinstance(model, tuple) else (model.config, model.state_dict())
    name = str(dtype or next(iter(state.values())).dtype).removeprefix("torch.")
    write_config(config, folder, dtype=name)
    write_weights(folder, config, state, shard_bytes=shard_bytes, dtype=dtype)


def write_config(config: ModelConfig, folder: Path, *, dtype: str = "float32") -> None:
    """Writes `config.json` alone, into a folder that exists."""
    text = json.dumps(config_json(config, dtype=dtype), indent=2)
    (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")


def read_tensors(folder: Path | str) -> dict[str, Tensor]:
    """The parameters of a model folder, by their names in memory, in the dtype of the file.

    Complete and of the shapes that `config.json` asks for; tied twins and what is no part of the
    model are left out. Tensors may be mapped from the file.

    Raises:
        InputError: the folder does not hold such a model.
    """
    return read_weights(folder, read_config(folder))


def holds_a_model_only(folder: Path) -> bool:
    """Whether a folder has a `config.json`, and nothing that we would not have written there."""
    return (folder / CONFIG_NAME).is_file() and all(
        path.is_file() and (path.name in _OUR_FILES or _SHARD.fullmatch(path.name))
        for path in folder.iterdir()
    )


def changed(config: ModelConfig, changes: Mapping[str, object]) -> ModelConfig:
    """The configuration with some fields set otherwise; one number is for all layers or heads."""
    fields: dict[str, Any] = {}
    for name, value in changes.items():
        if name not in _CHANGEABLE:
            raise InputError(
                f"change of {name}", got=value, wanted=f"a change of {', '.join(_CHANGEABLE)}",
                way_out="What the weights fix is changed by longpretrain convert.",
            )  # fmt: skip
        count = {"attention_window": config.num_layers, "dilation": config.num_heads}.get(name)
        fields[name] = value if count is None else spread(name, value, count)
    return dataclasses.replace(config, **fields)


def spread(name: str, value: object, count: int) -> tuple[int, ...]:
    """One integer repeated ``count`` times, or a list of integers as it is."""
    values: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
    if not all(isinstance(entry, int) and not isinstance(entry, bool) for entry in values):
        raise InputError(
            name, got=value, wanted=f"an integer, or a list of {count}", way_out=f"Set {name}."
        )
    return tuple(values * count if len(values) == 1 else values)


def _own_tensors(folder: Path | str, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a folder in fp32, by their names in memory."""
    # Copies: a mapped file may be replaced while the model lives.
    state = read_weights(folder, config)
    return {name: t.to(torch.float32, copy=True).contiguous() for name, t in state.items()}


def _has_lm_head(folder: Path, family: Family, tree: Mapping[str, Any]) -> bool:
    """By the weights, which are right where `config.json` is not; by its word without weights.

    Their damage is told by who reads them: a run may go on though the folder that it began with is
    broken.
    """
    with contextlib.suppress(InputError):
        found = has_lm_head(folder, family)
        if found is not None:
            return found
    said = tree.get("architectures")
    classes = said if isinstance(said, list) else []
    return not any(str(name).endswith("Model") for name in classes)


def _windows(path: Path, tree: Mapping[str, Any], num_layers: int) -> tuple[int, ...]:
    if "attention_window" not in tree:
        raise InputError(
            f"attention_window in {path}", got="no such key", wanted="a window per layer",
            way_out="Write the windows that the model was trained with into the file.",
        )  # fmt: skip
    return spread(f"attention_window in {path}", tree["attention_window"], num_layers)


def _own_block(path: Path, tree: Mapping[str, Any]) -> dict[str, Any]:
    block = tree.get("longpretrain", {})
    if not isinstance(block, dict) or block.keys() - {"dilation", "causal", "learnt_positions"}:
        raise InputError(
            f"longpretrain in {path}", got=block,
            wanted="keys dilation, causal and learnt_positions",
            way_out="A newer version of longpretrain may have written it.",
        )  # fmt: skip
    fields: dict[str, Any] = {"causal": bool(block.get("causal", False))}
    if "dilation" in block:
        fields["dilation"] = spread(f"dilation in {path}", block["dilation"], 1)
    learnt = block.get("learnt_positions", 0)
    fields["learnt_positions"] = read_number(path, "learnt_positions", learnt)
    return fields
