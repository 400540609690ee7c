"""prepare --verify: a whole corpus passes, and whatever is wrong with one is told."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from prepare_inputs import lines
from small_run import write_text
from tokenizers import models, normalizers
from told import check_form, exit_code

from longpretrain.data import Corpus
from longpretrain.errors import InputError
from longpretrain.prepare import prepare
from longpretrain.prepare.verify import verify


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A corpus of several shards."""
    folder = tmp_path_factory.mktemp("plain")
    write_text(folder / "books", documents=30, seed=1)
    prepare([folder / "books"], folder / "out", shard_bytes=4096, unit_bytes=4096)
    return folder / "out"


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Two corpora, made with problems, filters, and a source in pieces."""
    folder = tmp_path_factory.mktemp("split")
    texts = [f"peace number {n % 40}" for n in range(80)] + ["one"]
    bad = b'{"text": 1}\n' * 23
    (folder / "in.jsonl").write_bytes(lines(*({"text": text} for text in texts)) + bad)
    prepare(
        [folder / "in.jsonl"], folder / "out", valid=0.3, on_error="skip",
        filters=["unicode=nfc", "min_tokens=2", "deduplicate"], unit_bytes=512,
    )  # fmt: skip
    return folder / "out"


@pytest.fixture
def copy(tmp_path):
    """A copy to damage of what a test names."""

    def copied(source: Path) -> Path:
        return Path(shutil.copytree(source, tmp_path / "copy"))

    return copied


def edit(folder: Path, **changes: Any) -> None:
    """Another manifest, whatever it says."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def manifest(folder: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return tree


def replace_file(folder: Path, shard: int, kind: str, data: bytes) -> None:
    """Other bytes, to which the manifest agrees."""
    shards = manifest(folder)["shards"]
    record = shards[shard][kind]
    (folder / record["name"]).write_bytes(data)
    record |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(folder, shards=shards)


class TestWhole:
    def test_says_what_was_checked(self, plain, monkeypatch):
        monkeypatch.setattr("longpretrain.prepare.verify._READ_BYTES", 512)
        text = verify(plain)
        corpus = Corpus.open(plain)
        assert len(corpus.shards) > 2
        assert f"{plain}: whole" in text
        assert f"{len(corpus.shards)} shards" in text
        assert f"{len(corpus):,} documents, {corpus.num_tokens:,} tokens" in text
        largest = max(int(corpus.document(n).max()) for n in range(len(corpus)))
        assert f"the largest is {largest:,}, below 50,265" in text

    def test_both_sides_of_a_split(self, split):
        text = verify(split)
        assert text.count(": whole") == 2
        assert text.count("23 problems: problems.jsonl lists them all") == 2
        assert text.count("the counts of unicode=nfc, min_tokens=2, deduplicate add up") == 2
        assert text.endswith(f"{split}: no document of valid/ with the tokens of one in train/")
        assert verify(split / "train").count(": whole") == 1

    def test_tells_how_far_it_is(self, plain):
        told: list[tuple[int, int]] = []
        verify(plain, lambda done, total: told.append((done, total)))
        size = sum(path.stat().st_size for path in plain.glob("*.bin"))
        assert told[-1] == (size, size)

    def test_what_lies_beside_is_told_and_caches_are_not(self, copy, plain):
        folder = copy(plain)
        (folder / ".index-0123456789abcdef").touch()
        assert verify(folder) == verify(plain).replace(str(plain), str(folder))
        (folder / "notes.txt").touch()
        assert verify(folder).endswith("besides, not part of it: notes.txt")

    def test_a_corpus_of_version_1(self, copy, plain):
        folder = copy(plain)
        tree = manifest(folder)
        for key in ("mended_documents", "problems", "first_problems", "filters", "split"):
            del tree[key]
        for source in tree["sources"]:
            del source["pieces"]
        files = [(s["name"], s["bytes"], s["sha256"]) for s in tree["sources"]]
        text = json.dumps(
            [1, tree["tokenizer_fingerprint"], tree["settings"], files], sort_keys=True
        )
        tree |= {"version": 1, "inputs_digest": hashlib.sha256(text.encode()).hexdigest()}
        (folder / "manifest.json").write_text(json.dumps(tree))
        assert "whole" in verify(folder)

    def test_corpora_that_were_prepared_one_by_one(self, tmp_path):
        for name, texts in (("train", ["one", "two"]), ("valid", ["two", "two", "three"])):
            source = tmp_path / f"{name}.jsonl"
            source.write_bytes(lines(*({"text": text} for text in texts)))
            prepare([source], tmp_path / "data" / name)
        # Of two equal documents one is counted: the other is a duplicate within valid/.
        assert "data: 1 distinct documents of valid/ with the tokens of one" in verify(
            tmp_path / "data"
        )

    def test_a_tokenizer_that_makes_the_same_tokens_of_different_texts(self, tmp_path):
        """Sides are told apart by text: both may hold the same tokens, and nothing is wrong."""
        tokenizer = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "peace": 1}, "[UNK]"))
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
        (tmp_path / "tokenizer").mkdir()
        tokenizer.save(str(tmp_path / "tokenizer" / "tokenizer.json"))
        texts = ["".join(draw) for draw in itertools.product("pP", "eE", "aA", "cC", "eE")]
        (tmp_path / "in.jsonl").write_bytes(lines(*({"text": text} for text in texts)))
        prepare(
            [tmp_path / "in.jsonl"], tmp_path / "out", valid="1/2", filters=["deduplicate"],
            tokenizer_folder=tmp_path / "tokenizer",
        )  # fmt: skip
        valid = len(Corpus.open(tmp_path / "out" / "valid"))
        assert 0 < valid < len(texts)
        said = "1 distinct documents of valid/ with the tokens of one in train/"
        assert verify(tmp_path / "out").endswith(said)


