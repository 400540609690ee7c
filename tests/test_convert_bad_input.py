"""What cannot be converted: told in one line that names all of it, exit code 2, nothing written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq_files import make_dictionary, save
from family_models import FAMILIES, make_family, write_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_disk import small_disk
from told import check_form, disk, exit_code
from torch import Tensor

from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.model import read_config, read_tensors

UNREAD = ("xlm-roberta-xl", "albert", "deberta-v2", "electra", "mpnet", "distilbert", "gpt2", "")
LAYER = "encoder.layer"
WORDS = "roberta.embeddings.word_embeddings.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_family(tmp_path / "short", "roberta")


def refused(capsys: pytest.CaptureFixture[str], *words: object, within: Path) -> str:
    """The line that convert prints as it refuses; fails if it changed anything on the disk."""
    before = disk(within)
    capsys.readouterr()
    assert exit_code("convert", *words) == 2
    assert disk(within) == before
    return check_form(capsys.readouterr().err, "convert")


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("model_type", UNREAD)
def test_a_family_that_is_not_read(
    model_type: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(source, model_type=model_type)
    line = refused(capsys, source, tmp_path / "long", within=tmp_path)
    assert f"got {model_type or 'nothing'}; " in line
    assert "wanted bert, camembert, longformer, roberta or xlm-roberta. " in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("position_embedding_type", "relative_key_query"), ("hidden_act", "gelu_new"),
        ("hidden_act", "relu"), ("is_decoder", True), ("add_cross_attention", True),
        ("tie_word_embeddings", False), ("num_attention_heads", 5), ("hidden_size", "32"),
        ("type_vocab_size", 0), ("num_hidden_layers", 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("family", ["bert", "xlm-roberta"])
def test_a_family_s_model_that_computes_something_else(
    family: str, key: str, value: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_family(tmp_path / "short", family)
    edit_config(folder, **{key: value})
    refused(capsys, folder, tmp_path / "long", within=tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("num_hidden_layers", 10**9, "got 1000000000; wanted at most 1,000."),
        ("num_hidden_layers", 1000, "no bert.encoder.layer.[2-999].output.dense.bias;"),
        ("hidden_size", 10**18, "got 1000000000000000000; wanted at most 1,048,576."),
        ("hidden_size", 1 << 20, "not (1048576,)"),
        ("vocab_size", 10**30, "wanted at most 2,147,483,648."),
        ("max_position_embeddings", 10**12, "max_position_embeddings in "),
        ("intermediate_size", 2**31, "not (2147483648, 32)"),
        ("num_attention_heads", 10**9, "wanted at most"),
        ("num_attention_heads", 0, "num_attention_heads in "),
        ("pad_token_id", -(10**20), "wanted at most"),
        ("pad_token_id", -1, "pad_token_id in "),
        ("bos_token_id", -7, "bos_token_id in "),
        ("eos_token_id", 10**6, "eos_token_id in "),
        ("layer_norm_eps", float("nan"), "got nan; wanted 1e-30 to 1."),
        ("layer_norm_eps", -1, "got -1; wanted 1e-30 to 1."),
        ("initializer_range", 1e30, "got 1e+30; wanted 0 to 100."),
        ("hidden_dropout_prob", 1, "hidden_dropout_prob in "),
        ("hidden_dropout_prob", 10**4000, "... wanted at most"),
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_sizes_that_would_fill_the_memory(
    key: str, value: Any, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_family(tmp_path / "short", "bert", tokenizer=None)
    edit_config(folder, **{key: value})
    line = refused(capsys, folder, tmp_path / "long", within=tmp_path)
    assert told in line.replace("...;", "...")
    assert f"{folder}" in line


def test_ids_of_the_tokenizer_go_into_the_new_folder(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(source, bos_token_id=5)
    assert exit_code("convert", source, tmp_path / "long") == 0
    assert "bos_token_id: 0, the tokenizer's, instead of 5" in capsys.readouterr().out
    config = read_config(tmp_path / "long")
    assert (config.bos_id, config.eos_id) == (0, 2)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "minilm"])
def test_all_tensors_that_do_not_fit_are_named(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_family(tmp_path / "short", family, layers=3)
    prefix = {"bert": "bert", "longformer": "longformer"}.get(family, "roberta")

    def spoil(tensors: dict[str, Tensor]) -> None:
        for layer in range(3):
            del tensors[f"{prefix}.{LAYER}.{layer}.output.LayerNorm.bias"]
        del tensors[f"{prefix}.{LAYER}.2.attention.self.key.weight"]
        del tensors[f"{prefix}.embeddings.token_type_embeddings.weight"]
        tensors["extra.weight"] = torch.ones(3)
        tensors[f"{prefix}.{LAYER}.3.output.dense.bias"] = torch.ones(32)
        name = f"{prefix}.{LAYER}.1.intermediate.dense.weight"
        tensors[name] = tensors[name].T.contiguous()
        name = f"{prefix}.embeddings.position_embeddings.weight"
        tensors[name] = tensors[name][:-1].clone()
        name = f"{prefix}.embeddings.LayerNorm.weight"
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)

    edit_tensors(folder, spoil)
    line = refused(capsys, folder, tmp_path / "long", within=tmp_path)
    rows = 64 + FAMILIES[family].offset
    for told in (
        f"no {prefix}.{LAYER}.[0-2].output.LayerNorm.bias;",
        f"no {prefix}.{LAYER}.2.attention.self.key.weight;",
        f"no {prefix}.embeddings.token_type_embeddings.weight;",
        "extra.weight, which is no part of it;",
        f"{prefix}.{LAYER}.3.output.dense.bias, which is no part of it;",
        f"{prefix}.{LAYER}.1.intermediate.dense.weight of shape (32, 64), not (64, 32);",
        f"{prefix}.embeddings.position_embeddings.weight of shape ({rows - 1}, 32), "
        f"not ({rows}, 32);",
        f"{prefix}.embeddings.LayerNorm.weight of torch.float8_e4m3fn;",
    ):
        assert told in line
    assert line.count(";") == 8


def test_the_same_of_a_fairseq_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def spoil(whole: dict[str, Any]) -> None:
        model = whole["model"]
        for name in [name for name in model if "layers.1." in name and "fc1.b" not in name]:
            del model[name]
        model["encoder.segments"] = torch.ones(2)

    save(tmp_path, make_dictionary([str(i) for i in range(50256)]), edit=spoil)
    line = refused(capsys, tmp_path / "model.pt", tmp_path / "long", within=tmp_path)
    assert line.count("; no ") + line.count("got no ") == 15
    assert "encoder.segments, which is not RoBERTa's" in line


def poison(tensors: dict[str, Tensor]) -> None:
    for layer in (0, 1):
        tensors[f"roberta.{LAYER}.{layer}.output.dense.bias"][3] = math.nan
    tensors["lm_head.dense.weight"][1, :2] = math.inf
    tensors["lm_head.dense.weight"][2, 5] = -math.inf


def test_weights_that_are_no_numbers(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_tensors(source, poison)
    line = refused(capsys, source, tmp_path / "long", within=tmp_path)
    biases = f"NaN or infinity in longformer.{LAYER}.[0-1].output.dense.bias (1 of 32)"
    head = "NaN or infinity in lm_head.dense.weight (3 of 1,024)"
    assert biases in line
    assert head in line
    assert "--allow-nonfinite" in line
    assert exit_code("convert", source, tmp_path / "long", "--allow-nonfinite") == 0
    out = capsys.readouterr().out
    assert "kept as they are: " in out
    assert biases in out
    assert head in out
    old, new = read_tensors(source), read_tensors(tmp_path / "long")
    for name in ("lm_head.dense.weight", f"longformer.{LAYER}.0.output.dense.bias"):
        assert new[name].view(torch.int32).equal(old[name].view(torch.int32))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--attention-window 7", "got [7, 7]; wanted even numbers of 2 or more"),
        ("--attention-window 0", "even"),
        ("--attention-window=-8", "even"),
        ("--attention-window 8,9", "even"),
        ("--attention-window 8,8,8", "got 3 windows"),
        ("--attention-window 8,", "wanted whole numbers"),
        ("--attention-window 4098", "got 4098; wanted at most 4096, the positions"),
        ("--positions 100 --attention-window 102,8", "got [102, 8]; wanted at most 100"),
        ("--positions 0", "positions: got 0; wanted 1 or more"),
        ("--positions=-4096", "positions: got -4096"),
        ("--positions 16777217", "at most 16,777,216"),
        ("--positions many", "positions"),
        ("--seed=-1", "seed: got -1"),
        ("--init zeros", "zeros"),
        ("--new-head", "got a model with a masked-LM head"),
        ("--tokenizer nowhere", "nowhere"),
        ("--tokenizer nowhere --no-tokenizer", "got --tokenizer as well"),
    ],
)  # fmt: skip
def test_words_that_cannot_be(
    words: str, told: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refused(capsys, source, tmp_path / "long", *words.split(), within=tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_family(tmp_path / "short", "camembert", tokenizer=None)
    (source / "tokenizer_config.json").unlink(missing_ok=True)
    line = refused(capsys, source, tmp_path / "a", within=tmp_path)
    assert "got a model without a tokenizer; " in line
    assert "--tokenizer DIR" in line
    assert "--no-tokenizer" in line
    assert exit_code("convert", source, tmp_path / "a", "--no-tokenizer") == 0
    assert "tokenizer: none, as asked" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "config.json", "conversion.json", "model.safetensors",
    }  # fmt: skip
    write_tokenizer(tmp_path / "words", "camembert")
    words = ("--tokenizer", tmp_path / "words")
    assert exit_code("convert", source, tmp_path / "b", *words) == 0
    wanted = load_tokenizer(tmp_path / "words").fingerprint
    assert load_tokenizer(tmp_path / "b").fingerprint == wanted
    line = refused(capsys, source, tmp_path / "a", *words, within=tmp_path)
    assert "another conversion (source_files, tokenizer differ)" in line


def test_a_tokenizer_with_another_padding(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would shift positions: they count what is not padding."""
    source = make_family(tmp_path / "short", "bert", tokenizer=None, vocab_size=1000)
    write_tokenizer(tmp_path / "words", "xlm-roberta")
    words = ("--tokenizer", tmp_path / "words")
    line = refused(capsys, source, tmp_path / "long", *words, within=tmp_path)
    assert "got id 1 for padding; wanted 0, pad_token_id of the model" in line
    edit_config(source, pad_token_id=1)
    assert exit_code("convert", source, tmp_path / "long", *words) == 0


