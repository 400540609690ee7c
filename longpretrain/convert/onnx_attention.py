"""Longformer's attention as ONNX nodes: memory grows with the length, not with its square.

Queries are cut into blocks. A block's keys are its own tokens, those that its window reaches on
either side, and the global ones, so that each key stands once in the softmax. All lengths are read
from the inputs while the graph runs; nothing of the export's own inputs is in it.

Letters: B batch, N tokens, C hidden channels, H heads, D channels per head, G slots of global
tokens, M blocks, Q queries of a block, K keys of a block, T = B x N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from longpretrain.convert.onnx_file import OnnxGraph
from longpretrain.model import ModelConfig

_NEVER = -1e30
"""Added to the score of a key out of sight: exp gives 0, and rows of nothing else stay finite."""
_LEAST_BLOCK = 32
"""Queries of a block under small windows, where matrices of a few rows would take longer."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What every layer needs of the inputs, computed once."""

    batch: str
    """Rows, a vector of one."""
    num_tokens: str
    """Tokens of a row, a vector of one."""
    real_BN: str
    """Whether a token is one and not padding."""
    is_local_BN: str
    """Whether a key is met in the window: real and not global."""
    slot_BG2: str
    """Row and position of each slot: of its global token, else of some token."""
    is_slot_BG: str
    """Whether a slot has a global token. There is always one slot, for no runtime likes none."""
    seen: str
    """Tokens that global queries see, a vector of one: all, or 1 if no row has a global token."""


@dataclass(frozen=True, kw_only=True)
class Band:
    """Who sees whom under one window."""

    query_MQ: str
    """Token of each query of a block; beyond the end, the last."""
    key_MK: str
    """Token of each key of a block, then the slots, which stand behind the last token."""
    bias_B1MQK: str
    """0 where the query sees the key, else _NEVER."""


def read_inputs(graph: OnnxGraph, ids_BN: str, mask_BN: str, globals_BN: str = "") -> Inputs:
    """Masks and slots from the three inputs; RoBERTa has no third, and no slots."""
    shape = graph.node("Shape", ids_BN)
    batch = graph.node("Slice", shape, graph.ints(0), graph.ints(1))
    num_tokens = graph.node("Slice", shape, graph.ints(1), graph.ints(2))
    real_BN = graph.cast(mask_BN, "BOOL")
    if not globals_BN:
        return Inputs(
            batch=batch, num_tokens=num_tokens, real_BN=real_BN, is_local_BN=real_BN,
            slot_BG2="", is_slot_BG="", seen=num_tokens,
        )  # fmt: skip
    is_global_BN = graph.node("And", real_BN, graph.cast(globals_BN, "BOOL"))
    is_local_BN = graph.node("And", real_BN, graph.node("Not", is_global_BN))
    count_BN = graph.cast(is_global_BN, "INT64")
    count_B = graph.node("ReduceSum", count_BN, graph.ints(1), keepdims=0)
    most = graph.node("Unsqueeze", graph.node("ReduceMax", count_B, keepdims=0), graph.ints(0))
    slots = graph.node("Max", most, graph.ints(1))
    # Earlier tokens rank higher, so that the order of the slots is that of the text everywhere.
    backwards_N = graph.node("Sub", num_tokens, _count(graph, num_tokens))
    rank_BN = graph.node("Mul", count_BN, backwards_N)
    value_BG, token_BG = graph.nodes("TopK", rank_BN, slots, outputs=2, axis=1, largest=1, sorted=1)
    row_B1 = graph.node("Unsqueeze", _count(graph, batch), graph.ints(1))
    row_BG = graph.node("Expand", row_B1, graph.node("Shape", token_BG))
    pair = [graph.node("Unsqueeze", index, graph.ints(2)) for index in (row_BG, token_BG)]
    has_any = graph.node("Greater", most, graph.ints(0))
    return Inputs(
        batch=batch, num_tokens=num_tokens, real_BN=real_BN, is_local_BN=is_local_BN,
        slot_BG2=graph.node("Concat", *pair, axis=2),
        is_slot_BG=graph.node("Greater", value_BG, graph.ints(0)),
        seen=graph.node("Where", has_any, num_tokens, graph.ints(1)),
    )  # fmt: skip


def block_size(one_sided_window: int, channels: int) -> int:
    """Queries of a block: where copies of the keys and values take the memory that scores do.

    A block of Q has Q + 2w keys for its Q queries, so that a query costs 2 D (1 + 2w / Q) numbers
    of keys and values and 2 (Q + 2w) of scores and weights: least at Q = sqrt(2wD).
    """
    best = math.isqrt(2 * one_sided_window * channels)
    return max(_LEAST_BLOCK, 1 << best.bit_length() - 1)


