"""A model without values has the names and shapes of a real one, and takes no random numbers."""

from __future__ import annotations

import torch
from torch import nn

from longpretrain.model.encoder import ModelConfig
from longpretrain.model.lm_head import LongformerForMaskedLM
from longpretrain.model.skeleton import without_values


def test_names_and_shapes_are_those_of_the_model() -> None:
    config = ModelConfig(
        model_type="longformer",
        vocab_size=50,
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        intermediate_size=16,
        max_position_embeddings=18,
        attention_window=(4, 4),
    )
    before = torch.get_rng_state()
    with without_values():
        empty = LongformerForMaskedLM(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.is_meta for parameter in empty.parameters())
    real = LongformerForMaskedLM(config)
    assert [(n, p.shape, p.dtype) for n, p in empty.named_parameters()] == [
        (n, p.shape, p.dtype) for n, p in real.named_parameters()
    ]


def test_values_are_drawn_again_afterwards() -> None:
    with without_values():
        assert nn.Linear(3, 3).weight.is_meta
    weight = nn.Linear(3, 3).weight
    assert weight.abs().sum() > 0
    assert nn.init.ones_(weight).sum() == 9
