"""What a rank did last, in memory that it shares with its sentinel: writing there takes no call of
the system, and reading needs nothing of the rank.
"""

from __future__ import annotations

import mmap
import os
import struct
import time

SIZE = 1024
_CHANGE = struct.Struct("=Q")
"""Number of the change that was begun last, and of the one that was ended: they differ during it.
"""
_BEGUN, _ENDED, _HEAD_AT = 0, 8, 16
_HEAD = struct.Struct("=QdH")
"""Count of marks; clock of this machine; bytes of text."""
_TEXT_AT = _HEAD_AT + _HEAD.size

_TRIES, _PAUSE_S = 500, 1e-3
"""A change takes microseconds, or as long as a busy machine lets another process run instead. One
that never ends is of a rank that was killed or stopped in it.
"""


class Marks:
    """The rank's side."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("longpretrain-marks")
        os.ftruncate(self.descriptor, SIZE)
        self._memory = mmap.mmap(self.descriptor, SIZE)
        self._changes, self._count, self._text = 0, 0, b""
        self.write("its start")

    def write(self, what: str) -> None:
        """One more mark. The same again says that the rank goes on, and does not count."""
        text = what.encode()[: SIZE - _TEXT_AT]
        self._changes += 1
        self._count += text != self._text
        self._text = text
        _CHANGE.pack_into(self._memory, _BEGUN, self._changes)
        _HEAD.pack_into(self._memory, _HEAD_AT, self._count, time.monotonic(), len(text))
        self._memory[_TEXT_AT : _TEXT_AT + len(text)] = text
        _CHANGE.pack_into(self._memory, _ENDED, self._changes)

    def close(self) -> None:
        """Lets go of the memory."""
        self._memory.close()
        os.close(self.descriptor)


def open_marks(descriptor: int) -> mmap.mmap:
    """The sentinel's side."""
    return mmap.mmap(descriptor, SIZE, access=mmap.ACCESS_READ)


def read_mark(memory: mmap.mmap) -> tuple[int, float, str]:
    """How many marks there are, when the last was made, and what it says."""
    for _ in range(_TRIES):
        (ended,) = _CHANGE.unpack_from(memory, _ENDED)
        count, at, size = _HEAD.unpack_from(memory, _HEAD_AT)
        text = memory[_TEXT_AT : _TEXT_AT + size]
        if ended and _CHANGE.unpack_from(memory, _BEGUN) == (ended,):  # 0 while it is packed
            break
        time.sleep(_PAUSE_S)
    return count, at, text.decode(errors="replace")
