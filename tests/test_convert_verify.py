"""What verify finds: nothing in a good folder, and each kind of damage by its name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from longpretrain.convert import VerifyReport, theirs, verify, verify_outputs, verify_theirs
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.errors import InputError
from longpretrain.model import LongformerForMaskedLM, ModelConfig, read_tensors, save_model

LONG = ModelConfig(
    vocab_size=67, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48,
    max_position_embeddings=602, attention_window=(8, 16), initializer_range=0.3,
)  # fmt: skip
SHORT = dataclasses.replace(
    LONG, model_type="roberta", attention_window=(), max_position_embeddings=66
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(3)
    save_model(LongformerForMaskedLM(LONG), tmp_path / "model")
    return tmp_path / "model"


def failed(report: VerifyReport) -> list[str]:
    return [row.check for row in report.rows if not row.ok]


def test_a_good_folder_passes_every_check(folder: Path) -> None:
    report = verify(folder)
    assert report.ok, report.lines()
    checks = [row.check for row in report.rows]
    for length in ("7", "255", "512", "513", "600", "21"):
        assert any(check.startswith(f"logits, {length} tokens") for check in checks)
    lines = report.lines()
    assert lines[0].split() == ["check", "got", "limit"]
    assert all(line.startswith("ok ") for line in lines[1:])


def test_a_flipped_byte_of_a_checkpoint_is_found(folder: Path) -> None:
    weights = folder / "model.safetensors"
    state = {"files": {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()}}
    (folder / "state.json").write_text(json.dumps(state))
    assert verify(folder, folder).ok
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(InputError, match=r"model\.safetensors: got sha256"):
        verify(folder)


def test_a_roberta_with_a_tokenizer_passes_until_they_disagree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = load_tokenizer()
    config = dataclasses.replace(SHORT, vocab_size=tokenizer.vocab_size)
    save_model(LongformerForMaskedLM(config), tmp_path / "a")
    tokenizer.save(tmp_path / "a", max_tokens=config.max_tokens)
    report = verify(tmp_path / "a")
    assert report.ok, report.lines()
    assert report.rows[-1].check == "tokenizers agree"
    monkeypatch.setattr(type(tokenizer), "encode", lambda self, text: np.array([5, 6, 7]))
    published, row = (row for row in verify(tmp_path / "a").rows if not row.ok)
    assert (row.check, row.got[:15]) == ("tokenizers agree", "not on the text")
    assert published.check == "vocabulary"
    assert published.got.startswith("'Hello world' is not [31414, 232]")


def test_what_transformers_ties_otherwise_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(theirs.TheirModel, "ties", (True, False))
    assert failed(verify(folder)) == ["tied in transformers"]


def test_a_tokenizer_that_puts_a_space_first_agrees_too(tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    config = dataclasses.replace(SHORT, vocab_size=tokenizer.vocab_size)
    save_model(LongformerForMaskedLM(config), tmp_path / "a")
    tokenizer.save(tmp_path / "a", max_tokens=config.max_tokens)
    path = tmp_path / "a" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"add_prefix_space": True}))
    report = verify(tmp_path / "a")
    assert report.ok, report.lines()
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "a").encode("Hello")[1] == 20920


def test_damage_is_found(folder: Path) -> None:
    state = read_tensors(folder)
    position = "longformer.embeddings.position_embeddings.weight"
    damaged = dict(state)
    damaged[position] = state[position].clone()
    damaged[position][1] = 1e6
    save_model((LONG, damaged), folder)
    assert failed(verify(folder)) == ["position rows of padding"]
    damaged[position] = torch.full_like(state[position], torch.nan)
    save_model((LONG, damaged), folder)
    assert "weights finite" in failed(verify(folder))


def test_another_dtype_than_config_json_says_is_found(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float16"}))
    assert failed(verify(folder)) == ["dtype of the weights"]


@pytest.mark.parametrize(
    "change",
    [{"causal": True}, {"dilation": (1, 2, 1, 1)}, {"attention_window": (8, 12)}],
    ids=str,
)
def test_what_transformers_cannot_compute_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    config = dataclasses.replace(LONG, **change)
    save_model(LongformerForMaskedLM(config), tmp_path / "a")
    with pytest.raises(
        InputError, match=r"got (causal attention|dilation .1, 2, 1, 1.|windows .8)"
    ):
        verify(tmp_path / "a")
    assert verify(tmp_path / "a", tmp_path / "a").ok


def test_logits_that_differ_fail(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that our side reads otherwise than transformers must show."""

    class Wider(verify_outputs.OurModel):
        def __init__(self, config: ModelConfig, tensors: dict[str, torch.Tensor]) -> None:
            super().__init__(dataclasses.replace(config, attention_window=(8, 32)), tensors)

    monkeypatch.setattr(verify_theirs, "OurModel", Wider)
    found = failed(verify(folder))
    assert [name for name in found if not name.startswith("logits")] == []
    assert "logits, 255 tokens" in found
    assert "logits, 7 tokens" not in found  # either window covers it


def test_two_folders_are_compared_tensor_by_tensor(folder: Path, tmp_path: Path) -> None:
    same = verify(folder, folder)
    assert same.ok
    assert same.rows[0].check == "tensors that fit"
    assert same.relation == "the same model"
    state = dict(read_tensors(folder))
    state["lm_head.bias"] = state["lm_head.bias"] + torch.tensor([0.25] + [0.0] * 66)
    save_model((LONG, state), tmp_path / "b")
    report = verify(folder, tmp_path / "b")
    assert not report.ok
    row = report.rows[0]
    assert (row.check, row.limit) == ("lm_head.bias", "equal bit for bit")
    assert row.got == "differs by 2.5e-01 in 1 of 67 numbers"
    assert report.relation == "the same model, but for 1 tensors"
    lengths = [f"logits, {n} tokens" for n in (7, 255, 512, 513, 600)]
    padded = ["logits, 21 tokens with padding", "logits, 21 tokens, the first global"]
    assert failed(report)[2:] == [*lengths, *padded]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        verify(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"neither config\.json nor"):
        verify(tmp_path)


def test_importing_convert_does_not_import_transformers() -> None:
    code = "import sys, longpretrain.convert; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert transformers.__version__
