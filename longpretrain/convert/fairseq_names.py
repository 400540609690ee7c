"""What fairseq calls things: tensors of both generations, sizes, and options that change the maths.

Names in memory are ours (``longformer.`` first for every model type); fairseq's are those that its
RoBERTa has today. Checkpoints of our own plugin hold our names behind ``model.``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from longpretrain.convert.shown import shown
from longpretrain.errors import InputError
from longpretrain.model.weights import POSITIONS, WORDS

TYPES = "longformer.embeddings.token_type_embeddings.weight"
LM_WEIGHT = "encoder.lm_head.weight"
"""The decoder: in fairseq's files the word embeddings once more, under a second name."""
VERSION = "encoder.sentence_encoder.version"
"""A number that fairseq's encoder keeps with its tensors; 3 today."""
PLUGIN_PREFIX = "model."

_ENCODER = "encoder.sentence_encoder."
_ONCE = {
    WORDS: f"{_ENCODER}embed_tokens.weight",
    POSITIONS: f"{_ENCODER}embed_positions.weight",
    "longformer.embeddings.LayerNorm.weight": f"{_ENCODER}layernorm_embedding.weight",
    "longformer.embeddings.LayerNorm.bias": f"{_ENCODER}layernorm_embedding.bias",
    "lm_head.dense.weight": "encoder.lm_head.dense.weight",
    "lm_head.dense.bias": "encoder.lm_head.dense.bias",
    "lm_head.layer_norm.weight": "encoder.lm_head.layer_norm.weight",
    "lm_head.layer_norm.bias": "encoder.lm_head.layer_norm.bias",
    "lm_head.bias": "encoder.lm_head.bias",
}
_PER_LAYER = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.output.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "output.LayerNorm": "final_layer_norm",
}
_LAYER = re.compile(r"encoder\.(?:sentence_encoder\.layers|layer)\.(\d+)\.")
# Tensors that are no part of a masked-LM model, or no weights.
_LEFT_OUT = re.compile(r"classification_heads\..+|" + re.escape(VERSION))

# fairseq's size -> (ours, what its roberta takes where a file leaves it out)
SIZES = {
    "encoder_layers": ("num_layers", 12),
    "encoder_embed_dim": ("hidden_size", 768),
    "encoder_attention_heads": ("num_heads", 12),
    "encoder_ffn_embed_dim": ("intermediate_size", 3072),
}
DROPOUTS = {"dropout": "hidden_dropout", "attention_dropout": "attention_dropout"}
# What our code computes whatever the file says, and what fairseq's roberta takes by default: the
# same. encoder_normalize_before is what its layers do; the norm after the embeddings, which files
# of 2019 had under that name in the code only, is layernorm_embedding.
FIXED_OPTIONS: Mapping[str, Any] = {
    "activation_fn": "gelu",
    "encoder_normalize_before": False,
    "layernorm_embedding": True,
    "encoder_learned_pos": True,
    "no_token_positional_embeddings": False,
    "no_scale_embedding": True,
    "untie_weights_roberta": False,
    "adaptive_input": False,
    "quant_noise_pq": 0,
    "quant_noise_scalar": 0,
    "encoder_layers_to_keep": None,
    "encoder_xformers_att_config": None,
    "mha_heads_to_keep": -1,
    "ffn_blocks_to_remove": -1,
}
# Of training alone, and not carried over; a file that uses one is read, and the report says so.
TRAINING_OPTIONS = ("activation_dropout", "encoder_layerdrop")


def fairseq_names(num_layers: int) -> dict[str, str]:
    """Name in memory -> fairseq's, for all of a RoBERTa but the token types, which it lacks."""
    names = dict(_ONCE)
    for layer in range(num_layers):
        for ours, theirs in _PER_LAYER.items():
            for kind in ("weight", "bias"):
                name = f"longformer.encoder.layer.{layer}.{ours}.{kind}"
                names[name] = f"{_ENCODER}layers.{layer}.{theirs}.{kind}"
    return names


def current_names(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of any generation under today's names, as fairseq itself renames them on loading.

    Files of 2019 say ``decoder`` for the encoder and ``emb_layer_norm``, and hold the projections
    of queries, keys and values in one tensor, in this order.

    Raises:
        InputError: one tensor stands in the file under two names.
    """
    found = []
    for old, tensor in tensors.items():
        name = re.sub(r"^decoder\.", "encoder.", old)
        name = name.replace(".emb_layer_norm.", ".layernorm_embedding.")
        start, joint, kind = name.rpartition(".self_attn.in_proj_")
        if joint and tensor.dim() and len(tensor) % 3 == 0:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                found.append((old, f"{start}.self_attn.{part}_proj.{kind}", third))
        else:
            found.append((old, name, tensor))
    return _each_once(path, found)


def plugin_names(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of our plugin by their names in memory.

    Raises:
        InputError: one tensor stands in the file under two names.
    """
    found = [(old, old.removeprefix(PLUGIN_PREFIX), tensor) for old, tensor in tensors.items()]
    return _each_once(path, found)


def _each_once(path: Path, found: Iterable[tuple[str, str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by name, of (name in the file, name, tensor); with two of one, which would count?"""
    old_names: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for old, name, tensor in found:
        if name in tensors:
            raise InputError(
                str(path),
                got=f"{shown(name)} stands twice, as {shown(old_names[name])} and {shown(old)}",
                wanted="every tensor once",
                way_out="Give the checkpoint as fairseq-train wrote it, before anything was added.",
            )
        old_names[name], tensors[name] = old, tensor
    return tensors


def is_left_out(name: str) -> bool:
    """Whether a tensor, by today's name, is no part of the masked-LM model."""
    return _LEFT_OUT.fullmatch(name) is not None


def count_layers(names: Mapping[str, Any]) -> int:
    """Layers that a file has tensors of, by fairseq's names or ours."""
    return len({match[1] for name in names if (match := _LAYER.search(name))})
