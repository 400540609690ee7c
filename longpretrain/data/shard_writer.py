"""Writes the pairs of files that a corpus is made of (docs/data_format.md)."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longpretrain.data.manifest import SHARD_BYTES, FileRecord, ShardRecord, dtype_for


class ShardFile:
    """One pair of .bin and .idx, written from the beginning to the end.

    Args:
        folder: where.
        name: without suffix.
        dtype: of the ids.
    """

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype
        self.documents = self.tokens = 0
        self._names = f"{name}.bin", f"{name}.idx"
        self._folder = folder
        self._files = [(folder / file).open("wb", buffering=1 << 20) for file in self._names]
        self._sha256 = [hashlib.sha256() for _ in self._files]
        self._write(1, bytes(8))

    def append(self, data: Iterable[bytes | memoryview], lengths: NDArray[np.int64]) -> None:
        """Appends documents: the bytes of their ids in a row, and the length of each in tokens."""
        for part in data:
            self._write(0, part)
        ends = self.tokens + np.cumsum(lengths, dtype="<i8")
        self._write(1, ends.astype("<i8", copy=False).tobytes())
        self.documents += len(lengths)
        self.tokens = int(ends[-1])

    def finish(self) -> ShardRecord:
        """Puts both files on the disk and closes them."""
        sizes = self.tokens * self.dtype.itemsize, 8 * (self.documents + 1)
        for file in self._files:
            file.flush()
            os.fsync(file.fileno())
            file.close()
        records = [
            FileRecord(name=name, bytes=size, sha256=sha256.hexdigest())
            for name, size, sha256 in zip(self._names, sizes, self._sha256, strict=True)
        ]
        return ShardRecord(
            documents=self.documents, tokens=self.tokens, bin=records[0], idx=records[1]
        )

    def close(self) -> None:
        """Closes the files without finishing them: for the way out after an error."""
        for file in self._files:
            with contextlib.suppress(OSError):  # it is told already, and closing tries once more
                file.close()

    def _write(self, which: int, data: bytes | memoryview) -> None:
        self._files[which].write(data)
        self._sha256[which].update(data)


class ShardWriter:
    """Writes documents into shards, a new one when the next document would pass shard_bytes.

    A document is never split; one that is larger than shard_bytes has a shard of its own.
    """

    def __init__(self, folder: Path, *, vocab_size: int, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._dtype = dtype_for(vocab_size)
        self._max_tokens = shard_bytes // self._dtype.itemsize
        self._shards: list[ShardRecord] = []
        self._shard: ShardFile | None = None

    def add(self, ids: NDArray[np.integer]) -> None:
        """Appends one document, not empty."""
        assert len(ids) and int(ids.max()) < self._vocab_size, "ids of this vocabulary, at least 1"
        if self._shard and self._shard.tokens + len(ids) > self._max_tokens:
            self._finish_shard()
        if not self._shard:
            self._shard = ShardFile(self._folder, f"tokens-{len(self._shards):05d}", self._dtype)
        self._shard.append([ids.astype(self._dtype).tobytes()], np.array([len(ids)]))

    def finish(self) -> tuple[ShardRecord, ...]:
        """Closes the last shard and returns the records of all."""
        if self._shard:
            self._finish_shard()
        return tuple(self._shards)

    def close(self) -> None:
        """Closes the open shard without finishing it: for the way out after an error."""
        if self._shard:
            self._shard.close()
            self._shard = None

    def _finish_shard(self) -> None:
        assert self._shard
        self._shards.append(self._shard.finish())
        self._shard = None
