"""What a resume says has changed; test_slurm.py reads it in the journal of real runs."""

from __future__ import annotations

import json
from typing import Any

import pytest

from longpretrain.announce import changed_settings
from longpretrain.config import to_tree
from longpretrain.recipe import from_tree

RECIPE: dict[str, Any] = {"batch": {"global_sequences": 8, "micro_sequences": 2}}


@pytest.mark.parametrize(
    ("change", "world_size", "told"),
    [
        pytest.param({}, 2, "", id="nothing"),
        pytest.param({}, 1, "world size 2 -> 1, accumulation 2 -> 4", id="fewer ranks"),
        pytest.param({}, 4, "world size 2 -> 4, accumulation 2 -> 1", id="more ranks"),
        pytest.param(
            {"batch": {"global_sequences": 8, "micro_sequences": 4}},
            1,
            "world size 2 -> 1, batch.micro_sequences 2 -> 4",
            id="as many tokens at once",
        ),
        pytest.param({"precision": "fp32"}, 2, "precision bf16 -> fp32", id="a setting"),
    ],
)
def test_changes_since_the_checkpoint(change: dict[str, Any], world_size: int, told: str) -> None:
    recipe = to_tree(from_tree(RECIPE))
    state = json.loads(json.dumps({"world_size": 2, "recipe": recipe}))  # as from state.json
    assert changed_settings(state, from_tree({**RECIPE, **change}), world_size) == told


def test_settings_that_came_with_a_newer_version_are_no_change() -> None:
    recipe = to_tree(from_tree(RECIPE))
    del recipe["watchdog"]
    state = {"world_size": 2, "recipe": recipe}
    assert changed_settings(state, from_tree(RECIPE), 2) == ""


def test_a_run_that_begins_changes_nothing() -> None:
    assert changed_settings({}, from_tree(RECIPE), 2) == ""
