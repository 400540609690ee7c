"""What leaves a run is what was in memory, to the byte, whatever the ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks_helper import drive

from longpretrain.convert import convert, export
from longpretrain.model import copy_local_to_global, read_config, read_tensors, save_model

STAGES = (0, 1, 2, 3)
GLOBAL = "3, first token global"
RUNS = {**{str(stage): stage for stage in STAGES}, GLOBAL: 3}


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
