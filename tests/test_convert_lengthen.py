"""Conversion to any length: which row comes from where, and what is refused without a trace."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longpretrain.cli import main
from longpretrain.convert import export, lengthen, verify
from longpretrain.convert.lengthen import POSITIONS
from longpretrain.convert.position_rows import lengthen_positions
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.errors import InputError
from longpretrain.model import (
    LongformerForMaskedLM,
    ModelConfig,
    load_model,
    read_config,
    read_tensors,
    save_model,
)

SHORT = ModelConfig(
    model_type="roberta", vocab_size=67, hidden_size=32, num_layers=2, num_heads=4,
    intermediate_size=48, max_position_embeddings=34, layer_norm_eps=1e-6,
)  # fmt: skip
convert = functools.partial(lengthen.convert, need_tokenizer=False)
"""These models have no words, but where a test says so."""
PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A RoBERTa that transformers made, 32 tokens long, with well spread weights."""
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=34, type_vocab_size=1, layer_norm_eps=1e-6,
    )  # fmt: skip
    model = transformers.RobertaForMaskedLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    model.save_pretrained(tmp_path / "roberta")
    return tmp_path / "roberta"


def table(rows: int) -> Tensor:
    return torch.arange(rows, dtype=torch.float32)[:, None] + torch.tensor([0.0, 0.5, -1000.0])


def lengthened(learnt: int, positions: int, init: Any, seed: int = 1) -> Tensor:
    return lengthen_positions(
        table(2 + learnt), positions=positions, kept=2, init=init, deviation=0.02, seed=seed
    )


LENGTHS = st.integers(1, 70)


@given(learnt=LENGTHS, positions=LENGTHS)
@PROPERTY
def test_copy_tiles_the_learnt_rows(learnt: int, positions: int) -> None:
    new = lengthened(learnt, positions, "copy")
    assert new[:2].equal(table(2))
    assert new.tolist()[2:] == [
        table(2 + learnt)[2 + i % learnt].tolist() for i in range(positions)
    ]


@given(learnt=LENGTHS, positions=LENGTHS, seed=st.integers(0, 2**32))
@PROPERTY
def test_random_keeps_learnt_rows_and_repeats_by_seed(
    learnt: int, positions: int, seed: int
) -> None:
    new = lengthened(learnt, positions, "random", seed)
    kept = min(learnt, positions) + 2
    assert new.shape == (positions + 2, 3)
    assert new[:kept].equal(table(kept))
    assert new.equal(lengthened(learnt, positions, "random", seed))
    if positions > learnt:
        assert new[kept:].abs().max() < 0.02 * 8
        assert not new[kept:].equal(lengthened(learnt, positions, "random", seed + 1)[kept:])


@given(learnt=LENGTHS, positions=LENGTHS)
@PROPERTY
def test_interpolation_keeps_ends_and_is_linear(learnt: int, positions: int) -> None:
    new = lengthened(learnt, positions, "interpolate")
    assert new[:3].equal(table(3))
    if positions > 1:  # the rows of `table` grow by 1, so the stretched ones grow evenly
        assert new[-1].equal(table(2 + learnt)[-1])
        step = (learnt - 1) / (positions - 1)
        wanted = 2 + torch.arange(positions) * step
        torch.testing.assert_close(new[2:, 0], wanted, rtol=1e-5, atol=1e-4)
    if positions == learnt:
        assert new.equal(table(2 + learnt))


def test_random_rows_have_the_initializer_range() -> None:
    new = lengthen_positions(
        torch.ones(3, 64), positions=4000, kept=2, init="random", deviation=0.02, seed=1
    )
    assert float(new[3:].std()) == pytest.approx(0.02, rel=0.01)
    assert abs(float(new[3:].mean())) < 1e-3


def test_a_converted_model_keeps_every_other_tensor(source: Path, tmp_path: Path) -> None:
    report = convert(source, tmp_path / "long", positions=100, attention_window=[8, 16])
    old, new = read_tensors(source), read_tensors(tmp_path / "long")
    assert report.origins.keys() == new.keys()
    for name, tensor in new.items():
        if name == POSITIONS:
            assert tensor.shape == (102, 32)
            assert tensor[:34].equal(old[name])
            assert tensor[34:66].equal(old[name][2:])
            assert tensor[98:].equal(old[name][2:6])
        else:
            assert tensor.equal(old[name.replace("_global.", ".")]), name
    assert len(new) - len(old) == 12
    config = read_config(tmp_path / "long")
    assert config == dataclasses.replace(
        SHORT, model_type="longformer", max_position_embeddings=102, attention_window=(8, 16),
        learnt_positions=32,
    )  # fmt: skip
    assert not report.up_to_date
    text = str(report)
    assert "32 learnt rows copied end to end over 100; rows 0 to 1 kept" in text
    assert "12 x copies of the local projections" in text
    assert "tokenizer: none, as asked" in text


