"""What a resume says has changed; test_slurm.py reads it in the journal of real runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from longpretrain.announce import changed_settings
from longpretrain.cli import main
from longpretrain.config import to_tree
from longpretrain.convert import convert
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.model import read_config, read_tensors, save_model
from longpretrain.recipe import from_tree
from longpretrain.report.metrics import read_metrics

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


def test_a_new_head_that_does_not_train_is_told(
    small_run: Path, tmp_path: Path, process_group: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a run begins with one, and not where it goes on from what a training made of it."""
    short = small_run / "models" / "short"
    bare = dataclasses.replace(read_config(short), has_lm_head=False)
    save_model((bare, read_tensors(short)), tmp_path / "bare")
    load_tokenizer(short).save(tmp_path / "bare", max_tokens=64)
    new, own = tmp_path / "new", small_run / "models" / "long"
    convert(tmp_path / "bare", new, positions=128, attention_window=16, new_head=True)

    def train(name: str, folder: Path, only: str = "new_positions") -> bool:
        """Whether the run of one update warned."""
        words = ["schedule.total_steps=1", "schedule.warmup_steps=0", "data.valid=null"]
        words += [f"run.dir={tmp_path / name}", f"model.path={folder}", f"model.train_only={only}"]
        capsys.readouterr()
        assert main(["train", str(small_run / "recipe.yaml"), *words]) == 0
        told = [line["event"] for line in read_metrics(tmp_path / name / "metrics.jsonl")
                if "event" in line]  # fmt: skip
        warnings = [event for event in told if "the masked-LM head is new" in event]
        assert all(capsys.readouterr().out.count(warning) == 1 for warning in warnings)
        assert len(warnings) < 2
        return bool(warnings)

    assert train("first", new)
    assert not train("own head", own)
    assert not train("all trains", new, "all")
    done = tmp_path / "all trains" / "checkpoints" / "step-000001"
    assert not train("afterwards", done, "all")


def test_a_run_that_begins_changes_nothing() -> None:
    assert changed_settings({}, from_tree(RECIPE), 2) == ""
