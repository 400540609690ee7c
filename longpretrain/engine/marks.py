"""What a rank did last, in memory that it shares with its sentinel: writing there takes no call of
the system, and reading needs nothing of the rank.
"""

from __future__ import annotations

import mmap
import os
import struct
import time

SIZE = 1024
_HEAD = struct.Struct("=QQdH")
"""Count before and after a change, which differ during it; clock of this machine; bytes of text."""

_TRIES = 1000
"""A change takes microseconds, and they are far between."""


class Marks:
    """The rank's side."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("longpretrain-marks")
        os.ftruncate(self.descriptor, SIZE)
        self._memory = mmap.mmap(self.descriptor, SIZE)
        self._count, self._text = 0, b""
        self.write("its start")

    def write(self, what: str) -> None:
        """One more mark. The same again says that the rank goes on, and does not count."""
        text = what.encode()[: SIZE - _HEAD.size]
        before, self._count = self._count, self._count + (text != self._text)
        self._text = text
        _HEAD.pack_into(self._memory, 0, self._count, before, time.monotonic(), len(text))
        self._memory[_HEAD.size : _HEAD.size + len(text)] = text
        _HEAD.pack_into(self._memory, 0, self._count, self._count, time.monotonic(), len(text))

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
        count, before, at, size = _HEAD.unpack_from(memory, 0)
        text = memory[_HEAD.size : _HEAD.size + size]
        if count == before and _HEAD.unpack_from(memory, 0)[0] == count:
            break
    return count, at, text.decode(errors="replace")
