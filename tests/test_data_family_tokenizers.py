"""Tokenizers of every family: transformers' ids from the family's own files and, carried over by
convert, from the Longformer folder, whichever transformers runs these tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversions.titles import TITLES
from family_models import FAMILIES, HARD_TEXT, make_family, write_tokenizer
from family_tokenizers import (
    FORMS,
    POSITIONS,
    named,
    need_same_ids,
    need_same_special_ids,
    save_as_longformer,
    theirs_of,
    without_special,
)

from longpretrain.convert.lengthen import convert
from longpretrain.data import load_tokenizer, tokenizer_files
from longpretrain.data.sentence_piece import SentencePieceTokenizer
from longpretrain.prepare import prepare
from longpretrain.recipe import load_recipe
from longpretrain.tasks.masked_lm import MaskedLMTask

proves = {
    family: pytest.mark.conversion(
        family=name, direction="tokenizer -> Longformer",
        checked="ids, special ids and length as transformers' own, on hard text",
    )
    for family, name in TITLES.items()
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", [pytest.param(name, marks=proves[name]) for name in FAMILIES])
def test_ids_before_and_after_convert(tmp_path: Path, family: str, form: Any) -> None:
    source = make_family(tmp_path / "source", family, tokenizer=form, hidden=8, layers=1)
    convert(source, tmp_path / "long", positions=POSITIONS, attention_window=8)
    assert json.loads((tmp_path / "long/config.json").read_text())["model_type"] == "longformer"
    ours, again = load_tokenizer(source), load_tokenizer(tmp_path / "long")
    before, after = theirs_of(source), theirs_of(tmp_path / "long")
    need_same_ids(ours, before)
    need_same_special_ids(ours, before)
    need_same_ids(again, after)
    need_same_special_ids(again, after)
    assert (again.fingerprint, again.vocab) == (ours.fingerprint, ours.vocab)
    # What a user of the new folder gets is what the source gave, but for its length.
    assert (before.model_max_length, after.model_max_length) == (64, POSITIONS)
    assert len(after) == len(before) == ours.vocab_size
    assert (after.bos_token_id, after.eos_token_id) == (after.cls_token_id, after.sep_token_id)
    for text in HARD_TEXT.values():
        assert after(text).input_ids == before(text).input_ids
    # Without tokenizer.json transformers 5 forgets that RoBERTa's mask takes the space before it.
    write_tokenizer(named(FAMILIES[family].model_type, tmp_path), family)
    text = f"The {before.mask_token}. People"
    assert after(text).input_ids == theirs_of(tmp_path)(text).input_ids
    pair, wanted = (dict(theirs("the people", "1776")) for theirs in (after, before))
    assert pair["input_ids"] == wanted["input_ids"]
    assert pair.get("token_type_ids") == wanted.get("token_type_ids")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["roberta", "camembert", "xlm-roberta", "bert", "longformer"])
def test_what_transformers_saved(tmp_path: Path, family: str, form: Any) -> None:
    """transformers 4 and 5 write other files, and other settings in them, than the hub has."""
    write_tokenizer(tmp_path / "hub", family, form=form)
    source = tmp_path / "source"
    theirs_of(named(FAMILIES[family].model_type, tmp_path / "hub")).save_pretrained(source)
    ours = load_tokenizer(named(FAMILIES[family].model_type, source))
    need_same_ids(ours, theirs_of(source), tuple(HARD_TEXT))
    after = theirs_of(save_as_longformer(ours, tmp_path / "saved"))
    need_same_ids(ours, after, tuple(HARD_TEXT))
    need_same_special_ids(ours, after)
    assert {*after.all_special_ids} == ours.special_ids  # CamemBERT's unused ones among them


OTHERS_SETTINGS = {
    "of transformers 5": {
        "tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True,
        "extra_special_tokens": ["<s>NOTUSED", "</s>NOTUSED"],
    },
    "of transformers 4": {"tokenizer_class": "CamembertTokenizerFast", "extra_special_tokens": {}},
    "code of a stranger": {"auto_map": {"AutoTokenizer": [None, "theirs.Tokenizer"]}},
}  # fmt: skip


@pytest.mark.parametrize("settings", OTHERS_SETTINGS.values(), ids=OTHERS_SETTINGS)
def test_settings_that_only_one_transformers_reads_are_not_carried(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    write_tokenizer(tmp_path / "hub", "camembert", form="json")
    path = tmp_path / "hub" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    ours = load_tokenizer(named("camembert", tmp_path / "hub"))
    after = theirs_of(save_as_longformer(ours, tmp_path / "saved"))
    need_same_ids(ours, after, tuple(HARD_TEXT))
    need_same_special_ids(ours, after)
    assert after.model_max_length == POSITIONS


@proves["xlm-roberta"]
@pytest.mark.parametrize("form", ["files", "json"])
def test_xlm_r_of_250_002_ids(tmp_path: Path, form: str) -> None:
    """The published size: ids beyond 65,535 and the mask behind them all."""
    from sentencepiece import sentencepiece_model_pb2 as model_proto

    source = tmp_path / "source"
    write_tokenizer(source, "xlm-roberta", form="published")
    model, library = source / "sentencepiece.bpe.model", source / "tokenizer.json"
    proto = model_proto.ModelProto.FromString(model.read_bytes())
    more = [f"\u2581n{number}" for number in range(len(proto.pieces), 250_000)]
    if form == "files":
        for name in more:
            proto.pieces.add(piece=name, score=-20.0)
        model.write_bytes(proto.SerializeToString())
        library.unlink()
    else:
        tree = json.loads(library.read_text())
        vocab = tree["model"]["vocab"]
        tree["model"]["vocab"] = [*vocab[:-1], *([name, -20.0] for name in more), vocab[-1]]
        tree["added_tokens"][-1]["id"] = 250_001
        library.write_text(json.dumps(tree))
        model.unlink()
    ours = load_tokenizer(named("xlm-roberta", source))
    assert (ours.vocab_size, ours.mask_id, ours.id_dtype) == (250_002, 250_001, np.dtype(np.uint32))
    assert isinstance(ours, SentencePieceTokenizer) == (form == "files")
    after = theirs_of(save_as_longformer(ours, tmp_path / "saved", 4096))
    assert (len(after), after.model_max_length) == (250_002, 4096)
    need_same_special_ids(ours, after)
    need_same_ids(ours, after, ("accents", "cjk", "prose"))
    text = "the n249999 people n70000"
    assert 250_000 in ours.encode(text)
    assert ours.encode(text).tolist() == without_special(after, text)


def test_a_folder_keeps_its_vocabulary_for_other_tools(tmp_path: Path) -> None:
    kept = {
        "bert": {"vocab.txt"},
        "camembert": {"sentencepiece.bpe.model"},
        "roberta": {"vocab.json", "merges.txt"},
    }
    for family, names in kept.items():
        write_tokenizer(tmp_path / family, family)
        saved = save_as_longformer(load_tokenizer(tmp_path / family), tmp_path / f"{family} saved")
        found = {path.name for path in saved.iterdir()} & {*tokenizer_files.ALL}
        assert found - {"special_tokens_map.json"} == {*names, "tokenizer.json"}


@pytest.mark.parametrize("family", ["bert", "camembert", "xlm-roberta"])
def test_training_masks_real_tokens_of_the_family(
    tmp_path: Path, small_run: Path, family: str
) -> None:
    """BERT pads with 0, not 1; CamemBERT begins a text with 5, not 0: as the model has it."""
    model, corpus = tmp_path / "long", tmp_path / "corpus"
    convert(make_family(tmp_path / "short", family), model, positions=128, attention_window=8)
    prepare([small_run / "text" / "train"], corpus, tokenizer_folder=model)
    changes = [f"model.path={model}", f"data.train={corpus}"]
    task = MaskedLMTask(load_recipe(str(small_run / "recipe.yaml"), changes), model)
    tokenizer, sample = load_tokenizer(tmp_path / "short"), task.sample(3)
    assert task.tokenizer.fingerprint == tokenizer.fingerprint
    whole = sample.tokens_N.copy()
    assert whole[0] == tokenizer.bos_id == (4 if family == "bert" else tokenizer.vocab["<s>"])
    assert (whole[sample.positions_M] == tokenizer.mask_id).sum() > 5
    assert not np.isin(sample.targets_M, sorted(tokenizer.special_ids - {tokenizer.unk_id})).any()
    whole[sample.positions_M] = sample.targets_M
    end = whole[1:].tolist().index(tokenizer.eos_id)
    words = tokenizer.decode(whole[1 : 1 + end]).split()[1:-1]  # a block may cut the outer ones
    assert len(words) > 10
    files = sorted((small_run / "text" / "train").glob("*.txt"))
    assert any(" ".join(words) in path.read_text() for path in files)
