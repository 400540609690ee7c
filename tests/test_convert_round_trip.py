"""In and out again is the identity: files compared byte by byte, for every pair that allows it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from conversions.titles import TITLES
from fairseq.models.roberta import RobertaModel
from fairseq_files import batch, make_dictionary, roberta_order, save, theirs
from family_models import FAMILIES, make_family
from hypothesis import given, settings
from hypothesis import strategies as st

from longpretrain.convert import convert, export
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.model import LongformerForMaskedLM, ModelConfig, read_tensors, save_model

# hydra speaks of its own past.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

OF_THE_WAY = {"conversion.json", "README.md"}
"""Files that tell where a folder came from."""
FAMILY = [pytest.param(name, TITLES[name], id=name) for name in FAMILIES]
LONG = ModelConfig(
    vocab_size=50265, hidden_size=8, num_layers=2, num_heads=2, intermediate_size=12,
    max_position_embeddings=40, attention_window=(4, 8),
)  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    """What a folder holds of the model."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {name: content for name, content in found.items() if name not in OF_THE_WAY}


def same(one: Path, two: Path) -> None:
    """Fails with the names of files that differ, not with their contents."""
    first, second = files(one), files(two)
    assert "config.json" in first or "dict.txt" in first
    assert first.keys() == second.keys()
    assert [name for name, content in first.items() if second[name] != content] == []


@pytest.mark.parametrize(("family", "title"), FAMILY)
@pytest.mark.conversion(
    family="{title}", direction="HF -> Longformer -> HF -> Longformer",
    checked="all files equal bit for bit",
)  # fmt: skip
def test_convert_export_convert(tmp_path: Path, family: str, title: str) -> None:
    del title
    make_family(tmp_path / "in", family)
    words: Any = {"positions": 150, "attention_window": [8, 16] if family != "distilroberta" else 8}
    convert(tmp_path / "in", tmp_path / "once", **words)
    export(tmp_path / "once", tmp_path / "out", check=False)
    same(tmp_path / "once", tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "twice", **words)
    same(tmp_path / "once", tmp_path / "twice")


@pytest.mark.parametrize(("family", "title"), FAMILY)
@pytest.mark.conversion(
    family="{title}", direction="HF -> HF -> HF, its own length",
    checked="all files equal bit for bit",
)  # fmt: skip
def test_export_of_an_export(tmp_path: Path, family: str, title: str) -> None:
    """Whatever the source: what comes out is in our form, and stays as it is."""
    del title
    make_family(tmp_path / "in", family)
    export(tmp_path / "in", tmp_path / "once", check=False)
    export(tmp_path / "once", tmp_path / "twice", check=False)
    same(tmp_path / "once", tmp_path / "twice")
    before, after = read_tensors(tmp_path / "in"), read_tensors(tmp_path / "twice")
    assert before.keys() == after.keys()
    assert all(tensor.equal(after[name]) for name, tensor in before.items())
    convert(tmp_path / "in", tmp_path / "a", positions=99, attention_window=8)
    convert(tmp_path / "twice", tmp_path / "b", positions=99, attention_window=8)
    same(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("age", ["2019", "dict"])
@pytest.mark.conversion(
    family="RoBERTa", direction="fairseq -> HF -> fairseq -> HF", checked="equal bit for bit"
)
def test_fairseq_and_hugging_face(tmp_path: Path, age: str) -> None:
    model = save(tmp_path / "in", make_dictionary(roberta_order()), age)
    export(tmp_path / "in" / "model.pt", tmp_path / "hf", check=False)
    export(tmp_path / "hf", tmp_path / "out", format="fairseq")
    back = torch.load(tmp_path / "out" / "model.pt", weights_only=True)["model"]
    wanted = model.state_dict()
    assert back.keys() == wanted.keys()
    assert all(tensor.equal(back[name]) for name, tensor in wanted.items())
    export(tmp_path / "out" / "model.pt", tmp_path / "hf again", check=False)
    same(tmp_path / "hf", tmp_path / "hf again")
    export(tmp_path / "hf again", tmp_path / "out again", format="fairseq")
    same(tmp_path / "out", tmp_path / "out again")
    for source, target in (("in/model.pt", "a"), ("hf again", "b")):
        convert(tmp_path / source, tmp_path / target, positions=99, attention_window=8)
        same(tmp_path / "a", tmp_path / target)


def make_model(folder: Path, config: ModelConfig, *, tokenizer: bool = True) -> Path:
    """Random weights; no token types in a RoBERTa, which fairseq lacks."""
    torch.manual_seed(config.num_layers)
    model = LongformerForMaskedLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.0 if "token_type" in name else 0.3)
    save_model(model, folder)
    if tokenizer:
        load_tokenizer().save(folder, config.max_tokens)
    return folder


