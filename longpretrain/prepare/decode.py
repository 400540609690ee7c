"""Bytes of a document -> its text, strict about what they are, or mended where that can be done.

A text takes one, two or four times the memory of its bytes, by its rarest character. So a large one
is decoded in slices, its bytes are let go of, and only then it is put together: a bytearray that is
given to a function here may come back empty.

What is JSON here depends on the line alone, where Python's parser also asks how deep the caller is
and what the environment says of long numbers: nesting has a limit, numbers none.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from longpretrain.prepare.memory import GrowingText, trim
from longpretrain.prepare.unusable import SKIP, UnusableError

_REPLACEMENT = "\ufffd"
_SURROGATE = re.compile("[\ud800-\udfff]")
# A string of JSON; one that does not end is taken too, lest each quote in it is tried in turn.
_STRING = re.compile(rb'"((?:[^"\\]++|\\.)*+)("?)')
_COLON = re.compile(rb"\s*:")  # after a key
# So much of the inside of a string that no escape is cut in two.
_UNITS = re.compile(rb"(?:[^\\]{1,4096}+|\\u.{4}|\\[^u]){1,256}+", re.DOTALL)
_HIGH_AND_LOW = re.compile(rb"\\u[dD][89abAB]..\\u[dD][c-fC-F]..")

_LARGE_BYTES = 1 << 20
_LIFT_BYTES = 1 << 16
_SLICE = 1 << 20
_MOST_NESTED = 200
_BRACKETS = b"[]{}"
_NOT_BRACKETS = bytes(set(range(256)) - set(_BRACKETS))
_STEPS = np.array([{91: 1, 123: 1, 93: -1, 125: -1}.get(byte, 0) for byte in range(256)], np.int8)
# Of a whole number only the kind is told; to make it an int takes the square of its digits, and
# above 4,300 of them Python refuses, or not, by the environment.
_JSON = json.JSONDecoder(parse_int=len)
_OBJECT = "a JSON object with the text in a field"
_MEND = "Mend the line, name the field with --field, or pass --on-error skip."

Bytes = bytes | bytearray | memoryview
Text = tuple[str, bool]
"""A text, and whether it had to be mended."""


def decode(data: Bytes, offset: int, *, mend: bool) -> Text:
    """Text of UTF-8 without NUL.

    Args:
        data: the bytes; a bytearray may come back empty.
        offset: where they begin, for the message.
        mend: put U+FFFD in the place of what is wrong.

    Raises:
        UnusableError: something is wrong.
    """
    if len(data) > _LARGE_BYTES and not isinstance(data, memoryview):
        text, mended = _decode_large(data, offset, mend=mend)
        trim()
    else:  # also of memory that cannot be let go of
        text, mended = _decode_small(data, offset, mend=mend)
    if (at := text.find("\0")) >= 0:
        if not mend:
            raise _nul(offset + len(text[:at].encode()))
        text, mended = text.replace("\0", _REPLACEMENT), True
    return text, mended


def text_of_lines(data: bytearray, offset: int, *, mend: bool) -> Text:
    """A document of plain text: CRLF becomes LF, and white space around it is dropped.

    Otherwise like ``decode``.
    """
    if b"\r\n" in data:
        if not mend:  # while the offsets are those of the file
            for _ in _decode_slices(_slices(data), offset, mend=False):
                pass
        data[:] = data.replace(b"\r\n", b"\n")
    # Now rather than of the text, whose copy may be four times as large.
    del data[len(data.rstrip()) :]
    lead = len(data) - len(data.lstrip())
    del data[:lead]
    text, mended = decode(data, offset + lead, mend=mend)
    return text.strip(), mended


def text_of_json(line: bytes | bytearray, offset: int, field: str, *, mend: bool) -> Text:
    """The text that a line of JSON has in a field, as it is.

    Otherwise like ``decode``.
    """
    if len(line) > _LARGE_BYTES:
        text, mended = _text_of_large_json(line, offset, field, mend=mend)
        trim()
    else:
        whole, mended = decode(line, offset, mend=mend)
        text = _in_field(_parse(whole), field)
        del whole
    if wrong := _wrong_escape(text):
        if not mend:
            raise UnusableError(wrong, "Unicode characters but NUL")
        text, mended = _SURROGATE.sub(_REPLACEMENT, text).replace("\0", _REPLACEMENT), True
    return text, mended


def _decode_small(data: Bytes, offset: int, *, mend: bool) -> Text:
    try:
        return str(data, "utf-8"), False
    except UnicodeDecodeError as error:
        if not mend:
            raise _no_utf8(error, offset) from error
        return str(data, "utf-8", "replace"), True


def _decode_slices(slices: Iterator[bytes], offset: int, *, mend: bool) -> Iterator[Text]:
    """As ``_decode_small`` of all of them; a slice's text counts as mended after the first is."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    mended = False
    for part, final in itertools.chain(((part, False) for part in slices), [(b"", True)]):
        state = decoder.getstate()  # bytes of a character that has begun
        try:
            text = decoder.decode(part, final)
        except UnicodeDecodeError as error:
            if not mend:
                raise _no_utf8(error, offset - len(state[0])) from error
            mended = True
            decoder = codecs.getincrementaldecoder("utf-8")("replace")
            decoder.setstate(state)
            text = decoder.decode(part, final)
        yield text, mended
        offset += len(part)


