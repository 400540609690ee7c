"""Bytes to text: large documents take a way of their own, and come to the same."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longpretrain.prepare import decode as decode_module
from longpretrain.prepare.decode import decode, text_of_json, text_of_lines
from longpretrain.prepare.unusable import UnusableError

PIECES = [b"a", b"plain text ", "é👍".encode(), b"\xe2\x80", b"\xff", b"\0", b"\r\n", b"\n", b" "]
BYTES = st.lists(st.sampled_from(PIECES), max_size=20).map(b"".join)
ESCAPES = ["\\n", "\\\\", '\\"', "\\u00e9", "\\u2019", "\\ud83d\\ude00", "\\ud83d", "\\ude00"]
WRONG = ["\\x", "\\u12", "\\u12g4", "\t", "\\", "\0"]
STRINGS = st.lists(
    st.sampled_from(
        [*ESCAPES, *ESCAPES, "\\u0000", "a", "plain text ", "é", "👍", "\u2028", *WRONG, "\udcff"]
    ),
    max_size=12,
).map("".join)
FORMS = ['{"k": "%s", "t": "%s"}', '{"t": "%s%s"}', '{"t": "%s", "t": "%s"}', '{"%s": "%s"}']
FORMS += ['["%s", "%s"]', '{"t": [1, "%s"], "k": "%s"}', '"t": "%s%s"', '"%s%s"']
LINES = st.tuples(STRINGS, STRINGS, st.sampled_from(FORMS))


def outcome(read, *arguments, **options):
    """What was returned, or what is wrong: of "no JSON" that alone, for the place may differ."""
    try:
        return read(*arguments, **options)
    except UnusableError as error:
        return error.got.partition(" (")[0]


def large(read, data, *arguments, **options):
    """As for a text of many MiB: of some bytes a slice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode_module, "_LARGE_BYTES", 0)
        patch.setattr(decode_module, "_LIFT_BYTES", 8)
        patch.setattr(decode_module, "_SLICE", 3)
        units = rb"(?:[^\\]{1,2}+|\\u.{4}|\\[^u]){1,2}+"
        patch.setattr(decode_module, "_UNITS", re.compile(units, re.DOTALL))
        return outcome(read, bytearray(data), *arguments, **options)


class TestLarge:
    @settings(max_examples=300)
    @given(data=BYTES, mend=st.booleans())
    def test_text(self, data: bytes, mend: bool) -> None:
        assert large(decode, data, 5, mend=mend) == outcome(decode, data, 5, mend=mend)
        assert large(text_of_lines, data, 5, mend=mend) == outcome(
            text_of_lines, bytearray(data), 5, mend=mend
        )

    @settings(max_examples=600)
    @given(line=LINES, mend=st.booleans())
    @example(line=("", "\\ud83d\\ude00" * 4, '{"k": "%s", "t": "%s"}'), mend=False)
    @example(line=("a" * 9, "b" * 9, '{"t": "%s", "t": "%s"}'), mend=False)
    def test_json(self, line: tuple[str, str, str], mend: bool) -> None:
        data = (line[2] % line[:2]).encode("utf-8", "surrogateescape")
        found = large(text_of_json, data, 5, "t", mend=mend)
        assert found == outcome(text_of_json, data, 5, "t", mend=mend)

    @settings(max_examples=100)
    @given(text=st.text(), ascii_=st.booleans())
    def test_any_text(self, text: str, ascii_: bool) -> None:
        data = json.dumps({"t": text}, ensure_ascii=ascii_).encode("utf-8", "replace")
        whole = json.loads(data)["t"]
        found = large(text_of_json, data, 0, "t", mend=True)
        assert found[0] == whole.replace("\0", "\ufffd")

    def test_a_string_that_does_not_end(self):
        """In time that grows with the line, not with its square."""
        line = b'{"t": "' + b'\\"x' * 700_000
        for end, got in ((b"", "no JSON"), (b"\\", "no JSON"), (b'"}', ('"x' * 700_000, False))):
            assert outcome(text_of_json, line + end, 0, "t", mend=False) == got


class TestSmall:
    @pytest.mark.parametrize(
        ("data", "text"),
        [(b"a\0b", "a\ufffdb"), (b"\xff", "\ufffd"), (b"\xf0\x9f", "\ufffd"), (b"ok", "ok")],
    )
    def test_mended(self, data, text):
        assert decode(data, 0, mend=True) == (text, text != "ok")

    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_of_any_bytes(self, kind):
        assert decode(kind("é".encode()), 0, mend=False) == ("é", False)

    def test_offsets_are_of_the_file(self):
        with pytest.raises(UnusableError, match="byte 0xff at offset 107"):
            text_of_lines(bytearray(b" \r\na\r\nb\xff"), 100, mend=False)
        with pytest.raises(UnusableError, match="a NUL byte at offset 102"):
            decode("é\0".encode(), 100, mend=False)


def nested(levels: int) -> bytes:
    """A line so deep, by arrays and objects in turn, with a text beside them."""
    pairs, odd = divmod(levels - 1, 2)
    inside = '{"a": [' * pairs + "[" * odd + "]" * odd + "]}" * pairs
    return f'{{"n": {inside or 0}, "t": "x"}}'.encode()


DECOYS = "[{" * 300 + '\\"' + "[{" * 300 + "\\\\"


