"""The Longformer encoder (Beltagy et al. 2020, sections 3 and 5): RoBERTa's with sliding attention.

The parameter names are Hugging Face's, so a state dict of ours is one of theirs.

Letters of the shape suffixes: B batch, N tokens, C hidden channels, H heads, D channels per head,
G slots for global tokens, M tokens to predict, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longpretrain.attention import AttentionPattern, sliding_attention
from longpretrain.errors import InputError
from longpretrain.model.layer_norm import LayerNorm
from longpretrain.model.new_positions import LearntAndNewPositions


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and arithmetic of a model, in Hugging Face's meaning of each number.

    Raises:
        InputError: numbers that do not fit together, such as an odd window.
    """

    model_type: Literal["longformer", "roberta"] = "longformer"
    """roberta: full attention and no global projections."""
    vocab_size: int
    """Rows of the word embeddings, and logits per token."""
    hidden_size: int
    """Channels of a token."""
    num_layers: int
    """Transformer layers."""
    num_heads: int
    """Attention heads per layer."""
    intermediate_size: int
    """Channels inside the feed-forward part."""
    max_position_embeddings: int
    """Rows of the position table: tokens + pad_id + 1, so 4098 for 4,096 tokens."""
    pad_id: int = 1
    """Id of <pad>; also the position row that padding uses."""
    bos_id: int = 0
    """Id of <s>."""
    eos_id: int = 2
    """Id of </s>."""
    type_vocab_size: int = 1
    """Rows of the token type table; only row 0 is used."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in every LayerNorm."""
    hidden_dropout: float = 0.1
    """Dropout of embeddings and of what each half layer adds."""
    attention_dropout: float = 0.1
    """Dropout of attention weights."""
    initializer_range: float = 0.02
    """Standard deviation of new weights."""
    attention_window: tuple[int, ...] = ()
    """Keys that a query reaches beside its own, on both sides together: even, one per layer."""
    dilation: tuple[int, ...] = ()
    """Distance between reached keys, one per head; (): 1. Hugging Face's format lacks it."""
    causal: bool = False
    """Keys after the query are out of reach. Hugging Face's format lacks it."""
    has_lm_head: bool = True
    """Whether there is a masked-LM head; without one a folder holds the bare encoder."""
    learnt_positions: int = 0
    """Positions whose rows were learnt before the model was lengthened: later rows are new. 0:
    unknown, as of interpolated rows. Training leaves it as it is."""
    attention_backend: str = "auto"
    """Which implementation runs attention; never stored."""
    layer_norm_backend: str = "auto"
    """What computes LayerNorm: auto, torch or apex; never stored."""

    def __post_init__(self) -> None:
        _check(self)

    @property
    def max_tokens(self) -> int:
        """Tokens that the position table can place."""
        return self.max_position_embeddings - (self.pad_id + 1)

    @property
    def beyond_hugging_face(self) -> tuple[str, ...]:
        """What of it Hugging Face's Longformer does not compute, in words; empty: nothing.

        It pads to a multiple of the largest window, and each layer cuts that into its own windows.
        """
        found = []
        if set(self.dilation) - {1}:
            found.append(f"dilation {list(self.dilation)}")
        if self.causal:
            found.append("causal attention")
        largest = max(self.attention_window, default=0)
        odd = sorted({window for window in self.attention_window if largest % window})
        if odd:
            found.append(f"windows {odd} that do not divide the largest, {largest}")
        return tuple(found)

    def pattern(self, layer: int) -> AttentionPattern:
        """Who sees whom in one layer."""
        covers_all = self.max_position_embeddings
        one_sided = self.attention_window[layer] // 2 if self.attention_window else covers_all
        dilation = 1 if set(self.dilation) <= {1} else self.dilation
        return AttentionPattern(one_sided_window=one_sided, dilation=dilation, causal=self.causal)


