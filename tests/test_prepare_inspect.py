"""prepare --inspect: counts against a plain count, and what is printed of texts."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from prepare_inputs import lines
from told import check_form, exit_code

from longpretrain.data import Corpus, load_tokenizer
from longpretrain.data.manifest import Manifest
from longpretrain.data.shard_writer import ShardWriter
from longpretrain.errors import InputError
from longpretrain.prepare import inspect as module
from longpretrain.prepare import prepare
from longpretrain.prepare.inspect import inspect, inspect_text, measure_lengths, printable

TEXTS = [f"peace number {n} " + "and trade " * (n % 7) for n in range(60)]


def corpus_of(folder: Path, lengths: list[int]) -> Corpus:
    """Documents of those lengths, in shards of about 2,000 tokens."""
    folder.mkdir()
    writer = ShardWriter(folder, vocab_size=100, shard_bytes=4000)
    for length in lengths:
        writer.add(np.full(length, 7))
    shards = writer.finish()
    Manifest(
        tokenizer_fingerprint="f" * 64, vocab_size=100, dtype="uint16", documents=len(lengths),
        tokens=sum(lengths), shards=shards,
    ).write(folder)  # fmt: skip
    return Corpus.open(folder)


@pytest.fixture
def made(tmp_path):
    """A corpus in two parts, with all that may be told of one."""
    source = tmp_path / "in.jsonl"
    texts = [*TEXTS, TEXTS[0], "cafe\u0301 in the morning", "one"]
    bad = b'{"text": 1}\n' * 7
    source.write_bytes(lines(*({"text": text} for text in texts), {"text": ""}) + bad)
    prepare(
        [source], tmp_path / "out", valid="1/4", on_error="skip",
        filters=["unicode=nfc", "min_tokens=2", "deduplicate"],
    )  # fmt: skip
    return tmp_path / "out"


class TestLengths:
    @pytest.mark.parametrize(
        "lengths",
        [
            [1],
            [3, 1, 2],
            [7, 8, 8, 9, 1],
            [512, 513, 1200, 1201, 4096, 4097, 4095, 511],
            [int(n) for n in np.random.default_rng(1).integers(1, 9000, 101)],
        ],
        ids=["one", "three", "borders-of-bins", "borders-of-limits", "many"],
    )
    def test_against_a_plain_count(self, tmp_path, lengths, monkeypatch):
        monkeypatch.setattr("longpretrain.data.shards.SPAN_DOCUMENTS", 3)
        found = measure_lengths(corpus_of(tmp_path / "corpus", lengths))
        assert (found.shortest, found.longest) == (min(lengths), max(lengths))
        assert found.median == statistics.median_low(lengths)
        for number, low in enumerate(found.edges[:-1]):
            inside = [n for n in lengths if low <= n < found.edges[number + 1]]
            assert (found.documents[number], found.tokens[number]) == (len(inside), sum(inside))
        assert sum(found.documents) == len(lengths)
        assert found.longer == tuple(
            (limit, sum(n > limit for n in lengths), sum(n for n in lengths if n > limit))
            for limit in (512, 1200, 4096)
        )

    def test_a_median_beyond_what_is_counted_one_by_one(self, tmp_path, monkeypatch):
        monkeypatch.setattr(module, "_EXACT", 100)
        corpus_of(tmp_path / "corpus", [5, 300, 400])
        [contents] = inspect(tmp_path / "corpus")
        assert "median 100 or more" in inspect_text([contents])


class TestText:
    def test_everything_is_told(self, made):
        text = inspect_text(inspect(made))
        train, valid = (Corpus.open(made / side) for side in ("train", "valid"))
        for corpus in (train, valid):
            assert f"{len(corpus):,} documents, {corpus.num_tokens:,} tokens" in text
        for told in (
            "bytes: in.jsonl", "1 empty, 7 unreadable", "and 2 more, in problems.jsonl",
            "filter unicode=nfc: of 63 documents 1 changed", "in.jsonl line 62: cafe\u0301 in",
            "filter min_tokens=2: of 63 documents 1 dropped, with 1 tokens",
            "filter deduplicate: of 62 documents 1 dropped", "valid 1/4",
            "problem: in.jsonl line 65: got int in field 'text'",
        ):  # fmt: skip
            assert text.count(told) == 2, told

    def test_the_histogram_has_a_row_a_bin(self, tmp_path, monkeypatch):
        monkeypatch.setenv("COLUMNS", "60")
        corpus_of(tmp_path / "corpus", [1] * 400 + [5] * 100 + [40])
        text = inspect_text(inspect(tmp_path / "corpus"))
        rows = text.partition("their tokens\n")[2].partition("\n\n")[0].splitlines()
        assert [row.split()[:3] for row in rows] == [
            ["1", "400", "400"], ["2-3", "0", "0"], ["4-7", "100", "500"], ["8-15", "0", "0"],
            ["16-31", "0", "0"], ["32-63", "1", "40"],
        ]  # fmt: skip
        bars = [row.count("#") for row in rows]
        assert bars[0] == 4 * bars[2]
        assert bars[1::2] == [0, 0, 1]
        assert max(map(len, rows)) <= 60

    def test_samples_are_documents_decoded_and_stay_the_same(self, made):
        [contents, _] = inspect(made)
        corpus, tokenizer = Corpus.open(made / "train"), load_tokenizer()
        assert len({sample.number for sample in contents.samples}) == 3
        for sample in contents.samples:
            ids = corpus.document(sample.number)
            assert sample.text == " ".join(tokenizer.decode(ids).split())
            assert sample.tokens == len(ids)
        assert inspect(made)[0] == contents

    def test_a_long_document_is_cut_between_characters(self, tmp_path):
        source = tmp_path / "in.jsonl"
        text = "\N{ROCKET}" * 300  # several tokens each: one is cut in the middle somewhere
        source.write_bytes(lines({"text": text}, {"text": "x" + text}, {"text": "xy" + text}))
        prepare([source], tmp_path / "out")
        for sample in inspect(tmp_path / "out")[0].samples:
            assert "\N{REPLACEMENT CHARACTER}" not in sample.text
            assert sample.text.endswith("\N{ROCKET} ...")
            assert len(sample.text) < 150

    def test_nothing_in_a_text_reaches_the_terminal_as_a_command(self):
        assert printable("red \x1b[31m\n\t\x9b text\u202e") == r"red \u{1b}[31m \u{9b} text\u{202e}"
        assert printable("caf\u00e9 \N{ROCKET}") == "caf\u00e9 \N{ROCKET}"

    def test_nor_does_anything_in_a_name(self, tmp_path):
        source = tmp_path / "a\x1b[2J.jsonl"
        source.write_bytes(lines({"text": "peace and trade"}, {"text": "one"}, {"text": 1}))
        prepare([source], tmp_path / "out", on_error="skip", filters=["min_tokens=2"])
        text = inspect_text(inspect(tmp_path / "out"))
        assert "\x1b" not in text
        assert text.count(r"a\u{1b}[2J.jsonl") == 3  # a source, an example, a problem

    @pytest.mark.parametrize("change", [{"filters": [{"name": "x"}]}, {"first_problems": [{}]}])
    def test_a_manifest_that_was_edited(self, made, change):
        path = made / "train" / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
        if "filters" in change:
            with pytest.raises(InputError, match="counts of the filter x"):
                inspect(made)
        else:
            assert "problem: None: None" in inspect_text(inspect(made))


class TestTokenizer:
    def test_of_another_corpus(self, tmp_path):
        corpus_of(tmp_path / "corpus", [4])
        [contents] = inspect(tmp_path / "corpus")
        assert contents.samples == ()
        assert "no samples: another tokenizer than RoBERTa's" in inspect_text([contents])
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        load_tokenizer().save(folder, 512)
        with pytest.raises(InputError, match=r"wanted tokenizer .*that of --tokenizer"):
            inspect(tmp_path / "corpus", tokenizer=folder)

    def test_one_that_is_given(self, made, tmp_path):
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        load_tokenizer().save(folder, 512)
        assert inspect(made, tokenizer=folder) == inspect(made)


class TestVerb:
    def test_prints_and_draws(self, made, tmp_path, capsys):
        for name, begins in (("a.png", b"\x89PNG"), ("a.html", b"<!doctype html>")):
            assert exit_code("prepare", "--inspect", made, "--out", tmp_path / name) == 0
            assert (tmp_path / name).read_bytes().startswith(begins)
            assert "deduplicate" in capsys.readouterr().out
        page = (tmp_path / "a.html").read_text()
        for told in (">train<", ">valid<", "in.jsonl line 65", "peace number", "of 62 documents"):
            assert told in page, told

    def test_refuses_before_it_looks(self, made, tmp_path, capsys):
        assert exit_code("prepare", "--inspect", made, "--out", tmp_path / "a.pdf") == 2
        captured = capsys.readouterr()
        assert "wanted .png" in check_form(captured.err, "prepare")
        assert captured.out == ""
        assert exit_code("prepare", "--inspect", tmp_path / "absent") == 2
        check_form(capsys.readouterr().err, "prepare")
