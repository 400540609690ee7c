"""The published learning rates, and who decays."""

from __future__ import annotations

import pytest
from torch import nn

from longpretrain.config import OptimConfig, ScheduleConfig
from longpretrain.recipe import load_recipe
from longpretrain.schedule import (
    hidden_dropout_seed,
    learning_rate,
    parameter_groups,
    update_numbers,
)


@pytest.mark.parametrize(
    ("update", "rate"),
    # Longformer's recipe: peak * (1 - (n - 500) / 64,500)^3, to 4 significant digits.
    [
        (250, "1.500e-05"),
        (500, "3.000e-05"),
        (2_000, "2.796e-05"),
        (10_000, "1.860e-05"),
        (32_750, "3.750e-06"),
        (60_000, "1.398e-08"),
        (65_000, "0.000e+00"),
    ],
)
def test_published_points(update: int, rate: str) -> None:
    config = load_recipe("roberta-large-4096")
    assert f"{learning_rate(update, config.optim.lr, config.schedule):.3e}" == rate


def test_ends_and_forms() -> None:
    schedule = ScheduleConfig(total_steps=100, warmup_steps=10, power=2.0)
    assert learning_rate(1, 1.0, schedule) == 0.1
    assert learning_rate(10, 1.0, schedule) == 1.0
    assert learning_rate(55, 1.0, schedule) == 0.25
    assert learning_rate(100, 1.0, schedule) == 0.0
    constant = ScheduleConfig(total_steps=100, warmup_steps=0, decay="constant")
    assert {learning_rate(n, 2.0, constant) for n in range(1, 101)} == {2.0}


def test_groups_leave_out_frozen_parameters() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 2))
    model[2].requires_grad_(False)
    everything = parameter_groups(model.named_parameters(), OptimConfig())
    assert [len(group["params"]) for group in everything] == [4]  # type: ignore[arg-type]
    split = parameter_groups(model.named_parameters(), OptimConfig(decay_excludes=("bias",)))
    assert [(len(g["params"]), g["weight_decay"]) for g in split] == [(2, 0.01), (2, 0.0)]  # type: ignore[arg-type]


def test_dropout_seed_is_written_in_stone() -> None:
    """A resumed run of an older version must drop what it would have dropped."""
    assert hidden_dropout_seed(1, 1, 0) == 8808624845316746442
    seeds = {hidden_dropout_seed(s, u, r) for s in (1, 2) for u in range(1, 50) for r in range(4)}
    assert len(seeds) == 2 * 49 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_updates_take_the_samples_in_turn() -> None:
    """Two ranks, two micro-batches of two: micro-batches interleave the ranks."""

    def numbers(update: int, rank: int) -> list[range]:
        return update_numbers(
            update, global_sequences=8, micro_sequences=2, accumulation=2, world_size=2, rank=rank
        )

    assert numbers(1, 0) == [range(0, 2), range(4, 6)]
    assert numbers(1, 1) == [range(2, 4), range(6, 8)]
    assert numbers(3, 1) == [range(18, 20), range(22, 24)]