def test_a_tokenizer_that_is_there_but_not_wanted_is_left_where_it_is(
    source: Path, tmp_path: Path
) -> None:
    (source / "tokenizer.json").write_text("{")
    (source / "vocab.json").write_text("{")
    assert exit_code("convert", source, tmp_path / "a") == 2
    assert exit_code("convert", source, tmp_path / "a", "--no-tokenizer") == 0
    assert not (tmp_path / "a" / "tokenizer.json").exists()


class Foreign:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["lm_head.decoder.weight", "lm_head.dense.bias"])
def test_a_pickle_of_tensors_without_plain_numbers(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the right shapes and types: torch itself reads them without a word."""
    tensors = load_file(source / "model.safetensors")
    other = f"roberta.{LAYER}.1.output.dense.bias"
    tensors[name] = tensors.get(name, torch.empty(tensors[WORDS].shape)).to("meta")
    tensors[other] = tensors[other].to_sparse()
    torch.save(tensors, source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    line = refused(capsys, source, tmp_path / "long", within=tmp_path)
    assert "no plain numbers (sparse, nested or on no device) in " in line
    assert name in line
    assert other in line


@pytest.mark.parametrize("form", ["zip", "legacy", "shard", "fairseq"])
def test_a_pickle_with_foreign_objects(
    form: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "marker"
    content: dict[str, Any] = {"lm_head.bias": Foreign(marker)}
    (source / "model.safetensors").unlink()
    path = source / "pytorch_model.bin"
    given = source
    if form == "shard":
        path = source / "pytorch_model-00001-of-00001.bin"
        index = {"weight_map": {"lm_head.bias": path.name}}
        (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    if form == "fairseq":
        content = {"model": {"encoder.lm_head.bias": torch.ones(2)}, "args": Foreign(marker)}
        path = given = source / "model.pt"
    torch.save(content, path, _use_new_zipfile_serialization=form != "legacy")
    line = refused(capsys, given, tmp_path / "long", within=tmp_path)
    assert f"{os.mkdir.__module__}.mkdir" in line
    assert path.name in line
    assert "It was not made and nothing ran." in line
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the trap does work
    assert marker.exists()


def test_a_target_that_exists(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("jpg")
    (tmp_path / "file").write_text("text")
    assert exit_code("convert", source, tmp_path / "other", "--positions", 100) == 0
    for target in ("photos", "file", "file/inside", "short", "other"):
        refused(capsys, source, tmp_path / target, within=tmp_path)


@pytest.mark.parametrize("share", [0.01, 0.4, 0.8, 0.97])
def test_no_space_left(
    share: float, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the first file on to the record, which is the last one."""
    words = ("--positions", 128)
    assert exit_code("convert", source, tmp_path / "long", *words) == 0
    pages = sum(-(-path.stat().st_size // 4096) for path in (tmp_path / "long").iterdir())
    with small_disk(tmp_path / "disk", kib=4 * max(1, int(share * pages))) as place:
        line = refused(capsys, source, place / "long", *words, within=place)
        assert "got no space left on device; wanted room for the file" in line
        assert list(place.iterdir()) == []


def untie(tensors: dict[str, Tensor]) -> None:
    words = tensors["roberta.embeddings.word_embeddings.weight"]
    tensors["lm_head.decoder.weight"] = words * 2


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: edit_tensors(f, untie), "wanted tied weights"),
        (lambda f: (f / "config.json").write_text("{"), "wanted a JSON object"),
        (lambda f: (f / "config.json").unlink(), "neither config.json nor checkpoints/latest"),
        (lambda f: (f / "model.safetensors").unlink(), "got no weights"),
        (
            lambda f: os.truncate(f / "model.safetensors", 20_000),
            "wanted a whole safetensors file",
        ),
        (lambda f: edit_config(f, vocab_size=10), "not (10, 32)"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer"),
    ],
    ids=["untied", "config", "no config", "no weights", "cut", "sizes", "tokenizer"],
)
def test_a_folder_that_is_damaged(
    spoil: Callable[[Path], None], told: str, source: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    spoil(source)
    assert told in refused(capsys, source, tmp_path / "long", within=tmp_path)


def test_a_file_of_weights_is_no_model(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(capsys, source / "model.safetensors", tmp_path / "long", within=tmp_path)
    assert f"wanted its folder, which has config.json too. Give {source}." in line
