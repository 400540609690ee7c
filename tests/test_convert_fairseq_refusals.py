"""fairseq checkpoints that are refused, by name and without a trace; nothing in them runs."""

from __future__ import annotations

import dataclasses
import os
import runpy
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fairseq.utils
import numpy as np
import pytest
import torch
from fairseq_files import CFG, Evil, Raw, make_dictionary, roberta_order, save
from torch import Tensor

from longpretrain.cli import main
from longpretrain.convert import convert, export
from longpretrain.convert.source import open_source
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.errors import InputError
from longpretrain.model import LongformerForMaskedLM, ModelConfig, save_model

# hydra speaks of its own past.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

LONG = ModelConfig(
    vocab_size=50265, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48,
    max_position_embeddings=66, attention_window=(8, 12),
)  # fmt: skip


SMALL = make_dictionary(["0"])
ATTACKS = [("posix.system", os.system), ("eval", eval), ("runpy.run_path", runpy.run_path)]


@pytest.mark.parametrize("place", ["args", "cfg", "extra_state", "model"])
@pytest.mark.parametrize("age", ["2019", "dict"])
def test_nothing_in_a_file_runs(age: str, place: str, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    code = {"eval": f"open({str(marker)!r}, 'w')"}
    for name, function in ATTACKS:
        evil = {place: Evil(function, code.get(name, f"touch {marker}"))}
        save(tmp_path, SMALL, age, edit=lambda whole, evil=evil: whole.update(evil))
        with pytest.raises(InputError, match=f"got the object {name}; .*nothing ran"):
            open_source(tmp_path / "model.pt")
    assert not marker.exists()


def test_the_attack_is_one(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    edit = {"extra_state": Evil(os.system, f"touch {marker}")}
    save(tmp_path, SMALL, edit=lambda whole: whole.update(edit))
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert marker.exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-70_000])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, "bytes that do not read|does not read as data"),
        (lambda path: path.write_bytes(b""), "bytes that do not read|does not read as data"),
        (lambda path: path.write_text("<html>404</html>"), "do not read|does not read as data"),
        (lambda path: path.unlink(), "neither|no such"),
        (lambda path: torch.save([1, 2], path), "got a list"),
        (lambda path: torch.save({"a": torch.ones(2)}, path), "got no model in a"),
        (lambda path: torch.save({"model": {}}, path), "got no model in model"),
        (lambda path: torch.save({"model": {"a": 1}}, path), "got 'a' in model"),
        (lambda path: torch.save({"model": {"a": torch.ones(2)}}, path), r"neither args nor cfg"),
        (lambda path: torch.save({"model": {"a": torch.ones(2)}, "cfg": {}}, path), "neither args"),
    ],
    ids=["cut", "empty", "page", "gone", "list", "tensors", "no model", "number", "bare", "cfg"],
)
@pytest.mark.parametrize("age", ["2019", "dict"])
def test_files_that_are_no_checkpoint(
    age: str, spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    save(tmp_path, SMALL, age)
    spoil(tmp_path / "model.pt")
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "model.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_normalize_before": True}, r"encoder_normalize_before True \(wanted False\)"),
        ({"activation_fn": "relu"}, r"activation_fn relu \(wanted gelu\)"),
        ({"untie_weights_roberta": True}, "untie_weights_roberta True"),
        ({"quant_noise_pq": 0.1, "adaptive_input": 1}, r"input 1 .* and quant_noise_pq 0\.1"),
        ({"encoder_layers": 3}, "tensors of 2; wanted 3"),
        ({"encoder_attention_heads": 5}, "got 32; wanted a multiple of the 5 heads"),
        ({"encoder_attention_heads": "4"}, "encoder_attention_heads in the options"),
        ({"encoder_ffn_embed_dim": 47}, r"fc1\.weight .*\(48, 32\), not \(47, 32\); .*fc1\.bias"),
        ({"max_positions": 31}, r"embed_positions\.weight .*\(32, 32\), not \(33, 32\)"),
        ({"dropout": "much"}, "dropout in the options"),
        ({"dropout": np.float64(0)}, "dropout in .*: got an object that does not read; wanted a n"),
        ({"encoder_normalize_before": np.bool_(True)}, "normalize_before an object that does not"),
        ({"max_positions": np.int64(30)}, "max_positions in .*: got an object that does not read"),
        ({"activation_fn": "x\x1b[2J" + "y" * 200}, r"activation_fn x\?\[2Jy{92}\.\.\. \(wanted"),
    ],
    ids=str,
)
def test_options_that_mean_another_model(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    def edit(whole: dict[str, Any]) -> None:
        vars(whole["args"]).update(change)

    save(tmp_path, SMALL, "2019", edit=edit)
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / "model.pt")


