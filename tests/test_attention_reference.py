"""Our attention against Hugging Face's LongformerSelfAttention, and the definition by hand."""

from __future__ import annotations

import math

import pytest
import torch
from attention_cases import output_gradient
from torch import Tensor
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

from longpretrain.attention import AttentionPattern, sliding_attention

HEADS, HEAD_SIZE = 2, 8
HIDDEN = HEADS * HEAD_SIZE
PADDING, LOCAL, GLOBAL = -10000.0, 0.0, 10000.0  # what LongformerModel hands to its layers

# Each kind: token kinds of a batch of three rows, as a function of the length.
KINDS = [
    "plain",
    "padding",
    "padded_windows",
    "one_global",
    "ragged_globals",
    "padded_globals",
    "all_at_once",
]
# Windows as Hugging Face counts them. Its layer cannot compute a window of 2 (an empty slice in
# transformers 5.23); test_attention_portable.py compares that one with our dense reference.
SHORT = [(1, 4), (7, 4), (7, 6), (7, 8), (7, 14), (255, 4), (255, 32), (255, 256), (255, 510)]
LONG = [(513, 64), (513, 512), (513, 514)]
SETTINGS = [(tokens, window, kind) for tokens, window in SHORT + LONG for kind in KINDS] + [
    (4095, 4, "all_at_once"),
    (4095, 512, "all_at_once"),
    (4095, 512, "padded_globals"),
    (5000, 64, "padding"),
    (5000, 512, "ragged_globals"),
]


