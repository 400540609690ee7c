"""Shards and manifest: what is written is read back, and no damage goes unseen."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from longpretrain.data import shards
from longpretrain.data.manifest import Manifest, dtype_for
from longpretrain.data.shard_writer import ShardWriter
from longpretrain.data.shards import Corpus
from longpretrain.errors import InputError

ids = st.integers(0, 70_000)

PIECE = {"start": 0, "end": 5, "sha256": "x"}
SOURCE = {"name": "a", "bytes": 5, "sha256": "x"}
DOCUMENTS = [[5, 6, 7], [8], list(range(100, 130)), [9, 9], [10, 11, 12, 13]]


def write_corpus(folder, documents, *, vocab_size=1000, shard_bytes=20, fingerprint="f" * 64):
    """A corpus of lists of ids, in small shards."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, vocab_size=vocab_size, shard_bytes=shard_bytes)
    for ids in documents:
        writer.add(np.array(ids, np.int32))
    manifest = Manifest(
        tokenizer_fingerprint=fingerprint,
        vocab_size=vocab_size,
        dtype=dtype_for(vocab_size).name,
        documents=len(documents),
        tokens=sum(map(len, documents)),
        shards=writer.finish(),
    )
    manifest.write(folder)
    return manifest


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    documents=st.lists(st.lists(ids, min_size=1, max_size=9), min_size=1, max_size=12),
    shard_bytes=st.integers(1, 60),
    verify=st.sampled_from(["size", "sha256"]),
)  # fmt: skip
def test_documents_come_back(tmp_path_factory, documents, shard_bytes, verify):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, documents, vocab_size=70_001, shard_bytes=shard_bytes)
    corpus = Corpus.open(folder, verify=verify)
    assert len(corpus) == corpus.num_documents == len(documents)
    assert corpus.num_tokens == sum(map(len, documents))
    assert [corpus.document(i).tolist() for i in range(len(corpus))] == documents


@pytest.mark.parametrize(
    ("vocab_size", "dtype", "bytes_each"),
    [(1000, "uint16", 2), (65_535, "uint16", 2), (65_536, "uint32", 4), (250_002, "uint32", 4)],
)
def test_the_smallest_type_is_used(tmp_path, vocab_size, dtype, bytes_each):
    manifest = write_corpus(tmp_path, [[vocab_size - 1, 0]], vocab_size=vocab_size)
    assert manifest.dtype == dtype
    assert (tmp_path / "tokens-00000.bin").stat().st_size == 2 * bytes_each
    assert Corpus.open(tmp_path).document(0).tolist() == [vocab_size - 1, 0]


def test_the_files_are_as_documented(tmp_path):
    """docs/data_format.md, read without our reader."""
    write_corpus(tmp_path, DOCUMENTS)
    names = sorted(path.name for path in tmp_path.iterdir())
    shards = [f"tokens-{i:05d}.{kind}" for i in range(3) for kind in ("bin", "idx")]
    assert names == ["manifest.json", *shards]
    first = np.fromfile(tmp_path / "tokens-00000.bin", "<u2")
    assert first.tolist() == [5, 6, 7, 8]
    assert np.fromfile(tmp_path / "tokens-00000.idx", "<i8").tolist() == [0, 3, 4]
    tree = json.loads((tmp_path / "manifest.json").read_text())
    assert (tree["format"], tree["version"]) == ("longpretrain-tokens", 2)
    assert [shard["tokens"] for shard in tree["shards"]] == [4, 30, 6]
    assert tree["shards"][1]["bin"]["bytes"] == 60


def test_documents_are_memory_mapped(tmp_path):
    write_corpus(tmp_path, DOCUMENTS)
    document = Corpus.open(tmp_path).document(2)
    assert isinstance(document, np.memmap)
    assert not document.flags.writeable


def test_there_is_no_document_outside(tmp_path):
    write_corpus(tmp_path, DOCUMENTS)
    corpus = Corpus.open(tmp_path)
    for number in (-1, 5):
        with pytest.raises(IndexError):
            corpus.document(number)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    documents=st.lists(st.lists(ids, min_size=1, max_size=9), min_size=1, max_size=12),
    shard_bytes=st.integers(1, 60),
    span=st.integers(1, 5),
    data=st.data(),
)
def test_stretches_are_gathered_through_all_shards(
    tmp_path_factory, documents, shard_bytes, span, data
):
    folder = tmp_path_factory.mktemp("corpus")
    write_corpus(folder, documents, vocab_size=70_001, shard_bytes=shard_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "SPAN_DOCUMENTS", span)
        corpus = Corpus.open(folder)
        found = [
            (first + place, int(start), int(length))
            for first, starts, lengths in corpus.spans()
            for place, (start, length) in enumerate(zip(starts, lengths, strict=True))
        ]
    before = np.cumsum([0, *map(len, documents)]).tolist()
    assert found == [(n, before[n], len(document)) for n, document in enumerate(documents)]
    # Parts of some documents, of none of their tokens too, in the order of the corpus.
    chosen = sorted(data.draw(st.sets(st.integers(0, len(documents) - 1), min_size=1)))
    cuts = [sorted(data.draw(st.tuples(*[st.integers(0, len(documents[n]))] * 2))) for n in chosen]
    starts = np.array([before[n] + low for n, (low, _) in zip(chosen, cuts, strict=True)])
    lengths = np.array([high - low for low, high in cuts])
    right = [i for n, (low, high) in zip(chosen, cuts, strict=True) for i in documents[n][low:high]]
    assume(starts[-1] < corpus.num_tokens)
    assert corpus.gather(starts, lengths).tolist() == right


