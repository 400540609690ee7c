"""The verb ``prepare``: every option reaches what it is for, and what was left out is said."""

from __future__ import annotations

import gzip
import io
import json
import sys

import pytest
from told import check_form, exit_code

from longpretrain.cli import main
from longpretrain.data.manifest import Manifest


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Texts with something for every option, as the current folder."""
    monkeypatch.chdir(tmp_path)
    lines = [{"body": f"Document {i} of many, with some words."} for i in range(200)]
    lines += [
        lines[5],
        {"body": "short"},
        {"body": ""},
        {"body": "Cafe\u0301 au lait, s'il vous pla\u00eet"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + "{\n"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "in" / "b.txt").write_text(
        "One text between blank lines.\n\nAnother text, as said.\n"
    )
    return tmp_path


def told(capsys, *words):
    """The one line of a refusal."""
    assert exit_code("prepare", *words) == 2
    return check_form(capsys.readouterr().err, "prepare")


def test_all_options(place, capsys):
    words = [
        "in", "--out", "out", "--field", "body", "--documents", "blank-line", "--on-error", "skip",
        "--filter", "unicode=nfc", "--filter", "min_tokens=3", "--filter", "deduplicate",
        "--valid", "0.2", "--workers", "2", "--max-document-mb", "1",
    ]  # fmt: skip
    assert main(["prepare", *words]) == 0
    printed = capsys.readouterr()
    train, valid = (Manifest.read(place / "out" / name) for name in ("train", "valid"))
    assert train.documents + valid.documents == 200 + 1 + 2
    assert 20 < valid.documents < 60
    assert train.settings == {
        "documents": "blank-line", "field": "body",
        "filters": "unicode=nfc, min_tokens=3, deduplicate",
        "max_document_bytes": str(1 << 20), "on_error": "skip", "shard_bytes": str(1 << 29),
        "valid": "1/5",
    }  # fmt: skip
    lines = printed.out.splitlines()
    assert lines[0] == f"out/train: {train.documents:,} documents, {train.tokens:,} tokens"
    assert lines[1] == f"out/valid: {valid.documents:,} documents, {valid.tokens:,} tokens"
    assert lines[2] == "1 empty documents left out"
    assert lines[3] == "1 could not be read and were left out: out/train/problems.jsonl"
    reports = [line for line in lines[4:] if not line.startswith("  ")]
    assert [line.split(":")[0] for line in reports] == [
        "unicode=nfc",
        "min_tokens=3",
        "deduplicate",
    ]
    assert "  in/a.jsonl.gz line 202: short" in lines
    assert "  in/a.jsonl.gz line 201: Document 5 of many, with some words." in lines
    assert printed.err == ""
    assert main(["prepare", *words]) == 0
    assert capsys.readouterr().out == printed.out


def test_standard_input(place, capsys, monkeypatch):
    data = io.BytesIO(b'{"text": "From a pipe."}\n')
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(data))
    assert main(["prepare", "-", "--stdin-format", "jsonl", "--out", "out"]) == 0
    assert "out: 1 documents, 4 tokens" in capsys.readouterr().out


def test_mended_documents_are_counted(place, capsys):
    (place / "in" / "b.txt").write_bytes(b"caf\xe9 au lait")
    assert main(["prepare", "in/b.txt", "--out", "out", "--on-error", "replace"]) == 0
    assert "1 documents were mended with U+FFFD" in capsys.readouterr().out


def test_what_is_kept_is_said_and_restart_throws_it_away(place, capsys, monkeypatch):
    import longpretrain.prepare.job as job

    monkeypatch.setitem(job.prepare.__kwdefaults__, "unit_bytes", 60)
    (place / "in" / "c.jsonl").write_text("{")
    first = ["prepare", "in/b.txt", "in/c.jsonl", "--out", "out", "--documents", "blank-line"]
    assert exit_code(*first) == 2
    kept, refusal = capsys.readouterr().err.splitlines()
    work = place / ".out.preparing"
    assert kept.startswith("longpretrain prepare: 1 of 2 parts are finished and kept in ")
    assert kept.endswith(f"{work}: run the same command again to go on from there")
    assert "in/c.jsonl line 1: got no JSON" in check_form(refusal, "prepare")
    (place / "in" / "c.jsonl").unlink()
    other = ["prepare", "in/b.txt", "--out", "out"]
    line = told(capsys, *other[1:])
    assert "got parts made with another --documents; wanted a new corpus, or the same again" in line
    assert "--restart" in line
    assert main([*other, "--restart"]) == 0
    assert not work.exists()


TRAIN = ["in", "--out", "out", "--train-tokenizer", "bpe", "--vocab-size", "300"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "got nothing; wanted a value"),
        (["in"], "--out: got nothing; wanted a value"),
        (["--out", "out"], "INPUT: got nothing"),
        (["in", "--out", "out", "--valid", "2"], "valid: got 2; wanted a share"),
        (["-", "--out", "/"], "out /: got the root of all folders"),
        (["-", "--out", "/proc"], "out /proc: got a mount point"),
        (["in", "--out", "out", "--filter", "lower"], "filter lower: got 'lower'; wanted unicode"),
        (["in", "--out", "out", "--on-error", "ignore"], "--on-error: got 'ignore'; wanted one of"),
        (["in", "--out", "out", "--max-document-mb", "0"], "--max-document-mb: got 0; wanted 1"),
        (["in", "--out", "out", "--stdin-format", "parquet"], "--stdin-format: got 'parquet'"),
        (["in", "--verify", "out"], "--verify: got in as well; wanted one of them"),
        (["--verify", "a", "--inspect", "b"], "--inspect: got --verify as well"),
        (["in", "--out", "out", "--train-tokenizer", "bpe"], "--vocab-size: got nothing"),
        (["--verify", "a", "--valid", "7"], "--verify: got --valid as well; wanted one of them"),
        (["--inspect", "a", "--filter", "x"], "--inspect: got --filter as well; wanted one"),
        (["in", "--out", "out", "--vocab-size", "9"], "--vocab-size: got 9; wanted --train-tokeni"),
        (
            [*TRAIN, "--workers", "2"],
            "--train-tokenizer: got --workers as well",
        ),
        (
            [*TRAIN, "--filter", "deduplicate"],
            "--filter: got one of tokens or duplicates; wanted unicode=F",
        ),
        (["--verify", "no-such"], "no-such"),
        (["--inspect", "in"], "in: got"),
        (["-", "in", "-", "--out", "out"], "standard input: got the same file twice"),
    ],
)  # fmt: skip
def test_what_cannot_be(place, capsys, monkeypatch, words, message):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"text")))
    before = sorted(place.rglob("*"))
    assert message in told(capsys, *words)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    "more", [["--out", "out"], ["--train-tokenizer", "bpe", "--vocab-size", "270", "--out", "out"]]
)
def test_what_is_left_out_is_said(place, capsys, more):
    (place / "more").mkdir()
    (place / "more" / "a.txt").write_text("the hat and the cat " * 50, encoding="utf-8")
    (place / "more" / "b.xz").write_text("", encoding="utf-8")
    assert exit_code("prepare", "more", *more) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert line.startswith("longpretrain prepare: left out a file of other kinds (1 .xz); wanted")