def untie(model: dict[str, Tensor]) -> None:
    model["encoder.lm_head.weight"] = model["encoder.lm_head.weight"] * 2


def rename(model: dict[str, Tensor]) -> None:
    model["encoder.segments"] = model.pop("encoder.lm_head.bias")


def empty(model: dict[str, Tensor]) -> None:
    for name in [name for name in model if "layers.1." in name and not name.endswith("fc1.bias")]:
        del model[name]


def shorten(model: dict[str, Tensor]) -> None:
    for name in [name for name in model if "layers.1." in name]:
        del model[name]


def whole_numbers(model: dict[str, Tensor]) -> None:
    model[f"{CFG}embed_positions.weight"] = torch.ones(32, 32, dtype=torch.int64)


def diverge(model: dict[str, Tensor]) -> None:
    model[f"{CFG}layers.1.fc1.bias"][0] = torch.nan


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (untie, "got a decoder unlike the embeddings; wanted tied weights"),
        (rename, r"no encoder\.lm_head\.bias; encoder\.segments, which is not RoBERTa's"),
        (empty, r"layers\.1\.self_attn\.q_proj\.weight; (no .*; ){14}wanted the 41 tensors"),
        (shorten, "got tensors of 1; wanted 2"),
        (whole_numbers, r"embed_positions\.weight of torch\.int64"),
        (diverge, r"NaN or infinity in longformer\.encoder\.layer\.1"),
    ],
)
def test_tensors_that_are_another_model(
    edit: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    dictionary = make_dictionary([str(i) for i in range(50256)])
    save(tmp_path, dictionary, edit=lambda whole: edit(whole["model"]))
    with pytest.raises(InputError, match=message):
        convert(tmp_path / "model.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, r"no dict\.txt beside it; .*--tokenizer DIR\."),
        (["0 1", "1 1"], "got 7 symbols with the special ones; wanted 8"),
        (["0 1", "1 1", "2 1", "3 1"], "got 9 symbols with the special ones; wanted 8"),
        (["▁the 1", "1 1", "2 1"], "got the symbol '▁the'"),
        (["50257 1", "1 1", "2 1"], "got the symbol '50257'; wanted ids of GPT-2's BPE"),
        (["0 1", "1 1", "0 1"], "got '0' twice"),
        (["0 1", "1", "2 1"], "line 2: got '1'"),
        (["0 1", "1 1", "2 1"], "no line for 50253 of GPT-2's ids, such as 3"),
    ],
    ids=["none", "short", "long", "pieces", "beyond", "twice", "no count", "few"],
)
def test_a_dictionary_that_does_not_fit(
    lines: list[str] | None, message: str, tmp_path: Path
) -> None:
    save(tmp_path, make_dictionary(["0", "1", "2"]))
    (tmp_path / "dict.txt").unlink()
    if lines is not None:
        (tmp_path / "dict.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / "model.pt")
    load_tokenizer().save(tmp_path, 30)
    with pytest.raises(InputError, match="got 50265 ids"):
        open_source(tmp_path / "model.pt", tokenizer=tmp_path)


def test_a_tokenizer_given_stands_for_the_dictionary(tmp_path: Path) -> None:
    save(tmp_path, None)
    load_tokenizer().save(tmp_path, 30)
    command = ["convert", str(tmp_path / "model.pt"), str(tmp_path / "out"), "--positions", "60"]
    assert main(command) == 2
    assert main([*command, "--tokenizer", str(tmp_path)]) == 0
    assert main([*command, "--tokenizer", str(tmp_path)]) == 0
    assert load_tokenizer(tmp_path / "out").fingerprint == load_tokenizer().fingerprint


@pytest.mark.parametrize(
    ("change", "message", "formats"),
    [
        ({"causal": True}, "got causal attention", ["hf", "fairseq"]),
        ({"dilation": (1, 1, 2, 2), "model_type": "roberta", "attention_window": ()},
         r"got dilation \[1, 1, 2, 2\]", ["hf", "fairseq"]),
        ({"dilation": (1, 1, 2, 2)}, r"got dilation \[1, 1, 2, 2\]", ["hf"]),
        ({"layer_norm_eps": 1e-12, "pad_id": 0}, "eps 1e-12 .* and .*pad_id 0", ["fairseq"]),
        ({"vocab_size": 50000}, "got 50000 tokens", ["fairseq"]),
        ({"model_type": "roberta", "attention_window": ()}, "got none; wanted one", ["fairseq"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_format_cannot_express_is_refused_by_name(
    change: dict[str, Any], message: str, formats: list[str], tmp_path: Path
) -> None:
    save_model(LongformerForMaskedLM(dataclasses.replace(LONG, **change)), tmp_path / "model")
    for format in formats:
        with pytest.raises(InputError, match=message):
            export(tmp_path / "model", tmp_path / "out", format=format)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_tokenizer_that_fairseq_has_not(tmp_path: Path) -> None:
    config = dataclasses.replace(LONG, model_type="roberta", attention_window=())
    tokenizer = load_tokenizer()
    for change, message in (({"vocab_size": 50266}, None), ({}, "tokens such as '<extra>'")):
        folder = tmp_path / ("more" if message is None else "other")
        save_model(LongformerForMaskedLM(dataclasses.replace(config, **change)), folder)
        tokenizer.save(folder, 64)
        if message is None:  # a row without a token: its own line
            export(folder, tmp_path / "out", format="fairseq")
            lines = (tmp_path / "out" / "dict.txt").read_text().splitlines()
            assert lines[-2:] == ["<mask> 0", "madeupword0003 0"]
            assert open_source(tmp_path / "out" / "model.pt").config.vocab_size == 50266
            continue
        for name in ("vocab.json", "tokenizer.json"):
            text = (folder / name).read_text(encoding="utf-8")
            (folder / name).write_text(text.replace("madeupword0001", "<extra>"), encoding="utf-8")
        with pytest.raises(InputError, match=message):
            export(folder, tmp_path / "out2", format="fairseq")


CALL, MAKE, BUILD = b"\x85R", b"\x85\x81", b"}b"  # of one argument; of one; with an empty state
FORGED = {
    "reduce": lambda at: Raw().name("fairseq.utils", "import_user_module").text(at).op(CALL),
    "newobj": lambda at: Raw().name("fairseq.utils", "import_user_module").text(at).op(MAKE),
    "build": lambda at: Raw().name("fairseq.utils", "f").text(at).op(CALL + BUILD),
    "dotted": lambda at: Raw().name("fairseq.utils", "os.system").text(f"touch {at}").op(CALL),
    "dotted module": lambda at: Raw().name("fairseq.utils.os", "system").text(at).op(CALL),
    "a space": lambda at: Raw().name("fairseq.x", "y z").text(at).op(CALL),
    "result called": lambda at: Raw().name("fairseq.x", "y").text(at).op(CALL).text(at).op(CALL),
    "dict made": lambda at: Raw().name("collections", "defaultdict").text(at).op(MAKE),
    "text called": lambda at: Raw().text("GLOBAL fairseq.x was not").text(at).op(CALL),
    "escapes": lambda at: Raw().name("evil\x1b[31m" + "x" * 500, "y").text(at).op(CALL),
}


@pytest.mark.parametrize("attack", FORGED)
def test_names_of_fairseq_are_never_looked_up(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a name that we allow, a file may name anything: a stand-in answers to it."""
    marker, loads = tmp_path / "marker", []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: (loads.append(a), load(*a, **k))[1])
    monkeypatch.setattr(fairseq.utils, "import_user_module", lambda at: Path(at).touch())
    path = FORGED[attack](str(marker)).write(tmp_path / "model.pt")
    with pytest.raises(InputError) as refused:
        open_source(path)
    assert not marker.exists()
    assert len(loads) <= 3
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 400 + len(str(path))


def test_what_a_caller_allowed_is_not_ours(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    def touch(*unused: object) -> None:
        marker.touch()

    allowed = [(touch, "fairseq.x.y"), Namespace]
    with torch.serialization.safe_globals(allowed):
        before = set(torch.serialization.get_safe_globals())
        path = Raw().name("fairseq.x", "y").text("z").op(CALL).write(tmp_path / "evil.pt")
        torch.load(path, weights_only=True)
        assert marker.exists()  # the attack is one
        marker.unlink()
        with pytest.raises(InputError, match="got a Held"):
            open_source(path)
        assert not marker.exists()
        folder = tmp_path / "bin"
        save_model(LongformerForMaskedLM(LONG), folder)
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(path.read_bytes())
        with pytest.raises(InputError, match=r"more than tensors \(fairseq\.x\.y\)"):
            convert(folder, tmp_path / "out")
        assert not marker.exists()
        save(tmp_path, make_dictionary(roberta_order()), "2019")
        assert open_source(tmp_path / "model.pt").config.num_heads == 4
        assert set(torch.serialization.get_safe_globals()) == before


def test_an_ordered_dict_with_methods_of_its_own_still_reads(tmp_path: Path) -> None:
    def edit(whole: dict[str, Any]) -> None:
        whole["model"] = overridden(whole["model"])

    save(tmp_path, make_dictionary(roberta_order()), edit=edit)
    assert open_source(tmp_path / "model.pt").config.num_heads == 4
    torch.save(overridden({deep(): 1, "a\x1b" + "b" * 90: 2}), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"no model in a\?b{35}\.\.\.; "):
        open_source(tmp_path / "model.pt")


def overridden(items: dict[Any, Any]) -> Evil:
    """Loads as an OrderedDict whose methods are numbers."""
    methods = dict.fromkeys(["items", "get", "copy", "keys"], 1)
    forged = Evil(OrderedDict)
    forged.call = (OrderedDict, (), methods, None, iter(items.items()))
    return forged


def deep() -> Any:
    key: Any = ()
    for _ in range(300):
        key = (key,)
    return key


def test_options_that_grow_without_end_are_read_once(tmp_path: Path) -> None:
    many: Any = [1]
    for _ in range(60):
        many = [many, many]

    def edit(whole: dict[str, Any]) -> None:
        whole["args"].unused, whole["args"].dropout = many, many

    save(tmp_path, SMALL, "2019", edit=edit)
    with pytest.raises(InputError, match=r"dropout in .*: got a list; wanted a number"):
        open_source(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.to(torch.float8_e4m3fn), r"final_layer_norm\.bias of torch\.float8_e4m3fn"),
        (lambda t: t.to(torch.complex64), r"of torch\.complex64"),
        (lambda t: t.to("meta"), "final_layer_norm.bias' in model; wanted named, dense"),
        (lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8), "bias' in model"),
        (lambda t: t.to_sparse(), "bias' in model"),
        (lambda t: torch.ones(1).expand(32), "bias' in model"),
        (lambda t: torch.nested.nested_tensor([t, t]), "bias' in model"),
    ],
    ids=["float8", "complex", "meta", "quantized", "sparse", "expanded", "nested"],
)
def test_tensors_that_are_no_weights(
    spoil: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    def edit(whole: dict[str, Any]) -> None:
        name = f"{CFG}layers.1.final_layer_norm.bias"
        whole["model"][name] = spoil(whole["model"][name])

    save(tmp_path, SMALL, edit=edit)
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / "model.pt")


def both_generations(model: dict[str, Tensor]) -> None:
    model[f"{CFG}layers.0.self_attn.in_proj_weight"] = torch.zeros(96, 32)


def decoder_too(model: dict[str, Tensor]) -> None:
    model["decoder.lm_head.bias"] = model["encoder.lm_head.bias"] + 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (both_generations, r"q_proj\.weight stands twice, as \S+q_proj\.weight and \S+in_proj_w"),
        (decoder_too, r"as encoder\.lm_head\.bias and decoder\.lm_head\.bias"),
    ],
)
def test_tensors_that_stand_twice(
    edit: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path
) -> None:
    save(tmp_path, SMALL, edit=lambda whole: edit(whole["model"]))
    with pytest.raises(InputError, match=message):
        open_source(tmp_path / "model.pt")