def _decode_large(data: Bytes, offset: int, *, mend: bool) -> Text:
    text, mended = GrowingText(), False
    for part, was in _decode_slices(_slices(data), offset, mend=mend):
        text.add(part)
        mended = was
    if isinstance(data, bytearray):
        data.clear()
    return text.take(), mended


def _slices(data: Bytes) -> Iterator[bytes]:
    return (bytes(data[at : at + _SLICE]) for at in range(0, len(data), _SLICE))


def _text_of_large_json(line: bytes | bytearray, offset: int, field: str, *, mend: bool) -> Text:
    """Lifts the large strings out, parses what is left, and decodes those in slices."""
    mended = any(was for _, was in _decode_slices(_slices(line), offset, mend=mend))
    if (at := line.find(b"\0")) >= 0:
        if not mend:
            raise _nul(offset + at)
        line, mended = bytearray(line.replace(b"\0", _REPLACEMENT.encode())), True
    mark = hashlib.blake2b(line, digest_size=16).hexdigest()  # which no line holds of itself
    lifted: dict[str, bytes] = {}

    def lift(match: re.Match[bytes]) -> bytes:
        is_small = match.end() - match.start() < _LIFT_BYTES
        if is_small or not match[2] or _COLON.match(line, match.end()):
            return match[0]
        name = f"{mark}-{len(lifted)}"
        lifted[name] = match[1]
        return f'"{name}"'.encode()

    rest = _STRING.sub(lift, line)
    if isinstance(line, bytearray):
        line.clear()
    entry = _parse(rest.decode("utf-8", "replace"))
    wanted = entry.get(field) if isinstance(entry, dict) else None
    text = GrowingText()
    found = False
    for name in [*lifted]:  # each, for one that is no JSON spoils the line
        for part in _unescape(lifted.pop(name)):
            if name == wanted:
                text.add(part)
                found = True
    return text.take() if found else _in_field(entry, field), mended


def _unescape(string: bytes) -> Iterator[str]:
    """The text of a string of JSON, given without its quotes, in slices."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    at = 0
    while at < len(string):
        match = _UNITS.match(string, at)
        end = match.end() if match else len(string)
        if _HIGH_AND_LOW.match(string, end - 6):  # one character
            end += 6
        part = decoder.decode(string[at:end], final=end == len(string))
        yield _load(f'"{part}"')
        at = end


def _parse(text: str) -> Any:
    if _has_brackets(text) and _nesting(text) > _MOST_NESTED:
        got = f"JSON nested deeper than {_MOST_NESTED}"
        raise UnusableError(got, f"at most {_MOST_NESTED} levels", _MEND)
    return _load(text)


def _load(text: str) -> Any:
    try:
        return _JSON.decode(text)
    except ValueError as error:
        raise UnusableError(f"no JSON ({error})", _OBJECT, _MEND) from error


def _has_brackets(text: str) -> bool:
    """Whether there are enough to nest too deep; most texts have none, which is found fastest."""
    if "[" not in text and text.find("{", 1) < 0:
        return False
    return text.count("[") + text.count("{") > _MOST_NESTED


def _nesting(text: str) -> int:
    """How deep the brackets outside strings go; of what is no JSON, as far as it is."""
    without_escapes = text.replace("\\\\", "").replace('\\"', "")
    outside = "".join(without_escapes.split('"')[::2]).encode("utf-8", "replace")
    brackets = outside.translate(None, _NOT_BRACKETS)
    level = deepest = 0
    for start in range(0, len(brackets), _SLICE):
        codes = np.frombuffer(brackets[start : start + _SLICE], np.uint8)
        levels = level + np.cumsum(_STEPS[codes], dtype=np.int64)
        deepest = max(deepest, int(levels.max()))
        level = int(levels[-1])
    return deepest


def _in_field(entry: Any, field: str) -> str:
    if not isinstance(entry, dict):
        raise UnusableError(f"a JSON {type(entry).__name__}", _OBJECT, _MEND)
    text = entry.get(field)
    if isinstance(text, str):
        return text
    shown = (key[:40].encode("utf-8", "backslashreplace").decode() for key in sorted(entry)[:8])
    keys = f"fields {', '.join(shown)}" if entry else "no field"
    got = f"{type(text).__name__} in field {field!r}" if field in entry else keys
    raise UnusableError(got, f"text in field {field!r}", _MEND)


def _wrong_escape(text: str) -> str | None:
    """What only an escape of JSON can bring in: NUL, and half of a surrogate pair."""
    if (at := text.find("\0")) >= 0:
        return f"NUL at character {at}"
    if text.isascii():
        return None
    for start in range(0, len(text), _SLICE):
        try:
            text[start : start + _SLICE].encode()
        except UnicodeEncodeError as error:
            at = start + error.start
            return f"lone surrogate U+{ord(text[at]):04X} at character {at}"
    return None


def _no_utf8(error: UnicodeDecodeError, offset: int) -> UnusableError:
    return UnusableError(
        f"byte 0x{error.object[error.start]:02x} at offset {offset + error.start}",
        "UTF-8 text",
        f"Convert it, for example: iconv -f WINDOWS-1252 -t UTF-8 FILE; or {SKIP}",
    )


def _nul(at: int) -> UnusableError:
    return UnusableError(f"a NUL byte at offset {at}", "text")
