"""Shards of parts: the rule of one document after another, damage found and mended, duplicates."""

from __future__ import annotations

import json

import numpy as np
import pytest

from longpretrain.data import load_tokenizer
from longpretrain.data.shard_writer import ShardWriter
from longpretrain.errors import InputError
from longpretrain.prepare import assemble, layout, prepare
from longpretrain.prepare import job as job_module
from longpretrain.prepare.chunked import CHUNK_BYTES, ChunkedReader, ChunkedWriter, DamagedPartError


def texts(count, seed=0):
    """Of 1 to 40 words, a few of them very long."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, count)
    lengths[rng.integers(0, count, 3)] = 900
    return [" ".join(f"{word}" for word in rng.integers(0, 99, length)) for length in lengths]


def write(path, entries):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in entries))
    return path


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("drop_share", [None, 0.0, 0.3, 0.97])
@pytest.mark.parametrize("max_tokens", [1, 50, 128, 5000])
@pytest.mark.parametrize("block", [1, 7, 1 << 18])
def test_the_layout_is_that_of_one_document_after_another(
    drop_share, max_tokens, block, tmp_path, monkeypatch
):
    """``ShardWriter`` is the rule itself; the layout finds the same borders in the offsets."""
    monkeypatch.setattr(layout, "BLOCK_DOCUMENTS", block)
    rng = np.random.default_rng(max_tokens)
    parts = [rng.integers(1, 60, count) for count in (30, 0, 1, 40)]
    parts[3][5] = 300
    drops = [rng.random(len(part)) < (drop_share or 0) for part in parts]
    paths = []
    writer = ShardWriter(tmp_path, vocab_size=9, shard_bytes=2 * max_tokens)
    for number, (lengths, drop) in enumerate(zip(parts, drops, strict=True)):
        paths.append(tmp_path / f"{number}.index")
        np.cumsum([0, *lengths]).astype("<i8").tofile(paths[-1])
        for length in lengths[~drop]:
            writer.add(np.ones(length, np.int32))
    wanted = [(shard.documents, shard.tokens) for shard in writer.finish()]

    def kept(part):
        return None if drop_share is None else ~drops[part]

    found = list(layout.lay_out(paths, kept, max_tokens))
    assert [(shard.documents, shard.tokens) for shard in found] == wanted
    documents = [
        (taken.part, number)
        for shard in found
        for taken in shard.slices
        for number in range(taken.start, taken.end)
        if not drops[taken.part][number]
    ]
    assert documents == [(p, n) for p, drop in enumerate(drops) for n in np.flatnonzero(~drop)]


class TestCorpus:
    @pytest.mark.parametrize("shard_bytes", [300, 4000, 1 << 29])
    def test_units_leave_no_trace_in_the_shards(self, tmp_path, shard_bytes):
        source = write(tmp_path / "a.jsonl", texts(300))
        corpora = []
        for unit_bytes in (500, 5000, 1 << 25):
            out = tmp_path / f"{unit_bytes}"
            prepare([source], out, shard_bytes=shard_bytes, unit_bytes=unit_bytes)
            found = contents(out)
            del found["manifest.json"]  # names the pieces that the file was read in
            corpora.append(found)
        assert corpora[0] == corpora[1] == corpora[2]
        tokenizer = load_tokenizer()
        (tmp_path / "one by one").mkdir()
        writer = ShardWriter(
            tmp_path / "one by one", vocab_size=tokenizer.vocab_size, shard_bytes=shard_bytes
        )
        for text in texts(300):
            writer.add(tokenizer.encode(text))
        writer.finish()
        assert contents(tmp_path / "one by one") == corpora[0]

    def test_only_the_first_of_equal_documents_stays(self, tmp_path):
        own = texts(200)
        mixed = [*own[:150], *own[20:60], *own[150:], own[0], own[0]]
        source = write(tmp_path / "a\r.jsonl", mixed)
        whole = prepare(
            [source], tmp_path / "out", filters=["deduplicate"], unit_bytes=700, shard_bytes=900
        )
        prepare([write(tmp_path / "b.jsonl", own)], tmp_path / "own", shard_bytes=900)
        found, wanted = contents(tmp_path / "out"), contents(tmp_path / "own")
        assert {**found, "manifest.json": b""} == {**wanted, "manifest.json": b""}
        (report,) = whole.filters
        tokenizer = load_tokenizer()
        assert (report["seen"], report["dropped"]) == (242, 42)
        dropped = [*own[20:60], own[0], own[0]]
        assert report["tokens_dropped"] == sum(len(tokenizer.encode(text)) for text in dropped)
        assert [example["text"] for example in report["examples"]] == [t[:80] for t in own[20:23]]
        assert report["examples"][0]["place"].startswith("a\r.jsonl line ")

    def test_a_file_of_many_pieces_is_known_again(self, tmp_path):
        source = write(tmp_path / "a.jsonl", texts(100))
        first = prepare([source], tmp_path / "out", unit_bytes=1000)
        (record,) = first.sources
        assert len(record.pieces) > 5
        assert prepare([source], tmp_path / "out", unit_bytes=1 << 25) == first
        text = source.read_bytes()
        source.write_bytes(text[:-4] + b"x" + text[-3:])
        with pytest.raises(InputError, match="got a corpus of other inputs"):
            prepare([source], tmp_path / "out", unit_bytes=1000)


class TestDamage:
    """Between its making and its use a part changes on the disk."""

    @pytest.fixture
    def source(self, tmp_path):
        return write(tmp_path / "a.jsonl", texts(200))

    def damage(self, monkeypatch, name, change, times=1):
        """Alters a file of one part just before parts are assembled."""
        original = job_module.assemble
        said = []

        def assemble_damaged(work, parts, crew):
            if len(said) < times:
                path = work.part(parts[1].key) / name
                said.append(path)
                change(path)
            return original(work, parts, crew)

        monkeypatch.setattr(job_module, "assemble", assemble_damaged)

    @pytest.mark.parametrize(
        "name",
        ["tokens.bin", "tokens.idx", "tokens.hash", "tokens.places", "problems.jsonl", "part.json"],
    )
    @pytest.mark.parametrize("how", ["altered", "truncated", "missing"])
    def test_a_damaged_part_is_made_again(self, name, how, source, tmp_path, monkeypatch):
        options = {
            "filters": ["deduplicate"], "on_error": "skip", "unit_bytes": 1000, "shard_bytes": 2000,
        }  # fmt: skip
        lines = source.read_text().splitlines()
        source.write_text("\n{\n".join(lines) + "\n")
        prepare([source], tmp_path / "wanted", **options)

        def change(path):
            data = path.read_bytes()
            path.unlink()
            if how != "missing":
                path.write_bytes(data[:-4] if how == "truncated" else data[:-9] + b"123456789")

        self.damage(monkeypatch, name, change)
        said = []
        prepare([source], tmp_path / "out", say=said.append, **options)
        assert said == ["1 damaged parts are made again"]
        assert contents(tmp_path / "out") == contents(tmp_path / "wanted")

    def test_a_disk_that_alters_everything(self, source, tmp_path, monkeypatch):
        self.damage(monkeypatch, "tokens.bin", lambda path: path.write_bytes(b"no"), times=9)
        with pytest.raises(InputError, match="got files that are altered as soon as they are"):
            prepare([source], tmp_path / "out", unit_bytes=1000)
        assert not (tmp_path / "out").exists()

    def test_a_finished_shard_is_kept_only_with_the_same_parts(self, source, tmp_path, monkeypatch):
        """An interrupted assembly: what is copied already is not copied again."""
        options = {"unit_bytes": 1000, "shard_bytes": 600}
        copy = assemble._copy
        copied = []
        most = 1000

        def copy_some(*given):
            copied.append(given[1])
            if len(copied) > most:
                raise KeyboardInterrupt
            copy(*given)

        monkeypatch.setattr(assemble, "_copy", copy_some)
        prepare([source], tmp_path / "wanted", **options)
        of_all = len(copied)
        copied.clear()
        most = of_all // 2
        with pytest.raises(KeyboardInterrupt):
            prepare([source], tmp_path / "out", **options)
        finished = len(list((tmp_path / ".out.preparing" / "shards").glob("*.json")))
        assert finished > 3
        copied.clear()
        most = of_all
        prepare([source], tmp_path / "out", **options)
        assert contents(tmp_path / "out") == contents(tmp_path / "wanted")
        assert len(copied) <= of_all - finished


def test_shards_of_an_interrupted_run_of_more_inputs_go(tmp_path, monkeypatch):
    a, b = (write(tmp_path / f"{name}.jsonl", texts(100, seed)) for seed, name in enumerate("ab"))
    options = {"unit_bytes": 1000, "shard_bytes": 600}

    def interrupt(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(job_module, "write_corpora", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare([a, b], tmp_path / "out", **options)
    prepare([a], tmp_path / "wanted", **options)
    unfinished = list((tmp_path / ".out.preparing" / "out").iterdir())
    assert len(unfinished) > len(contents(tmp_path / "wanted"))
    prepare([a], tmp_path / "out", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "wanted")


class TestChunked:
    def test_any_stretch(self, tmp_path):
        data = np.random.default_rng(0).bytes(2 * CHUNK_BYTES + 5)
        writer = ChunkedWriter(tmp_path / "a")
        for start in range(0, len(data), 1_000_003):
            writer.write(data[start : start + 1_000_003])
        record = writer.finish()
        assert (record.bytes, len(record.sha256)) == (len(data), 3)
        reader = ChunkedReader(tmp_path / "a", record)
        borders = (0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, len(data))
        for start in borders:
            for end in borders:
                assert b"".join(reader.read(start, end)) == data[start:end]
        altered = bytearray(data)
        altered[CHUNK_BYTES + 3] ^= 1
        (tmp_path / "a").write_bytes(altered)
        reader = ChunkedReader(tmp_path / "a", record)
        assert b"".join(reader.read(0, CHUNK_BYTES)) == data[:CHUNK_BYTES]
        with pytest.raises(DamagedPartError, match="altered"):
            list(reader.read(CHUNK_BYTES, CHUNK_BYTES + 1))
