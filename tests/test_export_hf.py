"""Exports for transformers, as it loads them: with a head or bare, in any precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_models import make_family
from safetensors.torch import load_file, save_file
from small_disk import small_disk
from told import check_form, exit_code
from torch import Tensor

from longpretrain.convert import convert, export
from longpretrain.model import LongformerForMaskedLM, ModelConfig, save_model

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
TOKENS_BN = torch.tensor([[0, *range(10, 70), 2]])


def load(folder: Path, kind: str, **options: Any) -> Any:
    """A model of transformers' that found each of its tensors in the folder."""
    model, info = getattr(transformers, kind).from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def computed(model: Any, tokens_BN: Tensor = TOKENS_BN) -> Any:
    with torch.no_grad():
        return model(tokens_BN, attention_mask=torch.ones_like(tokens_BN))


@pytest.mark.conversion(
    family="Longformer", direction="HF -> HF, bare",
    checked="hidden states equal to the source's, no tensor missing",
)  # fmt: skip
def test_the_bare_encoder_of_a_masked_lm(tmp_path: Path) -> None:
    make_family(tmp_path / "in", "longformer")
    report = export(tmp_path / "in", tmp_path / "out", model="bare")
    assert report is not None
    assert "no pooler was trained: load it with add_pooling_layer=False" in report.notes
    wanted = computed(load(tmp_path / "in", "LongformerForMaskedLM").longformer)
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert "embeddings.word_embeddings.weight" in names
    assert not any(name.startswith(("longformer.", "lm_head.", "pooler.")) for name in names)
    for kind in ("LongformerModel", "AutoModel"):
        model = load(tmp_path / "out", kind, add_pooling_layer=False)
        assert computed(model).last_hidden_state.equal(wanted.last_hidden_state)
    card = (tmp_path / "out" / "README.md").read_text()
    assert 'AutoModel.from_pretrained("out", add_pooling_layer=False)' in card
    assert "| type | longformer, the bare encoder |" in card


@pytest.mark.conversion(
    family="Longformer", direction="HF -> HF, bare",
    checked="hidden states equal to the source's, no tensor missing",
)  # fmt: skip
def test_a_trained_pooler_goes_with_it(tmp_path: Path) -> None:
    make_family(tmp_path / "in", "longformer", kind="bare")
    report = export(tmp_path / "in", tmp_path / "out")  # bare by itself: there is no head
    assert report is not None
    assert not any("pooler" in note for note in report.notes)
    wanted = computed(load(tmp_path / "in", "LongformerModel"))
    found = computed(load(tmp_path / "out", "LongformerModel"))
    assert found.pooler_output.equal(wanted.pooler_output)
    assert found.last_hidden_state.equal(wanted.last_hidden_state)
    assert "add_pooling_layer" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.conversion(
    family="MiniLM", direction="HF -> Longformer -> HF, bare",
    checked="hidden states within 1e-5 of the source's, no tensor missing",
)  # fmt: skip
def test_a_long_sentence_encoder(tmp_path: Path) -> None:
    make_family(tmp_path / "in", "minilm")
    convert(tmp_path / "in", tmp_path / "long", positions=200, attention_window=128)
    export(tmp_path / "long", tmp_path / "out")
    tokens_BN = torch.arange(7, 71)[None]
    wanted = computed(load(tmp_path / "in", "BertModel"), tokens_BN)
    found = computed(load(tmp_path / "out", "LongformerModel"), tokens_BN)
    assert (found.last_hidden_state - wanted.last_hidden_state).abs().max() <= 1e-5
    assert (found.pooler_output - wanted.pooler_output).abs().max() <= 1e-5


def test_a_classifier_starts_from_the_bare_encoder(tmp_path: Path) -> None:
    make_family(tmp_path / "in", "longformer")
    export(tmp_path / "in", tmp_path / "out", model="bare")
    _, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert all(name.startswith("classifier.") for name in info["missing_keys"])
    assert not info["unexpected_keys"]


