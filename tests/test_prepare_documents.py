"""Documents of each kind of file; what is wrong with one is told with its place, as is decided."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from prepare_inputs import lines, outcomes, read, read_pieces, table, texts

from longpretrain.errors import InputError
from longpretrain.prepare import documents as documents_module
from longpretrain.prepare.documents import Document, Problem, ReadOptions, read_piece
from longpretrain.prepare.inputs import Piece, find_inputs, spooled


def jsonl(tmp_path, data):
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    return path


class TestText:
    @pytest.mark.parametrize(
        ("data", "text"),
        [
            (b"\xef\xbb\xbf\r\nFirst\r\nline  \n", "First\nline"),
            (b"Second.\n\nStill second.\n", "Second.\n\nStill second."),
            (b" \n\t\n", ""),
            (b"", ""),
            (b"\xef\xbb\xbf", ""),
            (b"\xef\xbb", None),
            ("\u00a0\u3000é\u2028".encode(), "é"),
            (b"\x1c a\rb \x1f", "a\rb"),
        ],
    )
    def test_a_file_is_a_document(self, tmp_path, data, text):
        path = tmp_path / "a.txt"
        path.write_bytes(data)
        if text is None:
            assert outcomes(read(path, on_error="skip")) == [
                "[got byte 0xef at offset 0; wanted UTF-8 text]"
            ]
        else:
            assert read(path) == [Document(text, "a.txt")]

    def test_blank_lines_separate_documents(self, tmp_path):
        path = tmp_path / "all.txt"
        path.write_bytes(b"\xef\xbb\xbf\n one\r\n two\r\n  \t\r\n\nthree\n\n\n\xc3\xa9 four")
        assert read(path, documents="blank-line") == [
            Document("one\n two", "all.txt line 2"),
            Document("three", "all.txt line 6"),
            Document("é four", "all.txt line 9"),
        ]

    @pytest.mark.parametrize("space", ["", " ", "\r", "\x1c", "\u00a0", "\u3000 \t", "\x85"])
    def test_what_a_blank_line_is(self, tmp_path, space):
        path = tmp_path / "a.txt"
        path.write_bytes(f"one\n{space}\ntwo\n{space}é\n".encode())
        assert texts(read(path, documents="blank-line")) == ["one", f"two\n{space}é".strip()]

    def test_nothing_but_blank_lines(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_bytes(b"\n \n\t\n")
        assert read(path, documents="blank-line") == []


class TestJsonLines:
    def test_the_text_is_taken_as_it_is(self, tmp_path):
        path = jsonl(
            tmp_path,
            b"\xef\xbb\xbf\n"
            + lines({"text": " one \u00e9 \U0001f44d\n"}, {"text": " \n\u00a0"}, {"text": ""})
            + '\u00a0\n {"text": "é"}\r\n'.encode()
            + b'{"text": "a", "text": "last"}',
        )
        assert read(path) == [
            Document(" one é 👍\n", "a.jsonl line 2"),
            Document("", "a.jsonl line 3"),
            Document("", "a.jsonl line 4"),
            Document("é", "a.jsonl line 6"),
            Document("last", "a.jsonl line 7"),
        ]

    def test_another_field(self, tmp_path):
        path = jsonl(tmp_path, lines({"body é": "yes", "text": 3}))
        assert texts(read(path, field="body é")) == ["yes"]

    def test_an_empty_file(self, tmp_path):
        assert read(jsonl(tmp_path, b"")) == []

    def test_lines_of_a_later_piece_say_where_it_begins(self, tmp_path):
        path = jsonl(tmp_path, lines(*({"text": str(i)} for i in range(6))))
        found = read_pieces(path, 30)
        assert [item.place for item in found] == [
            "a.jsonl line 1", "a.jsonl line 2", "a.jsonl line 3",
            "a.jsonl line 1 after byte 42", "a.jsonl line 2 after byte 42",
            "a.jsonl line 3 after byte 42",
        ]  # fmt: skip


BAD_LINES = [
    pytest.param(b"{", "no JSON", id="json"),
    pytest.param(b'{"text": "a"} {"text": "b"}', "no JSON", id="two"),
    pytest.param(b'{"text": "a\tb"}', "no JSON", id="control"),
    pytest.param(b'["text"]', "a JSON list; wanted a JSON object", id="list"),
    pytest.param(
        b'{"body": "x", "id": 3}', "fields body, id; wanted text in field 'text'", id="field"
    ),
    pytest.param(
        b'{"\\ud800": 1, "%s": 2}' % (b"y" * 60), f"fields {'y' * 40}, \\ud800;", id="keys"
    ),
    pytest.param(b"{}", "no field; wanted text in field 'text'", id="no field"),
    pytest.param(b'{"text": null}', "NoneType in field 'text'", id="null"),
    pytest.param(b'{"text": 3}', "int in field 'text'", id="number"),
    pytest.param(b"[" * 100_000, "JSON nested deeper than 200; wanted at most 200", id="deep"),
    pytest.param(b'{"text": "' + b"x" * 110_001 + b'"}', "a line above 0.1", id="long"),
]
CAN_BE_MENDED = [
    pytest.param(b'{"text": "\\ud83d!"}', "lone surrogate U+D83D at character 0", id="surrogate"),
    pytest.param(b'{"text": "\xe9!"}', "byte 0xe9 at offset 28; wanted UTF-8", id="utf-8"),
    pytest.param(b'{"text": "\\u0000!"}', "NUL at character 0", id="nul escape"),
    pytest.param(b'{"text": "\0!"}', "a NUL byte at offset 28; wanted text", id="nul"),
]
GOOD = b'{"text": "gr\xc3\xbcn"}\n'


class TestBadLines:
    """None is lost without a word, whatever is done about it."""

    def read(self, tmp_path, line, on_error):
        path = jsonl(tmp_path, GOOD + line + b"\n" + GOOD)
        return read(path, on_error=on_error, max_document_bytes=110_000)

    @pytest.mark.parametrize(("line", "got"), BAD_LINES + CAN_BE_MENDED)
    def test_stop(self, tmp_path, line, got):
        with pytest.raises(InputError) as info:
            self.read(tmp_path, line, "stop")
        told = str(info.value)
        assert told.startswith(f"file {tmp_path / 'a.jsonl'} line 2: got {got}")
        assert "\n" not in told
        assert "--on-error skip" in info.value.way_out

    @pytest.mark.parametrize(("line", "got"), BAD_LINES + CAN_BE_MENDED)
    def test_skip(self, tmp_path, line, got):
        first, problem, last = self.read(tmp_path, line, "skip")
        assert first == Document("grün", "a.jsonl line 1")
        assert isinstance(problem, Problem)
        assert problem.place == "a.jsonl line 2"
        assert problem.reason.startswith(f"got {got}")
        assert last == Document("grün", "a.jsonl line 3")

    @pytest.mark.parametrize(("line", "got"), BAD_LINES)
    def test_what_cannot_be_mended_is_skipped(self, tmp_path, line, got):
        assert self.read(tmp_path, line, "replace") == self.read(tmp_path, line, "skip")

    @pytest.mark.parametrize(("line", "got"), CAN_BE_MENDED)
    def test_replace(self, tmp_path, line, got):
        assert self.read(tmp_path, line, "replace")[1:] == [
            Document("\ufffd!", "a.jsonl line 2", mended=True),
            Document("grün", "a.jsonl line 3"),
        ]

    def test_a_pair_of_surrogates_is_a_character(self, tmp_path):
        assert texts(read(jsonl(tmp_path, b'{"text": "\\ud83d\\ude00"}'))) == ["😀"]


class TestBadText:
    @pytest.mark.parametrize("documents", ["file", "blank-line"])
    @pytest.mark.parametrize(
        ("data", "place", "mended"),
        [
            (b"caf\xe9 au lait", "byte 0xe9 at offset 3", "caf\ufffd au lait"),
            (b"one\ntwo\n\xff\xfe", "byte 0xff at offset 8", "one\ntwo\n\ufffd\ufffd"),
            (b"\xef\xbb\xbfa\x80", "byte 0x80 at offset 4", "a\ufffd"),
            (b" \r\n\r\na\r\nb\x80", "byte 0x80 at offset 9", "a\nb\ufffd"),
            ("cut 👍".encode()[:-1], "byte 0xf0 at offset 4", "cut \ufffd"),
            (b"surrogate \xed\xa0\x80", "byte 0xed at offset 10", "surrogate \ufffd\ufffd\ufffd"),
            ("nül \0!".encode(), "a NUL byte at offset 5", "nül \ufffd!"),
        ],
        ids=["latin-1", "line", "after a mark", "crlf", "cut short", "surrogate", "nul"],
    )
    def test_text_that_is_none(self, tmp_path, data, place, mended, documents):
        path = tmp_path / "z.txt"
        path.write_bytes(data)
        options = {"documents": documents}
        with pytest.raises(InputError, match=rf"z\.txt.*: got {place}; wanted .*--on-error skip"):
            read(path, **options)
        [problem] = read(path, on_error="skip", **options)
        assert isinstance(problem, Problem)
        assert problem.reason.startswith(f"got {place}; wanted")
        [document] = read(path, on_error="replace", **options)
        assert isinstance(document, Document)
        assert (document.text, document.mended) == (mended, True)
        assert document.place == problem.place

    def test_iconv_is_the_way_out(self, tmp_path):
        path = tmp_path / "z.txt"
        path.write_bytes(b"\xff")
        with pytest.raises(InputError, match="iconv"):
            read(path)

    def test_only_the_document_is_skipped(self, tmp_path):
        path = tmp_path / "z.txt"
        path.write_bytes(b"one\n\ntwo\n\xff\nmore\n\nthree")
        assert read(path, documents="blank-line", on_error="skip") == [
            Document("one", "z.txt line 1"),
            Problem("z.txt line 3", "got byte 0xff at offset 9; wanted UTF-8 text"),
            Document("three", "z.txt line 7"),
        ]


class TestLimit:
    def test_a_document_of_which_a_line_is_above_it(self, tmp_path):
        path = tmp_path / "a.txt"
        path.write_bytes(b"one\n\ntwo\n" + b"x" * 30 + b"\nmore\n\nthree")
        options = {"documents": "blank-line", "max_document_bytes": 20}
        first, problem, last = read(path, on_error="skip", **options)
        assert texts([first, last]) == ["one", "three"]
        assert isinstance(problem, Problem)
        assert problem.place == "a.txt line 3"

    @pytest.mark.parametrize(("size", "fits"), [(20, True), (21, False)])
    @pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "b.txt", "p.parquet"])
    def test_the_largest_that_fits(self, tmp_path, name, size, fits):
        path, options = tmp_path / name, {"max_document_bytes": 20, "on_error": "skip"}
        match name:
            case "a.jsonl":
                line = b'{"text": "' + b"x" * (size - 12) + b'"}'
                path.write_bytes(line + b'\n{"text": "a"}\n')
            case "a.txt":
                path.write_bytes(b"x" * size)
            case "b.txt":
                path.write_bytes(b"x" * 10 + b"\n" + b"x" * (size - 11) + b"\n\na\n")
                options["documents"] = "blank-line"
            case "p.parquet":
                table(path, ["x" * size, "a"])
        found = read(path, **options)
        assert isinstance(found[0], Document if fits else Problem)
        assert name == "a.txt" or texts(found[1:]) == ["a"]
        if not fits:
            with pytest.raises(InputError, match=r"got a \w+ above .* MiB; .*--max-document-mb"):
                read(path, **options | {"on_error": "stop"})

    @pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".bz2"])
    @pytest.mark.parametrize("kind", ["jsonl", "txt", "blank-line"])
    def test_what_is_above_it_is_not_held(self, tmp_path, kind, suffix, packed):
        filler = b"x" * 99 + (b"\n" if kind == "blank-line" else b"x")
        data = b'{"text": "' + filler * (2 << 18) + b'"}\n\n{"text": "a"}\n'
        path = tmp_path / f"a.{'jsonl' if kind == 'jsonl' else 'txt'}{suffix}"
        path.write_bytes(packed(data, suffix))
        options = ReadOptions(
            documents="blank-line" if kind == "blank-line" else "file",
            max_document_bytes=1 << 20, on_error="skip",
        )  # fmt: skip
        [file] = find_inputs([path], documents="file")
        tracemalloc.start()
        try:
            found = list(read_piece(file, Piece(0, 0, file.bytes), options, lambda _: None))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert isinstance(found[0], Problem)
        assert len(found) == (1 if kind == "txt" else 2)
        assert peak < 16 << 20


@pytest.fixture(scope="module")
def packed():
    from prepare_inputs import PACK

    done: dict[tuple[int, str], bytes] = {}

    def packed(data, suffix):
        key = (hash(data), suffix)
        if key not in done:
            done[key] = PACK[suffix](data)
        return done[key]

    return packed


class TestFile:
    def test_one_that_became_shorter(self, tmp_path):
        path = jsonl(tmp_path, lines({"text": "a"}, {"text": "b"}))
        [file] = find_inputs([path])
        path.write_bytes(lines({"text": "a"}))
        for on_error in ("stop", "skip"):
            pieces = read_piece(
                file, Piece(0, 0, file.bytes), ReadOptions(on_error=on_error), lambda _: None
            )
            with pytest.raises(InputError, match=r"a\.jsonl: got 14 bytes fewer than at the start"):
                list(pieces)

    def test_one_that_is_gone(self, tmp_path):
        path = jsonl(tmp_path, lines({"text": "a"}))
        [file] = find_inputs([path])
        path.unlink()
        options = ReadOptions(on_error="skip")
        with pytest.raises(FileNotFoundError):
            list(read_piece(file, Piece(0, 0, file.bytes), options, lambda _: None))

    def test_standard_input_has_no_path(self, tmp_path):
        (tmp_path / "spool").write_bytes(b'{"text": "a"}\n{')
        file = spooled(tmp_path / "spool", "jsonl")
        reading = read_piece(file, Piece(0, 0, file.bytes), ReadOptions(), lambda _: None)
        assert next(reading) == Document("a", "- line 1")
        with pytest.raises(InputError, match=r"^standard input line 2: got no JSON"):
            next(reading)

    def test_a_byte_order_mark_that_comes_in_bits(self, tmp_path, monkeypatch):
        """A decompressor may hand out a byte at a time."""
        monkeypatch.setattr(
            documents_module, "unpack", lambda part, _: (bytes([b]) for b in part.read(99))
        )
        path = jsonl(tmp_path, b"\xef\xbb\xbf" + lines({"text": "a\u00e9"}, {"text": "b"}))
        assert texts(read(path)) == ["aé", "b"]

    def test_a_mark_in_the_middle_is_text(self, tmp_path):
        path = jsonl(tmp_path, (json.dumps({"text": "a"}) + "\n").encode() + b"\xef\xbb\xbf{}")
        assert outcomes(read(path, on_error="skip"))[1].startswith("[got no JSON")
