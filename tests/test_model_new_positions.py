"""The position table in two parts: looked up, stored and loaded as one, trained in part."""

from __future__ import annotations

import pytest
import torch
from small_run import tiny_longformer

from longpretrain.model import LongformerForMaskedLM

TABLE = "longformer.embeddings.position_embeddings.weight"


def test_it_is_looked_up_as_one() -> None:
    whole, parted = tiny_longformer(), tiny_longformer()
    parted.load_state_dict(whole.state_dict())
    parted.train_new_positions_only()
    tokens_BN = torch.arange(5, 17)[None].repeat(2, 1)
    tokens_BN[1, 8:] = 1  # padding: the second row is of learnt positions only
    logits = [model(tokens_BN) for model in (whole, parted)]
    assert torch.equal(*logits)
    for found in logits:
        found.square().sum().backward()
    rows = whole.longformer.embeddings.position_embeddings.weight.grad[10:]
    assert torch.equal(parted.longformer.embeddings.position_embeddings.new_rows.grad, rows)
    assert rows.any()


def test_a_state_dict_has_one_table() -> None:
    whole, parted, other = tiny_longformer(), tiny_longformer(), tiny_longformer()
    parted.train_new_positions_only()
    other.train_new_positions_only()
    assert parted.state_dict().keys() == whole.state_dict().keys()
    other.load_state_dict(whole.state_dict())
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, whole.state_dict()[name]), name
    assert other.longformer.embeddings.position_embeddings.weight.shape == (10, 16)
    short = {**whole.state_dict(), TABLE: torch.zeros(17, 16)}
    with pytest.raises(RuntimeError, match=r"position_embeddings\.new_rows: .*7, 16.*8, 16"):
        other.load_state_dict(short)


def test_short_sequences_have_a_gradient_of_zeros() -> None:
    """Not None, of which ranks could disagree; recomputed layers hand it through, too."""
    for recompute_layers in (False, True):
        model = LongformerForMaskedLM(
            tiny_longformer().config, activation_checkpointing=recompute_layers
        ).train()
        model.train_new_positions_only()
        model(torch.arange(5, 11)[None]).square().sum().backward()
        found = model.longformer.embeddings.position_embeddings.new_rows.grad
        assert found is not None
        assert not found.any()
        model(torch.arange(5, 15)[None]).square().sum().backward()
        assert model.longformer.embeddings.position_embeddings.new_rows.grad.any()
