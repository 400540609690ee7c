"""What a training has only begun to change passes verify, and export, which ends in it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planted import POSITIONS
from ranks_helper import rank_environment
from torch import Tensor

from longpretrain.convert import convert, export
from longpretrain.convert.verify_alone import check_alone
from longpretrain.convert.verify_positions import repeats
from longpretrain.convert.verify_side import open_side
from longpretrain.model import read_config, read_tensors, save_model

LAYER = "longformer.encoder.layer.1"
SELF = f"{LAYER}.attention.self"
LEARNT, POSITION_COUNT, TOKENS = 64, 200, 48
SEED = 5


@pytest.fixture(scope="module")
def young_run(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two updates, at the rates with which a warm-up begins, of a model whose source is in 16 bits,
    on sequences that do not reach all its learnt rows.
    """
    folder = tmp_path_factory.mktemp("young")
    source = small_run / "models" / "short"
    tensors = {name: _drawn(name, tensor) for name, tensor in read_tensors(source).items()}
    save_model((read_config(source), tensors), folder / "short")
    convert(
        folder / "short", folder / "long", positions=POSITION_COUNT, attention_window=16,
        tokenizer=source,
    )  # fmt: skip
    words = [
        f"run.dir={folder / 'run'}", f"model.path={folder / 'long'}", f"data.max_tokens={TOKENS}",
        "model.global_tokens=first", "optim.lr=5e-8", "schedule.total_steps=2",
        "schedule.warmup_steps=1", "schedule.decay=constant", "evaluate.every_steps=0",
        "checkpoint.every_steps=2",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "longpretrain", "train", str(small_run / "recipe.yaml"), *words],
        env=rank_environment(), capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "run"


def _drawn(name: str, tensor: Tensor) -> Tensor:
    """Biases and scales like a trained model's, all of which fit fp16."""
    torch.manual_seed(SEED + len(name))
    if name.endswith(("LayerNorm.weight", "layer_norm.weight")):
        tensor = 1.05 + 0.9 * torch.rand(tensor.shape)  # whose last digit is 1.2e-7
    elif tensor.dim() == 1:
        tensor = torch.randn(tensor.shape) * 0.05
    return tensor.half().float()


def failed(path: Path) -> list[str]:
    return [row.check for row in check_alone(open_side(path))[0] if not row.ok]


def test_a_run_of_two_updates_exports(young_run: Path, tmp_path: Path) -> None:
    report = export(young_run, tmp_path / "out")
    assert report
    assert report.ok
    assert not failed(young_run)
    tensors = read_tensors(tmp_path / "out")

    def moved(name: str) -> bool:
        return not tensors[name].half().float().equal(tensors[name])

    norm = f"{LAYER}.output.LayerNorm"
    stood = [f"{SELF}.key.bias", f"{SELF}.key_global.bias", f"{norm}.weight"]
    assert not any(moved(name) for name in stood)
    assert all(moved(name) for name in (f"{SELF}.key.weight", f"{norm}.bias"))
    assert not tensors[f"{SELF}.query.weight"].equal(tensors[f"{SELF}.query_global.weight"])
    assert tensors[stood[0]].equal(tensors[stood[1]])
    rows_PC = tensors[POSITIONS][2:]
    same = (rows_PC[LEARNT : 2 * LEARNT] == rows_PC[:LEARNT]).all(dim=1)
    assert same.tolist() == [number >= TOKENS for number in range(LEARNT)]


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_it_exports_in_the_type_that_it_came_from(
    young_run: Path, tmp_path: Path, dtype: str
) -> None:
    """Rounding undoes some moves and not others."""
    export(young_run, tmp_path / "out", dtype=dtype, check=False)
    assert not failed(tmp_path / "out")


