"""Stopping and resuming equals never stopping: bit for bit at the same world size (design, 3.4)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks_helper import drive
from safetensors.torch import load_file

from longpretrain.report.metrics import deterministic, read_metrics

STEPS = 8
WHOLE, STOPPED = "whole", "stopped"


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
    """Two ranks, ZeRO 1, dropout on: each precision whole and stopped; then one rank and other
    stages."""
    folder = tmp_path_factory.mktemp("resume")
    recipe = small_run / "recipe.yaml"
    commands = []
    for precision in ("fp32", "bf16"):
        options = [f"precision={precision}"]
        commands += [
            train(folder, recipe, f"{precision}-{WHOLE}", *options),
            train(folder, recipe, f"{precision}-{STOPPED}", *options, stop_after=3),
            train(folder, recipe, f"{precision}-{STOPPED}", *options),
        ]
    commands.append(train(folder, recipe, f"fp32-{STOPPED}"))  # done: nothing to do
    no_dropout = ["model.dropout=0", "model.attention_dropout=0"]
    commands += [
        train(folder, recipe, "exact-2", *no_dropout),
        train(folder, recipe, "moved", *no_dropout, stop_after=3),
        train(folder, recipe, "global", "model.global_tokens=first"),
    ]
    two = drive(folder / "two", 2, commands)
    assert two.exit_codes == [0, 75, 0, 0, 75, 0, 0, 0, 75, 0], two.output[-3000:]
    one = drive(
        folder / "one",
        1,
        [
            train(folder, recipe, "exact-1", *no_dropout, "batch.micro_sequences=2"),
            train(folder, recipe, "moved", *no_dropout, "zero.config=ds_configs/zero3.json"),
            train(folder, recipe, "stage-0", *no_dropout, "zero.config=ds_configs/zero0.json"),
        ],
    )
    assert one.exit_codes == [0, 0, 0], one.output[-3000:]
    return folder


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_run_is_bit_identical(runs: Path, precision: str) -> None:
    whole, stopped = runs / f"{precision}-{WHOLE}", runs / f"{precision}-{STOPPED}"
    assert any(
        "resumed" in line.get("event", "") for line in read_metrics(stopped / "metrics.jsonl")
    )
    left, right = (deterministic(read_metrics(run / "metrics.jsonl")) for run in (whole, stopped))
    assert left == right
    assert [line["step"] for line in left if line["kind"] == "train"] == list(range(1, STEPS + 1))
    first, second = tensors(whole), tensors(stopped)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "name", ["exact-1", "moved", "stage-0"], ids=["one-rank", "stage-and-ranks-change", "stage-0"]
)
def test_curve_does_not_depend_on_ranks_or_stage(runs: Path, name: str) -> None:
    """With dropout off only the order of sums differs, over ranks and micro-batches: 1e-5
    relative."""
    wanted, got = (read_metrics(runs / run / "metrics.jsonl") for run in ("exact-2", name))
    for key in ("loss", "grad_norm"):
        left, right = ([line[key] for line in lines if key in line] for lines in (got, wanted))
        assert left == pytest.approx(right, rel=1e-5 if key == "loss" else 1e-4), key


def test_status_and_repeat(runs: Path) -> None:
    done = status(runs / f"fp32-{STOPPED}")
    assert (done["state"], done["step"]) == ("done", STEPS)


def test_losses_fall_and_dropout_matters(runs: Path) -> None:
    def losses(name: str) -> list[float]:
        lines = read_metrics(runs / name / "metrics.jsonl")
        return [line["loss"] for line in lines if line["kind"] == "train"]

    assert losses("exact-2")[-1] < losses("exact-2")[0]
    assert losses("fp32-whole") != losses("exact-2")


def test_checkpoint_is_a_hugging_face_folder(runs: Path) -> None:
    """A checkpoint of two ranks loads in transformers with nothing missing or left over."""
    from transformers import LongformerForMaskedLM

    folder = runs / "fp32-whole" / "checkpoints" / f"step-{STEPS:06d}"
    _, info = LongformerForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_frozen_global_projections_follow_the_local_ones(runs: Path) -> None:
    frozen, trained = tensors(runs / "fp32-whole"), tensors(runs / "global")
    name = "longformer.encoder.layer.0.attention.self.value.weight"
    twin = name.replace("value", "value_global")
    assert torch.equal(frozen[name], frozen[twin])
    assert f"{twin}.exp_avg" not in frozen
    assert not torch.equal(trained[name], trained[twin])
    assert trained[f"{twin}.exp_avg"].abs().max() > 0


def test_another_corpus_is_refused(runs: Path, small_run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(runs / "fp32-whole", tmp_path / "other")
    more = ["schedule.total_steps=9", f"data.train={small_run / 'data' / 'valid'}"]
    config = tmp_path / "other" / "config.yaml"
    config.write_text(config.read_text().replace(f"total_steps: {STEPS}", "total_steps: 9"))
    command = train(tmp_path, small_run / "recipe.yaml", "other", *more)
    finished = drive(tmp_path / "drive", 1, [command])
    assert finished.exit_codes == [2]
    assert "corpus of the run: got data.train with fingerprint" in finished.output


def test_altered_checkpoint_is_refused(runs: Path, small_run: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "altered"
    shutil.copytree(runs / "fp32-whole", copy)
    folder = copy / "checkpoints" / f"step-{STEPS:06d}"
    weights = next(folder.glob("optimizer-*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    recipe = (copy / "config.yaml").read_text().replace(f"total_steps: {STEPS}", "total_steps: 9")
    (copy / "config.yaml").write_text(recipe)
    command = train(tmp_path, small_run / "recipe.yaml", "altered", "schedule.total_steps=9")
    finished = drive(tmp_path / "drive", 1, [command])
    assert finished.exit_codes == [2]
    assert f"checkpoint file {weights}: got sha256" in finished.output
