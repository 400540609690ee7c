"""Which files are read, in which order, and as what; what cannot be is named before anything is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from longpretrain.errors import InputError
from longpretrain.prepare.inputs import InputFile, find_inputs, kind_of, spooled


def names(*inputs: Path | str) -> list[str]:
    return [file.name for file in find_inputs(inputs)]


def make(folder: Path, *files: str) -> Path:
    for file in files:
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return folder


class TestFound:
    def test_a_folder_to_any_depth_without_what_is_hidden(self, tmp_path):
        kept = ["a.txt", "b/c.jsonl.zst", "b/d.parquet", "b/e.txt.gz", "f.jsonl.bz2"]
        left = [".g.txt", "b/.git/h.txt", "readme.md", "i.zip", "j.gz", "k.txt.xz", "txt"]
        make(tmp_path / "texts", *kept, *left)
        assert names(tmp_path / "texts") == [f"texts/{name}" for name in kept]

    def test_inputs_keep_their_order_and_patterns_are_sorted(self, tmp_path):
        make(tmp_path, "x2.txt", "x1.txt", "y.jsonl")
        assert names(tmp_path / "y.jsonl", str(tmp_path / "x*.txt")) == [
            "y.jsonl", "x1.txt", "x2.txt",
        ]  # fmt: skip

    def test_a_pattern_to_any_depth(self, tmp_path):
        make(tmp_path, "a/b/c.txt", "a/d.txt", "e.jsonl")
        assert names(str(tmp_path / "**" / "*.txt")) == ["c.txt", "d.txt"]

    def test_a_hidden_folder_that_is_named_is_read(self, tmp_path):
        assert names(make(tmp_path / ".texts", "a.txt")) == [".texts/a.txt"]

    def test_what_a_file_is(self, tmp_path):
        make(tmp_path, "a.jsonl.gz")
        [file] = find_inputs([tmp_path / "a.jsonl.gz"])
        assert file == InputFile(tmp_path / "a.jsonl.gz", "a.jsonl.gz", 1, "jsonl", "gzip")
        assert file.shown == f"file {tmp_path / 'a.jsonl.gz'}"

    def test_a_name_that_is_not_utf8(self, tmp_path):
        (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("x")
        assert names(tmp_path) == [rf"{tmp_path.name}/caf\udce9.txt"]

    @pytest.mark.parametrize(
        ("name", "kind"),
        [
            ("a.txt", ("txt", "none")),
            ("a.b.txt.gz", ("txt", "gzip")),
            ("a.jsonl.zst", ("jsonl", "zstd")),
            ("a.parquet.bz2", ("parquet", "bzip2")),
            ("A.JSONL", ("jsonl", "none")),
            ("a.Txt.GZ", ("txt", "gzip")),
            ("a.gz", None),
            ("a.json", None),
            ("a.txt.gz.zst", None),
            (".gz", None),
            ("txt", None),
        ],
    )
    def test_kinds(self, name, kind):
        assert kind_of(name) == kind


class TestLinks:
    def test_are_followed(self, tmp_path):
        make(tmp_path / "real", "a.txt", "b/c.jsonl")
        make(tmp_path, "d.txt")
        folder = make(tmp_path / "in", "e.txt")
        (folder / "folder").symlink_to("../real")
        (folder / "file.txt").symlink_to("../d.txt")
        assert names(folder) == [
            "in/e.txt", "in/file.txt", "in/folder/a.txt", "in/folder/b/c.jsonl",
        ]  # fmt: skip
        (tmp_path / "alias").symlink_to("in")
        assert names(tmp_path / "alias")[0] == "in/e.txt"

    def test_that_lead_back_end(self, tmp_path):
        folder = make(tmp_path / "in", "a.txt", "b/c.txt")
        (folder / "b" / "up").symlink_to("..")
        (folder / "self").symlink_to(".")
        assert names(folder) == ["in/a.txt", "in/b/c.txt"]

    def test_to_what_is_there_already(self, tmp_path):
        folder = make(tmp_path / "in", "a/b.txt")
        (folder / "c").symlink_to("a")
        with pytest.raises(InputError, match=r"c/b\.txt: got the same file twice"):
            find_inputs([folder])

    @pytest.mark.parametrize("name", ["a.txt", "a.jsonl.zst", "A.PARQUET"])
    def test_to_nothing(self, tmp_path, name):
        folder = make(tmp_path / "in", "b.txt")
        (folder / name).symlink_to("absent")
        for given in (folder, folder / name, str(folder / "*")):
            with pytest.raises(InputError, match=f"{name}: got a link to nothing"):
                find_inputs([given])


class TestLeftOut:
    def told(self, *inputs: Path | str) -> list[str]:
        lines: list[str] = []
        find_inputs(inputs, warn=lines.append)
        return lines

    def test_is_counted(self, tmp_path):
        make(tmp_path / "a", "b.txt", "c.txt.xz", "d/e.xz", ".hidden.xz", "f.md", "Makefile")
        make(tmp_path / "g", "h.md", "i.md", "j.jsonl")
        (tmp_path / "a" / "absent.md").symlink_to("nothing")
        (line,) = self.told(tmp_path / "a", tmp_path / "g")
        assert line.startswith(
            "left out 7 files of other kinds (4 .md, 2 .xz, 1 without suffix); wanted .txt, .jsonl"
        )
        assert self.told(tmp_path / "g" / "j.jsonl") == []

    def test_no_more_than_some_kinds_are_named(self, tmp_path):
        make(tmp_path, "a.txt", *(f"b.{n}" for n in range(9)), os.fsdecode(b"c.\xe9"))
        (line,) = self.told(tmp_path)
        assert "10 files of other kinds (1 .0, 1 .1, 1 .2, 1 .3, 1 .4, others)" in line

    def test_one_of_a_strange_name(self, tmp_path):
        make(tmp_path, "a.txt", os.fsdecode(b"c.\xe9\n"))
        (line,) = self.told(tmp_path)
        assert line.startswith(r"left out a file of other kinds (1 .\udce9\n); wanted")

    def test_a_corpus_of_ours_is_no_input(self, tmp_path):
        """Else a second run would find what the first has written."""
        make(tmp_path / "in", "a.jsonl")
        for corpus in ("out", "pair/train", "pair/valid"):
            make(
                tmp_path / "in" / corpus, "manifest.json", "problems.jsonl", "tokens-00000.idx",
                "tokens-00000.bin", ".index-1/a.txt",
            )  # fmt: skip
        make(tmp_path / "in" / ".out.preparing", "b.txt")
        assert names(tmp_path / "in") == ["in/a.jsonl"]
        assert self.told(tmp_path / "in") == []

    def test_files_of_such_names_elsewhere_are(self, tmp_path):
        make(tmp_path / "in", "manifest.json", "problems.jsonl")
        make(tmp_path / "in" / "out", "tokens-00000.idx", "manifest.json", "a.txt")
        assert names(tmp_path / "in") == ["in/out/a.txt", "in/problems.jsonl"]


class TestPatterns:
    def test_that_match_folders(self, tmp_path):
        make(tmp_path / "data", "a/b.txt", "a/c/d.txt", "e.txt", "empty/f.md")
        assert names(str(tmp_path / "data" / "*")) == ["a/b.txt", "a/c/d.txt", "e.txt"]
        assert names(str(tmp_path / "data" / "**")) == [
            "data/a/b.txt", "data/a/c/d.txt", "data/e.txt",
        ]  # fmt: skip
        with pytest.raises(InputError, match="got a pattern that matches no file to read"):
            find_inputs([str(tmp_path / "data" / "empt*")])

    def test_a_name_that_is_one_is_itself(self, tmp_path):
        make(tmp_path, "[a].txt", "a.txt")
        assert names(tmp_path / "[a].txt") == ["[a].txt"]


class TestStandardInput:
    def test_takes_its_place_among_files(self, tmp_path):
        make(tmp_path, "a.txt", "b.txt", "spool")
        stdin = spooled(tmp_path / "spool", "jsonl")
        found = find_inputs([tmp_path / "b.txt", "-", tmp_path / "a.txt"], stdin=stdin)
        assert [(file.name, file.kind) for file in found] == [
            ("b.txt", "txt"), ("-", "jsonl"), ("a.txt", "txt"),
        ]  # fmt: skip
        assert found[1].shown == "standard input"

    def test_once(self, tmp_path):
        stdin = spooled(make(tmp_path, "spool") / "spool", "txt")
        with pytest.raises(InputError, match="standard input: got the same file twice"):
            find_inputs(["-", "-"], stdin=stdin)


class TestRefused:
    @pytest.fixture
    def refused(self):
        def refused(inputs, match, **options):
            with pytest.raises(InputError, match=match) as info:
                find_inputs(inputs, **options)
            assert info.value.way_out

        return refused

    def test_missing(self, tmp_path, refused):
        refused([], "input: got none")
        refused([tmp_path / "absent.txt"], r"absent\.txt: got no such file or folder")
        refused([tmp_path / "*.txt"], r"got a pattern that matches no file to read")
        refused([tmp_path], r"got a folder without \.txt, \.jsonl or \.parquet files")
        refused(["-"], r"input -: got no such file")

    @pytest.mark.parametrize("name", ["a.gz", "a.csv", "a", "a.txt.xz"])
    def test_an_unknown_kind(self, tmp_path, refused, name):
        refused([make(tmp_path, name) / name], r"wanted \.txt, \.jsonl or \.parquet, plain or pack")

    def test_what_is_no_file(self, tmp_path, refused):
        os.mkfifo(tmp_path / "a.jsonl")
        for given in (tmp_path, tmp_path / "a.jsonl", str(tmp_path / "*.jsonl"), "/dev/null"):
            refused([given], r": got a pipe, socket or device; wanted a file\. .*prepare -")

    def test_the_same_file_twice(self, tmp_path, refused):
        make(tmp_path, "a.txt", "b.txt")
        refused([tmp_path, tmp_path / "a.txt"], r"a\.txt: got the same file twice")
        (tmp_path / "c.txt").symlink_to(tmp_path / "a.txt")
        refused([tmp_path], r"c\.txt: got the same file twice")

    def test_a_very_large_text_must_say_how_it_divides(self, tmp_path, refused):
        path = tmp_path / "a.txt"
        path.write_bytes(b"x" * (1 << 20))
        match = r"got one \.txt of 1 MiB; .*--documents blank-line.*--max-document-mb"
        refused([path], match, max_document_bytes=(1 << 20) - 1)
        assert find_inputs([path], max_document_bytes=1 << 20)
        for documents in ("file", "blank-line"):
            assert find_inputs([path], documents=documents, max_document_bytes=9)

    def test_a_folder_that_may_not_be_read(self, tmp_path, refused):
        closed = make(tmp_path / "closed", "a.txt")
        make(tmp_path, "b.txt")
        closed.chmod(0)
        try:
            if os.access(closed, os.R_OK):
                pytest.skip("this user may read everything")
            with pytest.raises(PermissionError):
                find_inputs([tmp_path])
        finally:
            closed.chmod(0o755)