@pytest.mark.parametrize(
    "part", [f"{SELF}.key.weight", f"{SELF}.query.bias", f"{LAYER}.output.LayerNorm.bias"]
)
def test_a_rounded_part_is_still_found(young_run: Path, tmp_path: Path, part: str) -> None:
    side = open_side(young_run)
    torch.manual_seed(SEED)
    tensors = {name: t + 1e-3 * torch.randn(t.shape) for name, t in side.tensors.items()}
    save_model((side.config, tensors), tmp_path / "whole")
    assert not failed(tmp_path / "whole")
    tensors[part] = tensors[part].half().float()
    save_model((side.config, tensors), tmp_path / "rounded")
    assert failed(tmp_path / "rounded") == ["rounding of the weights"]


def test_a_key_bias_of_its_own_among_copies_is_still_found(young_run: Path, tmp_path: Path) -> None:
    side = open_side(young_run.parent / "long")
    tensors = dict(side.tensors)
    tensors[f"{SELF}.key_global.bias"] = tensors[f"{SELF}.key_global.bias"] + 1e-3
    save_model((side.config, tensors), tmp_path / "odd")
    assert failed(tmp_path / "odd") == ["global projections"]


@pytest.fixture(scope="module", name="table_PC")
def make_table() -> Tensor:
    """64 learnt rows, copied end to end over 512."""
    torch.manual_seed(SEED)
    return (0.1 * torch.randn(64, 128)).repeat(8, 1)


def is_good(table_PC: Tensor) -> bool:
    found = {repeats(table_PC, learnt=learnt).ok for learnt in (0, 64)}
    assert len(found) == 1
    return found.pop()


@pytest.mark.parametrize("moves", [1e-4, 1.0], ids=["a little", "far"])
@pytest.mark.parametrize("end", [8, 40, 64, 90, 128, 300, 512])
def test_the_first_rows_trained(table_PC: Tensor, end: int, moves: float) -> None:
    trained_PC = table_PC.clone()
    trained_PC[:end] += moves * torch.randn(end, 128)
    assert is_good(trained_PC)
    # A weight decay moves those, too, that no sequence reaches.
    assert is_good(trained_PC * 0.99)


@pytest.mark.parametrize("moves", [1e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("end", [40, 90, 300, 512])
def test_rows_trained_a_little_and_rounded(table_PC: Tensor, end: int, moves: float) -> None:
    """Which rows are whose copies is then a matter of chance."""
    trained_PC = table_PC.clone()
    trained_PC[:end] += moves * torch.randn(end, 128)
    assert is_good(trained_PC.bfloat16())


def test_a_model_lengthened_again_after_its_training() -> None:
    torch.manual_seed(SEED)
    trained_PC = torch.randn(256, 8)
    for learnt in (0, 64, 256):
        assert repeats(trained_PC.repeat(4, 1), learnt=learnt).ok
        assert not repeats(trained_PC.roll(1, dims=0).repeat(4, 1)[1:], learnt=96).ok


def test_damage_is_no_training(table_PC: Tensor) -> None:
    torch.manual_seed(SEED)
    noise_PC = 0.1 * torch.randn(512, 128)
    trained_PC = table_PC.clone()
    trained_PC[:40] += noise_PC[:40]
    damages = {
        "another learnt row": (trained_PC, 104, trained_PC[50]),
        "one strange row": (table_PC, 100, noise_PC[100]),
        "a strange row behind the trained ones": (trained_PC, 120, noise_PC[120]),
        "a strange row among copies of copies": (trained_PC, 200, noise_PC[200]),
        "a row of zeros": (trained_PC, 200, torch.zeros(128)),
        "one that is no number": (trained_PC, 200, torch.full((128,), torch.nan)),
    }
    for what, (base_PC, row, value_C) in damages.items():
        damaged_PC = base_PC.clone()
        damaged_PC[row] = value_C
        assert not is_good(damaged_PC), what
    for shift in (1, -1):
        assert not is_good(torch.cat([trained_PC[:64], trained_PC[64:].roll(shift, dims=0)]))
    few_PC = table_PC.clone()
    few_PC[:7] += 1e-4
    assert not is_good(few_PC), "no text is of so few tokens"
