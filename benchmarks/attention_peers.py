"""The implementations that people use today, made ready to run on random inputs of one shape.

Layouts, masks and block plans that a user makes once for a whole model are made here, outside of
the clock. So are choices that favour a peer: where in doubt, it gets the quicker one.

Letters: B batch row (1 here), N query, M key, H head, D number of a head, C hidden channels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from attention_ours import (
    DTYPES,
    HEAD_SIZE,
    Runnable,
    Shape,
    random_tensor,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

MOST_DENSE_TOKENS = 8192
"""Beyond, n^2 numbers for every head take too much memory."""
_DENSE_BIGBIRD_TOKENS = (5 + 2 * 3) * 64
"""Up to here Hugging Face's model takes dense attention in BigBird's place."""


@dataclass(frozen=True)
class HfLayer:
    """Hugging Face's ``LongformerSelfAttention`` on random hidden states, one global token."""

    module: Any
    x_BNC: Tensor
    grad_BNC: Tensor
    attention_mask_BN: Tensor = field(repr=False)

    def attend(self) -> list[Tensor]:
        """The whole module: projections and attention."""
        mask_BN = self.attention_mask_BN
        is_global_BN = mask_BN > 0
        outputs = self.module(
            self.x_BNC,
            attention_mask=mask_BN,
            is_index_masked=mask_BN < 0,
            is_index_global_attn=is_global_BN,
            is_global_attn=True,
        )
        return [outputs[0]]

    def project(self) -> list[Tensor]:
        """Its five projections of all tokens; query_global has the global tokens only."""
        module, x_BNC = self.module, self.x_BNC
        names = (module.query, module.key, module.value, module.key_global, module.value_global)
        return [linear(x_BNC) for linear in names]


def hf_layer(shape: Shape) -> HfLayer:
    """The module with dropout off, as initialised by torch."""
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    config = LongformerConfig(
        hidden_size=shape.channels,
        num_attention_heads=shape.heads,
        attention_window=[shape.attention_window],
        num_hidden_layers=1,
        attention_probs_dropout_prob=0.0,
    )
    module = LongformerSelfAttention(config, 0).to(DTYPES[shape.dtype])
    sizes = (1, shape.tokens, shape.channels)
    mask_BN = torch.zeros(1, shape.tokens, dtype=DTYPES[shape.dtype])
    mask_BN[:, 0] = 10000.0  # as LongformerModel marks a global token
    return HfLayer(
        module,
        random_tensor(*sizes, dtype=shape.dtype),
        random_tensor(*sizes, dtype=shape.dtype, is_leaf=False),
        mask_BN,
    )


def build_hf(shape: Shape) -> dict[str, Runnable]:
    """The module, and its projections alone, which are to be subtracted."""
    layer = hf_layer(shape)
    leaves = [layer.x_BNC, *layer.module.parameters()]
    grad = layer.grad_BNC
    return {
        "hf": Runnable(layer.attend, [grad], leaves, layer.module),
        "hf projections": Runnable(layer.project, [grad] * 5, leaves, layer.module),
    }


