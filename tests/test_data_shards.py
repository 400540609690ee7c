"""Shards and manifest: what is written is read back, and no damage goes unseen."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longpretrain.data.shards import Corpus, Manifest, ShardWriter, dtype_for
from longpretrain.errors import InputError

ids = st.integers(0, 70_000)

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
    assert (tree["format"], tree["version"]) == ("longpretrain-tokens", 1)
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


def test_a_corpus_travels_to_another_process_by_its_folder(tmp_path):
    write_corpus(tmp_path, [list(range(900))] * 50, shard_bytes=10_000)
    data = pickle.dumps(Corpus.open(tmp_path))
    assert len(data) < 1000
    assert pickle.loads(data).document(49).tolist() == list(range(900))


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

    @pytest.mark.parametrize("name", ["tokens-00001.bin", "tokens-00002.idx"])
    def test_one_altered_byte(self, folder, name):
        path = folder / name
        data = bytearray(path.read_bytes())
        data[9] ^= 1
        path.write_bytes(data)
        Corpus.open(folder)
        with pytest.raises(InputError, match=f"altered shard .*{name}: got sha256"):
            Corpus.open(folder, verify="sha256")

    def test_an_index_that_ends_elsewhere(self, folder):
        np.array([0, 7], "<i8").tofile(folder / "tokens-00001.idx")
        with pytest.raises(InputError, match=r"tokens-00001\.idx: got offsets 0 to 7"):
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
            ("{", "wanted the manifest of a corpus"),
            ("[]", "wanted the manifest of a corpus"),
            ("{}", "got KeyError 'format'"),
            (
                '{"format": "longpretrain-tokens", "version": 2}',
                "got .*version 2; wanted .*version 1",
            ),
            ('{"format": "other", "version": 1}', "got format other"),
            ('{"format": "longpretrain-tokens", "version": 1}', "got dtype None"),
            (
                '{"format": "longpretrain-tokens", "version": 1, "dtype": "uint16"}',
                "got KeyError 'shards'",
            ),
        ],
    )
    def test_a_damaged_manifest(self, folder, text, message):
        (folder / "manifest.json").write_text(text)
        with pytest.raises(InputError, match=message):
            Corpus.open(folder)

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
