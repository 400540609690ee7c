"""The task: a sample is what its number says, whoever asks; batches hold what the loss needs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from longpretrain.recipe import load_recipe
from longpretrain.tasks.masked_lm import MaskedLMTask


@pytest.fixture(scope="module")
def make_task(small_run: Path):
    def make(*overrides: str) -> MaskedLMTask:
        config = load_recipe(str(small_run / "recipe.yaml"), overrides)
        return MaskedLMTask(config, Path(config.model.path))

    return make


def test_a_sample_follows_from_its_number(make_task) -> None:
    """Asked in any order, by any task object, twice: the same tokens, masks, seed, identity."""
    one, other = make_task(), make_task()
    numbers = list(range(0, 3 * len(one.blocks), 7))
    backwards = {number: other.sample(number) for number in reversed(numbers)}
    for number in numbers:
        left, right = one.sample(number), backwards[number]
        for name in ("tokens_N", "positions_M", "targets_M"):
            assert np.array_equal(getattr(left, name), getattr(right, name)), name
        assert (left.dropout_seed, left.sample_id) == (right.dropout_seed, right.sample_id)


def test_identity_is_the_blocks_and_the_mask_is_the_epochs(make_task) -> None:
    task = make_task()
    size = len(task.blocks)
    first, second = ([task.sample(n) for n in range(e * size, (e + 1) * size)] for e in (0, 1))
    assert sorted(s.sample_id for s in first) == sorted(s.sample_id for s in second)
    assert [s.sample_id for s in first] != [s.sample_id for s in second]
    assert len({s.sample_id for s in first}) == size
    again = {s.sample_id: s for s in second}
    for sample in first:
        twin = again[sample.sample_id]
        assert not np.array_equal(sample.positions_M, twin.positions_M)
        assert sample.dropout_seed != twin.dropout_seed


def test_batch_tells_which_samples_it_holds(make_task) -> None:
    task = make_task()
    samples = [task.sample(number) for number in (3, 1, 3)]
    batch = task.collate(samples)
    assert task.sample_ids(batch) == [sample.sample_id for sample in samples]
    assert max(task.sample_ids(batch)) < 2**64
    assert task.count(batch) == sum(len(sample.targets_M) for sample in samples)
    assert task.tokens(batch) == sum(len(sample.tokens_N) for sample in samples)


def test_every_trained_parameter_has_a_gradient_in_every_batch(make_task, small_run: Path) -> None:
    """Also where no token of a batch is global: ZeRO 1 to 3 would decay a parameter without a
    gradient, stage 0 would not.
    """
    task = make_task("model.global_tokens=ids_50000")
    model = task.build_model(Path(task.config.model.path))
    batch = task.collate([task.sample(0), task.sample(1)])
    assert (batch["global_index_BG"] == -1).all(), "the id was chosen because nobody says it"
    task.loss(model, batch).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert any("query_global" in name for name in trained)
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.any() or "global" in name or ".key.bias" in name, name
