"""Every family in: what the long model computes is what transformers computes for the source."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from conversions.titles import TITLES
from family_models import FAMILIES, make_family
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from longpretrain.cli import main
from longpretrain.convert import convert
from longpretrain.convert.lengthen import POSITIONS
from longpretrain.convert.position_rows import Init
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.model import load_encoder, load_model, read_config, read_tensors

LIMIT = 1e-4
LEARNT, LONG = 64, 200
COVERING = 128
"""A window in which each of 64 tokens reaches all others."""
HEADS = {
    "masked-lm": "logits", "pretraining": "logits", "bare": "hidden states",
    "classifier": "hidden states",
}  # fmt: skip
FULL = [name for name in FAMILIES if name != "longformer"]
CASES = [
    *((family, "masked-lm") for family in FAMILIES if family != "minilm"),
    *((family, "bare") for family in FAMILIES),
    *((family, "classifier") for family in FULL if family != "minilm"),
    ("bert", "pretraining"),
]


def of_source(family: str, kind: str) -> Any:
    """A case whose row in the table of conversions is told by what it is."""
    what = {"bare": "no head", "classifier": "a classifier", "pretraining": "two heads"}.get(kind)
    mark = pytest.mark.conversion(
        family=TITLES[family] + (f" ({what})" if what else ""),
        direction="HF -> Longformer",
        checked=f"{HEADS[kind]} of ours and of transformers' Longformer equal to the source's "
        f"(1e-4) at 7 and {LEARNT} tokens, covering window",
    )
    return pytest.param(family, kind, marks=mark, id=f"{family}-{kind}")


def batch(folder: Path, length: int) -> tuple[Tensor, Tensor]:
    """Two sequences, the second one padded; ids and where there is padding."""
    config = read_config(folder)
    generator = torch.Generator().manual_seed(length)
    tokens_BN = torch.randint(7, config.vocab_size, (2, length), generator=generator)
    padding_BN = torch.zeros(2, length, dtype=torch.bool)
    padding_BN[1, length // 2 + 1 :] = True
    return tokens_BN.masked_fill(padding_BN, config.pad_id), padding_BN


def theirs(folder: Path, model: Any, tokens_BN: Tensor, padding_BN: Tensor) -> Tensor:
    """Logits or hidden states by transformers; the class of the folder, or the one given."""
    said = json.loads((folder / "config.json").read_text())["architectures"][0]
    if said.endswith("Classification"):
        model, said = transformers.AutoModel, ""
    model = (model or getattr(transformers, said)).from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(tokens_BN, attention_mask=(~padding_BN).long())
    found: Tensor = out.last_hidden_state if hasattr(out, "last_hidden_state") else out[0]
    return found[~padding_BN]


def ours(folder: Path, tokens_BN: Tensor, padding_BN: Tensor) -> Tensor:
    model: Any = (load_model if read_config(folder).has_lm_head else load_encoder)(folder)
    with torch.no_grad():
        found: Tensor = model(tokens_BN, padding_BN=padding_BN)
    return found[~padding_BN]


@pytest.mark.parametrize(("family", "kind"), [of_source(*case) for case in CASES])
def test_a_long_model_computes_what_its_source_does(family: str, kind: Any, tmp_path: Path) -> None:
    source = make_family(tmp_path / "short", family, kind=kind, positions=LEARNT, window=COVERING)
    target = tmp_path / "long"
    report = convert(source, target, positions=LONG, attention_window=COVERING)
    has_head = HEADS[kind] == "logits"
    assert read_config(target).has_lm_head == has_head
    assert ("no masked-LM head" in str(report)) == (not has_head)
    for length in (7, LEARNT):
        tokens_BN, padding_BN = batch(source, length)
        wanted = theirs(source, None, tokens_BN, padding_BN)
        assert wanted.std() > 0.1  # not degenerate
        for found in (
            ours(source, tokens_BN, padding_BN),
            ours(target, tokens_BN, padding_BN),
            theirs(target, None, tokens_BN, padding_BN),
        ):
            assert (found - wanted).abs().max() <= LIMIT
    assert load_tokenizer(target).fingerprint == load_tokenizer(source).fingerprint
    check_long_input(target)


def check_long_input(folder: Path) -> None:
    """All positions can be used; one more cannot."""
    config = read_config(folder)
    assert config.max_tokens == LONG
    tokens_BN = torch.full((1, LONG), 9)
    assert ours(folder, tokens_BN, torch.zeros_like(tokens_BN, dtype=torch.bool)).isfinite().all()


def name_in_source(family: str, name: str) -> str:
    """Of a tensor of the long model, its global projections those of the local attention."""
    if family == "longformer":
        return name
    name = name.replace("_global.", ".")
    if family != "bert":
        return name.replace("longformer.", "roberta.")
    name = name.replace("longformer.", "bert.").replace("lm_head.bias", "cls.predictions.bias")
    name = name.replace("lm_head.layer_norm", "cls.predictions.transform.LayerNorm")
    return name.replace("lm_head.dense", "cls.predictions.transform.dense")


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "minilm"])
def test_where_each_number_of_a_family_comes_from(family: str, tmp_path: Path) -> None:
    """Compared with the file, under its own names and without our reader."""
    source = make_family(tmp_path / "short", family, positions=LEARNT)
    convert(source, tmp_path / "long", positions=LONG, attention_window=8)
    with safe_open(source / "model.safetensors", "pt") as file:
        old = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    with safe_open(tmp_path / "long" / "model.safetensors", "pt") as file:
        new = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    is_bert = FAMILIES[family].model_type == "bert"
    for name, tensor in new.items():
        if "position_embeddings" in name:
            continue
        assert tensor.equal(old[name_in_source(family, name)]), name
    table = next(t for n, t in new.items() if "position_embeddings" in n)
    learnt = next(t for n, t in old.items() if "position_embeddings" in n)
    padding, first = (table[:1], 0) if is_bert else (table[:2], 2)
    assert padding.equal(torch.zeros(1, 32) if is_bert else learnt[:2])
    rows = table[len(padding) :]
    assert len(rows) == LONG
    assert all(rows[i].equal(learnt[first + i % LEARNT]) for i in range(LONG))
    config = read_config(tmp_path / "long")
    ids = {"camembert": (1, 5, 6), "bert": (0, 4, 5)}.get(family, (1, 0, 2))
    assert (config.pad_id, config.bos_id, config.eos_id) == ids
    assert config.type_vocab_size == (2 if is_bert else 1)
    assert config.layer_norm_eps == (1e-12 if is_bert else 1e-5)
    assert config.learnt_positions == LEARNT


@pytest.mark.parametrize("family", ["roberta", "minilm"])
def test_a_pooler_is_carried_over_and_read_by_transformers(family: str, tmp_path: Path) -> None:
    source = make_family(tmp_path / "short", family, kind="bare", positions=LEARNT)
    convert(source, tmp_path / "long", positions=LONG, attention_window=COVERING)
    long, info = transformers.LongformerModel.from_pretrained(
        tmp_path / "long", output_loading_info=True
    )
    assert not any(info.values()), info
    short = transformers.AutoModel.from_pretrained(source)
    tokens_BN, padding_BN = batch(source, 30)
    found, wanted = (
        model.eval()(tokens_BN, attention_mask=(~padding_BN).long()).pooler_output
        for model in (long, short)
    )
    assert wanted.std() > 0.1
    assert (found - wanted).abs().max() <= LIMIT


def test_a_model_without_a_head_or_a_pooler_says_so(tmp_path: Path) -> None:
    source = make_family(tmp_path / "short", "bert", kind="bare", positions=LEARNT)
    path = source / "model.safetensors"
    with safe_open(path, "pt") as file:
        kept = {n: file.get_tensor(n) for n in file.keys() if "pooler" not in n}  # noqa: SIM118
    save_file(kept, path, metadata={"format": "pt"})
    report = convert(source, tmp_path / "long", positions=LONG)
    assert [note.split(":")[0] for note in report.notes] == [
        "no masked-LM head in the source", "no pooler in the source",
    ]  # fmt: skip
    assert not any("pooler" in name for name in read_tensors(tmp_path / "long"))


def test_what_a_masked_lm_model_has_beside_it_is_told(tmp_path: Path) -> None:
    source = make_family(tmp_path / "short", "bert", kind="pretraining", positions=LEARNT)
    text = str(convert(source, tmp_path / "long", positions=LONG))
    assert "left out, no part of a masked-LM model: bert.pooler.dense.bias, " in text
    assert "cls.seq_relationship.weight" in text


def test_a_new_head_is_drawn_by_its_seed(tmp_path: Path) -> None:
    source = make_family(tmp_path / "short", "minilm", positions=LEARNT)
    targets = [tmp_path / name for name in ("one", "again", "other")]
    for target, seed in zip(targets, (1, 1, 2), strict=True):
        report = convert(source, target, positions=LONG, new_head=True, seed=seed)
    text = str(report)
    assert "5 x masked-LM head: new, drawn with seed 2" in text
    assert report.notes == ("left out, no part of a masked-LM model: the pooler",)
    one, again, other = (read_tensors(target) for target in targets)
    assert all(tensor.equal(again[name]) for name, tensor in one.items())
    differing = {name for name, tensor in one.items() if not tensor.equal(other[name])}
    assert differing == {"lm_head.dense.weight"}
    assert float(one["lm_head.dense.weight"].std()) == pytest.approx(0.02, rel=0.1)
    assert not any("pooler" in name for name in one)
    tokens_BN, padding_BN = batch(source, 30)
    assert ours(targets[0], tokens_BN, padding_BN).shape[-1] == read_config(source).vocab_size
    found = theirs(targets[0], transformers.LongformerForMaskedLM, tokens_BN, padding_BN)
    assert (found - ours(targets[0], tokens_BN, padding_BN)).abs().max() <= LIMIT


@pytest.mark.conversion(
    family="Longformer",
    direction="4,096 -> 16,384 tokens",
    checked="logits equal to the source's (1e-4) at 7 and 64 tokens; every row of the table",
)
def test_a_longformer_of_4096_tokens_is_lengthened_to_16384(tmp_path: Path) -> None:
    source = make_family(
        tmp_path / "short", "longformer", positions=4096, window=64, layers=1, hidden=16
    )
    target = tmp_path / "long"
    assert main(["convert", str(source), str(target), "--positions", "16384"]) == 0
    config = read_config(target)
    assert (config.max_position_embeddings, config.attention_window) == (16386, (64,))
    old, new = read_tensors(source), read_tensors(target)
    assert new[POSITIONS][2:].equal(old[POSITIONS][2:].repeat(4, 1))
    assert all(new[name].equal(old[name]) for name in old if name != POSITIONS)
    tokens_BN, padding_BN = batch(source, 33)  # within both windows
    wanted = theirs(source, None, tokens_BN, padding_BN)
    assert (ours(target, tokens_BN, padding_BN) - wanted).abs().max() <= LIMIT
    tokens_BN = torch.full((1, 16384), 9)
    assert ours(target, tokens_BN, torch.zeros(1, 16384, dtype=torch.bool)).isfinite().all()


@pytest.mark.conversion(
    family="Longformer",
    direction="other windows",
    checked="logits equal to transformers' with the same windows (1e-4) at 7 and 64 tokens",
)
def test_a_longformer_with_other_windows_is_what_transformers_makes_of_them(
    tmp_path: Path,
) -> None:
    source = make_family(tmp_path / "short", "longformer", positions=LEARNT, window=4)
    convert(source, tmp_path / "wide", positions=LEARNT, attention_window=[8, 16])
    model = transformers.LongformerForMaskedLM.from_pretrained(source, attention_window=[8, 16])
    for length in (7, LEARNT):
        tokens_BN, padding_BN = batch(source, length)
        with torch.no_grad():
            out = model.eval()(tokens_BN, attention_mask=(~padding_BN).long())
        wanted = out.logits[~padding_BN]
        found = ours(tmp_path / "wide", tokens_BN, padding_BN)
        assert (found - wanted).abs().max() <= LIMIT
        narrow = ours(source, tokens_BN, padding_BN)
        assert length == 7 or (found - narrow).abs().max() > 0.01


def rewritten(folder: Path, form: str) -> None:
    """The weights of a folder in another form."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    path.unlink()
    if form in ("zip", "legacy"):
        file_name = folder / "pytorch_model.bin"
        torch.save(tensors, file_name, _use_new_zipfile_serialization=form == "zip")
        return
    names = sorted(tensors)
    suffix = "bin" if form == "bin shards" else "safetensors"
    stem = "pytorch_model" if suffix == "bin" else "model"
    weight_map = {}
    for number, part in enumerate(names[start::3] for start in range(3)):
        file_name = folder / f"{stem}-{number + 1:05d}-of-00003.{suffix}"
        shard = {name: tensors[name] for name in part}
        torch.save(shard, file_name) if suffix == "bin" else save_file(shard, file_name)
        weight_map |= dict.fromkeys(part, file_name.name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("form", "shown"),
    [
        ("zip", "pytorch_model.bin"),
        ("legacy", "pytorch_model.bin of torch < 1.6"),
        ("shards", "safetensors shards"),
        ("bin shards", "pytorch_model.bin shards"),
    ],
)
@pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            name,
            marks=pytest.mark.conversion(
                family=TITLES[name], direction="{shown} -> Longformer",
                checked="every tensor equal bit for bit to that of safetensors",
            ),
        )
        for name in ("xlm-roberta", "bert")
    ],
)  # fmt: skip
def test_the_form_of_the_files_does_not_matter(
    family: str, form: str, shown: str, tmp_path: Path
) -> None:
    source = make_family(tmp_path / "short", family, positions=LEARNT)
    convert(source, tmp_path / "one", positions=LONG)
    rewritten(source, form)
    convert(source, tmp_path / "two", positions=LONG)
    first, second = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")
    )
    assert first == second


