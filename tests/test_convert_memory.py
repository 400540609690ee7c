"""Models pass through convert and export tensor by tensor: memory does not grow with their size."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_scripts import BENCHMARKS, scripts_importable
from ranks_helper import rank_environment

from longpretrain.model import LongformerForMaskedLM, ModelConfig

with scripts_importable():
    from convert_memory import FORMS, LIMIT, Peak, row

MIB = 1 << 20
LAYER = 4 * MIB * 3
"""Bytes of a layer of 512 channels, about; a Longformer's is a quarter larger."""
CHILD = """
import re, sys
from longpretrain.convert import convert, export

def peak():
    with open("/proc/self/status", encoding="utf-8") as file:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", file.read())[1]) * 1024

source, folder = sys.argv[1:]
words = {"positions": 100, "attention_window": 8, "need_tokenizer": False}
convert(folder + "/tiny", folder + "/tiny long", **words)  # what is imported late
export(folder + "/tiny long", folder + "/tiny out", check=False)
peaks = [peak()]
convert(source, folder + "/long", **words)
peaks.append(peak())
for number, dtype in enumerate((None, "bf16")):
    export(folder + "/long", folder + f"/out {number}", dtype=dtype, check=False)
    peaks.append(peak())
print(*peaks)
"""


def model(layers: int) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Layers of 12 MiB, and little beside."""
    config = ModelConfig(
        model_type="roberta", vocab_size=100, hidden_size=512, num_layers=layers, num_heads=8,
        intermediate_size=2048, max_position_embeddings=66,
    )  # fmt: skip
    whole = LongformerForMaskedLM(config)
    return config, {name: p.detach() for name, p in whole.named_parameters()}


@pytest.mark.parametrize("form", ["safetensors, shards", "pytorch_model.bin"])
def test_memory_is_that_of_a_few_tensors(tmp_path: Path, form: str) -> None:
    status = Path("/proc/self/status")
    if not status.is_file() or "VmHWM:" not in status.read_text(encoding="utf-8"):
        pytest.skip("this system does not tell a process's VmHWM")
    FORMS["safetensors"](model(1), tmp_path / "tiny")
    source = FORMS[form](model(10), tmp_path / "source")
    finished = subprocess.run(
        [sys.executable, "-c", CHILD, str(source), str(tmp_path)],
        env=rank_environment(), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-3000:]
    start, *peaks = map(int, finished.stdout.split())
    assert (tmp_path / "long" / "model.safetensors").stat().st_size > 10 * LAYER
    assert all(peak - start < 3 * LAYER for peak in peaks), (start, peaks)


def test_the_benchmark_measures_a_real_conversion(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    words = ["--layers", "1", "--hidden", "64", "--no-check", "--only", "safetensors"]
    finished = subprocess.run(
        [sys.executable, str(BENCHMARKS / "convert_memory.py"), *words, "--json", str(numbers)],
        env=rank_environment(), capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    peaks = [Peak(**tree) for tree in json.loads(numbers.read_text(encoding="utf-8"))["peaks"]]
    assert [peak.verb for peak in peaks] == [
        "convert", "export --no-check", "export --no-check --dtype bf16",
    ]  # fmt: skip
    assert all(100 * MIB < peak.peak_bytes < 2000 * MIB for peak in peaks)
    assert 12 * MIB < peaks[0].checkpoint_bytes < 16 * MIB
    assert [row(peak) for peak in peaks] == finished.stdout.splitlines()[-3:]


def test_the_table_tells_the_ratio() -> None:
    peak = Peak(verb="v", form="f", checkpoint_bytes=10**9, peak_bytes=1300 * 10**6, seconds=2.4)
    assert peak.ratio == LIMIT
    assert row(peak) == "| v | f | 1,000 MB | 1,300 MB | 1.30 | 2 |"
