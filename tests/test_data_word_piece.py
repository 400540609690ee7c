"""BERT's vocab.txt as a tokenizer, and its settings above a tokenizer.json: as in transformers."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_models import HARD_TEXT, write_tokenizer
from family_tokenizers import (
    FORMS,
    TEXTS,
    named,
    need_same_ids,
    save_as_longformer,
    theirs_of,
    without_special,
)

from longpretrain.data import load_tokenizer
from longpretrain.errors import InputError

BERTS_SETTINGS: dict[str, dict[str, Any]] = {
    "uncased": {},
    "cased": {"do_lower_case": False},
    "accents kept": {"strip_accents": False},
    "accents of cased stripped": {"do_lower_case": False, "strip_accents": True},
    "chinese words": {"tokenize_chinese_chars": False},
    "nulls": {"strip_accents": None, "never_split": None},
}


def with_settings(folder: Path, settings: dict[str, Any], form: Any) -> Path:
    write_tokenizer(folder, "bert", form=form)
    path = folder / "tokenizer_config.json"
    whole = json.loads(path.read_text()) | settings
    if "tokenizer_class" in settings and settings["tokenizer_class"] is None:
        del whole["tokenizer_class"]
    path.write_text(json.dumps(whole))
    return folder


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("settings", BERTS_SETTINGS.values(), ids=BERTS_SETTINGS)
def test_settings_count_above_tokenizer_json(
    tmp_path: Path, settings: dict[str, Any], form: Any
) -> None:
    folder = with_settings(tmp_path / "bert", settings, form)
    ours, before = load_tokenizer(folder), theirs_of(folder)
    need_same_ids(ours, before)
    after = theirs_of(save_as_longformer(ours, tmp_path / "saved"))
    need_same_ids(ours, after)
    assert load_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint
    plain = load_tokenizer(with_settings(tmp_path / "plain", {}, form))
    changed = any(
        not np.array_equal(ours.encode(text), plain.encode(text)) for text in TEXTS.values()
    )
    assert changed == any(value is not None for value in settings.values())


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "BertTokenizer", None])
def test_only_berts_class_has_them(tmp_path: Path, kind: str | None) -> None:
    settings = {"do_lower_case": False, "tokenizer_class": kind}
    folder = with_settings(tmp_path / "bert", settings, "json")
    ours = load_tokenizer(named("bert", folder))
    need_same_ids(ours, theirs_of(folder))
    upper = ours.encode("PEOPLE").tolist()
    assert (upper == ours.encode("people").tolist()) == (kind == "PreTrainedTokenizerFast")


def test_vocab_txt_alone_is_the_same_tokenizer(tmp_path: Path) -> None:
    alone, whole = (
        load_tokenizer(with_settings(tmp_path / form, {}, form)) for form in ("files", "published")
    )
    assert alone.fingerprint == whole.fingerprint
    assert (alone.special_ids, alone.bos_id, alone.eos_id) == (whole.special_ids, 4, 5)
    assert np.array_equal(alone.real_ids, whole.real_ids)
    assert not {1, 2} & {*alone.real_ids.tolist()}  # [unused0], [unused1]
    assert alone.decode(alone.encode("the people")) == "the people"


def test_special_names_in_text_are_text(tmp_path: Path) -> None:
    ours = load_tokenizer(with_settings(tmp_path, {}, "files"))
    found = set(ours.encode("[MASK] the [SEP] people [PAD][CLS]").tolist())
    assert not found & (ours.special_ids - {ours.unk_id})


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_lines_of_vocab_txt(tmp_path: Path, end: str) -> None:
    with_settings(tmp_path, {}, "files")
    path = tmp_path / "vocab.txt"
    words = path.read_text().strip().split("\n")
    words.insert(20, "a\u2028b")  # ends a line to Python, and none to transformers
    path.write_bytes(((end or "\n").join(words) + end).encode())
    need_same_ids(load_tokenizer(tmp_path), theirs_of(tmp_path), tuple(HARD_TEXT))


def test_tokens_added_to_the_vocabulary(tmp_path: Path) -> None:
    folder = with_settings(tmp_path / "bert", {}, "files")
    size = load_tokenizer(folder).vocab_size
    (folder / "added_tokens.json").write_text(json.dumps({"longpre": size}))
    ours, before = load_tokenizer(folder), theirs_of(folder)
    assert ours.vocab_size == size + 1
    text = "the longpre people"
    assert ours.encode(text).tolist() == without_special(before, text)
    assert size in ours.encode(text)
    after = theirs_of(save_as_longformer(ours, tmp_path / "saved"))
    assert without_special(after, text) == ours.encode(text).tolist()
    (folder / "added_tokens.json").write_text(json.dumps({"longpre": size + 1}))
    told = rf"got added token 'longpre' with id {size + 1}; wanted {size} and on"
    with pytest.raises(InputError, match=told):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("settings", "config", "got"),
    [
        ({"tokenizer_class": "BertJapaneseTokenizer"}, {}, "BertJapaneseTokenizer"),
        ({"tokenizer_class": None}, {"tokenizer_class": "PhobertTokenizer"}, "PhobertTokenizer"),
        ({"tokenizer_class": None}, {"model_type": "roberta"}, "roberta"),
    ],
)
def test_vocab_txt_of_another_tokenizer(
    tmp_path: Path, settings: dict[str, Any], config: dict[str, Any], got: str
) -> None:
    with_settings(tmp_path, settings, "files")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match=f"got vocab.txt for {got}; wanted BERT's WordPiece .* --tokenizer"
    ):
        load_tokenizer(tmp_path)


def test_vocab_txt_beside_codes_of_a_bpe(tmp_path: Path) -> None:
    with_settings(tmp_path, {"tokenizer_class": None}, "files")
    (tmp_path / "bpe.codes").touch()
    with pytest.raises(InputError, match=r"got vocab.txt beside bpe.codes; wanted BERT's"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["[UNK]", "[SEP]"])
def test_vocab_txt_without_a_special_token(tmp_path: Path, name: str) -> None:
    with_settings(tmp_path, {}, "files")
    path = tmp_path / "vocab.txt"
    path.write_text(path.read_text().replace(name, "word"))
    told = rf"got no {re.escape(name)} in vocab.txt of .*; wanted \[UNK\], \[CLS\], \[SEP\], or"
    with pytest.raises(InputError, match=told):
        load_tokenizer(tmp_path)


def test_a_truncation_of_the_source_is_not_the_long_models(tmp_path: Path) -> None:
    """all-MiniLM's tokenizer.json cuts every text at 128 tokens and pads to it."""
    import tokenizers

    folder = with_settings(tmp_path / "bert", {}, "json")
    whole = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    whole.enable_truncation(8)
    whole.enable_padding(length=8)
    whole.save(str(folder / "tokenizer.json"))
    save_as_longformer(load_tokenizer(folder), tmp_path / "saved")
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert (saved.truncation, saved.padding) == (None, None)
    assert len(saved.encode("the people " * 50).ids) > 100
