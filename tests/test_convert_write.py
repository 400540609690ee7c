"""Export: what leaves a run is what was trained, checked and described, or it does not leave."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import longpretrain.convert.write as write_module
from longpretrain.convert import VerifyReport, VerifyRow, convert, export
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.errors import InputError
from longpretrain.model import (
    LongformerForMaskedLM,
    ModelConfig,
    copy_local_to_global,
    read_config,
    read_tensors,
    save_model,
)

LONG = ModelConfig(
    vocab_size=67, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48,
    max_position_embeddings=66, attention_window=(8, 16), initializer_range=0.3,
)  # fmt: skip


def make_run(run: Path, config: ModelConfig = LONG, **state: Any) -> Path:
    """A run folder as training leaves it; returns the checkpoint."""
    torch.manual_seed(3)
    folder = run / "checkpoints" / "step-000020"
    save_model(LongformerForMaskedLM(config), folder)
    (folder / "optimizer.safetensors").write_bytes(b"moments")
    files = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()
    } | {"optimizer.safetensors": "of no interest"}
    recipe = {
        "name": "tiny", "run": {"dir": "/home/somebody/runs/tiny"}, "optim": {"lr": 3e-5},
        "schedule": {"total_steps": 40}, "data": {"train": "/home/somebody/shards"},
        "later": {"folders": ["/home/somebody/one", {"path": "/home/somebody/two"}, 3]},
    }  # fmt: skip
    whole = {
        "format": 1, "step": 20, "samples_done": 160, "global_tokens": "none", "files": files,
        "recipe": recipe, "versions": {"torch": "2.13.0"}, **state,
    }  # fmt: skip
    (folder / "state.json").write_text(json.dumps(whole))
    (run / "checkpoints" / "latest").write_text("step-000020\n")
    lines: list[dict[str, Any]] = [
        {"kind": "event", "name": "start", "step": 0},
        {"kind": "train", "step": 19, "loss": 5.5, "bits": 7.9},
        {"kind": "train", "step": 20, "loss": 5.0625, "bits": 7.3036},
        {"kind": "evaluation", "step": 20, "loss": 5.25, "bits": 7.5742},
        {"kind": "train", "step": 21, "loss": 4.0, "bits": 5.77},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra'
    (run / "metrics.jsonl").write_text(text)
    return folder


def test_a_run_leaves_as_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    checkpoint = make_run(tmp_path / "run")
    report = export(tmp_path / "run", tmp_path / "out")
    assert report is not None
    assert report.ok
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["README.md", "config.json", "model.safetensors"]
    trained, left = read_tensors(checkpoint), read_tensors(tmp_path / "out")
    copy_local_to_global(trained)
    assert trained.keys() == left.keys()
    assert all(trained[name].equal(left[name]) for name in trained)
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "LongformerForMaskedLM"


def test_a_run_can_be_lengthened_as_it_is(tmp_path: Path) -> None:
    checkpoint = make_run(tmp_path / "run")
    options: Any = {"positions": 100, "attention_window": 8, "need_tokenizer": False}
    convert(tmp_path / "run", tmp_path / "long", **options)
    assert read_tensors(tmp_path / "long")["lm_head.bias"].equal(
        read_tensors(checkpoint)["lm_head.bias"]
    )
    (checkpoint / "optimizer.safetensors").write_bytes(b"gone")
    assert convert(checkpoint, tmp_path / "long", **options).up_to_date


def test_trained_global_projections_stay(tmp_path: Path) -> None:
    checkpoint = make_run(tmp_path / "run", global_tokens="first")
    export(checkpoint, tmp_path / "out")
    trained, left = read_tensors(checkpoint), read_tensors(tmp_path / "out")
    assert all(trained[name].equal(left[name]) for name in trained)


def test_global_projections_stay_beside_local_ones_that_did_not_train(tmp_path: Path) -> None:
    checkpoint = make_run(tmp_path / "run", train_only="new_positions")
    export(checkpoint, tmp_path / "out")
    trained, left = read_tensors(checkpoint), read_tensors(tmp_path / "out")
    assert all(trained[name].equal(left[name]) for name in trained)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| what trained | the position rows beyond the learnt ones, nothing else |" in card


def test_the_card_says_what_was_found_and_no_more(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for fact in (
        "| updates | 20 of 40 |",
        "| sequences seen | 160 |",
        "| 20 | training batch | 5.0625 | 7.3036 |",
        "| 20 | held-out data | 5.2500 | 7.5742 |",
        "| torch | 2.13.0 |",
        "total_steps: 40",
        "train: shards",
        "  - one\n  - path: two\n  - 3\n",
        "| logits, 64 tokens |",
    ):
        assert fact in card, card
    assert "| 21 |" not in card  # later than the checkpoint
    assert "| 19 |" not in card
    assert "somebody" not in card
    assert str(tmp_path) not in card


def test_a_bare_model_folder_has_a_card_without_training(tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    config = dataclasses.replace(
        LONG, model_type="roberta", attention_window=(), vocab_size=tokenizer.vocab_size
    )
    save_model(LongformerForMaskedLM(config), tmp_path / "a")
    tokenizer.save(tmp_path / "a", max_tokens=64)
    export(tmp_path / "a", tmp_path / "out")
    assert read_config(tmp_path / "out") == config
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Training" not in card
    assert "## Scores" not in card
    assert tokenizer.fingerprint in card
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == 64


def test_exporting_again_replaces_the_export_and_nothing_else(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out")
    first = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    export(tmp_path / "run", tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == first
    (tmp_path / "out" / "results.csv").write_text("years of work")
    with pytest.raises(InputError, match="a folder with other files"):
        export(tmp_path / "run", tmp_path / "out")
    assert (tmp_path / "out" / "results.csv").is_file()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "README.md").write_text("holiday")
    with pytest.raises(InputError, match="a folder with other files"):
        export(tmp_path / "run", tmp_path / "photos")
    with pytest.raises(InputError, match="a folder with other files"):
        export(tmp_path / "run", tmp_path / "run")
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"causal": True}, "got causal attention"),
        ({"dilation": (1, 1, 2, 2)}, r"got dilation \[1, 1, 2, 2\]"),
        ({"causal": True, "dilation": (2, 2, 2, 2)}, "and causal attention"),
    ],
    ids=str,
)
def test_what_hugging_face_cannot_express_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    make_run(tmp_path / "run", dataclasses.replace(LONG, **change))
    with pytest.raises(InputError, match=message):
        export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_altered_checkpoint_does_not_leave(tmp_path: Path) -> None:
    checkpoint = make_run(tmp_path / "run")
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"model\.safetensors: got sha256"):
        export(tmp_path / "run", tmp_path / "out")
    path.write_bytes(content[:-5])
    with pytest.raises(InputError, match=r"model\.safetensors: got sha256"):
        export(tmp_path / "run", tmp_path / "out")
    (checkpoint / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"state\.json"):
        export(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_folder_that_fails_its_check_does_not_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run")
    row = VerifyRow(check="logits", got="3.0", limit="1e-04", ok=False)
    monkeypatch.setattr(write_module, "verify", lambda folder: VerifyReport(rows=(row,)))
    with pytest.raises(RuntimeError, match="the export fails its check"):
        export(tmp_path / "run", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_without_transformers_the_card_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run(tmp_path / "run")
    monkeypatch.setattr(write_module, "why_no_transformers", lambda: "it is not installed")
    assert export(tmp_path / "run", tmp_path / "out") is None
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not compared with transformers: it is not installed." in card


def test_sources_and_formats_that_cannot_be(tmp_path: Path) -> None:
    checkpoint = make_run(tmp_path / "run")
    with pytest.raises(InputError, match="got tf; wanted hf or fairseq or onnx"):
        export(checkpoint, tmp_path / "out", format="tf")
    with pytest.raises(InputError, match="no such folder"):
        export(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "young" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match=r"neither config\.json nor checkpoints/latest"):
        export(tmp_path / "young", tmp_path / "out")
    for name in ("step-000040", "../../young", ""):
        (tmp_path / "run" / "checkpoints" / "latest").write_text(name)
        with pytest.raises(InputError, match="wanted a checkpoint beside it"):
            export(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()