@settings(max_examples=3)
@given(
    layers=st.integers(1, 3), heads=st.integers(1, 3), width=st.integers(1, 4),
    inner=st.integers(1, 9), positions=st.integers(1, 40), is_long=st.booleans(),
)  # fmt: skip
@pytest.mark.conversion(
    family="RoBERTa and Longformer", direction="HF -> fairseq -> HF -> fairseq",
    checked="all files equal bit for bit, any size",
)  # fmt: skip
def test_hugging_face_and_fairseq(
    tmp_path_factory: pytest.TempPathFactory, layers: int, heads: int, width: int, inner: int,
    positions: int, is_long: bool,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("sizes")
    config = dataclasses.replace(
        LONG, model_type="longformer" if is_long else "roberta", num_layers=layers,
        num_heads=heads, hidden_size=heads * width, intermediate_size=inner,
        max_position_embeddings=positions + 2,
        attention_window=tuple(2 << layer for layer in range(layers)) if is_long else (),
    )  # fmt: skip
    make_model(folder / "in", config)
    export(folder / "in", folder / "fairseq", format="fairseq")
    export(folder / "fairseq" / "model.pt", folder / "out", check=False)
    same(folder / "in", folder / "out")
    export(folder / "out", folder / "again", format="fairseq")
    same(folder / "fairseq", folder / "again")


KINDS = st.sampled_from(["roberta", "longformer"])
WINDOW = st.integers(1, 16).map(lambda half: 2 * half)


@settings(max_examples=20)
@given(
    layers=st.integers(1, 4), heads=st.integers(1, 4), width=st.integers(1, 5),
    inner=st.integers(1, 20), learnt=st.integers(1, 30), positions=st.integers(2, 60),
    types=st.integers(1, 3), pad_id=st.integers(0, 3), kind=KINDS, has_head=st.booleans(),
    init=st.sampled_from(["copy", "random", "interpolate"]), window=WINDOW,
    dtype=st.sampled_from([None, "fp16", "bf16", "fp32"]),
)  # fmt: skip
def test_any_size_in_and_out(
    tmp_path_factory: pytest.TempPathFactory, layers: int, heads: int, width: int, inner: int,
    learnt: int, positions: int, types: int, pad_id: int, kind: Any, has_head: bool, init: Any,
    window: int, dtype: str | None,
) -> None:  # fmt: skip
    """The second conversion says another init: with no row to make, it has nothing to say."""
    folder = tmp_path_factory.mktemp("sizes")
    config = ModelConfig(
        model_type=kind, vocab_size=20, hidden_size=heads * width, num_layers=layers,
        num_heads=heads, intermediate_size=inner, max_position_embeddings=learnt + pad_id + 1,
        pad_id=pad_id, type_vocab_size=types,
        attention_window=(4,) * layers if kind == "longformer" else (),
    )  # fmt: skip
    make_model(folder / "whole", config, tokenizer=False)
    model = "masked-lm" if has_head else "bare"
    export(folder / "whole", folder / "in", model=model, dtype=dtype, check=False)
    window = min(window, positions // 2 * 2)
    words: Any = {"positions": positions, "attention_window": window, "need_tokenizer": False}
    convert(folder / "in", folder / "once", init=init, **words)
    export(folder / "once", folder / "out", dtype=dtype, check=False)
    same(folder / "once", folder / "out")
    convert(folder / "out", folder / "twice", init="random", **words)
    one, two = files(folder / "once"), files(folder / "twice")
    assert one["model.safetensors"] == two["model.safetensors"]
    if init != "interpolate":  # whose rows nobody counts as learnt
        same(folder / "once", folder / "twice")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.conversion(
    family="RoBERTa", direction="HF -> fairseq, {dtype}",
    checked="fairseq's RobertaModel loads the rounded weights bit for bit",
)  # fmt: skip
def test_fairseq_loads_rounded_weights(tmp_path: Path, dtype: str) -> None:
    config = dataclasses.replace(LONG, model_type="roberta", attention_window=())
    make_model(tmp_path / "in", config)
    report = export(tmp_path / "in", tmp_path / "out", format="fairseq", dtype=dtype)
    assert report is not None
    assert report.ok
    assert report.notes[0].startswith(f"rounded to {dtype} from fp32")
    export(tmp_path / "in", tmp_path / "hf", dtype=dtype, check=False)
    rounded = read_tensors(tmp_path / "hf")
    hub = RobertaModel.from_pretrained(
        str(tmp_path / "out"), checkpoint_file="model.pt", bpe="characters"
    )
    words = hub.model.state_dict()["encoder.sentence_encoder.embed_tokens.weight"]
    stored = rounded["longformer.embeddings.word_embeddings.weight"]
    assert words.equal(stored.to(words.dtype))
    assert torch.isfinite(theirs(hub.model, batch(30))).all()
    export(tmp_path / "out" / "model.pt", tmp_path / "back", check=False)
    same(tmp_path / "hf", tmp_path / "back")


def test_a_bare_encoder_does_not_go_to_fairseq(tmp_path: Path) -> None:
    make_model(
        tmp_path / "in", dataclasses.replace(LONG, model_type="roberta", attention_window=())
    )
    with pytest.raises(ValueError, match=r"got no masked-LM head; wanted a model that fairseq"):
        export(tmp_path / "in", tmp_path / "out", format="fairseq", model="bare")