class TestDamage:
    def refused(self, folder: Path, match: str) -> None:
        with pytest.raises(InputError, match=match) as info:
            verify(folder)
        assert info.value.way_out

    @pytest.mark.parametrize("suffix", ["bin", "idx"])
    def test_a_flipped_bit(self, copy, plain, suffix):
        folder = copy(plain)
        path = folder / f"tokens-00001.{suffix}"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        self.refused(folder, rf"shard .*tokens-00001\.{suffix}")

    @pytest.mark.parametrize("suffix", ["bin", "idx"])
    def test_a_file_cut_short_or_missing(self, copy, plain, suffix):
        folder = copy(plain)
        path = folder / f"tokens-00002.{suffix}"
        path.write_bytes(path.read_bytes()[:-1])
        self.refused(folder, f"truncated shard .*{suffix}")
        path.unlink()
        self.refused(folder, f"missing shard .*{suffix}")

    def test_an_id_beyond_the_vocabulary(self, copy, plain, monkeypatch):
        monkeypatch.setattr("longpretrain.prepare.verify._READ_BYTES", 512)
        folder = copy(plain)
        ids = np.fromfile(folder / "tokens-00000.bin", "<u2")
        ids[1000] = 60_000
        replace_file(folder, 0, "bin", ids.tobytes())
        self.refused(folder, r"got id 60000 at token 1000; wanted ids below 50265")

    def test_offsets_that_fall(self, copy, plain):
        folder = copy(plain)
        starts = np.fromfile(folder / "tokens-00000.idx", "<i8")
        starts[[1, 2]] = starts[[2, 1]]
        replace_file(folder, 0, "idx", starts.tobytes())
        self.refused(folder, "not rising")

    def test_a_shard_that_was_closed_too_early(self, copy, plain):
        folder = copy(plain)
        edit(folder, settings=manifest(folder)["settings"] | {"shard_bytes": "8192"})
        self.refused(folder, "filled to 4096 tokens before the next")

    def test_shards_in_another_order(self, copy, plain):
        folder = copy(plain)
        edit(folder, shards=manifest(folder)["shards"][::-1])
        self.refused(folder, "filled to 2048 tokens before the next")

    def test_another_source(self, copy, plain):
        folder = copy(plain)
        sources = manifest(folder)["sources"]
        edit(folder, sources=[sources[0] | {"sha256": "0" * 64}, *sources[1:]])
        self.refused(folder, "sources, settings and tokenizer of digest")

    def test_a_piece_of_a_source(self, copy, split):
        folder = copy(split)
        [source] = manifest(folder / "train")["sources"]
        source["pieces"][1]["sha256"] = "0" * 64
        edit(folder / "train", sources=[source])
        self.refused(folder, "another sha256 for in.jsonl than its pieces give")

    def test_problems(self, copy, split):
        folder = copy(split) / "valid"
        path = folder / "problems.jsonl"
        told = path.read_text().splitlines(keepends=True)
        path.write_text("".join(told[:-1]))
        self.refused(folder, "got 22 problems; wanted 23")
        path.write_text("".join([told[1], told[0], *told[2:]]))
        self.refused(folder, "other first problems")
        path.write_text("".join([*told[:20], "{}\n", *told[21:]]))
        self.refused(folder, "problems.jsonl line 21")
        path.unlink()
        self.refused(folder, "wanted a list of 23 problems")

    def test_a_list_of_problems_where_there_are_none(self, copy, plain):
        folder = copy(plain)
        (folder / "problems.jsonl").write_text("")
        self.refused(folder, "got a list of problems")

    @pytest.mark.parametrize(
        "change",
        [
            {"seen": 79},
            {"dropped": 42},
            {"seen": 85, "dropped": 45},  # of these as many are left, but more than came to it
            {"changed": 90},
            {"tokens_dropped": -1},
            {"tokens_dropped": "1"},
            {"more": 1},
        ],
    )
    def test_counts_of_a_filter(self, copy, split, change):
        folder = copy(split)
        filters = manifest(folder / "train")["filters"]
        filters[2] |= change
        for side in ("train", "valid"):
            edit(folder / side, filters=filters)
        self.refused(folder, "filter")

    def test_a_document_on_both_sides(self, copy, split):
        folder = copy(split)
        data = (folder / "valid" / "tokens-00000.bin").read_bytes()
        starts = np.fromfile(folder / "valid" / "tokens-00000.idx", "<i8")
        ids = np.fromfile(folder / "train" / "tokens-00000.bin", "<u2")
        other = np.fromfile(folder / "train" / "tokens-00000.idx", "<i8")
        first = next(d for d in range(len(other) - 1) if other[d + 1] - other[d] == starts[1])
        leaked = ids[other[first] : other[first + 1]].tobytes()
        replace_file(folder / "valid", 0, "bin", leaked + data[len(leaked) :])
        self.refused(folder, r"got 1 distinct documents of valid/ with the tokens of one in train/")

    def test_sides_of_two_preparations(self, copy, split, plain):
        folder = copy(split)
        shutil.rmtree(folder / "valid")
        self.refused(folder, "valid: got no such folder")
        shutil.copytree(plain, folder / "valid")
        self.refused(folder, "do not agree about split")

    @pytest.mark.parametrize("name", ["empty_documents", "mended_documents"])
    def test_a_count_that_one_side_tells_otherwise(self, copy, split, name):
        folder = copy(split)
        edit(folder / "valid", **{name: manifest(folder / "valid")[name] + 1})
        self.refused(folder, f"do not agree about {name}")

    def test_no_corpus(self, tmp_path):
        self.refused(tmp_path, "got no manifest.json")
        self.refused(tmp_path / "absent", "got no such folder")


def test_the_verb(plain, copy, capsys):
    assert exit_code("prepare", "--verify", plain) == 0
    assert "whole" in capsys.readouterr().out
    folder = copy(plain)
    (folder / "tokens-00000.bin").write_bytes(b"")
    assert exit_code("prepare", "--verify", folder) == 2
    check_form(capsys.readouterr().err, "prepare")