def test_it_says_how_many_positions_are_learnt(source: Path, tmp_path: Path) -> None:
    """Those of the source that fit; of one that was lengthened itself, and not trained since, those
    of its source; of a checkpoint all; of interpolated rows none is known.
    """

    def learnt(origin: Path, positions: int, init: Any = "copy") -> int:
        target = tmp_path / f"{origin.name}-{positions}-{init}"
        convert(origin, target, positions=positions, attention_window=8, init=init)
        return read_config(target).learnt_positions

    assert [learnt(source, 100), learnt(source, 100, "random"), learnt(source, 20)] == [32, 32, 20]
    assert learnt(source, 100, "interpolate") == 0
    again = tmp_path / "roberta-100-copy"
    assert [learnt(again, 200), learnt(again, 16)] == [32, 16]
    (again / "state.json").write_text(json.dumps({"global_tokens": "none"}))
    assert learnt(again, 201) == 100


def test_with_a_covering_window_logits_are_the_source_s(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "long", positions=100, attention_window=64)
    theirs = transformers.RobertaForMaskedLM.from_pretrained(source).eval()
    ours = load_model(tmp_path / "long")
    tokens_BN = torch.randint(3, 67, (3, 32))
    padding_BN = torch.arange(32)[None, :] >= torch.tensor([32, 20, 1])[:, None]
    tokens_BN = tokens_BN.masked_fill(padding_BN, 1)
    wanted = theirs(tokens_BN, attention_mask=(~padding_BN).long()).logits
    got = ours(tokens_BN, padding_BN=padding_BN)
    assert (got - wanted)[~padding_BN].abs().max() <= 1e-4


