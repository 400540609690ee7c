"""Files of a part, with a sha256 for every 4 MiB: any stretch can be checked as it is read.

A large packed file is one part, and many shards take their stretch of it: one hash of the whole
would have each of them read it all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 1 << 22


class DamagedPartError(Exception):
    """A part is not what was written. It can be made again."""


@dataclass(frozen=True)
class ChunkedFile:
    """What was written."""

    bytes: int
    sha256: tuple[str, ...]
    """Of each chunk."""


class ChunkedWriter:
    """Writes a file from its beginning to its end."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")
        self._bytes = 0
        self._chunk = hashlib.sha256()
        self._done: list[str] = []

    def write(self, data: bytes | memoryview) -> None:
        """Appends some bytes."""
        self._file.write(data)
        view = memoryview(data)
        while view:
            room = CHUNK_BYTES - self._bytes % CHUNK_BYTES
            self._chunk.update(view[:room])
            self._bytes += len(view[:room])
            view = view[room:]
            if self._bytes % CHUNK_BYTES == 0:
                self._end_chunk()

    def finish(self) -> ChunkedFile:
        """Puts the file on the disk and closes it."""
        if self._bytes % CHUNK_BYTES:
            self._end_chunk()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return ChunkedFile(self._bytes, tuple(self._done))

    def close(self) -> None:
        """Closes the file without finishing it: for the way out after an error."""
        with contextlib.suppress(OSError):  # it is told already, and closing tries once more
            self._file.close()

    def _end_chunk(self) -> None:
        self._done.append(self._chunk.hexdigest())
        self._chunk = hashlib.sha256()


class ChunkedReader:
    """Reads stretches of a file; each chunk is checked when it is first needed."""

    def __init__(self, path: Path, record: ChunkedFile) -> None:
        self._path = path
        self._record = record
        self._number = -1
        self._chunk = memoryview(b"")
        try:
            self._file: BinaryIO = path.open("rb", buffering=0)
        except FileNotFoundError as error:
            raise DamagedPartError(f"{path} is missing") from error

    def read(self, start: int, end: int) -> Iterator[memoryview]:
        """The bytes from one place to another.

        Raises:
            DamagedPartError: they are not what was written.
        """
        while start < end:
            number, within = divmod(start, CHUNK_BYTES)
            self._load(number)
            part = self._chunk[within : within + end - start]
            yield part
            start += len(part)

    def read_all(self) -> None:
        """Checks the whole file."""
        for _ in self.read(0, self._record.bytes):
            pass

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _load(self, number: int) -> None:
        if number == self._number:
            return
        size = min(CHUNK_BYTES, self._record.bytes - number * CHUNK_BYTES)
        self._file.seek(number * CHUNK_BYTES)
        data = bytearray()
        while len(data) < size and (more := self._file.read(size - len(data))):
            data += more
        if hashlib.sha256(data).hexdigest() != self._record.sha256[number]:
            raise DamagedPartError(f"{self._path} is altered")
        self._chunk, self._number = memoryview(data), number
