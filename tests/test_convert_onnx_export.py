"""An ONNX export: the file, its checks, its card, and what is refused."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from family_models import make_family
from onnx_runs import OnnxModel, draw_model, quiet, run, small_config, text
from small_disk import small_disk
from told import check_form, disk, exit_code
from torch import Tensor

import longpretrain.convert.onnx_attention as attention_module
import longpretrain.convert.onnx_graph as graph_module
from longpretrain.convert import export
from longpretrain.convert.onnx_check import cases, check_onnx
from longpretrain.convert.onnx_file import DATA_NAME, MODEL_NAME, check_file
from longpretrain.convert.onnx_graph import build_graph
from longpretrain.errors import InputError
from longpretrain.model import ModelConfig, read_config, save_model

CONFIG = small_config(8, 64, tokens=640)
WEIGHTS = {name: p.detach() for name, p in draw_model(CONFIG).named_parameters()}


def session_of(folder: Path) -> Any:
    return onnxruntime.InferenceSession(folder / MODEL_NAME, quiet())


def outputs(folder: Path) -> Tensor:
    ids_BN = text(CONFIG, 2, 300)
    globals_BN = torch.zeros_like(ids_BN)
    globals_BN[0, 5] = 1
    return run(session_of(folder), ids_BN, torch.ones_like(ids_BN), globals_BN)


def new_folder(folder: Path) -> Path:
    folder.mkdir()
    return folder


def check(folder: Path, weights: dict[str, Tensor] = WEIGHTS, **changes: Any) -> dict[str, bool]:
    """Which checks pass."""
    arguments = {"dtype": torch.float32, "tokenizer": None} | changes
    return {row.check: row.ok for row in check_onnx(folder, CONFIG, weights, **arguments)}


def test_the_file_is_plain_onnx_with_free_dimensions(tmp_path: Path) -> None:
    build_graph(CONFIG, WEIGHTS).save(tmp_path)
    model = onnx.load(tmp_path / MODEL_NAME)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert model.ir_version == 8
    assert not model.functions
    for value in model.graph.input:
        dims = [dim.dim_param for dim in value.type.tensor_type.shape.dim]
        assert dims == ["batch", "sequence"]
        assert value.type.tensor_type.elem_type == onnx.TensorProto.INT64
    names = [value.name for value in model.graph.input]
    assert names == ["input_ids", "attention_mask", "global_attention_mask"]
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, weight in WEIGHTS.items():  # each once: the decoder is the word embeddings
        assert torch.from_numpy(onnx.numpy_helper.to_array(stored.pop(name)).copy()).equal(weight)
    assert all(name.startswith("constant_") for name in stored)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build_graph(CONFIG, WEIGHTS).save(new_folder(tmp_path / name))
    assert disk(tmp_path / "one") == disk(tmp_path / "two")


def test_large_weights_lie_in_a_file_beside(tmp_path: Path) -> None:
    size = sum(weight.nbytes for weight in WEIGHTS.values())
    build_graph(CONFIG, WEIGHTS).save(new_folder(tmp_path / "one"), largest_file_bytes=size)
    assert [path.name for path in (tmp_path / "one").iterdir()] == [MODEL_NAME]
    build_graph(CONFIG, WEIGHTS).save(new_folder(tmp_path / "two"), largest_file_bytes=size - 1)
    assert (tmp_path / "two" / DATA_NAME).stat().st_size >= size
    assert (tmp_path / "two" / MODEL_NAME).stat().st_size < size
    check_file(tmp_path / "two" / MODEL_NAME)
    assert outputs(tmp_path / "two").equal(outputs(tmp_path / "one"))
    assert all(check(tmp_path / "two").values())


def test_fp16_halves_the_file_and_computes_in_fp32(tmp_path: Path) -> None:
    build_graph(CONFIG, WEIGHTS).save(new_folder(tmp_path / "full"))
    build_graph(CONFIG, WEIGHTS, dtype=torch.float16).save(new_folder(tmp_path / "half"))
    rounded = {name: weight.half().float() for name, weight in WEIGHTS.items()}
    build_graph(CONFIG, rounded).save(new_folder(tmp_path / "rounded"))
    size = {f: (tmp_path / f / MODEL_NAME).stat().st_size for f in ("full", "half")}
    half = sum(weight.nbytes for weight in WEIGHTS.values()) // 2
    assert size["full"] - size["half"] == pytest.approx(half, rel=0.25)  # less the casts
    got = outputs(tmp_path / "half")
    assert got.dtype == torch.float32
    assert (got - outputs(tmp_path / "rounded")).abs().max() < 1e-5
    assert (got - outputs(tmp_path / "full")).abs().max() > 1e-4
    assert all(check(tmp_path / "half", dtype=torch.float16).values())
    assert not all(check(tmp_path / "half").values())


def swapped(name: str, other: str) -> Callable[[onnx.ModelProto], None]:
    """Two weights of one shape, one for the other."""

    def swap(model: onnx.ModelProto) -> None:
        found = {tensor.name: tensor for tensor in model.graph.initializer}
        found[name].name, found[other].name = other, name

    return swap


def rewired(operator: str, which: int, at: int, to: int) -> Callable[[onnx.ModelProto], None]:
    """An input of one node of a kind becomes another input of it."""

    def rewire(model: onnx.ModelProto) -> None:
        node = [node for node in model.graph.node if node.op_type == operator][which]
        node.input[at] = node.input[to]

    return rewire


def other_constant(old: int, new: int) -> Callable[[onnx.ModelProto], None]:
    """A number of the graph, wherever it is used as a vector of one."""

    def change(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.int64_data == [old] and list(tensor.dims) == [1]:
                tensor.int64_data[0] = new

    return change


def gone(operator: str, which: int, keeps: int) -> Callable[[onnx.ModelProto], None]:
    """A node hands on one of its inputs as it is."""

    def remove(model: onnx.ModelProto) -> None:
        node = [node for node in model.graph.node if node.op_type == operator][which]
        kept = node.input[keeps]
        del node.attribute[:]
        node.op_type = "Identity"
        node.input[:] = [kept]

    return remove


LAYER = "longformer.encoder.layer.1"
CHANGED = {
    "query and key swapped": swapped(
        f"{LAYER}.attention.self.query.weight", f"{LAYER}.attention.self.key.weight"
    ),
    "layers swapped": swapped(
        f"{LAYER}.output.dense.bias", "longformer.encoder.layer.0.output.dense.bias"
    ),
    "global and local values swapped": swapped(
        f"{LAYER}.attention.self.value.bias", f"{LAYER}.attention.self.value_global.bias"
    ),
    "window one token short": other_constant(4, 3),
    "global rows are never written": gone("ScatterND", 0, 0),
    "positions do not skip padding": gone("CumSum", 0, 0),
    "keys beyond the ends count": gone("And", 2, 0),
    "global keys count twice": gone("And", 1, 0),
    "padding gives what it attends to": gone("Where", 3, 1),
    "no LayerNorm": gone("LayerNormalization", 2, 0),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_graph_is_caught(tmp_path: Path, change: str) -> None:
    build_graph(CONFIG, WEIGHTS).save(tmp_path)
    assert all(check(tmp_path).values())
    model = onnx.load(tmp_path / MODEL_NAME)
    CHANGED[change](model)
    onnx.save(model, tmp_path / MODEL_NAME)
    assert not all(check(tmp_path).values())


def test_a_graph_that_bakes_a_length_in_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As traces do: right at one length, wrong at the others; no folder is left."""
    save_model((CONFIG, WEIGHTS), tmp_path / "source")
    make_band = attention_module.make_band

    def for_512(graph: Any, inputs: Any, *rest: Any) -> Any:
        return make_band(graph, dataclasses.replace(inputs, num_tokens=graph.ints(512)), *rest)

    monkeypatch.setattr(graph_module, "make_band", for_512)
    build_graph(CONFIG, WEIGHTS).save(tmp_path)
    passed = check(tmp_path, dtype=torch.float32)
    assert passed["logits, 512 tokens"]
    assert not passed["logits, 513 tokens"]
    assert not passed["logits, 511 tokens"]
    with pytest.raises(RuntimeError, match=r"FAIL +logits, 513 tokens"):
        export(tmp_path / "source", tmp_path / "out", format="onnx")
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_export_leaves_a_whole_folder(tmp_path: Path) -> None:
    make_family(tmp_path / "source", "longformer", positions=520)
    for _ in range(2):  # the second replaces the first
        words = ["export", tmp_path / "source", tmp_path / "out", "--format", "onnx"]
        assert exit_code(*words) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {MODEL_NAME, "config.json", "README.md", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: onnx" in card
    for fact in (
        "| logits, 1 token |", "| logits, 511 tokens |", "| logits, 512 tokens |",
        "| logits, 513 tokens |", "| logits, 520 tokens |",
        "| logits, 2 rows of 520 tokens, one padded |", "| logits, 520 tokens, the first global |",
        "| logits, 4 rows of 520 tokens with 5, 1, 0 and 0 global ones |",
        "up to 520 tokens", 'session.run(["logits"], inputs)', "global_attention_mask",
    ):  # fmt: skip
        assert fact in card, fact
    assert str(tmp_path) not in card
    (tmp_path / "out" / "notes.txt").write_text("of somebody's")
    assert exit_code(*words) == 2


def test_the_cards_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the card tells a user to type, typed."""
    make_family(tmp_path / "source", "longformer", positions=100)
    export(tmp_path / "source", tmp_path / "out", format="onnx")
    monkeypatch.chdir(tmp_path)
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    namespace: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), namespace)
    vocabulary = read_config(tmp_path / "source").vocab_size
    assert namespace["logits"].shape == (*namespace["batch"]["input_ids"].shape, vocabulary)


def test_without_a_tokenizer_the_cards_lines_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model((CONFIG, WEIGHTS), tmp_path / "source")
    export(tmp_path / "source", tmp_path / "out", format="onnx")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "AutoTokenizer" not in card
    assert "* no tokenizer: the source has none" in card
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"input_ids": text(CONFIG, 2, 30).numpy()}
    exec(card.split("```python\n")[1].split("```")[0], namespace)
    assert namespace["logits"].shape == (2, 30, CONFIG.vocab_size)


def test_a_pooler_is_neither_written_nor_counted(tmp_path: Path) -> None:
    make_family(tmp_path / "source", "longformer", kind="bare")
    export(tmp_path / "source", tmp_path / "out", format="onnx")
    export(tmp_path / "source", tmp_path / "hf", check=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "* without the pooler: the graph gives out the hidden states of all tokens\n" in card
    model = onnx.load(tmp_path / "out" / MODEL_NAME)
    weights = [t for t in model.graph.initializer if not t.name.startswith("constant_")]
    count = sum(math.prod(tensor.dims) for tensor in weights)
    assert f"| parameters | {count:,}, in float32 |" in card
    width = read_config(tmp_path / "source").hidden_size
    with_pooler = count + width * width + width
    assert f"| parameters | {with_pooler:,}, in" in (tmp_path / "hf" / "README.md").read_text()


def test_logits_that_would_fill_the_memory_are_not_compared() -> None:
    """A length is compared in full where it fits, and the row says where it does not."""
    long = small_config(8, tokens=16384, vocab_size=250_002)
    found = {case.name: case.ids_BN.numel() for case in cases(None, long)}
    assert max(found.values()) * long.vocab_size <= 2**30
    assert found["4294 tokens (of 16384: logits of more take too much memory)"] == 4294
    for config in (
        dataclasses.replace(long, vocab_size=50_265), dataclasses.replace(long, has_lm_head=False),
    ):  # fmt: skip
        found = {case.name: case.ids_BN.numel() for case in cases(None, config)}
        assert found["16384 tokens"] == 16384
        assert found["1 token"] == 1
        assert not any("memory" in name for name in found)


def test_bare_and_half(tmp_path: Path) -> None:
    make_family(tmp_path / "source", "roberta")
    words = ["export", tmp_path / "source", tmp_path / "out", "--format", "onnx"]
    assert exit_code(*words, "--model", "bare", "--dtype", "fp16") == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipeline_tag: feature-extraction" in card
    assert "| last hidden state, 64 tokens |" in card
    assert "Weights are stored in float16. All arithmetic is in float32." in card
    assert "add_pooling_layer" not in card
    session = session_of(tmp_path / "out")
    assert [value.name for value in session.get_inputs()] == ["input_ids", "attention_mask"]
    assert [value.name for value in session.get_outputs()] == ["last_hidden_state"]


def test_a_source_in_fp16_stays_so_and_one_in_bf16_becomes_fp32(tmp_path: Path) -> None:
    for name, dtype in (("half", torch.float16), ("brain", torch.bfloat16)):
        weights = {key: weight.to(dtype) for key, weight in WEIGHTS.items()}
        save_model((CONFIG, weights), tmp_path / name)
        export(tmp_path / name, tmp_path / f"{name}-onnx", format="onnx")
    size = {f: (tmp_path / f / MODEL_NAME).stat().st_size for f in ("half-onnx", "brain-onnx")}
    assert size["half-onnx"] < size["brain-onnx"]
    assert '"dtype": "float32"' in (tmp_path / "brain-onnx" / "config.json").read_text()
    assert '"dtype": "float16"' in (tmp_path / "half-onnx" / "config.json").read_text()


@pytest.mark.parametrize(
    ("changes", "words", "wanted"),
    [
        ({"causal": True}, [], "got causal attention"),
        ({"dilation": (1, 2)}, [], "got dilation [1, 2]"),
        ({}, ["--dtype", "bf16"], "got bfloat16; wanted float32 or float16"),
    ],
    ids=["causal", "dilation", "bf16"],
)
def test_what_the_graph_has_not_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    words: list[str],
    wanted: str,
) -> None:
    config: ModelConfig = dataclasses.replace(CONFIG, **changes)
    save_model((config, WEIGHTS), tmp_path / "source")
    out = tmp_path / "out"
    assert exit_code("export", tmp_path / "source", out, "--format", "onnx", *words) == 2
    assert wanted in check_form(capsys.readouterr().err, "export")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model((CONFIG, WEIGHTS), tmp_path / "source")
    size = sum(weight.nbytes for weight in WEIGHTS.values())
    with small_disk(tmp_path / "disk", kib=size // 2048) as disk:
        words = ["export", tmp_path / "source", disk / "out", "--format", "onnx"]
        assert exit_code(*words) == 2
        assert not list(disk.iterdir())
    assert "no space left" in check_form(capsys.readouterr().err, "export")


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_without_the_packages_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    save_model((CONFIG, WEIGHTS), tmp_path / "source")
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(InputError, match=r"pip install 'longpretrain\[onnx\]'"):
        export(tmp_path / "source", tmp_path / "out", format="onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_windows_that_transformers_cannot_compute_are_no_matter(tmp_path: Path) -> None:
    """It needs each to divide the largest; the graph does not."""
    config = small_config(6, 10, tokens=64)
    assert config.beyond_hugging_face
    model = OnnxModel(tmp_path / "model", config)
    save_model((config, model.weights), tmp_path / "source")
    report = export(tmp_path / "source", tmp_path / "out", format="onnx")
    assert report is not None
    assert report.ok
