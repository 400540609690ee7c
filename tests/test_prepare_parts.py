"""Parts: what one holds, when it is used again, what is wrong with the text, and standard input."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import shutil

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from longpretrain.data import Corpus, load_tokenizer
from longpretrain.errors import InputError
from longpretrain.prepare import prepare
from longpretrain.prepare.parts import make_part

UNITS = {"unit_bytes": 400}


def line(text):
    return json.dumps({"text": text}).encode() + b"\n"


def texts_of(folder):
    corpus = Corpus.open(folder, verify="sha256")
    tokenizer = load_tokenizer()
    return [tokenizer.decode(corpus.document(i)) for i in range(len(corpus))]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def parts_of(out):
    """Finished parts of an interrupted preparation: name and time."""
    parts = out.with_name(f".{out.name}.preparing").glob("parts/[!.]*")
    return {path.name: (path / "part.json").stat().st_mtime_ns for path in parts}


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


class TestKinds:
    def test_every_kind_of_input_gives_the_same_documents(self, tmp_path, out):
        texts = [f"Document {i}.\nIts second line." for i in range(50)]
        folder = tmp_path / "in"
        folder.mkdir()
        plain = b"".join(map(line, texts))
        (folder / "a.jsonl").write_bytes(plain)
        (folder / "b.jsonl.gz").write_bytes(gzip.compress(plain))
        (folder / "c.jsonl.zst").write_bytes(zstandard.compress(plain))
        (folder / "d.jsonl.bz2").write_bytes(bz2.compress(plain))
        table = pyarrow.table({"text": texts, "id": list(range(50))})
        pyarrow.parquet.write_table(table, folder / "e.parquet", row_group_size=7)
        (folder / "f.txt").write_text("\n\n".join(texts))
        (folder / "g.txt.gz").write_bytes(gzip.compress("\n\n".join(texts).encode()))
        manifest = prepare([folder], out, documents="blank-line", **UNITS)
        assert texts_of(out) == texts * 7
        assert [s.name for s in manifest.sources] == sorted(
            f"in/{p.name}" for p in folder.iterdir()
        )
        pieces = {source.name: len(source.pieces) for source in manifest.sources}
        assert pieces["in/a.jsonl"] > 3
        assert pieces["in/e.parquet"] > 3
        assert pieces["in/b.jsonl.gz"] == 0
        assert prepare([folder], out, documents="blank-line", **UNITS) == manifest

    @pytest.mark.parametrize(("rows", "dtype"), [(65_535, "uint16"), (65_536, "uint32")])
    def test_the_smallest_type_that_holds_the_ids(self, tmp_path, out, rows, dtype):
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        load_tokenizer().save(folder, max_tokens=512)
        vocab = json.loads((folder / "vocab.json").read_text())
        vocab["<extra>"] = rows - 1
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "tokenizer.json").unlink()
        (tmp_path / "a.txt").write_text("Hello world")
        manifest = prepare([tmp_path / "a.txt"], out, tokenizer_folder=folder)
        assert (manifest.vocab_size, manifest.dtype) == (rows, dtype)
        assert Corpus.open(out).document(0).tolist() == [31414, 232]
        assert (out / "tokens-00000.bin").stat().st_size == 2 * int(dtype[4:]) // 8
        with pytest.raises(InputError, match="got a corpus of other inputs, settings or tokenizer"):
            prepare([tmp_path / "a.txt"], out)


class TestStandardInput:
    def test_it_is_read_and_goes_by_its_name(self, tmp_path, out):
        (tmp_path / "b.txt").write_text("From a file.")
        data = line("One.") + line("Two.")
        inputs = ["-", tmp_path / "b.txt"]
        manifest = prepare(inputs, out, stdin=io.BytesIO(data), stdin_format="jsonl")
        assert texts_of(out) == ["One.", "Two.", "From a file."]
        assert (manifest.sources[0].name, manifest.sources[0].bytes) == ("-", len(data))
        again = prepare(inputs, out, stdin=io.BytesIO(data), stdin_format="jsonl")
        assert again == manifest
        assert not list(tmp_path.glob(".out*"))
        with pytest.raises(InputError, match="got a corpus of other inputs"):
            prepare(inputs, out, stdin=io.BytesIO(data + line("3")), stdin_format="jsonl")

    def test_a_second_run_knows_it_again(self, tmp_path, out):
        good = b"".join(line(f"Number {i} of the lines.") for i in range(60))
        kept = []
        for _ in range(2):
            with pytest.raises(InputError, match=r"standard input line .*: got no JSON"):
                prepare(["-"], out, stdin=io.BytesIO(good + b"{"), stdin_format="jsonl", **UNITS)
            kept.append(parts_of(out))
        assert kept[0] == kept[1], "no part was made again"
        assert len(kept[0]) > 3
        source = io.BytesIO(good + b"{")
        prepare(["-"], out, stdin=source, stdin_format="jsonl", on_error="skip", **UNITS)
        assert len(texts_of(out)) == 60

    def test_nothing(self, out):
        with pytest.raises(InputError, match="got no text"):
            prepare(["-"], out, stdin=io.BytesIO(b""))
        assert not list(out.parent.glob(".out*"))


BAD = {
    "no JSON": b"{\n",
    "not UTF-8": b'{"text": "caf\xe9"}\n',
    "NUL": b'{"text": "a\\u0000b"}\n',
    "no field": b'{"body": "x"}\n',
    "too long": line("x" * 5000),
    "lone surrogate": b'{"text": "\\ud83d"}\n',
}
MENDED = {"not UTF-8": "caf\ufffd", "NUL": "a\ufffdb", "lone surrogate": "\ufffd"}


class TestWhatIsWrong:
    @pytest.fixture
    def source(self, tmp_path):
        """Bad lines among good ones, an empty document, and a packed file that is cut short."""
        folder = tmp_path / "in"
        folder.mkdir()
        lines = [line(f"Number {i}.") for i in range(60)]
        for number, bad in enumerate(BAD.values()):
            lines.insert(7 * number + 7, bad)
        lines.insert(3, line(" "))
        (folder / "a.jsonl").write_bytes(b"".join(lines))
        packed = gzip.compress(b"".join(line(f"Packed {i}.") for i in range(5000)))
        (folder / "b.jsonl.gz").write_bytes(packed[: len(packed) // 2])
        (folder / "c.txt").write_text("The last.")
        return folder

    def test_stop(self, source, out):
        with pytest.raises(InputError, match=r"a\.jsonl line 9.*: got no JSON"):
            prepare([source], out, max_document_bytes=1000, unit_bytes=1 << 20)
        assert not out.exists()

    @pytest.mark.parametrize("workers", [1, 2])
    @pytest.mark.parametrize("on_error", ["skip", "replace"])
    def test_the_rest_is_there_and_each_is_listed(self, source, out, on_error, workers):
        manifest = prepare(
            [source], out, on_error=on_error, max_document_bytes=1000, workers=workers, **UNITS
        )
        texts = texts_of(out)
        assert [text for text in texts if text.startswith("Number")] == [
            f"Number {i}." for i in range(60)
        ]
        packed = [text for text in texts if text.startswith("Packed")]
        assert packed == [f"Packed {i}." for i in range(len(packed))]
        assert len(packed) > 100
        assert texts[-1] == "The last."
        mended = [text for text in texts if "\ufffd" in text]
        assert mended == (list(MENDED.values()) if on_error == "replace" else [])
        assert manifest.mended_documents == len(mended)
        assert manifest.problems == len(BAD) + 1 - len(mended)
        assert manifest.empty_documents == 1
        listed = [json.loads(text) for text in (out / "problems.jsonl").read_text().splitlines()]
        assert len(listed) == manifest.problems
        assert list(manifest.first_problems) == listed
        assert "line 9" in listed[0]["place"]
        assert "no JSON" in listed[0]["reason"]
        assert "in/b.jsonl.gz" in listed[-1]["place"]
        assert "early" in listed[-1]["reason"]
        assert prepare([source], out, on_error=on_error, max_document_bytes=1000) == manifest

    @pytest.mark.parametrize("how", ["missing", "short", "altered"])
    def test_a_list_that_is_not_whole_is_made_again(self, source, out, how):
        options = {"on_error": "skip", "max_document_bytes": 1000}
        prepare([source], out, **options)
        before = contents(out)
        path = out / "problems.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        path.unlink()
        if how != "missing":
            path.write_bytes(b"".join(lines[:-1] if how == "short" else lines[::-1]))
        prepare([source], out, **options)
        assert contents(out) == before

    def test_nothing_is_listed_where_nothing_is_wrong(self, tmp_path, out):
        (tmp_path / "a.txt").write_text("Good.")
        manifest = prepare([tmp_path / "a.txt"], out, on_error="skip")
        assert (manifest.problems, manifest.first_problems) == (0, ())
        assert not (out / "problems.jsonl").exists()

    def test_nothing_but_problems(self, tmp_path, out):
        (tmp_path / "a.jsonl").write_bytes(b"{\n" + line(""))
        with pytest.raises(
            InputError, match=r"got no text \(1 empty documents, 1 left out, the first at a"
        ):
            prepare([tmp_path / "a.jsonl"], out, on_error="skip")
        (tmp_path / "a.jsonl").write_bytes(line("one two"))
        with pytest.raises(InputError, match=r"got no text \(0 empty documents, 1 dropped by filt"):
            prepare([tmp_path / "a.jsonl"], out, filters=["min_tokens=9"])


class TestUsedAgain:
    """After an error a second run makes only what is missing, whatever the way out was."""

    @pytest.fixture
    def source(self, tmp_path):
        folder = tmp_path / "in"
        folder.mkdir()
        for name in "abcdef":
            (folder / f"{name}.jsonl").write_bytes(b"".join(line(f"{name}{i}") for i in range(60)))
        with (folder / "e.jsonl").open("ab") as file:
            file.write(b"{\n")
        return folder

    def stop(self, source, out):
        with pytest.raises(InputError, match=r"e\.jsonl line \d+ after byte \d+: got no JSON"):
            prepare([source], out, **UNITS)
        kept = parts_of(out)
        assert len(kept) > 8
        return kept

    @pytest.fixture
    def made(self, monkeypatch):
        """Numbers of the parts that are made."""
        numbers = []

        def counted(work, number, tick):
            numbers.append(number)
            return make_part(work, number, tick)

        monkeypatch.setattr("longpretrain.prepare.job.make_part", counted)
        return numbers

    @pytest.mark.parametrize("way_out", ["skip", "replace", "mend", "remove", "add", "limit"])
    def test_every_way_out_keeps_what_is_done(self, source, out, made, way_out):
        kept = self.stop(source, out)
        made.clear()
        options = {}
        bad = source / "e.jsonl"
        match way_out:
            case "skip" | "replace":
                options = {"on_error": way_out}
            case "mend":
                bad.write_bytes(bad.read_bytes()[:-2] + line("mended"))
            case "remove":
                bad.unlink()
            case "add":
                bad.unlink()
                (source / "A.jsonl").write_bytes(line("a new one"))
            case "limit":
                options = {"on_error": "skip", "max_document_bytes": 1 << 30}
        prepare([source], out, **UNITS, **options)
        units = len(kept) + len(made)
        assert len(made) < units / 2
        fresh = out.with_name("fresh")
        prepare([source], fresh, **UNITS, **options)
        assert contents(fresh) == contents(out)

    def test_what_skipping_left_out_is_not_used_where_errors_stop(self, source, out):
        interrupted = out.with_name(".out.preparing")
        with pytest.raises(KeyboardInterrupt):
            prepare([source], out, on_error="skip", **UNITS, progress=interrupt_at_end)
        shutil.copytree(interrupted, out.with_name("copy"))
        with pytest.raises(InputError, match=r"e\.jsonl line \d+ after byte \d+: got no JSON"):
            prepare([source], out, **UNITS)

    @pytest.mark.parametrize("option", ["documents", "field", "filters", "valid", "tokenizer"])
    def test_other_settings_are_refused_until_it_is_restarted(self, source, out, option, tmp_path):
        kept = self.stop(source, out)
        (source / "e.jsonl").unlink()
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        load_tokenizer().save(folder, max_tokens=512)
        vocab = json.loads((folder / "vocab.json").read_text())
        (folder / "vocab.json").write_text(json.dumps(vocab | {"<extra>": 50265}))
        (folder / "tokenizer.json").unlink()
        values = {
            "documents": "blank-line", "field": "body", "filters": ["min_tokens=1"], "valid": "0.5",
            "tokenizer": folder,
        }  # fmt: skip
        for path in source.iterdir():
            if option == "field":
                path.write_text(path.read_text().replace('"text"', '"body"'))
        given = {"tokenizer_folder" if option == "tokenizer" else option: values[option]}
        flag = "--filter" if option == "filters" else f"--{option}"
        with pytest.raises(InputError, match=f"got parts made with another {flag}; .*--restart"):
            prepare([source], out, **given, **UNITS)
        assert parts_of(out) == kept
        prepare([source], out, restart=True, **given, **UNITS)
        assert not parts_of(out)
        assert out.exists()

    @pytest.mark.parametrize("name", ["tokens.idx", "part.json"])
    def test_a_part_without_its_files_is_made_again(self, source, out, made, name):
        kept = self.stop(source, out)
        (source / "e.jsonl").unlink()
        part = out.with_name(".out.preparing") / "parts" / min(kept)
        (part / name).write_bytes(b"")
        made.clear()
        prepare([source], out, **UNITS)
        one_less = len(made)
        shutil.rmtree(out)
        self_made = out.with_name("fresh")
        prepare([source], self_made, **UNITS)
        assert 0 < one_less < len(made) - one_less

    def test_an_input_that_changes_meanwhile(self, source, out, made, monkeypatch):
        (source / "e.jsonl").unlink()

        def changing(work, number, tick):
            (source / "c.jsonl").write_bytes(line("other") * number)
            return make_part(work, number, tick)

        monkeypatch.setattr("longpretrain.prepare.job.make_part", changing)
        with pytest.raises(InputError, match=r"c\.jsonl: got a file that has changed since"):
            prepare([source], out, **UNITS)


def interrupt_at_end(done, total):
    if done == total:
        raise KeyboardInterrupt