def test_512_tokens_of_a_roberta_at_full_length(tmp_path: Path) -> None:
    torch.manual_seed(1)
    config = transformers.RobertaConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=128, max_position_embeddings=514, type_vocab_size=1,
        initializer_range=0.3, pad_token_id=1,
    )  # fmt: skip
    theirs = transformers.RobertaForMaskedLM(config).eval()
    theirs.save_pretrained(tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", positions=4096, attention_window=1024)
    ours = load_model(tmp_path / "b")
    assert ours.config.max_position_embeddings == 4098
    assert ours.config.layer_norm_eps == 1e-12
    tokens_BN = torch.randint(3, 300, (1, 512))
    with torch.no_grad():
        wanted = theirs(tokens_BN, attention_mask=torch.ones_like(tokens_BN)).logits
        assert (ours(tokens_BN) - wanted).abs().max() <= 1e-4


def test_a_longformer_keeps_its_own_global_projections(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(
        SHORT, model_type="longformer", attention_window=(8, 8), causal=True
    )
    save_model(LongformerForMaskedLM(config), tmp_path / "a")
    convert(tmp_path / "a", tmp_path / "b", positions=20, attention_window=4, init="interpolate")
    old, new = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert all(new[name].equal(old[name]) for name in old if name != POSITIONS)
    assert read_config(tmp_path / "b").causal
    assert read_config(tmp_path / "b").max_tokens == 20


@pytest.mark.parametrize("policy", ["none", "first"])
def test_global_projections_of_a_checkpoint_are_those_of_its_export(
    policy: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(SHORT, model_type="longformer", attention_window=(8, 8))
    save_model(LongformerForMaskedLM(config), tmp_path / "a")
    (tmp_path / "a" / "state.json").write_text(json.dumps({"global_tokens": policy}))
    report = convert(tmp_path / "a", tmp_path / "b", positions=32, attention_window=8)
    export(tmp_path / "a", tmp_path / "c")
    old, new, exported = (read_tensors(tmp_path / name) for name in "abc")
    assert all(tensor.equal(exported[name]) for name, tensor in new.items())
    for name in (name for name in new if "_global." in name):
        assert new[name].equal(old[name.replace("_global.", ".") if policy == "none" else name])
    count = list(report.origins.values()).count("copies of the local projections")
    assert count == (12 if policy == "none" else 0)
    (tmp_path / "a" / "state.json").write_text(json.dumps({"global_tokens": "every_4"}))
    with pytest.raises(InputError, match=r"another conversion \(global_tokens differ\)"):
        convert(tmp_path / "a", tmp_path / "b", positions=32, attention_window=8)


def test_the_tokenizer_comes_along_with_its_new_length(tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    config = dataclasses.replace(SHORT, vocab_size=tokenizer.vocab_size)
    save_model(LongformerForMaskedLM(config), tmp_path / "a")
    tokenizer.save(tmp_path / "a", max_tokens=32)
    report = lengthen.convert(tmp_path / "a", tmp_path / "b", positions=100, attention_window=8)
    assert report.has_tokenizer
    assert load_tokenizer(tmp_path / "b").fingerprint == tokenizer.fingerprint
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "b")
    assert theirs.model_max_length == 100
    assert theirs("Hello world").input_ids == [0, 31414, 232, 2]
    save_model(LongformerForMaskedLM(SHORT), tmp_path / "c")
    tokenizer.save(tmp_path / "c", max_tokens=32)
    with pytest.raises(InputError, match="got 50265 ids; wanted at most 67"):
        lengthen.convert(tmp_path / "c", tmp_path / "d", positions=100, attention_window=8)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    model = LongformerForMaskedLM(SHORT)
    with torch.no_grad():
        model.longformer.encoder.layer[1].output.dense.weight[3, 4] = value
    save_model(model, tmp_path / "a")
    with pytest.raises(
        InputError, match=r"NaN or infinity in longformer.*1\.output\.dense\.weight"
    ):
        convert(tmp_path / "a", tmp_path / "b", positions=64, attention_window=8)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_windows_that_transformers_cannot_run_are_made_and_named(
    source: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        report = convert(source, tmp_path / "b", positions=64, attention_window=[6, 8])
        assert report.beyond_hugging_face
        assert "transformers cannot run windows [6] that do not divide" in report.lines()[-1]
    assert report.up_to_date
    assert load_model(tmp_path / "b")(torch.full((1, 30), 9)).shape == (1, 30, 67)
    for refused in (lambda: verify(tmp_path / "b"), lambda: export(tmp_path / "b", tmp_path / "c")):
        with pytest.raises(InputError, match=r"got windows \[6\] that do not divide"):
            refused()
    assert not (tmp_path / "c").exists()


def test_converting_twice_writes_once(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "long"
    convert(source, target, positions=50, attention_window=8)
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    report = convert(source, target, positions=50, attention_window=8)
    assert report.up_to_date
    assert report.lines() == [f"{target} is up to date"]
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == before
    convert(source, tmp_path / "again", positions=50, attention_window=8)
    for name in before:
        assert (tmp_path / "again" / name).read_bytes() == (target / name).read_bytes()
    with pytest.raises(InputError, match=r"another conversion \(positions differ\)"):
        convert(source, target, positions=51, attention_window=8)
    tensors = read_tensors(target)
    tensors["lm_head.bias"] = tensors["lm_head.bias"] + 1
    record = (target / "conversion.json").read_text()
    save_model((read_config(target), tensors), target)  # as if it had been trained
    (target / "conversion.json").write_text(record)
    with pytest.raises(InputError, match="altered since"):
        convert(source, target, positions=50, attention_window=8)
    assert read_tensors(target)["lm_head.bias"].equal(tensors["lm_head.bias"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention_window": 7}, "even"),
        ({"attention_window": 0}, "even"),
        ({"attention_window": -8}, "even"),
        ({"attention_window": [8, 8, 8]}, r"3 windows \[8, 8, 8\]; wanted 2 windows"),
        ({"attention_window": []}, "0 windows"),
        ({"attention_window": [8, 8.0]}, "an integer"),
        ({"positions": 0}, "positions: got 0; wanted 1 or more"),
        ({"positions": -5}, "positions"),
        ({"positions": 2.5}, "positions"),
        ({"attention_window": 66}, "attention_window: got 66; wanted at most 64, the positions"),
        ({"attention_window": [8, 66]}, r"got \[8, 66\]; wanted at most 64"),
        ({"init": "zeros"}, "init: got zeros; wanted copy or random or interpolate"),
    ],
    ids=str,
)
def test_a_conversion_that_cannot_be(
    source: Path, tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        convert(source, tmp_path / "long", **{"positions": 64, "attention_window": 8, **arguments})
    assert sorted(tmp_path.rglob("*")) == before


def test_a_source_or_target_that_cannot_be(source: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("jpg")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="a folder with other files"):
        convert(source, tmp_path / "photos", attention_window=8)
    with pytest.raises(InputError, match="a folder with other files"):
        convert(source, source, attention_window=8)
    with pytest.raises(InputError, match=r"config\.json"):
        convert(tmp_path / "photos", tmp_path / "long")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        convert(source, tmp_path / "long", attention_window=8)
    tree = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(tree | {"model_type": "deberta"}))
    with pytest.raises(
        InputError, match="got deberta; wanted bert, camembert, longformer, roberta"
    ):
        convert(source, tmp_path / "long", attention_window=8)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_path_that_is_nearly_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dict.txt").write_text("0 1\n")
    (tmp_path / "model.pt").write_bytes(b"x")
    for name, message in (
        ("nothing.pt", f"got no such file; wanted a fairseq checkpoint. Give its name, such as "
                       f"DIR/model.pt; {tmp_path} has model.pt."),
        ("", f"got a folder with model.pt; wanted a model folder, a run, or one fairseq "
             f"checkpoint by its name. Give {tmp_path / 'model.pt'}."),
    ):  # fmt: skip
        assert main(["convert", str(tmp_path / name), str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def test_any_target_length_loads_and_runs(source: Path, tmp_path: Path) -> None:
    for init, positions in (("copy", 1), ("random", 33), ("interpolate", 95), ("copy", 31)):
        target = tmp_path / f"{init}-{positions}"
        convert(source, target, positions=positions, init=init)
        model = load_model(target)
        assert model.config.attention_window == (max(2, positions // 2 * 2),) * 2
        logits = model(torch.full((1, positions), 9))
        assert logits.shape == (1, positions, 67)
        assert math.isfinite(float(logits.detach().abs().max()))
        with pytest.raises(InputError, match="tokens of a sequence"):
            model(torch.full((1, positions + 1), 9))
