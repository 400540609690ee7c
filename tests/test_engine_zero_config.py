"""Files of ds_configs/ and pairs of precision and stage: what is read, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from longpretrain.config import Config
from longpretrain.engine.zero_config import check_precision, read_zero_config
from longpretrain.errors import InputError
from longpretrain.recipe import from_tree

DS_CONFIGS = Path(__file__).resolve().parents[1] / "ds_configs"


def config(precision: str, stage: int) -> Config:
    return from_tree({"precision": precision, "zero": {"config": f"ds_configs/zero{stage}.json"}})


@pytest.mark.parametrize("key", ["train_batch_size", "bf16", "optimizer", "gradient_clipping"])
def test_ds_config_with_a_number_of_ours_is_refused(tmp_path: Path, key: str) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, key: 1}))
    with pytest.raises(
        InputError, match=rf"{key}: got a number that the recipe owns; wanted .* Remove"
    ):
        read_zero_config(str(path))


def test_broken_ds_configs_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text("{")
    with pytest.raises(InputError, match="wanted JSON"):
        read_zero_config(str(path))
    path.write_text("{}")
    with pytest.raises(InputError, match="wanted 0, 1, 2 or 3"):
        read_zero_config(str(path))
    with pytest.raises(InputError, match=r"no-such\.json; wanted a JSON file that exists"):
        read_zero_config("no-such.json")


@pytest.mark.parametrize("name", sorted(p.name for p in DS_CONFIGS.glob("*.json")))
def test_shipped_ds_configs_are_read(name: str) -> None:
    assert read_zero_config(f"ds_configs/{name}")["zero_optimization"]["stage"] in (0, 1, 2, 3)


def test_pairs_that_cannot_run_are_refused() -> None:
    with pytest.raises(InputError, match="bf16 at ZeRO stage 0"):
        check_precision(config("bf16", 0), torch.device("cpu"))
    with pytest.raises(InputError, match="fp16 on a CPU"):
        check_precision(config("fp16", 1), torch.device("cpu"))