def token_kinds(kind: str, tokens: int) -> tuple[Tensor, Tensor | None]:
    """padding_BN, and global_index_BG (int32, -1 = unused) with None for no slots."""
    padding_BN = torch.zeros(3, tokens, dtype=torch.bool)
    index_BG = None
    last = tokens - 1
    if kind in {"padding", "padded_globals", "all_at_once"}:
        padding_BN[0, tokens - tokens // 4 :] = True
        padding_BN[1, tokens // 3] = tokens > 1
        padding_BN[2, : tokens // 5] = True
    if kind in {"padded_windows", "all_at_once"}:
        padding_BN[1, tokens // 10 :] = True  # whole windows of padding
        padding_BN[2] |= kind == "padded_windows"  # and a whole row
    if kind == "one_global":
        index_BG = torch.zeros(3, 1, dtype=torch.int32)
    if kind in {"ragged_globals", "padded_globals", "all_at_once"}:
        rows = [[0], sorted({0, tokens // 2, last}), []]
        if kind != "ragged_globals":
            rows[2] = sorted({0, last, tokens // 7})  # 0 is padding there
        slots = max(len(row) for row in rows)
        filled = [row + [-1] * (slots - len(row)) for row in rows]
        index_BG = torch.tensor(filled, dtype=torch.int32)
    return padding_BN, index_BG


def hugging_face(
    layer: LongformerSelfAttention, hidden_BNE: Tensor, padding_BN: Tensor, index_BG: Tensor | None
) -> Tensor:
    """The layer's output, computed as LongformerModel calls it: padded to the window."""
    tokens, window = hidden_BNE.shape[1], 2 * layer.one_sided_attn_window_size
    extra = -tokens % window
    padded_BNE = torch.nn.functional.pad(hidden_BNE, (0, 0, 0, extra), value=0.5)
    mask_BN = torch.full((len(hidden_BNE), tokens + extra), PADDING)
    mask_BN[:, :tokens] = LOCAL
    if index_BG is not None:
        for mask_N, index_G in zip(mask_BN, index_BG, strict=True):
            mask_N[index_G[index_G >= 0].long()] = GLOBAL
    mask_BN[:, :tokens][padding_BN] = PADDING
    is_global_BN = mask_BN > 0
    out_BNE = layer(
        padded_BNE,
        attention_mask=mask_BN,
        is_index_masked=mask_BN < 0,
        is_index_global_attn=is_global_BN,
        is_global_attn=is_global_BN.any().item(),
    )[0]
    return out_BNE[:, :tokens]


def ours(
    layer: LongformerSelfAttention,
    hidden_BNE: Tensor,
    padding_BN: Tensor,
    index_BG: Tensor | None,
    backend: str,
) -> Tensor:
    def heads(linear: torch.nn.Module, x_BNE: Tensor) -> Tensor:
        return linear(x_BNE).unflatten(-1, (HEADS, HEAD_SIZE))

    own = {}
    if index_BG is not None:
        each_B1 = torch.arange(len(hidden_BNE))[:, None]
        chosen_BGE = hidden_BNE[each_B1, index_BG.clamp(min=0).long()]
        own = {
            "q_global_BGHD": heads(layer.query_global, chosen_BGE),
            "k_global_BNHD": heads(layer.key_global, hidden_BNE),
            "v_global_BNHD": heads(layer.value_global, hidden_BNE),
        }
    out_BNHD = sliding_attention(
        *(heads(linear, hidden_BNE) for linear in (layer.query, layer.key, layer.value)),
        AttentionPattern(layer.one_sided_attn_window_size),
        padding_BN=padding_BN,
        global_index_BG=index_BG,
        backend=backend,
        **own,
    )
    return out_BNHD.flatten(2)


def layer_and_input(tokens: int, window: int) -> tuple[LongformerSelfAttention, Tensor]:
    torch.manual_seed(tokens * 1000 + window)
    config = LongformerConfig(
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_hidden_layers=1,
        attention_window=[window],
        attention_probs_dropout_prob=0.0,
    )
    layer = LongformerSelfAttention(config, 0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=HIDDEN**-0.5)
    return layer, torch.randn(3, tokens, HIDDEN, requires_grad=True)


@pytest.mark.parametrize(("tokens", "window", "kind"), SETTINGS)
def test_equals_hugging_face(tokens: int, window: int, kind: str) -> None:
    """Values within 1e-5; each gradient within 1e-5 of the largest magnitude in its tensor.

    Biases share their weight's scale, and no scale is below a hundredth of the largest (a twentieth
    for a single token): some true gradients are 0 (of a key's bias; of the queries and keys of a
    single token) and only rounding is left.
    """
    layer, hidden_BNE = layer_and_input(tokens, window)
    padding_BN, index_BG = token_kinds(kind, tokens)
    leaves = {"hidden": hidden_BNE, **dict(layer.named_parameters())}

    def gradients(out_BNE: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(
            out_BNE, list(leaves.values()), output_gradient(out_BNE), allow_unused=True
        )
        return {name: x for name, x in zip(leaves, found, strict=True) if x is not None}

    right = hugging_face(layer, hidden_BNE, padding_BN, index_BG)
    right_gradients = gradients(right)
    for backend in ("portable", "reference") if tokens < 600 else ("portable",):
        out = ours(layer, hidden_BNE, padding_BN, index_BG, backend)
        assert (out - right).abs().max() <= 1e-5
        found = gradients(out)
        assert found.keys() == right_gradients.keys()
        largest = max(x.abs().max() for x in right_gradients.values())
        for name, got in found.items():
            like = name.replace("bias", "weight")
            scale = max(right_gradients[like].abs().max(), largest / (100 if tokens > 1 else 20))
            assert (got - right_gradients[name]).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_by_hand(backend: str) -> None:
    """Three tokens, equal scores: each output is the mean of the values a query reaches."""
    zero_BNHD = torch.zeros(1, 3, 1, 1, dtype=torch.float64)
    value_BNHD = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64).view(1, 3, 1, 1)

    def attend(pattern: AttentionPattern, **masks: Tensor) -> tuple[list[float], list[float]]:
        out, lse = sliding_attention(
            zero_BNHD, zero_BNHD, value_BNHD, pattern, backend=backend, return_lse=True, **masks
        )
        return out.flatten().tolist(), lse.exp().flatten().tolist()

    # One neighbour on each side: 2, 3 and 2 keys.
    assert attend(AttentionPattern(1)) == (
        pytest.approx([5.5, 37.0, 55.0]),
        pytest.approx([2, 3, 2]),
    )
    assert attend(AttentionPattern(1, causal=True))[0] == pytest.approx([1.0, 5.5, 55.0])
    assert attend(AttentionPattern(1, 2))[0] == pytest.approx([50.5, 10.0, 50.5])
    # A global first token: seen by all, seeing all, counted once.
    first = torch.tensor([[0]], dtype=torch.int32)
    assert attend(AttentionPattern(0), global_index_BG=first) == (
        pytest.approx([37.0, 5.5, 50.5]),
        pytest.approx([3, 2, 2]),
    )
    # Padding beats global, and a padding query returns 0 with a log-sum-exp of +inf.
    padding = torch.tensor([[True, False, False]])
    assert attend(AttentionPattern(1), global_index_BG=first, padding_BN=padding) == (
        pytest.approx([0.0, 55.0, 55.0]),
        pytest.approx([math.inf, 2, 2]),
    )
    # Another document is out of reach, for global keys and queries too.
    document = torch.tensor([[0, 0, 1]], dtype=torch.int32)
    assert attend(AttentionPattern(2), global_index_BG=first, document_BN=document)[
        0
    ] == pytest.approx([5.5, 5.5, 100.0])
