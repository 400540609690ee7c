"""Runs of two ranks: status, repetition, what a checkpoint holds and when it is refused.

That stopping and resuming changes nothing: test_exactness.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks_helper import drive
from safetensors.torch import load_file

from longpretrain.report.metrics import deterministic, read_metrics

STEPS = 8
WHOLE = "whole"


def train(
    folder: Path, recipe: Path, name: str, *overrides: str, stop_after: int | None = None
) -> dict:
    arguments = [
        str(recipe),
        f"run.dir={folder / name}",
        f"schedule.total_steps={STEPS}",
        *overrides,
    ]
    return {"arguments": arguments, "stop_after": stop_after}


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of a run's last checkpoint."""
    folder = run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text().strip()
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def status(run_dir: Path) -> dict:
    return json.loads((run_dir / "status.json").read_text())


@pytest.fixture(scope="module")
def runs(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, ZeRO 1: with dropout, started again when it is done, without, with a global
    token, and asked to stop just before evaluations."""
    folder = tmp_path_factory.mktemp("resume")
    recipe = small_run / "recipe.yaml"
    no_dropout = ["model.dropout=0", "model.attention_dropout=0"]
    commands = [
        train(folder, recipe, WHOLE),
        train(folder, recipe, WHOLE),  # done: nothing to do
        train(folder, recipe, "no-dropout", *no_dropout),
        train(folder, recipe, "global", "model.global_tokens=first"),
        train(folder, recipe, "asked", stop_after=3),  # which is to be evaluated
        train(folder, recipe, "asked", stop_after=STEPS),
    ]
    two = drive(folder / "two", 2, commands)
    assert two.exit_codes == [0, 0, 0, 0, 75, 0], two.output[-3000:]
    return folder


def test_status_and_repeat(runs: Path) -> None:
    done = status(runs / WHOLE)
    assert (done["state"], done["step"]) == ("done", STEPS)


def test_who_asks_to_stop_waits_for_no_evaluation(runs: Path) -> None:
    """It is made up for; that of the last step, which nothing follows, is made all the same."""
    lines = read_metrics(runs / "asked" / "metrics.jsonl")
    assert deterministic(lines) == deterministic(read_metrics(runs / WHOLE / "metrics.jsonl"))
    kinds = [
        line["kind"] if line["kind"] != "event" else line["event"].split()[0]
        for line in lines
        if line["step"] in (3, STEPS)
    ]
    assert kinds[kinds.index("checkpoint") :] == [
        "checkpoint", "resumed:", "training", "evaluation", "train", "evaluation", "checkpoint",
    ]  # fmt: skip
    found, wanted = tensors(runs / "asked"), tensors(runs / WHOLE)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_losses_fall_and_dropout_matters(runs: Path) -> None:
    def losses(name: str) -> list[float]:
        lines = read_metrics(runs / name / "metrics.jsonl")
        return [line["loss"] for line in lines if line["kind"] == "train"]

    assert losses("no-dropout")[-1] < losses("no-dropout")[0]
    assert losses(WHOLE) != losses("no-dropout")


def test_checkpoint_is_a_hugging_face_folder(runs: Path) -> None:
    """A checkpoint of two ranks loads in transformers with nothing missing or left over."""
    from transformers import LongformerForMaskedLM

    folder = runs / WHOLE / "checkpoints" / f"step-{STEPS:06d}"
    _, info = LongformerForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_frozen_global_projections_follow_the_local_ones(runs: Path) -> None:
    frozen, trained = tensors(runs / WHOLE), tensors(runs / "global")
    name = "longformer.encoder.layer.0.attention.self.value.weight"
    twin = name.replace("value", "value_global")
    assert torch.equal(frozen[name], frozen[twin])
    assert f"{twin}.exp_avg" not in frozen
    assert not torch.equal(trained[name], trained[twin])
    assert trained[f"{twin}.exp_avg"].abs().max() > 0


def test_another_corpus_is_refused(runs: Path, small_run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(runs / WHOLE, tmp_path / "other")
    more = ["schedule.total_steps=9", f"data.train={small_run / 'data' / 'valid'}"]
    config = tmp_path / "other" / "config.yaml"
    config.write_text(config.read_text().replace(f"total_steps: {STEPS}", "total_steps: 9"))
    command = train(tmp_path, small_run / "recipe.yaml", "other", *more)
    finished = drive(tmp_path / "drive", 1, [command])
    assert finished.exit_codes == [2]
    assert "corpus of the run: got data.train with fingerprint" in finished.output


def test_altered_checkpoint_is_skipped(runs: Path, small_run: Path, tmp_path: Path) -> None:
    """Rank 1 finds it, both go on from the one before, and end where the whole one would."""
    import shutil

    copy = tmp_path / "altered"
    shutil.copytree(runs / WHOLE, copy)
    folder = copy / "checkpoints" / f"step-{STEPS:06d}"
    of_rank_1 = sorted(json.loads((folder / "state.json").read_text())["files"])[1::2]
    weights = folder / next(name for name in of_rank_1 if name.endswith(".safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    command = train(tmp_path, small_run / "recipe.yaml", "altered")
    finished = drive(tmp_path / "drive", 2, [command])
    assert finished.exit_codes == [0]
    told = f"checkpoint {folder.name} is damaged, {weights.name}: sha256"
    assert told in finished.output
    assert "(rank 1): skipped" in finished.output
    assert "step 6: going on from step-000006" in finished.output
    found, wanted = tensors(copy), tensors(runs / WHOLE)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    lines = [read_metrics(run / "metrics.jsonl") for run in (copy, runs / WHOLE)]
    assert deterministic(lines[0]) == deterministic(lines[1])
