"""What leaves a run is what was in memory, to the byte, whatever the ZeRO stage."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from ranks_helper import drive
from told import exit_code

from longpretrain.convert import convert, export
from longpretrain.data.manifest import Manifest
from longpretrain.files import sha256
from longpretrain.model import copy_local_to_global, read_config, read_tensors, save_model

GLOBAL = "1, first token global"
RUNS = {"0": 0, GLOBAL: 1, "2": 2, "3": 3}
"""Name -> ZeRO stage."""


@pytest.fixture(scope="module")
def runs(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks, two updates each; beside each run, what DeepSpeed gathered of its weights."""
    folder = tmp_path_factory.mktemp("stages")
    commands = []
    for name, stage in RUNS.items():
        words = [str(small_run / "recipe.yaml"), f"run.dir={folder / name}"]
        words += [f"zero.config=ds_configs/zero{stage}.json", "evaluate.every_steps=0"]
        words += ["schedule.total_steps=2", "schedule.warmup_steps=1"]
        words += ["model.global_tokens=first"] if name == GLOBAL else []
        commands.append({"arguments": words})
    finished = drive(folder / "drive", 2, commands, driver="memory_driver.py")
    assert finished.exit_codes == [0] * len(RUNS), finished.output[-3000:]
    return folder


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.conversion(
    family="Longformer", direction="run of any ZeRO stage -> HF",
    checked="files equal to those of the weights in memory, bit for bit",
)  # fmt: skip
def test_the_bytes_are_those_of_the_weights_in_memory(
    runs: Path, small_run: Path, tmp_path: Path, name: str
) -> None:
    run, began = runs / name, read_tensors(small_run / "models" / "long")
    memory = torch.load(run / "memory" / "step-000002.pt", weights_only=True)
    stood = [key for key, tensor in memory.items() if tensor.equal(began[key])]
    assert all("_global.bias" in key for key in stood), stood  # no gradient reaches some of them
    is_global = [key for key in memory if "_global." in key]
    assert bool(is_global) == (name == GLOBAL)
    whole = began | memory
    if not is_global:
        copy_local_to_global(whole)
    config = read_config(run / "checkpoints" / "step-000002")
    save_model((config, whole), tmp_path / "memory")
    export(run, tmp_path / "out", check=name == "2")
    written, wanted = (tmp_path / folder / "model.safetensors" for folder in ("out", "memory"))
    assert written.read_bytes() == wanted.read_bytes()
    assert all(t.equal(whole[key]) for key, t in read_tensors(tmp_path / "out").items())


@pytest.mark.parametrize("name", [GLOBAL])
def test_a_run_and_its_export_convert_to_the_same_files(
    runs: Path, tmp_path: Path, name: str
) -> None:
    export(runs / name, tmp_path / "out", check=False)
    for source, target in ((runs / name, "of run"), (tmp_path / "out", "of export")):
        convert(source, tmp_path / target, positions=200, attention_window=16)
    found = {path.name for path in (tmp_path / "of run").iterdir()}
    for file in found - {"conversion.json"}:  # which names the source
        of_run, of_export = (tmp_path / f"of {kind}" / file for kind in ("run", "export"))
        assert of_run.read_bytes() == of_export.read_bytes(), file


def test_the_card_tells_the_recipe_the_data_the_losses_and_the_sources(
    runs: Path, small_run: Path, tmp_path: Path
) -> None:
    export(runs / "2", tmp_path / "out", check=False)
    card = (tmp_path / "out" / "README.md").read_text()
    checkpoint = runs / "2" / "checkpoints" / "step-000002"
    lines = map(json.loads, (runs / "2" / "metrics.jsonl").read_text().splitlines())
    (*_, last) = (line for line in lines if line["kind"] == "train")
    corpus = Manifest.read(small_run / "data" / "train")
    shards = sorted(checkpoint.glob("model-*.safetensors"))
    assert len(shards) == 2, "one of each rank"
    facts = [
        "| updates | 2 of 2 |", "| sequences seen | 8 |", "| sequences per update | 4 |",
        "| learning rate, at its peak | 0.001 |", "| precision | fp32 |",
        "| tokens per sequence, at most | 128 |",
        f"| fingerprint of the corpus | `{corpus.fingerprint}` |",
        f"| train data | {corpus.documents:,} documents, {corpus.tokens:,} tokens, ",
        f"| 2 | training batch | {last['loss']:.4f} |",
        "Made from `step-000002`, by content:",
        *(f"| `{shard.name}` | `{sha256(shard)}` |" for shard in shards),
        "`long` was made by `longpretrain convert`:",
        '| source | `"short"` |', "| positions | `128` |",
        f"| `model.safetensors` | `{sha256(small_run / 'models/short/model.safetensors')}` |",
    ]  # fmt: skip
    assert [fact for fact in facts if fact not in card] == []
    for folder in (runs, small_run, tmp_path):
        assert str(folder) not in card, "a card is for strangers"


def test_an_evaluation_of_the_checkpoint_is_told(
    runs: Path, small_run: Path, tmp_path: Path
) -> None:
    """And one that is older than the checkpoint is not: it scored other weights."""
    run = tmp_path / "run"
    shutil.copytree(runs / "2", run)
    command = ["evaluate", run, "--data", small_run / "data" / "valid", "--max-tokens", "64,128"]
    assert exit_code(*command) == 0
    results = json.loads((run / "evaluation.json").read_text())["results"]
    rows = [
        f"| 2 | `longpretrain evaluate`, {result['max_tokens']} tokens | "
        f"{result['bits'] * math.log(2):.4f} | {result['bits']:.4f} |"
        for result in results
    ]
    for is_older in (False, True):
        if is_older:
            os.utime(run / "evaluation.json", (1, 1))
        export(run, tmp_path / "out", check=False)
        card = (tmp_path / "out" / "README.md").read_text()
        assert [row in card for row in rows] == [not is_older] * 2, card