class _WithoutProbabilities(TorchFunctionMode):
    """Lets BigBird write its n^2 attention probabilities to nowhere (a tensor without storage)."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self._ending = (tokens, tokens)

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.zeros and args[-2:] == self._ending:
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def build_bigbird(shape: Shape) -> dict[str, Runnable]:
    """Hugging Face's ``BigBirdBlockSparseAttention``: blocks of 64, three random ones.

    A query reaches 8 blocks, 512 keys, and two blocks of queries reach all: about the work of an
    attention window of 512. The module always copies its weights into a matrix of n^2
    probabilities, wanted or not; "bigbird lean" is the same module without that copy. In training
    it draws its random blocks anew in each call; in evaluation they are all the first block.
    """
    from transformers import BigBirdConfig
    from transformers.models.big_bird import modeling_big_bird as big_bird

    config = BigBirdConfig(
        hidden_size=shape.channels,
        num_attention_heads=shape.heads,
        block_size=64,
        num_random_blocks=3,
        max_position_embeddings=max(4096, shape.tokens),
    )
    module = big_bird.BigBirdBlockSparseAttention(config, seed=1).to(DTYPES[shape.dtype])
    all_BN = torch.ones(1, shape.tokens, dtype=DTYPES[shape.dtype])
    masks = big_bird.BigBirdModel.create_masks_for_block_sparse_attn(all_BN, config.block_size)
    blocked, band, from_mask, to_mask = masks
    x_BNC = random_tensor(1, shape.tokens, shape.channels, dtype=shape.dtype)
    grad_BNC = random_tensor(*x_BNC.shape, dtype=shape.dtype, is_leaf=False)

    def attend(is_lean: bool) -> list[Tensor]:
        lean = _WithoutProbabilities(shape.tokens) if is_lean else contextlib.nullcontext()
        with lean:
            context_BNC, _probabilities = module(
                x_BNC, band_mask=band, from_mask=from_mask, to_mask=to_mask,
                from_blocked_mask=blocked, to_blocked_mask=blocked,
            )  # fmt: skip
        return [context_BNC]

    def project() -> list[Tensor]:
        return [linear(x_BNC) for linear in (module.query, module.key, module.value)]

    leaves = [x_BNC, *module.parameters()]
    made = {
        "bigbird lean": Runnable(lambda: attend(True), [grad_BNC], leaves, module),
        "bigbird projections": Runnable(project, [grad_BNC] * 3, leaves, module),
    }
    if shape.tokens <= MOST_DENSE_TOKENS:
        made["bigbird"] = Runnable(lambda: attend(False), [grad_BNC], leaves, module)
    return made


def reached_mask(shape: Shape, *, with_global: bool = True) -> Tensor:
    """Which key each query reaches, as a dense mask."""
    position = torch.arange(shape.tokens)
    reached = (position[:, None] - position).abs() <= shape.one_sided_window
    if with_global:
        reached[0] = reached[:, 0] = True
    return reached


def build_sdpa(shape: Shape) -> dict[str, Runnable]:
    """Dense attention with a mask: all n^2 scores, one global token."""
    q, k, v, grad = _heads_first(shape)
    mask_NM = reached_mask(shape)
    return {
        "sdpa": Runnable(
            lambda: [F.scaled_dot_product_attention(q, k, v, attn_mask=mask_NM)], [grad], [q, k, v]
        )
    }


def build_blocked(shape: Shape) -> dict[str, Runnable]:
    """Dense attention in blocks: queries of one-sided-window tokens to the keys around them.

    What a careful user writes in plain PyTorch; it has no global token. Four dimensions,
    [blocks, H, queries, D], let torch take its fused CPU kernel, which reads the overlapping keys
    where they are: with three it falls back to one that writes all scores. Of its masks, one of
    numbers to be added is the quickest.
    """
    q, k, v, grad = _heads_first(shape)
    reach, tokens, heads = shape.one_sided_window, shape.tokens, shape.heads
    blocks, span = tokens // reach, 3 * reach
    key, query = torch.arange(span) - reach, torch.arange(reach)
    position = torch.arange(blocks)[:, None, None] * reach + key
    inside = (position >= 0) & (position < tokens)
    reached = ((key - query[:, None]).abs() <= reach) & inside
    mask = torch.zeros(reached.shape, dtype=q.dtype).masked_fill(~reached, -torch.inf)[:, None]

    def forward() -> list[Tensor]:
        padded = (F.pad(x[0], (0, 0, reach, reach)).unfold(1, span, reach) for x in (k, v))
        keys, values = (x.permute(1, 0, 3, 2) for x in padded)
        queries = q.view(heads, blocks, reach, HEAD_SIZE).transpose(0, 1)
        out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)
        return [out.transpose(0, 1).reshape(1, heads, tokens, HEAD_SIZE)]

    return {"blocked": Runnable(forward, [grad], [q, k, v])}


def build_flex(shape: Shape) -> dict[str, Runnable]:
    """Compiled FlexAttention, the same mask; it has no backward on the CPU (torch 2.13)."""
    import torch._dynamo.config as dynamo
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # One compilation for each shape. Beyond the limit it would silently run uncompiled.
    dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = 200, True
    reach = shape.one_sided_window

    def reaches(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ((query - key).abs() <= reach) | (query == 0) | (key == 0)

    mask = create_block_mask(reaches, None, None, shape.tokens, shape.tokens, device="cpu")
    compiled = torch.compile(flex_attention, dynamic=False)
    q, k, v, _grad = (x.detach() for x in _heads_first(shape))
    return {"flex": Runnable(lambda: [compiled(q, k, v, block_mask=mask)], [], [q, k, v])}


def _heads_first(shape: Shape) -> list[Tensor]:
    """q, k, v and the output's gradient as [B, H, N, D], contiguous: the layout SDPA likes."""
    sizes = (1, shape.heads, shape.tokens, HEAD_SIZE)
    qkv = [random_tensor(*sizes, dtype=shape.dtype) for _ in range(3)]
    return [*qkv, random_tensor(*sizes, dtype=shape.dtype, is_leaf=False)]


@dataclass(frozen=True)
class Peer:
    """An implementation, and what it can do.

    Args:
        cases: what its builder makes, the names of results, with their labels.
        build: makes them.
        most_tokens: beyond, it would need too much memory or time to set up.
        only_window: the one attention window that is its own; None: any.
        whole_windows: it takes lengths that are multiples of the attention window.
        whole_blocks: it takes multiples of 64 that are long enough for BigBird to be sparse.
    """

    cases: Mapping[str, str]
    build: Callable[[Shape], dict[str, Runnable]]
    most_tokens: int = 2**30
    only_window: int | None = None
    whole_windows: bool = False
    whole_blocks: bool = False

    def why_not(self, shape: Shape) -> str | None:
        """Why it cannot run that shape; None when it can."""
        if shape.tokens > self.most_tokens:
            return f"would take memory or minutes: not set up beyond {self.most_tokens:,} tokens"
        if self.only_window not in {None, shape.attention_window}:
            return f"its window is fixed: compared at {self.only_window}"
        if self.whole_windows and shape.tokens % shape.attention_window:
            return "takes multiples of the attention window"
        if self.whole_blocks and (shape.tokens % 64 or shape.tokens <= _DENSE_BIGBIRD_TOKENS):
            return f"takes multiples of 64 beyond {_DENSE_BIGBIRD_TOKENS}: up to there it is dense"
        return None


PEERS: Mapping[str, Peer] = {
    "hf": Peer(
        {"hf": "HF Longformer", "hf projections": "its five projections"},
        build_hf,
        whole_windows=True,
    ),
    "bigbird": Peer(
        {
            "bigbird": "HF BigBird",
            "bigbird lean": "HF BigBird, no n² copy",
            "bigbird projections": "its three projections",
        },
        build_bigbird,
        only_window=512,
        whole_blocks=True,
    ),
    "sdpa": Peer({"sdpa": "SDPA, n² with mask"}, build_sdpa, most_tokens=MOST_DENSE_TOKENS),
    "blocked": Peer({"blocked": "SDPA, blocked"}, build_blocked, whole_windows=True),
    "flex": Peer({"flex": "FlexAttention, compiled"}, build_flex, most_tokens=16384),
}

NET_OF = {
    "hf": "hf projections",
    "bigbird": "bigbird projections",
    "bigbird lean": "bigbird projections",
}
"""Case -> the case whose time is subtracted from it: what is left is its attention."""