@pytest.mark.parametrize("model", ["masked-lm", "bare"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.conversion(
    family="Longformer", direction="HF -> HF, {dtype}",
    checked="weights are the source's, rounded; fp32 logits of ours and theirs within 1e-4",
)  # fmt: skip
def test_half_precision(tmp_path: Path, dtype: str, model: str) -> None:
    make_family(tmp_path / "in", "longformer")
    report = export(tmp_path / "in", tmp_path / "out", dtype=dtype, model=model)
    assert report is not None
    assert report.ok
    assert report.notes[-2].startswith(f"rounded to {dtype} from fp32")
    what = "logits" if model == "masked-lm" else "hidden states"
    assert report.notes[-1].startswith(f"{what} move by up to ")
    kind, options = "LongformerForMaskedLM", {}
    if model == "bare":
        kind, options = "LongformerModel", {"add_pooling_layer": False}
    theirs = load(tmp_path / "out", kind, dtype="auto", **options)
    assert theirs.dtype == DTYPES[dtype]
    assert theirs.config.dtype == DTYPES[dtype]
    whole = load(tmp_path / "in", "LongformerForMaskedLM")
    source = (whole if model == "masked-lm" else whole.longformer).state_dict()
    for name, tensor in theirs.state_dict().items():
        assert tensor.equal(source[name].to(DTYPES[dtype])), name
    card = (tmp_path / "out" / "README.md").read_text()
    assert f", in {str(DTYPES[dtype]).removeprefix('torch.')} |" in card
    assert 'dtype="auto"' in card


def small_model(folder: Path, **changes: Tensor) -> Path:
    """A folder of zeros but for the tensors that are given, by the ends of their names."""
    config = ModelConfig(
        vocab_size=50, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8,
        max_position_embeddings=20, attention_window=(4,),
    )  # fmt: skip
    model = LongformerForMaskedLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_()
            for end, values in changes.items():
                if name.replace(".", "_").endswith(end):
                    parameter.view(-1)[: len(values)] = values
    save_model(model, folder)
    return folder


@pytest.mark.parametrize("model", ["masked-lm", "bare"])
@pytest.mark.parametrize("has_tokenizer", [True, False], ids=["tokenizer", "no tokenizer"])
def test_the_cards_lines_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, has_tokenizer: bool
) -> None:
    """What the card tells a user to type, typed: no tokenizer is loaded where there is none."""
    make_family(tmp_path / "in", "longformer")
    words = {"positions": 100, "attention_window": 8, "need_tokenizer": has_tokenizer}
    convert(tmp_path / "in", tmp_path / "long", **words)
    export(tmp_path / "long", tmp_path / "out", model=model, check=False)
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("AutoTokenizer" in card) == has_tokenizer
    note = "* no tokenizer: the source has none (--tokenizer DIR gives one)\n"
    assert (note in card) == (not has_tokenizer)
    monkeypatch.chdir(tmp_path)
    code = card.split("```python\n")[1].split("```")[0]
    namespace: dict[str, Any] = {"input_ids": TOKENS_BN}
    exec(compile(code, "card", "exec"), namespace)
    ids_BN = TOKENS_BN
    if has_tokenizer:
        ids_BN = namespace["tokenizer"]("A long document.", return_tensors="pt")["input_ids"]
    assert namespace["logits" if model == "masked-lm" else "hidden"].shape[:2] == ids_BN.shape


def test_weights_of_two_types(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As of a model whose LayerNorms stayed in fp32 beside fp16: config.json has room for one."""
    make_family(tmp_path / "in", "longformer")
    path = tmp_path / "in" / "model.safetensors"
    tensors = {n: t if "LayerNorm" in n else t.half() for n, t in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    words = ("export", tmp_path / "in", tmp_path / "out")
    capsys.readouterr()
    assert exit_code(*words) == 2
    line = check_form(capsys.readouterr().err, "export")
    assert "got numbers of fp16 and fp32; wanted one type" in line
    assert "Say --dtype fp32" in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]
    assert exit_code(*words, "--dtype", "fp32") == 0


def test_numbers_that_fp16_cannot_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """65,519 is the last that rounds to the largest, 65,504."""
    small_model(
        tmp_path / "in",
        intermediate_dense_weight=torch.tensor([0.0, -7e4, 1e5]),
        lm_head_bias=torch.tensor([65520.0]), embeddings_LayerNorm_bias=torch.tensor([65519.0]),
    )  # fmt: skip
    assert exit_code("export", tmp_path / "in", tmp_path / "out", "--dtype", "fp16") == 2
    line = check_form(capsys.readouterr().err, "export")
    assert "got 100000 as the largest of" in line
    assert "intermediate.dense.weight (up to 1e+05), lm_head.bias (up to 65520)" in line
    assert "LayerNorm" not in line
    assert "--dtype bf16" in line
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    export(tmp_path / "in", tmp_path / "out", dtype="bf16", check=False)
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.bias"][0] == 65536


def test_numbers_that_fp16_holds_badly_are_counted(tmp_path: Path) -> None:
    small_model(
        tmp_path / "in",
        intermediate_dense_weight=torch.tensor([6.2e-5, 6e-5, -1e-6, 1e-9, 2.9e-8, -6e-8]),
    )
    for dtype, told in (
        ("fp16", "; 5 of 1,402 numbers are smaller than 6.1e-05 and keep fewer digits, 2 of them"),
        ("bf16", "\n"),
    ):
        export(tmp_path / "in", tmp_path / "out", dtype=dtype, check=False)
        card = (tmp_path / "out" / "README.md").read_text()
        assert f"* rounded to {dtype} from fp32{told}" in card


def test_the_type_of_the_source_is_kept_and_may_be_widened(tmp_path: Path) -> None:
    make_family(tmp_path / "in", "longformer")
    export(tmp_path / "in", tmp_path / "half", dtype="fp16", check=False)
    export(tmp_path / "half", tmp_path / "again", check=False)
    export(tmp_path / "half", tmp_path / "whole", dtype="fp32")
    files = [tmp_path / name / "model.safetensors" for name in ("half", "again", "whole")]
    half, again, whole = map(load_file, files)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert all(tensor.equal(half[name].float()) for name, tensor in whole.items())
    assert {tensor.dtype for tensor in again.values()} == {torch.float16}
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "* stored in fp32, with the numbers of fp16\n" in card
    assert "rounded" not in card.partition("## Checks")[0]
    assert "move by" not in card


def test_without_the_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_family(tmp_path / "in", "longformer")
    words = ("export", tmp_path / "in", tmp_path / "out", "--no-check", "--model", "bare")
    assert exit_code(*words) == 0
    assert f"wrote {tmp_path / 'out'}" in capsys.readouterr().out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Not compared with transformers: it was not asked for (--no-check)." in card
    assert "add_pooling_layer=False" in card
    load(tmp_path / "out", "LongformerModel", add_pooling_layer=False)


def test_words_that_mean_nothing(tmp_path: Path) -> None:
    source = small_model(tmp_path / "in")
    for words, told in (
        ({"model": "causal"}, "export model: got causal; wanted masked-lm or bare"),
        ({"dtype": "int8"}, "dtype: got int8; wanted fp16 or bf16 or fp32"),
        ({"format": "tf"}, "export format: got tf; wanted hf or fairseq"),
    ):
        with pytest.raises(ValueError, match=told):
            export(source, tmp_path / "out", **words)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("options", [[], ["--dtype", "fp16"]], ids=["as it is", "fp16"])
def test_no_room(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    make_family(tmp_path / "in", "longformer", hidden=64)
    capsys.readouterr()  # transformers' own words
    with small_disk(tmp_path / "disk", kib=64) as disk:
        assert exit_code("export", tmp_path / "in", disk / "out", "--no-check", *options) == 2
        assert "no space left" in check_form(capsys.readouterr().err, "export").lower()
        assert list(disk.iterdir()) == []


def test_a_number_that_is_none_does_not_leave(tmp_path: Path) -> None:
    make_family(tmp_path / "in", "longformer")
    path = tmp_path / "in" / "model.safetensors"
    tensors = load_file(path)
    tensors["longformer.encoder.layer.1.output.dense.bias"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    for dtype in (None, "fp16"):
        with pytest.raises(ValueError, match=r"NaN or infinity in longformer\.encoder\.layer\.1"):
            export(tmp_path / "in", tmp_path / "out", dtype=dtype)
    assert [entry.name for entry in tmp_path.iterdir()] == ["in"]