def make_band(graph: OnnxGraph, inputs: Inputs, one_sided_window: int, channels: int) -> Band:
    """The blocks of one window, for all layers that have it."""
    end = inputs.num_tokens
    size = graph.node("Min", graph.ints(block_size(one_sided_window, channels)), end)
    one = graph.ints(1)
    blocks = graph.node("Div", graph.node("Sub", graph.node("Add", end, size), one), size)
    # A single block reaches nothing beyond itself: short inputs cost what full attention does.
    rest = graph.node("Mul", graph.node("Sub", blocks, one), size)
    halo = graph.node("Min", graph.ints(one_sided_window), rest)
    width = graph.node("Add", size, graph.node("Add", halo, halo))
    last = graph.node("Sub", end, one)
    first_M1 = graph.node(
        "Unsqueeze", graph.node("Mul", _count(graph, blocks), size), graph.ints(1)
    )
    query_Q = _count(graph, size)
    query_MQ = graph.node("Min", graph.node("Add", first_M1, query_Q), last)
    key_K = graph.node("Sub", _count(graph, width), halo)
    unbounded_MK = graph.node("Add", first_M1, key_K)
    key_MK = graph.node("Max", graph.node("Min", unbounded_MK, last), graph.ints(0))
    exists_MK = graph.node("Equal", key_MK, unbounded_MK)
    is_local_BMK = graph.node("Gather", inputs.is_local_BN, key_MK, axis=1)
    sees_key_BMK = graph.node("And", is_local_BMK, exists_MK)
    query_Q1 = graph.node("Unsqueeze", query_Q, graph.ints(1))
    distance_QK = graph.node("Abs", graph.node("Sub", query_Q1, key_K))
    reaches_QK = graph.node("LessOrEqual", distance_QK, graph.ints(one_sided_window))
    sees_BM1K = graph.node("Unsqueeze", sees_key_BMK, graph.ints(2))
    sees_BMQK = graph.node("And", sees_BM1K, reaches_QK)

    slots = graph.node("Shape", inputs.is_slot_BG, start=1, end=2)
    slot_G = graph.node("Add", _count(graph, slots), end)
    slot_MG = graph.node("Expand", slot_G, graph.node("Concat", blocks, slots, axis=0))
    is_slot_B11G = graph.node("Unsqueeze", inputs.is_slot_BG, graph.ints(1, 2))
    to_BMQG = graph.node("Concat", inputs.batch, blocks, size, slots, axis=0)
    sees_BMQG = graph.node("Expand", is_slot_B11G, to_BMQG)
    sees_BMQK = graph.node("Concat", sees_BMQK, sees_BMQG, axis=3)
    return Band(
        query_MQ=query_MQ,
        key_MK=graph.node("Concat", key_MK, slot_MG, axis=1),
        bias_B1MQK=_bias(graph, graph.node("Unsqueeze", sees_BMQK, graph.ints(1))),
    )


