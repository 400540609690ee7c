"""Families of models as they are read: their names, their ids, their positions, their heads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_models import FAMILIES, make_family, write_tokenizer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from longpretrain.convert import convert
from longpretrain.errors import InputError
from longpretrain.model import (
    load_encoder,
    load_model,
    read_config,
    read_tensors,
    save_model,
)
from longpretrain.model.families import POOLER
from longpretrain.model.weights import POSITIONS, open_weights

PREFIXES = {"bert": "bert.", "longformer": "longformer."}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    tensors = {rename(name): tensor for name, tensor in tensors_of(folder).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    tree = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in tree.items() if value is not ...}))


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert all(tensor.equal(two[name]) for name, tensor in one.items())


@pytest.mark.parametrize(
    ("family", "other"),
    [
        *((name, other) for name in ("camembert", "longformer") for other in
          ("roberta.", "longformer.", "")),
        ("bert", "bert."), ("bert", ""),
    ],
)  # fmt: skip
def test_a_file_may_have_another_prefix_or_none(family: str, other: str, tmp_path: Path) -> None:
    """A Longformer saved under ``roberta.`` loads with new weights in transformers: not here."""
    folder = make_family(tmp_path / "a", family, tokenizer=None)
    wanted = read_tensors(folder)
    own = PREFIXES.get(family, "roberta.")

    def rename(name: str) -> str:
        return other + name.removeprefix(own) if name.startswith(own) else name

    renamed(folder, rename)
    assert_equal(read_tensors(folder), wanted)
    assert load_model(folder).config == read_config(folder)


@pytest.mark.parametrize(("family", "other"), [("roberta", "bert"), ("bert", "roberta")])
def test_a_model_under_another_family_s_name_is_not_read(
    family: str, other: str, tmp_path: Path
) -> None:
    """Its positions would start two rows off, and nothing else would be wrong."""
    folder = make_family(tmp_path / "a", family, tokenizer=None)
    edit_config(folder, model_type=other)
    with pytest.raises(InputError) as told:
        read_tensors(folder)
    assert f"{family}.embeddings.LayerNorm.bias, which is no part of it" in str(told.value)
    head = "lm_head.bias" if family == "roberta" else "cls.predictions.bias"
    assert f"{head}, which is no part of it" in str(told.value)
    own = f"{family}."
    renamed(folder, lambda name: name.replace(own, f"{other}."))
    with pytest.raises(InputError, match=f"{head}, which is no part of it"):
        read_tensors(folder)


def test_two_prefixes_in_one_file_are_not_read(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "a", "roberta", tokenizer=None)
    renamed(folder, lambda name: name.replace("roberta.encoder.layer.1", "bert.encoder.layer.1"))
    with pytest.raises(InputError) as told:
        read_tensors(folder)
    assert "no roberta.encoder.layer.1.output.dense.bias;" in str(told.value)
    assert "bert.encoder.layer.1.output.dense.bias, which is no part of it" in str(told.value)


def test_tensorflow_s_names_of_a_layer_norm(tmp_path: Path) -> None:
    """As in the files of bert-base-uncased."""
    folder = make_family(tmp_path / "a", "bert", kind="pretraining", tokenizer=None)
    wanted = read_tensors(folder)
    new = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}

    def rename(name: str) -> str:
        end = next((end for end in new if name.endswith(end)), "")
        return name.removesuffix(end) + new.get(end, "")

    renamed(folder, rename)
    assert any("gamma" in name for name in tensors_of(folder))
    assert_equal(read_tensors(folder), wanted)
    both = tensors_of(folder)
    both["bert.embeddings.LayerNorm.weight"] = both["bert.embeddings.LayerNorm.gamma"] + 1
    save_file(both, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"bert.embeddings.LayerNorm.\w+ under another name, too"):
        read_tensors(folder)


@pytest.mark.parametrize("twin", ["cls.predictions.decoder", "lm_head.decoder"])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_either_of_a_tied_pair_is_enough(twin: str, kind: str, tmp_path: Path) -> None:
    family, prefix = ("bert", "bert.") if "cls" in twin else ("xlm-roberta", "roberta.")
    folder = make_family(tmp_path / "a", family, tokenizer=None)
    wanted = read_tensors(folder)
    first = {
        "weight": f"{prefix}embeddings.word_embeddings.weight",
        "bias": twin.removesuffix(".decoder") + ".bias",
    }[kind]
    stored = tensors_of(folder)
    stored[f"{twin}.{kind}"] = stored[first].clone()
    save_file(stored, folder / "model.safetensors")
    assert_equal(read_tensors(folder), wanted)
    del stored[first]
    save_file(stored, folder / "model.safetensors")
    assert_equal(read_tensors(folder), wanted)
    stored[first] = stored[f"{twin}.{kind}"] + 1
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(InputError, match="wanted tied weights"):
        read_tensors(folder)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({"vocab.txt": "[PAD]\n[SEP]\r\n[CLS]\n"}, (2, 1)),
        ({"vocab.txt": "[PAD]\n<x>\n<y>\n", "tokenizer_config.json":
          '{"cls_token": "<y>", "sep_token": {"content": "<x>"}}'}, (2, 1)),
        ({"tokenizer.json": '{"added_tokens": [{"content": "[CLS]", "id": 7}]}'}, (7, 102)),
        ({"tokenizer.json": '{"added_tokens": [1, {"content": "[SEP]", "id": "x"}]}'}, (101, 102)),
        ({"tokenizer.json": "["}, (101, 102)),
        ({}, (101, 102)),
    ],
)  # fmt: skip
def test_first_and_last_token_of_a_bert_are_its_tokenizer_s(
    files: dict[str, str], wanted: tuple[int, int], tmp_path: Path
) -> None:
    folder = make_family(tmp_path / "a", "bert", tokenizer=None)
    for name, text in files.items():
        (folder / name).write_text(text)
    config = read_config(folder)
    assert (config.bos_id, config.eos_id) == wanted
    edit_config(folder, bos_token_id=3, eos_token_id=4)
    config = read_config(folder)
    assert (config.bos_id, config.eos_id) == (3, 4)


def test_a_bert_with_another_family_s_tokenizer(tmp_path: Path) -> None:
    """Multilingual MiniLM: its config.json calls 0 the padding, which is <s> of its tokenizer."""
    folder = tmp_path / "a"
    size = write_tokenizer(folder, "xlm-roberta", form="json")
    make_family(folder, "bert", kind="bare", tokenizer=None, vocab_size=size)
    assert json.loads((folder / "config.json").read_text())["pad_token_id"] == 0
    for said in ({}, {"pad_token": {"content": "<pad>"}, "cls_token": "<s>", "sep_token": "</s>"}):
        (folder / "special_tokens_map.json").write_text(json.dumps(said))
        config = read_config(folder)
        assert (config.pad_id, config.bos_id, config.eos_id) == (1, 0, 2)
    tokens_BN = torch.tensor([[0, 9, 8, 10, 2]])
    theirs = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        wanted = theirs(tokens_BN).last_hidden_state
        found = load_encoder(folder)(tokens_BN)
    assert (found - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize("pad", [0, 3])
def test_padding_rows_stand_before_a_bert_s_positions(pad: int, tmp_path: Path) -> None:
    folder = make_family(tmp_path / "a", "bert", positions=20, pad_token_id=pad, tokenizer=None)
    config = read_config(folder)
    assert (config.pad_id, config.max_tokens) == (pad, 20)
    assert config.max_position_embeddings == 21 + pad
    table = read_tensors(folder)[POSITIONS]
    assert not table[: pad + 1].any()
    stored = tensors_of(folder)["bert.embeddings.position_embeddings.weight"]
    assert table[pad + 1 :].equal(stored)
    model = load_model(folder)
    tokens_BN = torch.full((1, 20), 9)
    assert model(tokens_BN).shape == (1, 20, config.vocab_size)


def test_what_a_key_left_out_means_depends_on_the_family(tmp_path: Path) -> None:
    keys = ("pad_token_id", "bos_token_id", "eos_token_id")
    for family, wanted in (
        ("roberta", (1, 0, 2)), ("xlm-roberta", (1, 0, 2)), ("camembert", (1, 0, 2)),
        ("longformer", (1, 0, 2)), ("bert", (0, 101, 102)),
    ):  # fmt: skip
        folder = make_family(tmp_path / family, family, tokenizer=None)
        for absent in (..., None):
            edit_config(folder, **dict.fromkeys(keys, absent))
            config = read_config(folder)
            assert (config.pad_id, config.bos_id, config.eos_id) == wanted, family


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_bare_encoder_has_no_logits(family: str, tmp_path: Path) -> None:
    folder = make_family(tmp_path / "a", family, kind="bare")
    config = read_config(folder)
    assert not config.has_lm_head
    assert set(POOLER) < read_tensors(folder).keys()
    with pytest.raises(InputError, match=r"got no masked-LM head; .*convert .* DST --new-head"):
        load_model(folder)
    save_model((config, read_tensors(folder)), tmp_path / "b")
    assert read_config(tmp_path / "b") == config
    assert_equal(read_tensors(tmp_path / "b"), read_tensors(folder))
    said = json.loads((tmp_path / "b" / "config.json").read_text())["architectures"]
    assert said == ["LongformerModel" if family == "longformer" else "RobertaModel"]
    assert all(name.startswith(("embed", "enc", "pool")) for name in tensors_of(tmp_path / "b"))
    tokens_BN = torch.randint(7, config.vocab_size, (1, 20))
    one, two = (load_encoder(tmp_path / name)(tokens_BN) for name in "ab")
    assert one.equal(two)


def test_the_encoder_of_a_masked_lm_model(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "a", "camembert", tokenizer=None)
    whole, encoder = load_model(folder), load_encoder(folder, changes={"hidden_dropout": 0.5})
    tokens_BN = torch.randint(7, whole.config.vocab_size, (1, 20))
    assert encoder(tokens_BN).equal(whole.longformer(tokens_BN))
    assert encoder.config.hidden_dropout == 0.5
    assert not encoder.training


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy"])
def test_weights_say_whether_there_is_a_head_whatever_config_json_says(
    form: str, tmp_path: Path
) -> None:
    for name, kind, said in (("a", "bare", "XForMaskedLM"), ("b", "masked-lm", "BertModel")):
        folder = make_family(tmp_path / name, "bert", kind=kind, tokenizer=None)
        edit_config(folder, architectures=[said])
        if form != "safetensors":
            path, zipped = folder / "pytorch_model.bin", form == "zip"
            torch.save(tensors_of(folder), path, _use_new_zipfile_serialization=zipped)
            (folder / "model.safetensors").unlink()
        assert read_config(folder).has_lm_head == (kind == "masked-lm")
    for path in (tmp_path / "b").glob("*model*"):
        path.write_bytes(b"damaged")
    assert not read_config(tmp_path / "b").has_lm_head  # whoever reads the weights tells it
    with pytest.raises(InputError, match=r"do not read|something else than tensors"):
        read_tensors(tmp_path / "b")
    shutil.copy(tmp_path / "b" / "config.json", tmp_path)
    assert not read_config(tmp_path).has_lm_head  # no weights: config.json's word


def test_a_head_that_is_not_all_there_is_refused(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "a", "bert", tokenizer=None)
    stored = tensors_of(folder)
    del stored["cls.predictions.transform.dense.weight"], stored["cls.predictions.bias"]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(InputError) as told:
        load_model(folder)
    assert told.value.got == "no cls.predictions.bias; no cls.predictions.transform.dense.weight"
    assert told.value.wanted.startswith("the 42 tensors of a BERT with a masked-LM head")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_as_it_is(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = make_family(tmp_path / "a", "bert", tokenizer=None)
    stored = {name: tensor.to(dtype) for name, tensor in tensors_of(folder).items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    convert(folder, tmp_path / "b", need_tokenizer=False)
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "b").values()} == {dtype}
    said = json.loads((tmp_path / "b" / "config.json").read_text())["dtype"]
    assert f"torch.{said}" == str(dtype)
    assert load_model(tmp_path / "b").lm_head.bias.dtype == torch.float32


def test_what_is_left_out_is_named_and_buffers_are_not(tmp_path: Path) -> None:
    folder = make_family(tmp_path / "a", "roberta", kind="classifier", tokenizer=None)
    stored = tensors_of(folder)
    stored["roberta.embeddings.position_ids"] = torch.arange(66)[None]
    stored["roberta.embeddings.token_type_ids"] = torch.zeros(1, 66, dtype=torch.int64)
    stored["roberta.pooler.dense.weight"] = torch.ones(32, 32)  # half of one is none
    save_file(stored, folder / "model.safetensors")
    found = open_weights(folder, read_config(folder))
    assert sorted(found.left_out) == [
        "classifier.dense.bias", "classifier.dense.weight",
        "classifier.out_proj.bias", "classifier.out_proj.weight",
        "roberta.pooler.dense.weight",
    ]  # fmt: skip
    assert not any("pooler" in name or "_ids" in name for name in found.tensors)
