"""The validation split: by the text alone, so it stands when the corpus grows."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from longpretrain.data import Corpus, load_tokenizer
from longpretrain.errors import InputError
from longpretrain.prepare import prepare
from longpretrain.prepare.deduplicate import document_hash
from longpretrain.prepare.split import Split

TEXTS = [f"Document number {number} of the corpus." for number in range(400)]


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(folder):
    corpus = Corpus.open(folder, verify="sha256")
    tokenizer = load_tokenizer()
    return [tokenizer.decode(corpus.document(i)) for i in range(len(corpus))]


@pytest.mark.parametrize("share", ["0.01", 0.01, Fraction(1, 100)])
def test_a_share_is_what_was_written(share):
    """0.01 as a binary number is a little more."""
    split = Split(share)
    assert split.share == Fraction(1, 100)
    border = (1 << 128) // 100
    assert split.of((border - 1).to_bytes(16)) == "valid"
    assert split.of(border.to_bytes(16)) == "train"


def test_no_share_no_split():
    assert Split(None).names == ("",)
    assert Split(None).of(bytes(16)) == ""


@pytest.mark.parametrize("share", ["0", "1", "-0.1", "x", "1/0", "nan", "1e-400", 2.0])
def test_a_share_that_is_none(share):
    with pytest.raises(InputError, match=r"valid: got .*; wanted a share"):
        Split(share)


def test_about_the_share(tmp_path):
    sides = [Split("0.1").of(document_hash(text)) for text in TEXTS]
    assert 20 < sides.count("valid") < 60


def test_it_stands_when_the_corpus_grows(tmp_path):
    first = write(tmp_path / "first.jsonl", TEXTS[:300])
    more = write(tmp_path / "more.jsonl", [*TEXTS[300:], TEXTS[5], TEXTS[299]])
    prepare([first], tmp_path / "small", valid="0.1")
    prepare([more, first], tmp_path / "large", valid="0.1", unit_bytes=1000)
    sides = {}
    for name in ("train", "valid"):
        small, large = texts_of(tmp_path / "small" / name), texts_of(tmp_path / "large" / name)
        assert set(small) <= set(large)
        assert [text for text in large if text in set(small)][-len(small) :] == small
        sides[name] = large
        manifest = Corpus.open(tmp_path / "large" / name).manifest
        assert (manifest.split, manifest.settings["valid"]) == (name, "1/10")
    assert not set(sides["train"]) & set(sides["valid"]), "no document in both"
    assert sorted(sides["train"] + sides["valid"]) == sorted([*TEXTS, TEXTS[5], TEXTS[299]])


def test_a_filter_of_text_comes_before(tmp_path):
    """Two spellings that become one text are on one side."""
    spelt = write(tmp_path / "a.jsonl", [f"Caf\u00e9 {i}" for i in range(200)])
    other = write(tmp_path / "b.jsonl", [f"Cafe\u0301 {i}" for i in range(200)])
    prepare([spelt, other], tmp_path / "out", valid="0.3", filters=["unicode=nfc"])
    train, valid = (texts_of(tmp_path / "out" / name) for name in ("train", "valid"))
    assert not set(train) & set(valid)
    assert len(train) + len(valid) == 400


def test_one_side_without_a_document(tmp_path):
    source = write(tmp_path / "a.jsonl", TEXTS[:3])
    with pytest.raises(InputError, match="valid documents: got none of 3; wanted at least one"):
        prepare([source], tmp_path / "out", valid="0.000001")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
    assert prepare([source], tmp_path / "out", valid="0.5").documents < 3


def test_both_sides_are_found_whole_or_made_again(tmp_path):
    source = write(tmp_path / "a.jsonl", TEXTS)
    out = tmp_path / "out"
    manifest = prepare([source], out, valid="0.1")
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert prepare([source], out, valid="0.1") == manifest
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == times
    damaged = out / "valid" / "tokens-00000.bin"
    before = damaged.read_bytes()
    damaged.write_bytes(before[:-2])
    prepare([source], out, valid="0.1")
    assert damaged.read_bytes() == before
    for other in (None, "0.2"):
        with pytest.raises(InputError, match="got a corpus of other inputs, settings"):
            prepare([source], out, valid=other)
