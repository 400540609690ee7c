"""Large texts in little memory: put together of parts that go as it grows, and given back."""

from __future__ import annotations

import codecs
import ctypes
from collections import deque

_PART_BYTES = 1 << 20
_TRIM_BYTES = 1 << 22

# Bytes of UTF-8 below the first that needs it -> the highest character of a text as wide.
_WIDTHS = ((bytes(range(0xF0)), 0x10FFFF), (bytes(range(0xC4)), 0xFFFF), (b"", 0xFF))
_new = ctypes.pythonapi.PyUnicode_New
_new.argtypes, _new.restype = (ctypes.c_ssize_t, ctypes.c_uint32), ctypes.c_void_p
_copy = ctypes.pythonapi.PyUnicode_CopyCharacters
_copy.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t, ctypes.py_object, *[ctypes.c_ssize_t] * 2)
_copy.restype = ctypes.c_ssize_t
_release = ctypes.pythonapi.Py_DecRef
_release.argtypes, _release.restype = (ctypes.c_void_p,), None


class GrowingText:
    """A text that comes in parts; to put it together takes its own memory and some MiB.

    One character can make a text take four bytes for each, and ``str.join`` needs all parts beside
    the whole. Here parts wait as UTF-8, and each goes as soon as the text has it. No method of
    Python's makes a text of a known width to be filled, so it is made as the interpreter makes it.
    """

    def __init__(self) -> None:
        self._parts: deque[bytearray] = deque()
        self._length = 0
        self._highest = 0x7F  # character for which the text must have room

    def add(self, part: str) -> None:
        """Appends to the text."""
        data = part.encode("utf-8", "surrogatepass")
        self._length += len(part)
        if not part.isascii():
            width = next(high for below, high in _WIDTHS if data.translate(None, below))
            self._highest = max(self._highest, width)
        if self._parts and len(self._parts[-1]) + len(data) <= _PART_BYTES:
            self._parts[-1] += data
        else:
            self._parts.append(bytearray(data))

    def take(self) -> str:
        """The text, once."""
        if len(self._parts) <= 1:
            return "".join(map(_decode, self._parts))
        address = _new(self._length, self._highest)
        at = freed = 0
        while self._parts:
            part = _decode(self._parts.popleft())
            at += _copy(address, at, part, 0, len(part))
            freed += len(part)
            if freed > _TRIM_BYTES:
                trim()
                freed = 0
        assert at == self._length
        text = ctypes.cast(address, ctypes.py_object).value
        _release(address)  # of its two owners the one that is no variable
        return str(text)


def _decode(data: bytearray) -> str:
    return codecs.decode(data, "utf-8", "surrogatepass")


def trim() -> None:
    """To be called after a large document: it takes some milliseconds.

    glibc keeps up to 64 MB at the end of its heap once blocks of many MB were freed, and more in
    the middle of it. Other C libraries have no such function.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