NAMES = st.sampled_from([(family, kind) for family, kind in CASES if kind != "classifier"])


class Folders:
    """Sources, each written once, and fresh names for targets."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = itertools.count()

    def new(self) -> Path:
        return self._folder / f"target-{next(self._count)}"

    def source(self, family: str, kind: Any) -> Path:
        folder = self._folder / f"{family}-{kind}"
        if not folder.exists():
            make_family(folder, family, kind=kind, positions=24, window=64, tokenizer=None)
        return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("families"))


@settings(max_examples=30)
@given(name=NAMES, init=st.sampled_from(get_args(Init)), data=st.data())
def test_within_a_covering_window_nothing_changes(
    folders: Folders, name: Any, init: Any, data: Any
) -> None:
    """Any family, target length, windows and way to make positions; any text that they cover."""
    source, target = folders.source(*name), folders.new()
    positions = 24 if init == "interpolate" else data.draw(st.integers(2, 70))
    half = st.integers(1, positions // 2)
    windows = [2 * w for w in data.draw(st.lists(half, min_size=2, max_size=2))]
    layers = read_config(source).num_layers
    convert(
        source, target, positions=positions, attention_window=windows[:layers], init=init,
        need_tokenizer=False,
    )  # fmt: skip
    covered = min(windows[:layers]) // 2 + 1
    length = data.draw(st.integers(1, min(24, positions, covered)))
    tokens_BN, padding_BN = batch(source, length)
    found, wanted = (ours(folder, tokens_BN, padding_BN) for folder in (target, source))
    assert (found - wanted).abs().max() <= 1e-5
