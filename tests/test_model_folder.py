"""Model folders in and out: bit-exact, readable by transformers, never half-written."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from longpretrain.data import load_tokenizer, tokenizer_files
from longpretrain.errors import InputError
from longpretrain.files import fresh_folder
from longpretrain.model import (
    INDEX_NAME,
    WEIGHTS_NAME,
    LongformerForMaskedLM,
    ModelConfig,
    config_json,
    copy_local_to_global,
    load_model,
    read_config,
    read_tensors,
    save_model,
    stored_names,
)

LONG = ModelConfig(
    vocab_size=67, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48,
    max_position_embeddings=66, attention_window=(8, 4), layer_norm_eps=1e-6,
    hidden_dropout=0.0, attention_dropout=0.2, initializer_range=0.3,
)  # fmt: skip
SHORT = dataclasses.replace(LONG, model_type="roberta", attention_window=())
BOTH = pytest.mark.parametrize("config", [LONG, SHORT], ids=["longformer", "roberta"])


def new_model(config: ModelConfig) -> LongformerForMaskedLM:
    torch.manual_seed(3)
    return LongformerForMaskedLM(config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model(new_model(LONG), tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}))


@BOTH
@pytest.mark.parametrize("shard_bytes", [10**9, 20_000], ids=["one-file", "shards"])
def test_round_trip_is_exact_and_transformers_loads_it(
    config: ModelConfig, shard_bytes: int, tmp_path: Path
) -> None:
    model = new_model(config)
    save_model(model, tmp_path / "a", shard_bytes=shard_bytes)
    assert (tmp_path / "a" / INDEX_NAME).is_file() == (shard_bytes < 10**9)
    loaded = load_model(tmp_path / "a")
    assert loaded.config == config
    assert not loaded.training
    assert loaded.lm_head.decoder.weight is loaded.longformer.embeddings.word_embeddings.weight
    assert loaded.lm_head.decoder.bias is loaded.lm_head.bias
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    theirs, info = transformers.AutoModelForMaskedLM.from_pretrained(
        tmp_path / "a", output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(theirs).__name__.startswith(config.model_type.capitalize())
    tokens_BN = torch.randint(3, 67, (1, 50))
    got = theirs.eval()(tokens_BN, attention_mask=torch.ones_like(tokens_BN)).logits
    torch.testing.assert_close(got, loaded(tokens_BN), rtol=0, atol=1e-4)


@BOTH
def test_reads_what_transformers_writes(config: ModelConfig, tmp_path: Path) -> None:
    save_model(new_model(config), tmp_path / "a")
    theirs = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")
    assert read_config(tmp_path / "b") == config
    first, second = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@BOTH
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_reads_a_pickled_file_with_its_extras(
    config: ModelConfig, legacy: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As the released RoBERTa files are: tied twins, a pooler and position ids are stored too."""
    model = new_model(config)
    save_model(model, tmp_path)
    names = stored_names(model)
    stored = {names.get(name, name): t for name, t in model.state_dict().items()}
    stored[f"{config.model_type}.pooler.dense.weight"] = torch.zeros(32, 32)
    stored[f"{config.model_type}.embeddings.position_ids"] = torch.arange(66)[None]
    (tmp_path / WEIGHTS_NAME).unlink()
    torch.save(stored, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    with caplog.at_level(logging.INFO):
        read = read_tensors(tmp_path)
    assert read.keys() == names.keys()
    assert all(torch.equal(read[name], model.state_dict()[name]) for name in read)
    assert [record.message for record in caplog.records if "pooler" in record.message]
    loaded = load_model(tmp_path)
    assert torch.equal(loaded.lm_head.decoder.weight, model.lm_head.decoder.weight)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_model(new_model(LONG), tmp_path / name)
    for file in ("config.json", WEIGHTS_NAME):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_others_may_read_the_weights_if_they_may_read_the_rest(folder: Path) -> None:
    modes = {path.name: path.stat().st_mode for path in folder.iterdir()}
    assert modes[WEIGHTS_NAME] == modes["config.json"]


def test_a_model_from_its_tensors_and_an_older_folder_replaced(tmp_path: Path) -> None:
    save_model(new_model(SHORT), tmp_path / "a", shard_bytes=20_000)
    state = {name: t.to(torch.bfloat16) for name, t in new_model(LONG).state_dict().items()}
    save_model((LONG, state), tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", WEIGHTS_NAME]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert json.loads((tmp_path / "a" / "config.json").read_text())["dtype"] == "bfloat16"
    assert next(load_model(tmp_path / "a").parameters()).dtype == torch.float32


def test_stored_names_leave_tied_twins_out() -> None:
    names = stored_names(LONG)
    assert len(names) == len(new_model(LONG).state_dict()) - 2
    assert "lm_head.bias" in names
    assert not any("decoder" in name for name in names)
    assert stored_names(SHORT)["longformer.embeddings.LayerNorm.bias"].startswith("roberta.")


def test_copy_local_to_global() -> None:
    state = dict(new_model(LONG).state_dict())
    before = {name: tensor.clone() for name, tensor in state.items()}
    copy_local_to_global(state)
    changed = {name for name in state if not torch.equal(state[name], before[name])}
    assert changed == {n for n in state if "_global.weight" in n}  # biases are all zero
    name = "longformer.encoder.layer.1.attention.self.key"
    assert torch.equal(state[f"{name}_global.weight"], before[f"{name}.weight"])


def test_config_json_has_every_field_of_a_longformer() -> None:
    tree = config_json(dataclasses.replace(LONG, layer_norm_eps=1e-5))
    assert tree == {
        "architectures": ["LongformerForMaskedLM"], "model_type": "longformer", "vocab_size": 67,
        "max_position_embeddings": 66, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
        "attention_window": [8, 4], "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
        "sep_token_id": 2, "hidden_act": "gelu", "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.2, "initializer_range": 0.3, "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
        "onnx_export": False, "tie_word_embeddings": True, "dtype": "float32",
    }  # fmt: skip


def test_what_hugging_face_cannot_express_round_trips(tmp_path: Path) -> None:
    config = dataclasses.replace(LONG, dilation=(1, 1, 2, 3), causal=True)
    save_model(new_model(config), tmp_path / "a")
    tree = json.loads((tmp_path / "a" / "config.json").read_text())
    assert tree["longpretrain"] == {"causal": True, "dilation": [1, 1, 2, 3]}
    assert read_config(tmp_path / "a") == config
    plain = dataclasses.replace(LONG, dilation=(1, 1, 1, 1))
    assert "longpretrain" not in config_json(plain)


def test_defaults_of_a_file_are_those_of_hugging_face(folder: Path) -> None:
    left_out = ("layer_norm_eps", "hidden_dropout_prob", "pad_token_id", "initializer_range")
    edit(folder, attention_window=8, **dict.fromkeys(left_out, ...))
    config = read_config(folder)
    assert (config.layer_norm_eps, config.hidden_dropout) == (1e-12, 0.1)
    assert (config.pad_id, config.initializer_range) == (1, 0.02)
    assert config.attention_window == (8, 8)


def test_changes_at_loading(folder: Path) -> None:
    changes = {"attention_window": (16,), "dilation": 2, "causal": True, "attention_dropout": 0.0}
    config = load_model(folder, changes=changes, activation_checkpointing=True).config
    assert config.attention_window == (16, 16)
    assert config.dilation == (2, 2, 2, 2)
    assert (config.causal, config.attention_dropout, config.hidden_dropout) == (True, 0.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_window": (5, 6)}, "even"),
        ({"attention_window": (4, 4, 4)}, "3 windows"),
        ({"attention_window": (4.0,)}, "an integer"),
        ({"hidden_size": 64}, "change of hidden_size"),
        ({"window": 4}, "change of window"),
    ],
    ids=str,
)
def test_changes_that_cannot_be(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(folder, changes=changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "electra"}, "got electra; wanted bert, camembert, longformer, roberta or"),
        ({"model_type": ...}, "got None; wanted bert, camembert, longformer, roberta or"),
        ({"model_type": ["bert"]}, r"got \['bert'\]; wanted bert, "),
        ({"hidden_act": "gelu_new"}, "hidden_act .* got gelu_new; wanted gelu"),
        ({"is_decoder": True}, "is_decoder"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings"),
        ({"vocab_size": ...}, "vocab_size .* got None; wanted a number"),
        ({"vocab_size": "67"}, "vocab_size"),
        ({"hidden_size": 64}, r"shape \(67, 32\), not \(67, 64\)"),
        ({"num_hidden_layers": 3, "attention_window": 8}, "no longformer.encoder.layer.2"),
        ({"attention_window": ...}, "attention_window .* got no such key"),
        ({"attention_window": [8, 4, 4]}, "3 windows"),
        ({"attention_window": [8, 3]}, "even"),
        ({"longpretrain": {"rotary": True}}, "newer version"),
        ({"model_type": "roberta"}, r"layer.\[0-1\].*key_global.bias, which is no part of it"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit(folder, **changes)
    with pytest.raises(InputError, match=message):
        load_model(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 3000, -1])
def test_a_truncated_safetensors_file_is_named(folder: Path, keep: int) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors: got [\d,]+ bytes that do not read"):
        load_model(folder)


def test_shards_that_are_not_all_there(tmp_path: Path) -> None:
    save_model(new_model(LONG), tmp_path / "a", shard_bytes=20_000)
    index = tmp_path / "a" / INDEX_NAME
    shards = sorted((tmp_path / "a").glob("model-*.safetensors"))
    whole = index.read_text()
    index.write_text(whole.replace(shards[0].name, "../" + shards[0].name))
    with pytest.raises(InputError, match="no file"):
        load_model(tmp_path / "a")
    index.write_text(whole[:-20])
    with pytest.raises(InputError, match="wanted a JSON object"):
        load_model(tmp_path / "a")
    index.write_text('{"weight_map": {"a": 3}}')
    with pytest.raises(InputError, match="wanted a weight_map"):
        load_model(tmp_path / "a")
    index.write_text(whole)
    wanted = read_tensors(tmp_path / "a")
    with safe_open(shards[0], "pt") as file:
        stale = {f: file.get_tensor(f) + 1 for f in file.keys()}  # noqa: SIM118
    with safe_open(shards[1], "pt") as file:
        stale |= {f: file.get_tensor(f) for f in file.keys()}  # noqa: SIM118
    save_file(stale, shards[1], metadata={"format": "pt"})
    found = read_tensors(tmp_path / "a")  # the index says which of two counts
    assert all(tensor.equal(wanted[name]) for name, tensor in found.items())
    shards[1].write_bytes(shards[2].read_bytes())
    with pytest.raises(InputError, match=f"{shards[1].name}: got no "):
        load_model(tmp_path / "a")
    shards[0].unlink()
    with pytest.raises(InputError, match=f"no file {shards[0].name}"):
        load_model(tmp_path / "a")


class Foreign:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_pickled_file_is_refused_and_not_run(
    folder: Path, tmp_path: Path, legacy: bool
) -> None:
    (folder / WEIGHTS_NAME).unlink()
    trap = tmp_path / "trap"
    content = {"lm_head.bias": Foreign(trap)}
    file = folder / "pytorch_model.bin"
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError) as info:
        load_model(folder)
    module = os.mkdir.__module__
    got = f"got more than tensors ({module}.mkdir); wanted tensors and nothing else"
    assert got in str(info.value)
    assert "pytorch_model.bin" in info.value.what
    assert "weights_only" not in str(info.value)  # torch advises to let the code run
    assert not trap.exists()
    torch.load(file, weights_only=False)  # the trap does work
    assert trap.exists()


@pytest.mark.parametrize(
    "content", [b"", b"no archive", b"PK\x03\x04 cut"], ids=["0", "text", "zip"]
)
def test_a_damaged_pickled_file_is_named(folder: Path, content: bytes) -> None:
    (folder / WEIGHTS_NAME).unlink()
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(InputError, match=r"pytorch_model\.bin") as info:
        load_model(folder)
    assert "weights_only" not in str(info.value)


@pytest.mark.parametrize("twin", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_tied_twins_are_compared_in_the_narrower_type(folder: Path, twin: torch.dtype) -> None:
    (folder / WEIGHTS_NAME).unlink()
    state = dict(new_model(LONG).state_dict())
    state["lm_head.decoder.weight"] = state["lm_head.decoder.weight"].to(twin)
    torch.save(state, folder / "pytorch_model.bin")
    words = "longformer.embeddings.word_embeddings.weight"
    assert torch.equal(read_tensors(folder)[words], state[words])
    state["lm_head.decoder.weight"] = state["lm_head.decoder.weight"] * 1.5
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="wanted tied weights"):
        read_tensors(folder)


def test_weights_that_are_no_model(folder: Path) -> None:
    (folder / WEIGHTS_NAME).unlink()
    with pytest.raises(InputError, match="got no weights"):
        load_model(folder)
    torch.save([torch.zeros(2)], folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="got list; wanted a dictionary of tensors"):
        load_model(folder)
    state = new_model(LONG).state_dict()
    state["lm_head.decoder.weight"] = torch.zeros(67, 32)
    torch.save(dict(state), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="wanted tied weights"):
        load_model(folder)


def test_no_folder_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        load_model(tmp_path / "nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="wanted a JSON object"):
        load_model(tmp_path)


def test_saving_never_harms_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("jpg")
    (tmp_path / "file").write_text("text")
    for name in ("photos", "file"):
        with pytest.raises(InputError, match="Choose another name"):
            save_model(new_model(LONG), tmp_path / name)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "one.jpg", "photos"]


@pytest.mark.parametrize("kind", ["file", "folder", "weights"])
def test_a_model_folder_with_other_things_in_it_is_not_replaced(folder: Path, kind: str) -> None:
    match kind:
        case "file":
            (folder / "notes.txt").write_text("years of work")
        case "folder":
            (folder / "README.md").mkdir()
        case "weights":
            (folder / "pytorch_model.bin").write_bytes(b"another model, for all we know")
    before = sorted(folder.rglob("*"))
    with pytest.raises(InputError, match="a folder with other files"):
        save_model(new_model(LONG), folder)
    assert sorted(folder.rglob("*")) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_whatever_we_write_beside_a_model_may_be_replaced(folder: Path) -> None:
    load_tokenizer().save(folder, max_tokens=64)
    for name in (*tokenizer_files.ALL, "README.md", "conversion.json"):
        (folder / name).touch()
    save_model(new_model(LONG), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", WEIGHTS_NAME]


def test_an_error_while_writing_leaves_the_old_folder(tmp_path: Path) -> None:
    save_model(new_model(LONG), tmp_path / "a")
    before = (tmp_path / "a" / WEIGHTS_NAME).read_bytes()
    with (
        pytest.raises(OSError, match="full"),
        fresh_folder(tmp_path / "a", belongs=lambda _: True) as fresh,
    ):
        (fresh / WEIGHTS_NAME).write_bytes(b"half")
        raise OSError("disk full")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / WEIGHTS_NAME).read_bytes() == before