def _check(config: ModelConfig) -> None:
    sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
    for name in (*sizes, "type_vocab_size"):
        _need(name, getattr(config, name), getattr(config, name) >= 1, "1 or more")
    _need(
        "hidden_size", config.hidden_size, config.hidden_size % config.num_heads == 0,
        f"a multiple of the {config.num_heads} heads",
    )  # fmt: skip
    in_vocabulary = 0 <= config.pad_id < config.vocab_size
    _need("pad_id", config.pad_id, in_vocabulary, f"0 <= id < {config.vocab_size}")
    rows = config.max_position_embeddings
    wanted = f"{config.pad_id + 2} or more ({config.pad_id + 1} rows are taken by padding)"
    _need("max_position_embeddings", rows, config.max_tokens >= 1, wanted)
    learnt = config.learnt_positions
    wanted = f"0 to {config.max_tokens}, the positions of the model"
    _need("learnt_positions", learnt, 0 <= learnt <= config.max_tokens, wanted)
    for name in ("hidden_dropout", "attention_dropout"):
        _need(name, getattr(config, name), 0 <= getattr(config, name) < 1, "0 <= x < 1")
    _check_windows(config)
    fits = len(config.dilation) in (0, config.num_heads) and all(d >= 1 for d in config.dilation)
    wanted = f"numbers of 1 or more, one for each of {config.num_heads} heads"
    _need("dilation", list(config.dilation), fits, wanted)


def _check_windows(config: ModelConfig) -> None:
    windows = list(config.attention_window)
    if config.model_type == "roberta":
        wanted = "none: RoBERTa's attention is full (longpretrain convert makes a Longformer of it)"
        _need("attention_window", windows, not windows, wanted)
        return
    wanted = f"{config.num_layers} windows, one per layer (or one number for all)"
    _need(
        "attention_window", f"{len(windows)} windows {windows}",
        len(windows) == config.num_layers, wanted,
    )  # fmt: skip
    wanted = "even numbers of 2 or more (both sides together: 512 reaches 256 to each side)"
    _need("attention_window", windows, all(w >= 2 and w % 2 == 0 for w in windows), wanted)


def _need(name: str, got: object, fits: bool, wanted: str) -> None:
    if not fits:
        raise InputError(name, got=got, wanted=wanted, way_out=f"Change {name} of the model.")


class Embeddings(nn.Module):
    """Word + position + token type, normalised."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, pad = config.hidden_size, config.pad_id
        self.pad_id = pad
        self.word_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=pad)
        positions = config.max_position_embeddings
        self.position_embeddings: nn.Embedding | LearntAndNewPositions = nn.Embedding(
            positions, width, padding_idx=pad
        )
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.LayerNorm = layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, tokens_BN: Tensor, position_BN: Tensor | None) -> Tensor:
        """Embeds tokens; without positions they count the tokens that are not <pad>."""
        if position_BN is None:
            position_BN = self._positions(tokens_BN)
        x_BNC = self.word_embeddings(tokens_BN) + self.position_embeddings(position_BN)
        x_BNC = self.LayerNorm(x_BNC + self.token_type_embeddings.weight[0])
        out_BNC: Tensor = self.dropout(x_BNC)
        return out_BNC

    def _positions(self, tokens_BN: Tensor) -> Tensor:
        # By the ids, whatever the mask says: so do fairseq and Hugging Face.
        real_BN = tokens_BN.ne(self.pad_id).long()
        return real_BN.cumsum(1) * real_BN + self.pad_id


class SelfAttention(nn.Module):
    """Sliding attention, with projections of their own for global tokens (paper, section 3.1)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_heads
        self.pattern = config.pattern(layer)
        self.dropout = config.attention_dropout
        self.backend = config.attention_backend
        names = ["query", "key", "value"]
        if config.model_type == "longformer":
            names += ["query_global", "key_global", "value_global"]
        for name in names:
            self.add_module(name, nn.Linear(width, width))

    def _project(self, name: str, x_BNC: Tensor) -> Tensor:
        projected_BNC: Tensor = getattr(self, name)(x_BNC)
        return projected_BNC.view(*x_BNC.shape[:2], self.num_heads, -1)

    def forward(
        self,
        x_BNC: Tensor,
        padding_BN: Tensor | None,
        document_BN: Tensor | None,
        global_index_BG: Tensor | None,
        dropout_seed_B: Tensor | None,
    ) -> Tensor:
        """Attends; the heads' outputs side by side, BNC."""
        q_global_BGHD = k_global_BNHD = v_global_BNHD = None
        if global_index_BG is not None:
            # A slot without a token (-1) reads token 0; the operator drops its row.
            slot_BG1 = global_index_BG.long().clamp(min=0)[..., None]
            global_BGC = x_BNC.gather(1, slot_BG1.expand(-1, -1, x_BNC.shape[-1]))
            q_global_BGHD = self._project("query_global", global_BGC)
            k_global_BNHD = self._project("key_global", x_BNC)
            v_global_BNHD = self._project("value_global", x_BNC)
        out_BNHD = sliding_attention(
            self._project("query", x_BNC),
            self._project("key", x_BNC),
            self._project("value", x_BNC),
            self.pattern,
            padding_BN=padding_BN,
            global_index_BG=global_index_BG,
            q_global_BGHD=q_global_BGHD,
            k_global_BNHD=k_global_BNHD,
            v_global_BNHD=v_global_BNHD,
            document_BN=document_BN,
            dropout_p=self.dropout if self.training else 0.0,
            dropout_seed_B=dropout_seed_B,
            backend=self.backend,
        )
        return out_BNHD.flatten(2)