def test_a_corpus_travels_to_another_process_by_its_folder(tmp_path):
    write_corpus(tmp_path, [list(range(900))] * 50, shard_bytes=10_000)
    data = pickle.dumps(Corpus.open(tmp_path))
    assert len(data) < 1000
    assert pickle.loads(data).document(49).tolist() == list(range(900))
    # Another corpus of its name is no substitute.
    write_corpus(tmp_path, [list(range(900))] * 49, shard_bytes=10_000)
    with pytest.raises(InputError, match="as it was a moment ago"):
        pickle.loads(data)


class TestFingerprint:
    def test_it_is_that_of_the_data(self, tmp_path):
        first = write_corpus(tmp_path / "a", DOCUMENTS)
        assert write_corpus(tmp_path / "b", DOCUMENTS).fingerprint == first.fingerprint
        assert replace(first, inputs_digest="x").fingerprint == first.fingerprint
        assert Corpus.open(tmp_path / "a").fingerprint == first.fingerprint

    @pytest.mark.parametrize(
        "documents",
        [DOCUMENTS[:-1], [[5, 6], [7, 8], *DOCUMENTS[2:]], [[5, 6, 4], *DOCUMENTS[1:]]],
        ids=["fewer", "other borders", "another id"],
    )
    def test_other_data_has_another(self, tmp_path, documents):
        first = write_corpus(tmp_path / "a", DOCUMENTS)
        assert write_corpus(tmp_path / "b", documents).fingerprint != first.fingerprint

    def test_another_tokenizer_has_another(self, tmp_path):
        first = write_corpus(tmp_path / "a", DOCUMENTS)
        other = write_corpus(tmp_path / "b", DOCUMENTS, fingerprint="e" * 64)
        assert other.fingerprint != first.fingerprint


