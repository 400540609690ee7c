"""Which relation verify finds between two models, and what it lets pass: every door in and out."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import planted
import pytest
import torch
from conversions.titles import TITLES as FAMILY_TITLES
from family_models import FAMILIES, make_family
from planted import POSITIONS
from safetensors.torch import load_file
from small_run import make_roberta
from torch import Tensor

from longpretrain.cli import main
from longpretrain.convert import VerifyReport, convert, export, verify
from longpretrain.convert.position_rows import Init
from longpretrain.files import sha256
from longpretrain.model import read_config, read_tensors, save_model

TITLES = FAMILY_TITLES | {"minilm": "MiniLM (no head)"}
MADE = "the second is a model of {} tokens made from the first"


def good(report: VerifyReport) -> VerifyReport:
    assert report.ok, "\n".join(report.lines())
    return report


def failed(report: VerifyReport) -> list[str]:
    return [row.check for row in report.rows if not row.ok]


def origins(report: VerifyReport) -> dict[str, int]:
    """How many tensors have which origin."""
    told = [row.origin for row in report.tensors]
    return {origin: told.count(origin) for origin in told}


def rewrite(folder: Path, target: Path, change: Any = lambda name, tensor: tensor) -> Path:
    """The model once more, written by us, some of its tensors changed; with no tokenizer."""
    tensors = {name: change(name, tensor.clone()) for name, tensor in read_tensors(folder).items()}
    save_model((read_config(folder), tensors), target)
    return target


@pytest.mark.parametrize(("family", "title"), TITLES.items(), ids=TITLES)
@pytest.mark.conversion(
    family="{title}", direction="HF -> Longformer",
    checked="verify A, verify A B: origin of every tensor, outputs within 1e-4, ids",
)  # fmt: skip
def test_every_family_and_its_long_model(family: str, title: str, tmp_path: Path) -> None:
    assert TITLES.keys() == FAMILIES.keys(), title
    short = make_family(tmp_path / "a", family)
    convert(short, tmp_path / "b", positions=100, attention_window=16)
    good(verify(short))
    good(verify(tmp_path / "b"))
    report = good(verify(short, tmp_path / "b"))
    assert report.relation == MADE.format(100)
    own_globals = family == "longformer"
    layers = 1 if family == "distilroberta" else 2
    found = origins(report)
    assert found.get("copies of the local projections", 0) == (0 if own_globals else 6 * layers)
    assert found["position rows: 64 learnt rows copied end to end over 100"] == 1
    assert sum(found.values()) == len(report.tensors) == len(read_tensors(tmp_path / "b"))
    turned = good(verify(tmp_path / "b", short))
    assert turned.relation == "the first is a model of 100 tokens made from the second"


@pytest.mark.parametrize("kind", ["masked-lm", "bare", "classifier", "pretraining"])
def test_every_kind_of_bert(kind: Any, tmp_path: Path) -> None:
    """What is no part of the model is told, and the pooler compared where it is."""
    short = make_family(tmp_path / "a", "bert", kind=kind)
    report = good(verify(short))
    left_out = {"classifier": "classifier.bias", "pretraining": "cls.seq_relationship.bias"}
    assert (left_out.get(kind, "left out") in " ".join(report.notes)) == (kind in left_out)
    convert(short, tmp_path / "b", positions=100, attention_window=16)
    good(verify(short, tmp_path / "b"))
    if kind in ("bare", "classifier"):
        convert(short, tmp_path / "c", positions=100, attention_window=16, new_head=True)
        good(verify(tmp_path / "c"))
        found = origins(good(verify(short, tmp_path / "c")))
        assert found["only in the new model: the other has no masked-LM head"] == 5
        assert found["only in the source: a pooler, no part of a masked-LM model"] == 2


@pytest.mark.parametrize("init", ["copy", "random", "interpolate"])
@pytest.mark.parametrize("positions", [40, 64, 130, 200])
def test_every_initialisation_and_length(init: Init, positions: int, tmp_path: Path) -> None:
    """By its record; and, where somebody lost that, by the rows alone."""
    short = make_family(tmp_path / "a", "roberta", tokenizer=None)
    convert(
        short, tmp_path / "b", positions=positions, attention_window=16, init=init, seed=7,
        need_tokenizer=False,
    )  # fmt: skip
    good(verify(tmp_path / "b"))
    (row,) = (r for r in good(verify(short, tmp_path / "b")).tensors if r.name == POSITIONS)
    by_init = {
        "copy": f"64 learnt rows copied end to end over {positions}",
        "random": f"64 learnt rows and {positions - 64} drawn anew",
        "interpolate": f"64 learnt rows interpolated to {positions}",
    }
    fewer = positions <= 64 and init != "interpolate"
    told = f"the first {positions} of 64 learnt rows" if fewer else by_init[init]
    assert row.origin == f"position rows: {told}"
    planted.forget_record(tmp_path / "b")
    (row,) = (r for r in good(verify(short, tmp_path / "b")).tensors if r.name == POSITIONS)
    if init == "random" and not fewer:
        told = f"64 learnt rows, {positions - 64} random ones or trained since"
        assert row.origin.startswith(f"position rows: {told}; at most ")
        return
    elif positions == 64:
        told = "the first 64 of 64 learnt rows"  # interpolated to its own length: itself
    assert row.origin == f"position rows: {told}"


def test_another_seed_than_the_record_has_is_found(tmp_path: Path) -> None:
    short = make_family(tmp_path / "a", "roberta")
    for name, seed in (("b", 1), ("c", 2)):
        convert(
            short, tmp_path / name, positions=100, attention_window=16, init="random", seed=seed
        )
    shutil.copy(tmp_path / "c" / "model.safetensors", tmp_path / "b")
    planted.forge_record(tmp_path / "b")
    report = verify(short, tmp_path / "b")
    assert failed(report) == [POSITIONS, "tensors that fit"]
    assert report.relation == f"{MADE.format(100)}, but for 1 tensors"


def test_rows_that_trained_since(tmp_path: Path) -> None:
    """New rows alone may have moved, all of them or the first ones; learnt rows may not."""
    short = make_family(tmp_path / "a", "roberta", tokenizer=None)
    convert(short, tmp_path / "b", positions=160, attention_window=16, need_tokenizer=False)

    def trained(first: int, end: int) -> Path:
        def change(name: str, tensor: Tensor) -> Tensor:
            if name == POSITIONS:
                tensor[2 + first : 2 + end] *= 1.01
            return tensor

        return rewrite(tmp_path / "b", tmp_path / f"{first}-{end}", change)

    for end, told in ((160, ""), (100, ", 60 copies")):
        path = trained(64, end)
        good(verify(path))
        (row,) = (r for r in good(verify(short, path)).tensors if r.name == POSITIONS)
        wanted = f"64 learnt rows, {end - 64} random ones or trained since{told}"
        assert row.origin.startswith(f"position rows: {wanted}; at most ")
        assert row.origin.endswith("e-03 from copies")  # a hundredth of numbers of up to 0.8
        (row,) = (r for r in verify(tmp_path / "b", path).tensors if not r.ok)
        assert row.origin.endswith(f": {end - 64} rows, from 66 to {end + 1}")
    for first, end in ((64, 66), (80, 160), (0, 1), (63, 160), (0, 160)):
        assert POSITIONS in failed(verify(short, trained(first, end))), (first, end)
    factor_P1 = torch.ones(162, 1).index_fill(0, torch.tensor([2]), 2)
    skips_one = rewrite(
        trained(65, 160), tmp_path / "skips",
        lambda name, t: t * factor_P1 if name == POSITIONS else t,
    )  # fmt: skip
    assert POSITIONS in failed(verify(short, skips_one)), "row 0, but not row 64"


def test_a_training_is_no_relation(tmp_path: Path) -> None:
    short = make_family(tmp_path / "a", "roberta", tokenizer=None)
    trained = rewrite(short, tmp_path / "b", lambda name, tensor: tensor + 1e-4)
    report = verify(short, trained)
    assert not report.ok
    assert report.relation == "none that verify can prove: 42 tensors differ, as after training"
    assert len([row for row in report.rows if row.got.startswith("differs by 1.0e-04")]) == 42


def test_other_sizes_are_no_relation(tmp_path: Path) -> None:
    one = make_family(tmp_path / "a", "roberta", tokenizer=None)
    two = make_family(tmp_path / "b", "roberta", tokenizer=None, hidden=16)
    report = verify(one, two)
    assert report.relation == "none: two models of other sizes"
    assert failed(report) == ["sizes and arithmetic"]
    assert "hidden_size 32 and 16" in str(report)


def test_one_longformer_made_of_another(tmp_path: Path) -> None:
    """Longer, shorter, or of the same length with other windows: then its record has to say so."""
    first = make_family(tmp_path / "a", "longformer", positions=64, window=8)
    for name, positions, window in (("long", 130, 8), ("short", 48, 8), ("wide", 64, 16)):
        convert(first, tmp_path / name, positions=positions, attention_window=window)
        report = good(verify(first, tmp_path / name))
        assert report.relation == MADE.format(positions)
        assert any(row.check.endswith("the first global") for row in report.rows)
    planted.forget_record(tmp_path / "wide")
    assert failed(verify(first, tmp_path / "wide"))[0] == "sizes and arithmetic"
    good(verify(tmp_path / "long", tmp_path / "long"))


@pytest.mark.conversion(
    family="Longformer", direction="HF -> HF", checked="verify A B: shards, .bin, fp16, bf16, bare"
)
def test_one_model_in_many_forms(tmp_path: Path) -> None:
    first = make_family(tmp_path / "a", "longformer", positions=64)
    bin_folder = shutil.copytree(first, tmp_path / "bin")
    torch.save(load_file(first / "model.safetensors"), bin_folder / "pytorch_model.bin")
    (bin_folder / "model.safetensors").unlink()
    assert origins(good(verify(first, bin_folder))) == {"equal bit for bit": 54}
    sharded = tmp_path / "sharded"
    model = (read_config(first), read_tensors(first))
    save_model(model, sharded, shard_bytes=40_000)
    assert not (sharded / "model.safetensors").exists()
    assert failed(verify(first, sharded)) == ["tokenizers"], "that one has none"
    assert origins(verify(first, sharded)) == {"equal bit for bit": 54}
    for dtype, name in (("fp16", "float16"), ("bf16", "bfloat16")):
        export(first, tmp_path / dtype, dtype=dtype, check=False)
        for pair in ((first, tmp_path / dtype), (tmp_path / dtype, first)):
            report = good(verify(*pair))
            (origin,) = origins(report)
            assert name in origin and "equal once rounded" in origin
            assert report.relation.startswith("the same model, rounded to ")
        good(verify(tmp_path / dtype))
    assert "types" not in " ".join(failed(verify(tmp_path / "fp16", tmp_path / "bf16")))
    assert not verify(tmp_path / "fp16", tmp_path / "bf16").ok
    export(first, tmp_path / "bare", model="bare", check=False)
    report = good(verify(first, tmp_path / "bare"))
    assert origins(report)["only in the first: the other has no masked-LM head"] == 5
    assert any(row.check.startswith("hidden states") for row in report.rows)


@pytest.mark.conversion(
    family="RoBERTa", direction="HF -> fairseq", checked="verify A B: every tensor, logits, ids"
)
def test_a_folder_and_a_fairseq_checkpoint(tmp_path: Path) -> None:
    make_roberta(tmp_path / "a")
    assert read_tensors(tmp_path / "a")["longformer.embeddings.token_type_embeddings.weight"].any()
    export(tmp_path / "a", tmp_path / "b", format="fairseq")
    checkpoint = tmp_path / "b" / "model.pt"
    alone = good(verify(checkpoint))
    assert any(row.check == "logits, 64 tokens" for row in alone.rows)
    assert good(verify(tmp_path / "a", checkpoint)).relation == "the same model"
    convert(checkpoint, tmp_path / "c", positions=100, attention_window=16)
    assert good(verify(checkpoint, tmp_path / "c")).relation == MADE.format(100)
    changed = rewrite(
        tmp_path / "a", tmp_path / "d", lambda name, t: t + 1e-3 if name == POSITIONS else t
    )
    assert POSITIONS in failed(verify(changed, checkpoint))


@pytest.mark.conversion(
    family="Longformer", direction="run -> HF", checked="verify A B: every tensor, logits"
)
def test_a_checkpoint_and_its_export(tmp_path: Path) -> None:
    """Global projections that stood still are copies of the local ones at export, and only then."""
    checkpoint = make_family(tmp_path / "a", "longformer", tokenizer=None)

    def say(global_tokens: str) -> None:
        files = {n: sha256(checkpoint / n) for n in ("config.json", "model.safetensors")}
        state = {"files": files, "global_tokens": global_tokens, "step": 3}
        (checkpoint / "state.json").write_text(json.dumps(state))

    say("none")
    export(checkpoint, tmp_path / "b", check=False)
    found = origins(good(verify(checkpoint, tmp_path / "b")))
    assert found["copies of the local projections, equal bit for bit"] == 12
    alone = good(verify(checkpoint))
    (row,) = (row for row in alone.rows if row.check == "global projections")
    assert row.got == "their own, which no global token trained: export makes them copies"
    say("first")
    assert (
        len([name for name in failed(verify(checkpoint, tmp_path / "b")) if "_global" in name])
        == 12
    )


def test_a_lost_tokenizer_is_found_unless_the_record_has_it_so(tmp_path: Path) -> None:
    short = make_family(tmp_path / "a", "xlm-roberta")
    convert(short, tmp_path / "b", positions=100, attention_window=16, need_tokenizer=False)
    report = good(verify(short, tmp_path / "b"))
    (row,) = (row for row in report.rows if row.check == "tokenizers")
    assert row.got == "only the source has one"
    planted.forget_record(tmp_path / "b")
    assert failed(verify(short, tmp_path / "b")) == ["tokenizers"]


def test_dilation_counts(tmp_path: Path) -> None:
    one = make_family(tmp_path / "a", "longformer", tokenizer=None)
    config = dataclasses.replace(read_config(one), dilation=(1, 2))
    save_model((config, read_tensors(one)), tmp_path / "b")
    assert "dilation [] and [1, 2]" in str(verify(one, tmp_path / "b"))
    good(verify(tmp_path / "b", tmp_path / "b"))


def test_the_verb_says_it_all_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = make_family(tmp_path / "a", "roberta")
    convert(short, tmp_path / "b", positions=100, attention_window=16)
    words = ["verify", str(short), str(tmp_path / "b"), "--json"]
    capsys.readouterr()
    assert main([*words, "-"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert (tree["ok"], tree["a"], tree["b"]) == (True, words[1], words[2])
    assert tree["relation"] == MADE.format(100)
    assert {row["name"] for row in tree["tensors"]} == read_tensors(tmp_path / "b").keys()
    (row,) = (row for row in tree["tensors"] if row["name"] == POSITIONS)
    assert (row["shape"], row["dtype"], row["ok"]) == ([102, 32], "float32", True)
    assert all(row["ok"] for row in tree["checks"])
    planted.in_config(attention_window=[8, 8])(tmp_path / "b")
    assert main([*words, str(tmp_path / "found.json")]) == 1
    assert json.loads((tmp_path / "found.json").read_text())["ok"] is False
    out = capsys.readouterr().out
    assert "FAIL  second: length and windows of the conversion" in out
    assert "   12 x copies of the local projections" in out
    assert main(["verify", str(short), str(tmp_path / "nothing")]) == 2
    assert main(["verify", str(tmp_path / "b"), "--json", "-"]) == 1
    tree = json.loads(capsys.readouterr().out)
    assert (tree["b"], tree["relation"]) == (None, None)
    names = {row["name"] for row in tree["tensors"]}
    assert names == load_file(tmp_path / "b" / "model.safetensors").keys()
