"""Small Longformers of transformers, plain and accelerated, and what is compared of them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import LongformerConfig

import longpretrain


def make_plain(kind: str = "LongformerForMaskedLM", **changes: Any) -> nn.Module:
    """Small, with attention that is far from even, and a chosen dropout."""
    torch.manual_seed(5)
    chosen: dict[str, Any] = {
        "attention_window": (8, 16), "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0, "initializer_range": 0.15,
    }  # fmt: skip
    chosen |= changes
    chosen["attention_window"] = list(chosen["attention_window"])
    config = LongformerConfig(
        vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=130, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, sep_token_id=2, type_vocab_size=1, **chosen,
    )  # fmt: skip
    model: nn.Module = getattr(transformers, kind)(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def make_pair(kind: str = "LongformerForMaskedLM", **changes: Any) -> tuple[nn.Module, nn.Module]:
    plain = make_plain(kind, **changes)
    return plain, longpretrain.accelerate(copy.deepcopy(plain))


def make_inputs(tokens: int = 45, *, padding: bool = True, slots: bool = True) -> dict[str, Tensor]:
    """Three rows: of padding inside and at the end, and with different numbers of global tokens."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(4, 67, (3, tokens), generator=generator)
    mask, is_global = torch.ones_like(ids), torch.zeros_like(ids)
    if padding:
        mask[1, tokens // 2 :] = 0
        mask[2, tokens // 3 : tokens // 2] = 0
        ids[mask == 0] = 1
    if slots:
        is_global[0, :3] = 1
        is_global[2, [0, tokens - 1]] = 1
        is_global[1, tokens - 1] = 1  # where there is padding, that wins
    return {"input_ids": ids, "attention_mask": mask, "global_attention_mask": is_global}


def floats(output: Any) -> list[Tensor]:
    """All tensors of an output of transformers, in its order."""
    values = [value if isinstance(value, tuple) else (value,) for value in output.values()]
    return [x for value in values for x in value if isinstance(x, Tensor)]


def largest_difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    assert len(found) == len(wanted) > 0
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
    return max(float((x - y).abs().max()) for x, y in zip(found, wanted, strict=True))


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Of every parameter, for a fixed gradient of the outputs; and the outputs' own sum."""
    model.train()
    model.zero_grad()
    out = floats(model(**inputs))[0]
    generator = torch.Generator().manual_seed(3)
    out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
    return {name: parameter.grad for name, parameter in model.named_parameters()}