class TestDamage:
    @pytest.fixture
    def folder(self, tmp_path):
        write_corpus(tmp_path, DOCUMENTS)
        return tmp_path

    @pytest.mark.parametrize("name", ["tokens-00001.bin", "tokens-00002.idx"])
    def test_a_truncated_shard(self, folder, name):
        path = folder / name
        size = path.stat().st_size
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(InputError, match=f"truncated shard .*{name}") as info:
            Corpus.open(folder)
        assert info.value.got == f"{size - 1} bytes"
        assert info.value.wanted == f"{size} bytes"
        assert "prepare" in info.value.way_out

    def test_a_missing_shard(self, folder):
        (folder / "tokens-00001.bin").unlink()
        with pytest.raises(
            InputError, match=r"missing shard .*tokens-00001\.bin: got no such file"
        ):
            Corpus.open(folder)

    @pytest.mark.parametrize(
        ("name", "verify"),
        [
            ("tokens-00001.bin", "sha256"),
            ("tokens-00002.idx", "sha256"),
            ("tokens-00002.idx", "size"),
        ],
    )
    def test_one_altered_byte(self, folder, name, verify):
        path = folder / name
        data = bytearray(path.read_bytes())
        data[9] ^= 1
        path.write_bytes(data)
        with pytest.raises(InputError, match=f"altered shard .*{name}: got sha256"):
            Corpus.open(folder, verify=verify)

    def test_altered_tokens_are_found_when_every_byte_is_read(self, folder):
        path = folder / "tokens-00001.bin"
        path.write_bytes(bytes(path.stat().st_size))
        Corpus.open(folder)
        with pytest.raises(InputError, match="altered shard"):
            Corpus.open(folder, verify="sha256")

    @pytest.mark.parametrize(
        ("shard", "offsets", "message"),
        [
            (1, [0, 7], "got offsets 0 to 7 of 1 documents"),
            (0, [1, 3, 4], "got offsets 1 to 4"),
            (0, [0, 4, 4], "got offsets 0 to 4 of 2 documents, not rising"),
            (0, [0, 9, 4], "not rising; wanted 0 to 4 of 2, rising"),
        ],
        ids=str,
    )
    def test_an_index_that_cannot_be(self, folder, shard, offsets, message):
        """Even where the manifest was written to match."""
        data = np.array(offsets, "<i8").tobytes()
        (folder / f"tokens-{shard:05d}.idx").write_bytes(data)
        tree = json.loads((folder / "manifest.json").read_text())
        tree["shards"][shard]["idx"]["sha256"] = hashlib.sha256(data).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(tree))
        with pytest.raises(InputError, match=rf"tokens-{shard:05d}\.idx: .*{message}"):
            Corpus.open(folder)

    def test_no_corpus(self, tmp_path):
        with pytest.raises(InputError, match=r"got no such folder; .*longpretrain prepare"):
            Corpus.open(tmp_path / "absent")
        (tmp_path / "empty").mkdir()
        with pytest.raises(InputError, match=r"got no manifest\.json"):
            Corpus.open(tmp_path / "empty")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("{", r"manifest\.json: got Expecting .*wanted a JSON object"),
            ("[]", "got a list; wanted a JSON object"),
            ("{}", "got format None version None"),
            (
                '{"format": "longpretrain-tokens", "version": 3}',
                "got .*version 3; wanted .*version 1 or 2",
            ),
            ('{"format": "other", "version": 1}', "got format other"),
            ('{"format": "longpretrain-tokens", "version": 1}', "keys .. for a Manifest"),
            (
                '{"format": "longpretrain-tokens", "version": 1, "dtype": "uint16"}',
                "keys .'dtype'. for a Manifest",
            ),
        ],
    )
    def test_a_damaged_manifest(self, folder, text, message):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(InputError, match=message):
            Corpus.open(folder)

    @pytest.mark.parametrize(
        ("place", "value", "message"),
        [
            (["vocab_size"], "1000", "vocab_size '1000', no int"),
            (["vocab_size"], True, "vocab_size True, no int"),
            (["vocab_size"], 1e3, "vocab_size 1000.0, no int"),
            (["empty_documents"], -1, "empty_documents -1"),
            (["dtype"], "float16", "dtype float16"),
            (["dtype"], ["uint16"], "no str"),
            (["dtype"], "uint32", "do not fit the sizes of tokens-00000.bin"),
            (["tokenizer_fingerprint"], None, "no str"),
            (["settings"], [], "no dict"),
            (["shards"], {}, "shards {}, no list"),
            (["shards", 0], "a", "a str for a ShardRecord"),
            (["shards", 0, "documents"], 0, "do not fit the sizes"),
            (["shards", 0, "documents"], 5, "do not fit the sizes"),
            (["shards", 0, "idx"], 3, "idx 3, no dict"),
            (["shards", 0, "bin", "bytes"], 9, "do not fit the sizes"),
            (["shards", 0, "bin", "sha256"], 3, "no str"),
            (["shards", 0, "bin", "extra"], 3, "for a FileRecord"),
            (["sources"], ["a"], "a str for a SourceRecord"),
            (["sources"], [SOURCE | {"pieces": [PIECE | {"end": 4}]}], "pieces of 'a' that do not"),
            (["sources"], [SOURCE | {"pieces": [PIECE | {"start": 1}]}], "pieces of 'a' that do"),
            (
                ["sources"],
                [SOURCE | {"pieces": [{"start": 0}]}],
                "['start'] for a PieceRecord",
            ),
            (["filters"], [3], "a int for an object"),
            (["first_problems"], ["a"], "a str for an object"),
            (["extra"], 3, "for a Manifest"),
            *(
                (["shards", 1, kind, "name"], name, "not that of a file in the folder")
                for kind in ("bin", "idx")
                for name in ("../a", "/etc/passwd", "a/b", "a\\b", "", ".", "..", "a/", "a\0")
            ),
        ],
        ids=repr,
    )
    def test_a_manifest_that_cannot_be(self, folder, place, value, message):
        tree = json.loads((folder / "manifest.json").read_text())
        node = tree
        for key in place[:-1]:
            node = node[key]
        node[place[-1]] = value
        (folder / "manifest.json").write_text(json.dumps(tree))
        with pytest.raises(
            InputError, match=r"manifest\.json: got .*" + re.escape(message)
        ) as info:
            Corpus.open(folder)
        assert "Remove the folder" in info.value.way_out

    def test_counts_that_do_not_add_up(self, folder):
        manifest = Manifest.read(folder)
        replace(manifest, tokens=manifest.tokens + 1).write(folder)
        with pytest.raises(InputError, match="counts that do not add up"):
            Corpus.open(folder)

    def test_an_empty_corpus(self, folder):
        replace(Manifest.read(folder), shards=(), tokens=0, documents=0).write(folder)
        with pytest.raises(InputError, match="got no tokens"):
            Corpus.open(folder)

    def test_another_tokenizer(self, folder):
        corpus = Corpus.open(folder)
        corpus.require_tokenizer("f" * 64, owner="model M")
        with pytest.raises(InputError, match=r"ids of tokenizer ffff.*that of model M"):
            corpus.require_tokenizer("e" * 64, owner="model M")