class AddAndNorm(nn.Module):
    """Projection, dropout, residual, LayerNorm after the sum (post-LN)."""

    def __init__(self, config: ModelConfig, width_in: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, config.hidden_size)
        self.LayerNorm = layer_norm(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, branch_BNC: Tensor, residual_BNC: Tensor) -> Tensor:
        """Adds the branch to the residual stream."""
        out_BNC: Tensor = self.LayerNorm(self.dropout(self.dense(branch_BNC)) + residual_BNC)
        return out_BNC


class Attention(nn.Module):
    """The attention half of a layer; exists for Hugging Face's names."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.self = SelfAttention(config, layer)
        self.output = AddAndNorm(config, config.hidden_size)


class Intermediate(nn.Module):
    """The widening projection of the feed-forward half, with GELU (the exact, erf one)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size)

    def forward(self, x_BNC: Tensor) -> Tensor:
        """BNC to BN(intermediate)."""
        return F.gelu(self.dense(x_BNC))


class Layer(nn.Module):
    """One post-LN transformer layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer)
        self.intermediate = Intermediate(config)
        self.output = AddAndNorm(config, config.intermediate_size)

    def forward(
        self,
        x_BNC: Tensor,
        padding_BN: Tensor | None,
        document_BN: Tensor | None,
        global_index_BG: Tensor | None,
        dropout_seed_B: Tensor | None,
    ) -> Tensor:
        """BNC to BNC."""
        attended_BNC = self.attention.self(
            x_BNC, padding_BN, document_BN, global_index_BG, dropout_seed_B
        )
        x_BNC = self.attention.output(attended_BNC, x_BNC)
        out_BNC: Tensor = self.output(self.intermediate(x_BNC), x_BNC)
        return out_BNC


class LayerStack(nn.Module):
    """The layers; exists for Hugging Face's names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer(config, number) for number in range(config.num_layers))


class Encoder(nn.Module):
    """Embeddings and layers, without a head."""

    def __init__(self, config: ModelConfig, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        self.embeddings = Embeddings(config)
        self.encoder = LayerStack(config)

    def forward(
        self,
        tokens_BN: Tensor,
        *,
        padding_BN: Tensor | None = None,
        position_BN: Tensor | None = None,
        document_BN: Tensor | None = None,
        global_index_BG: Tensor | None = None,
        dropout_seed_B: Tensor | None = None,
    ) -> Tensor:
        """Hidden states BNC. Arguments as in LongformerForMaskedLM.forward."""
        seeds = [dropout_seed_B] * self.config.num_layers
        if self.training and self.config.attention_dropout > 0 and dropout_seed_B is not None:
            seeds = [layer_seed(dropout_seed_B, n) for n in range(self.config.num_layers)]
        x_BNC: Tensor = self.embeddings(tokens_BN, position_BN)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer, seed_B in zip(self.encoder.layer, seeds, strict=True):
            inputs = (x_BNC, padding_BN, document_BN, global_index_BG, seed_B)
            # Without reentrance the saved random state makes hidden dropout repeat bit for bit;
            # attention dropout is keyed by its seed.
            x_BNC = checkpoint(layer, *inputs, use_reentrant=False) if recompute else layer(*inputs)
        return x_BNC


def layer_norm(config: ModelConfig) -> LayerNorm:
    """A LayerNorm of the model's width."""
    backend = config.layer_norm_backend
    return LayerNorm(config.hidden_size, eps=config.layer_norm_eps, backend=backend)


def layer_seed(seed_B: Tensor, layer: int) -> Tensor:
    """A layer's own attention dropout seeds: step ``layer + 1`` of SplitMix64 from each row's seed.

    The generator is that of Steele, Lea and Flood (2014).

    Args:
        seed_B: int64, read as 64 unsigned bits.
        layer: number of the layer, from 0.
    """
    z = seed_B + _signed(0x9E3779B97F4A7C15 * (layer + 1))
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # torch has no unsigned shift


def _signed(value: int) -> int:
    return (value + 2**63) % 2**64 - 2**63
