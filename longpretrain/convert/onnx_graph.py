"""A model as an ONNX graph, built from its configuration and tensors: nothing is traced.

A trace holds whatever the traced input was: that is why other exports of Longformer are wrong at
other lengths. Inputs and their meaning are those of Hugging Face.

Letters: B batch, N tokens, C hidden channels, T = B x N, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from longpretrain.convert.onnx_attention import (
    AttentionNodes,
    Band,
    Inputs,
    linear,
    make_band,
    read_inputs,
)
from longpretrain.convert.onnx_file import OnnxGraph
from longpretrain.model import ModelConfig

_DIMS_BN = ("batch", "sequence")
_EMBEDDINGS = "longformer.embeddings"


def input_names(config: ModelConfig) -> tuple[str, ...]:
    """What the graph is fed with, each int64 [batch, sequence]."""
    names = ("input_ids", "attention_mask", "global_attention_mask")
    return names if config.model_type == "longformer" else names[:2]


def output_name(config: ModelConfig) -> str:
    """What the graph gives out, [batch, sequence, vocabulary or channels]."""
    return "logits" if config.has_lm_head else "last_hidden_state"


def build_graph(
    config: ModelConfig, weights: Mapping[str, Tensor], *, dtype: torch.dtype = torch.float32
) -> OnnxGraph:
    """The graph of a model without dilation and not causal, all dimensions free.

    Args:
        config: the model's.
        weights: by their names in memory, of any dtype.
        dtype: of the stored weights, fp32 or fp16; all arithmetic is in fp32.
    """
    graph = OnnxGraph(weights, dtype)
    ids_BN, mask_BN, *globals_BN = (graph.input(name, _DIMS_BN) for name in input_names(config))
    nodes = _ModelNodes(graph, config)
    x_TC = nodes.embeddings(ids_BN)
    x_TC = nodes.layers(x_TC, read_inputs(graph, ids_BN, mask_BN, *globals_BN))
    width = config.hidden_size
    if config.has_lm_head:
        x_TC, width = nodes.lm_head(x_TC), config.vocab_size
    to_BNC = graph.node("Concat", graph.node("Shape", ids_BN), graph.ints(width), axis=0)
    graph.output(output_name(config), graph.node("Reshape", x_TC, to_BNC), (*_DIMS_BN, width))
    return graph


class _ModelNodes:
    """The parts of a model, as in longpretrain/model."""

    def __init__(self, graph: OnnxGraph, config: ModelConfig) -> None:
        self._graph, self._config = graph, config

    def embeddings(self, ids_BN: str) -> str:
        """Word + position + token type, normalised: BN to TC."""
        graph, config = self._graph, self._config
        names = (f"{kind}_embeddings" for kind in ("word", "position", "token_type"))
        word, position, token_type = (graph.weight(f"{_EMBEDDINGS}.{n}.weight") for n in names)
        # By the ids, whatever the mask says: so does Hugging Face.
        pad = graph.whole(config.pad_id)
        real_BN = graph.cast(graph.node("Not", graph.node("Equal", ids_BN, pad)), "INT64")
        count_BN = graph.node("Mul", graph.node("CumSum", real_BN, graph.whole(1)), real_BN)
        position_BN = graph.node("Add", count_BN, pad)
        rows = ((word, ids_BN), (position, position_BN), (token_type, graph.whole(0)))
        words, positions, kind = (
            graph.as_real(graph.node("Gather", table, row, axis=0)) for table, row in rows
        )
        x_BNC = graph.node("Add", graph.node("Add", words, positions), kind)
        x_TC = graph.node("Reshape", x_BNC, graph.ints(-1, config.hidden_size))
        return self._layer_norm(f"{_EMBEDDINGS}.LayerNorm", x_TC)

    def layers(self, x_TC: str, inputs: Inputs) -> str:
        """All of them: TC to TC."""
        graph, config = self._graph, self._config
        channels = config.hidden_size // config.num_heads
        bands: dict[int, Band] = {}
        for window in sorted(set(config.attention_window)):
            with graph.scope(f"window.{window}"):
                bands[window] = make_band(graph, inputs, window // 2, channels)
        for number in range(config.num_layers):
            prefix = f"longformer.encoder.layer.{number}"
            with graph.scope(f"layer.{number}"):
                nodes = AttentionNodes(graph, config, f"{prefix}.attention.self", inputs)
                if config.model_type == "roberta":
                    attended_TC = nodes.full(x_TC)
                else:
                    attended_TC = nodes.sliding(x_TC, bands[config.attention_window[number]])
                x_TC = self._add_and_norm(f"{prefix}.attention.output", attended_TC, x_TC)
                wide = self._gelu(linear(graph, f"{prefix}.intermediate.dense", x_TC))
                x_TC = self._add_and_norm(f"{prefix}.output", wide, x_TC)
        return x_TC

    def lm_head(self, x_TC: str) -> str:
        """Dense, GELU, LayerNorm, and the word embeddings as decoder: TC to TV."""
        graph = self._graph
        x_TC = self._gelu(linear(graph, "lm_head.dense", x_TC))
        x_TC = self._layer_norm("lm_head.layer_norm", x_TC)
        word = graph.real_weight(f"{_EMBEDDINGS}.word_embeddings.weight")
        return graph.node("Gemm", x_TC, word, graph.real_weight("lm_head.bias"), transB=1)

    def _add_and_norm(self, prefix: str, branch: str, residual_TC: str) -> str:
        dense_TC = linear(self._graph, f"{prefix}.dense", branch)
        sum_TC = self._graph.node("Add", dense_TC, residual_TC)
        return self._layer_norm(f"{prefix}.LayerNorm", sum_TC)

    def _layer_norm(self, name: str, x_TC: str) -> str:
        graph, epsilon = self._graph, self._config.layer_norm_eps
        scale, shift = (graph.real_weight(f"{name}.{part}") for part in ("weight", "bias"))
        return graph.node("LayerNormalization", x_TC, scale, shift, axis=-1, epsilon=epsilon)

    def _gelu(self, x: str) -> str:
        """The exact one: x (1 + erf(x / sqrt 2)) / 2. ONNX has an operator for it from opset 20."""
        graph = self._graph
        erf = graph.node("Erf", graph.node("Div", x, graph.real(math.sqrt(2))))
        doubled = graph.node("Mul", x, graph.node("Add", erf, graph.real(1.0)))
        return graph.node("Mul", doubled, graph.real(0.5))