class TestNesting:
    @pytest.mark.parametrize("read", [outcome, large])
    def test_has_a_limit(self, read):
        for levels in (1, 2, 199, 200):
            assert read(text_of_json, nested(levels), 0, "t", mend=False) == ("x", False)
        for levels in (201, 202, 990, 1100, 100_000):
            got = read(text_of_json, nested(levels), 0, "t", mend=False)
            assert got == "JSON nested deeper than 200"

    @pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
    def test_of_one_kind(self, opening, closing):
        for levels, got in ((199, ("x", False)), (200, "JSON nested deeper than 200")):
            line = f'{{"n": {opening * levels}0{closing * levels}, "t": "x"}}'.encode()
            assert outcome(text_of_json, line, 0, "t", mend=False) == got

    def test_does_not_ask_how_deep_the_caller_is(self):
        def call(frames: int) -> object:
            if frames:
                return call(frames - 1)
            lines = map(nested, range(190, 1000, 5))
            return [outcome(text_of_json, line, 0, "t", mend=False) for line in lines]

        assert call(0) == call(450)

    @pytest.mark.parametrize("read", [outcome, large])
    def test_brackets_in_strings_are_text(self, read):
        line = b'{"' + DECOYS.encode() + b'": [], "t": "' + DECOYS.encode() + b'", "n": [1]}'
        assert read(text_of_json, line, 0, "t", mend=False) == (json.loads(line)["t"], False)
        deep = line.replace(b"[1]", b"[" * 200 + b"]" * 200)
        assert read(text_of_json, deep, 0, "t", mend=False) == "JSON nested deeper than 200"

    def test_many_brackets_side_by_side(self, monkeypatch):
        monkeypatch.setattr(decode_module, "_SLICE", 7)  # brackets at a time
        line = b'{"t": "x", "n": [' + b"[{}], " * 500 + b"0]}"
        assert outcome(text_of_json, line, 0, "t", mend=False) == ("x", False)
        deep = line.replace(b"0]", b"[" * 198 + b"0" + b"]" * 198 + b"]")
        assert outcome(text_of_json, deep, 0, "t", mend=False) == ("x", False)
        deeper = deep.replace(b"0]", b"[0]]")
        got = outcome(text_of_json, deeper, 0, "t", mend=False)
        assert got == "JSON nested deeper than 200"


class TestNumbers:
    @pytest.mark.parametrize("most", [0, 640, 4300])
    def test_of_any_length(self, most):
        """Whatever the environment says of their digits."""
        before = sys.get_int_max_str_digits()
        sys.set_int_max_str_digits(most)
        try:
            for number in ("1" * 5000, "-" + "9" * 100_000, "1" * 5000 + ".5e" + "1" * 5000):
                line = f'{{"n": {number}, "t": "x"}}'.encode()
                assert outcome(text_of_json, line, 0, "t", mend=False) == ("x", False)
        finally:
            sys.set_int_max_str_digits(before)

    @pytest.mark.parametrize(
        ("value", "kind"), [("5", "int"), ("-" + "5" * 5000, "int"), ("5.0", "float")]
    )
    def test_are_no_text(self, value, kind):
        line = f'{{"t": {value}}}'.encode()
        assert outcome(text_of_json, line, 0, "t", mend=False) == f"{kind} in field 't'"


PEAK = """
import re, sys
from pathlib import Path
from longpretrain.prepare.documents import ReadOptions, read_piece
from longpretrain.prepare.inputs import Piece, find_inputs
[file] = find_inputs([Path(sys.argv[1])], documents="file")
options = ReadOptions(documents=sys.argv[2])
# Not getrusage, whose peak is that of the process which started this one, if that was higher.
told = lambda key: int(re.search(key + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
before, held = told("VmHWM"), 0
for document in read_piece(file, Piece(0, 0, file.bytes), options, lambda _: None):
    assert len(document.text) > 16_000_000
    held = max(held, told("VmRSS") - before - sys.getsizeof(document.text) // 1024)
    del document
print(told("VmHWM") - before, held)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="measures what glibc keeps")
class TestMemory:
    """Two documents of 34 MiB, above the 32 that malloc may keep; an emoji at the end makes a text
    four times as large as its bytes, of which little is there besides.
    """

    @pytest.mark.parametrize(
        ("name", "documents", "copies"),
        [
            ("mixed.jsonl", "file", 4.3),
            ("ascii.jsonl", "file", 3),
            ("a.txt", "blank-line", 4.3),
        ],
    )
    def test_is_flat(self, tmp_path: Path, name: str, documents: str, copies: float) -> None:
        size = 34 << 20
        text = "A line of text.\n" * (size // 16 + 9)
        text += "" if name.startswith("ascii") else "\U0001f600"
        path = tmp_path / name
        if name.endswith(".txt"):
            path.write_text(f"{text}\n\n" * 2, encoding="utf-8")
        else:
            line = json.dumps({"text": text}, ensure_ascii=False)
            if name == "mixed.jsonl":
                line = line.replace("A line", "\\u0410 line", 1)
            path.write_text(f"{line}\n" * 2, encoding="utf-8")
        told = subprocess.run(
            [sys.executable, "-c", PEAK, path, documents],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        peak, held = map(int, told.stdout.split())
        assert peak / (size >> 10) < copies + 0.4
        assert held / (size >> 10) < 0.6  # besides the text, when that is handed out