class AttentionNodes:
    """The attention of one layer.

    Args:
        graph: grows.
        config: of the model.
        prefix: of the names of the layer's weights.
        inputs: of all layers.
    """

    def __init__(
        self,
        graph: OnnxGraph,
        config: ModelConfig,
        prefix: str,
        inputs: Inputs,
    ) -> None:
        self._graph, self._prefix, self._inputs = graph, prefix, inputs
        self._heads, self._width = config.num_heads, config.hidden_size
        self._channels = config.hidden_size // config.num_heads

    def full(self, x_TC: str) -> str:
        """RoBERTa's: every token sees every real one. TC to TC."""
        q_BHND, k_BHND, v_BHND = (self._project(name, x_TC) for name in ("query", "key", "value"))
        bias_B11N = self._sees_real(self._inputs.num_tokens)
        out_BHND = self._attend(q_BHND, k_BHND, v_BHND, bias_B11N)
        return self._rows(self._without_padding(self._side_by_side(out_BHND)))

    def sliding(self, x_TC: str, band: Band) -> str:
        """Longformer's: a window, and global tokens. TC to TC."""
        graph, inputs = self._graph, self._inputs
        to_BNC = graph.node("Concat", inputs.batch, graph.ints(-1, self._width), axis=0)
        x_BNC = graph.node("Reshape", x_TC, to_BNC)
        slot_BGC = graph.node("GatherND", x_BNC, inputs.slot_BG2)
        # Behind the last token stand the global ones again, as keys of every block.
        key_TC = self._rows(graph.node("Concat", x_BNC, slot_BGC, axis=1))
        q_BHMQD = graph.node("Gather", self._project("query", x_TC), band.query_MQ, axis=2)
        k_BHMKD, v_BHMKD = (
            graph.node("Gather", self._project(name, key_TC), band.key_MK, axis=2)
            for name in ("key", "value")
        )
        out_BHMQD = self._attend(q_BHMQD, k_BHMKD, v_BHMKD, band.bias_B1MQK, blocked=True)
        cut = graph.ints(self._heads, -1, self._channels)
        to_BHND = graph.node("Concat", inputs.batch, cut, axis=0)
        out_BHND = graph.node("Reshape", out_BHMQD, to_BHND)  # with what the last block is beyond
        end = (graph.ints(0), inputs.num_tokens, graph.ints(2))
        out_BNC = self._side_by_side(graph.node("Slice", out_BHND, *end))
        return self._rows(self._with_globals(self._without_padding(out_BNC), x_BNC, slot_BGC))

    def _with_globals(self, out_BNC: str, x_BNC: str, slot_BGC: str) -> str:
        """Rows of global tokens are of projections of their own, over all real tokens."""
        graph, inputs = self._graph, self._inputs
        seen_BNC = graph.node("Slice", x_BNC, graph.ints(0), inputs.seen, graph.ints(1))
        seen_TC = self._rows(seen_BNC)
        q_BHGD = self._project("query_global", self._rows(slot_BGC))
        k_BHND, v_BHND = (self._project(f"{name}_global", seen_TC) for name in ("key", "value"))
        out_BHGD = self._attend(q_BHGD, k_BHND, v_BHND, self._sees_real(inputs.seen))
        # A slot without a token writes back what it finds; slots of a row are different tokens.
        found_BGC = graph.node("GatherND", out_BNC, inputs.slot_BG2)
        is_slot_BG1 = graph.node("Unsqueeze", inputs.is_slot_BG, graph.ints(2))
        new_BGC = graph.node("Where", is_slot_BG1, self._side_by_side(out_BHGD), found_BGC)
        return graph.node("ScatterND", out_BNC, inputs.slot_BG2, new_BGC)

    def _attend(self, q: str, k: str, v: str, bias: str, *, blocked: bool = False) -> str:
        """Softmax-weighted mean of the values: BHND, or BHMQD if ``blocked``."""
        graph = self._graph
        q = graph.node("Mul", q, graph.real(1 / math.sqrt(self._channels)))
        k = graph.node("Transpose", k, perm=[0, 1, 2, 4, 3] if blocked else [0, 1, 3, 2])
        score = graph.node("Add", graph.node("MatMul", q, k), bias)
        return graph.node("MatMul", graph.node("Softmax", score, axis=-1), v)

    def _project(self, name: str, x_TC: str) -> str:
        """A projection, cut into heads: TC to BHND."""
        graph = self._graph
        out_TC = linear(graph, f"{self._prefix}.{name}", x_TC)
        cut = graph.ints(-1, self._heads, self._channels)
        to_BNHD = graph.node("Concat", self._inputs.batch, cut, axis=0)
        return graph.node("Transpose", graph.node("Reshape", out_TC, to_BNHD), perm=[0, 2, 1, 3])

    def _side_by_side(self, x_BHND: str) -> str:
        """BHND to BNC."""
        x_BNHD = self._graph.node("Transpose", x_BHND, perm=[0, 2, 1, 3])
        return self._graph.node("Reshape", x_BNHD, self._graph.ints(0, 0, self._width))

    def _rows(self, x_BNC: str) -> str:
        """BNC to TC."""
        return self._graph.node("Reshape", x_BNC, self._graph.ints(-1, self._width))

    def _without_padding(self, x_BNC: str) -> str:
        """Exactly 0 for padded queries, as in our operator."""
        graph = self._graph
        real_BN1 = graph.node("Unsqueeze", self._inputs.real_BN, graph.ints(2))
        return graph.node("Where", real_BN1, x_BNC, graph.real(0.0))

    def _sees_real(self, count: str) -> str:
        """The bias of queries that see all real ones of the first ``count`` tokens, B11N."""
        graph = self._graph
        real_BN = graph.node("Slice", self._inputs.real_BN, graph.ints(0), count, graph.ints(1))
        return _bias(graph, graph.node("Unsqueeze", real_BN, graph.ints(1, 2)))


def linear(graph: OnnxGraph, name: str, x_TC: str) -> str:
    """A linear layer, its weight as torch stores it: output channels, input channels."""
    weight, bias = (graph.real_weight(f"{name}.{part}") for part in ("weight", "bias"))
    return graph.node("Gemm", x_TC, weight, bias, transB=1)


def _bias(graph: OnnxGraph, sees: str) -> str:
    return graph.node("Where", sees, graph.real(0.0), graph.real(_NEVER))


def _count(graph: OnnxGraph, end: str) -> str:
    """0, 1, ... below a vector of one."""
    return graph.node("Range", graph.whole(0), graph.node("Squeeze", end), graph.whole(1))
