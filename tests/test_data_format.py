"""docs/data_format.md is true: a reader that follows it and nothing else reads what we write."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path

import pytest
from prepare_inputs import lines
from shard_reader import FormatError, ShardReader, is_for_validation
from small_run import write_text
from tokenizers import Tokenizer, models, pre_tokenizers

from longpretrain.data import Corpus, load_tokenizer
from longpretrain.prepare import prepare

WIDE = 70_000
"""Ids of a vocabulary that needs four bytes for each."""


def wide_tokenizer(folder: Path) -> Path:
    """A word is an id; most of the vocabulary are numbers, and ``last`` comes last."""
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "peace", "and"]
    names += [f"n{number}" for number in range(WIDE - len(names) - 1)] + ["last"]
    whole = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    whole.pre_tokenizer = pre_tokenizers.Whitespace()
    whole.add_special_tokens(names[:5])
    folder.mkdir()
    whole.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def speeches(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    write_text(folder / "books", documents=60, seed=1)
    return folder / "books"


def equal(folder, inputs):
    """Reads a corpus both ways, and checks all that the page says of it."""
    reader, corpus = ShardReader(folder), Corpus.open(folder, verify="sha256")
    documents = list(reader.documents())
    assert documents == [tuple(corpus.document(n).tolist()) for n in range(len(corpus))]
    assert len(reader.shards) == len(corpus.shards)
    reader.check_ids()
    reader.check_shards()
    reader.check_sources(inputs)
    reader.problems()
    return reader, documents


def test_two_bytes_an_id_and_several_shards(tmp_path, speeches):
    prepare([speeches], tmp_path / "out", shard_bytes=4096, unit_bytes=2048)
    reader, documents = equal(tmp_path / "out", speeches.parent)
    assert len(reader.shards) > 3
    assert len(documents) == 60
    tokenizer = load_tokenizer()
    texts = [path.read_text().strip() for path in sorted(speeches.glob("*.txt"))]
    assert [tokenizer.decode(ids) for ids in documents] == texts


def test_four_bytes_an_id(tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(lines(*({"text": f"peace and n{n} last"} for n in range(50))))
    tokenizer = wide_tokenizer(tmp_path / "tokenizer")
    prepare([source], tmp_path / "out", tokenizer_folder=tokenizer, shard_bytes=160)
    reader, documents = equal(tmp_path / "out", tmp_path)
    assert documents == [(5, 6, 7 + n, WIDE - 1) for n in range(50)]
    assert [len(starts) - 1 for _, starts in reader.shards] == [10] * 5
    assert len(reader.shards[0][0]) == 160


def test_a_source_in_pieces_and_a_document_larger_than_a_shard(tmp_path):
    source = tmp_path / "in.jsonl"
    texts = ["peace " * (400 if n == 17 else 5) + str(n) for n in range(40)]
    source.write_bytes(lines(*({"text": text} for text in texts)))
    prepare([source], tmp_path / "out", shard_bytes=200, unit_bytes=512)
    reader, documents = equal(tmp_path / "out", tmp_path)
    assert len(reader.manifest["sources"][0]["pieces"]) > 2
    assert [load_tokenizer().decode(ids) for ids in documents] == texts
    assert max(len(data) for data, _ in reader.shards) > 200


def test_problems_filters_and_both_sides_of_a_split(tmp_path):
    source = tmp_path / "in.jsonl"
    texts = [f"peace number {n % 30}" for n in range(60)] + ["one", "cafe\u0301 and trade routes"]
    bad = b"".join(b'{"text": %d}\n' % n for n in range(25))
    source.write_bytes(lines(*({"text": text} for text in texts)) + bad)
    filters = ["unicode=nfc", "min_tokens=2", "deduplicate"]
    prepare([source], tmp_path / "out", valid="1/3", filters=filters, on_error="skip")
    tokenizer = load_tokenizer()
    found = {}
    for side in ("train", "valid"):
        reader, documents = equal(tmp_path / "out" / side, tmp_path)
        assert reader.manifest["split"] == side
        assert len(reader.problems()) == 25
        found[side] = [tokenizer.decode(ids) for ids in documents]
        counts = [(f["name"], f["seen"], f["dropped"]) for f in reader.manifest["filters"]]
        assert counts == [("unicode=nfc", 62, 0), ("min_tokens=2", 62, 1), ("deduplicate", 61, 30)]
    kept = [f"peace number {n}" for n in range(30)] + ["caf\u00e9 and trade routes"]
    for side, texts_of in found.items():
        assert texts_of == [t for t in kept if is_for_validation(t, (1, 3)) == (side == "valid")]
        assert texts_of


class TestTheReaderNotices:
    """It is no test of the page if the reader takes anything."""

    @pytest.fixture
    def corpus(self, tmp_path, speeches):
        prepare([speeches], tmp_path / "out", shard_bytes=4096)
        return tmp_path / "out"

    def test_a_changed_byte(self, corpus):
        path = corpus / "tokens-00001.bin"
        data = bytearray(path.read_bytes())
        data[5] ^= 1
        path.write_bytes(data)
        with pytest.raises(FormatError, match=r"sha256 of tokens-00001\.bin"):
            ShardReader(corpus)

    def test_a_shard_closed_too_early(self, corpus):
        path = corpus / "manifest.json"
        tree = json.loads(path.read_text())
        tree["settings"]["shard_bytes"] = "100000"
        path.write_text(json.dumps(tree))
        with pytest.raises(FormatError, match="closed too early"):
            ShardReader(corpus).check_shards()

    def test_big_endian_numbers(self, corpus):
        starts = (corpus / "tokens-00000.idx").read_bytes()
        count = len(starts) // 8
        swapped = struct.pack(f">{count}q", *struct.unpack(f"<{count}q", starts))
        path = corpus / "manifest.json"
        old, new = (hashlib.sha256(data).hexdigest() for data in (starts, swapped))
        (corpus / "tokens-00000.idx").write_bytes(swapped)
        path.write_text(path.read_text().replace(old, new))
        with pytest.raises(FormatError, match=r"first and last of a \.idx"):
            ShardReader(corpus)
