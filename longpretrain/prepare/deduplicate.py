"""Exact duplicates among any number of documents, found in flat memory from their hashes.

The hashes are dealt into buckets by their first byte, those of a bucket that is still too large by
the next byte, and so on, until a bucket can be sorted in memory. On the way equal hashes that lie
in one chunk become one, so that a text that is everywhere makes no bucket large.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

HASH_BYTES = 16
_RECORD = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<u8")])
_SLICE_CHARS = 1 << 20

Records = NDArray[np.void]
"""Two halves of a hash, and the number of the document in the corpus."""


def document_hash(text: str) -> bytes:
    """BLAKE2b of a text in UTF-8."""
    digest = hashlib.blake2b(digest_size=HASH_BYTES)
    for start in range(0, len(text), _SLICE_CHARS):
        digest.update(text[start : start + _SLICE_CHARS].encode())
    return digest.digest()


@dataclass(frozen=True)
class Duplicates:
    """Which documents have the text of an earlier one: a byte each, in a file."""

    path: Path
    starts: tuple[int, ...]
    """Number of each part's first document, and of all."""

    count: int

    def of(self, part: int) -> NDArray[np.bool_]:
        """For each document of a part, whether it is a duplicate."""
        start, end = self.starts[part : part + 2]
        return np.fromfile(self.path, np.bool_, end - start, offset=start)


def find_duplicates(
    hash_files: Sequence[Path], folder: Path, max_records: int = 1 << 20
) -> Duplicates:
    """All but the first, in corpus order, of the documents that have one hash.

    Args:
        hash_files: the 16-byte hashes of the documents of each part, in corpus order.
        folder: an empty one, for work and for the result.
        max_records: documents whose hashes are held in memory; about 100 bytes each.
    """
    assert max_records > 1, "equal hashes become fewer only where two are seen at once"
    sizes = [path.stat().st_size // HASH_BYTES for path in hash_files]
    starts = (0, *np.cumsum(sizes, dtype=np.int64).tolist())
    path = folder / "duplicates.bin"
    with path.open("wb") as file:
        file.truncate(starts[-1])
    if not starts[-1]:
        return Duplicates(path, starts, 0)
    marks = np.memmap(path, np.bool_, "r+")
    search = _Search(marks, folder, max_records)
    count = search.mark(_records(hash_files, max_records), starts[-1], depth=0)
    marks.flush()
    return Duplicates(path, starts, count)


@dataclass(frozen=True)
class _Search:
    """Marks duplicates, given records whose hashes begin alike."""

    marks: NDArray[np.bool_]
    """A truth for each document of the corpus."""

    folder: Path
    """For buckets."""

    max_records: int
    """How many may be sorted at once."""

    def mark(self, chunks: Iterator[Records], total: int, depth: int) -> int:
        """Of ``total`` records in corpus order, whose first ``depth`` bytes are equal.

        Returns:
            How many were marked.
        """
        if total <= self.max_records:
            records = np.concatenate(list(chunks))
            return len(records) - len(_firsts(records, self.marks))
        count = 0
        for chunk in chunks:
            firsts = _firsts(chunk, self.marks)
            count += len(chunk) - len(firsts)
            _deal(firsts, self.folder, depth)
        for byte in range(256):
            bucket = _bucket(self.folder, depth, byte)
            if bucket.exists():
                size = bucket.stat().st_size // _RECORD.itemsize
                count += self.mark(_read(bucket, self.max_records), size, depth + 1)
                bucket.unlink()
        return count


def _firsts(records: Records, marks: NDArray[np.bool_]) -> Records:
    """The first of each hash, sorted by hash; marks the others."""
    records = records[np.lexsort((records["low"], records["high"]))]  # stable: in corpus order
    high, low = records["high"], records["low"]
    repeated = np.zeros(len(records), np.bool_)
    repeated[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    marks[records["number"][repeated]] = True
    return records[~repeated]


def _deal(records: Records, folder: Path, depth: int) -> None:
    """Adds sorted records to the buckets of their hashes' byte ``depth``."""
    # Beyond the last byte all are equal, and one bucket takes them as well as another.
    word, shift = ("high", "low")[depth // 8 % 2], np.uint64(56 - depth % 8 * 8)
    bytes_N = records[word] >> shift & np.uint64(255)
    ends = np.searchsorted(bytes_N, np.arange(257, dtype=np.uint64)).tolist()
    for byte in range(256):
        if ends[byte] < ends[byte + 1]:
            with _bucket(folder, depth, byte).open("ab") as file:
                file.write(records[ends[byte] : ends[byte + 1]].tobytes())


def _bucket(folder: Path, depth: int, byte: int) -> Path:
    return folder / f"bucket-{depth:02d}-{byte:02x}"


def _read(bucket: Path, max_records: int) -> Iterator[Records]:
    with bucket.open("rb") as file:
        while len(chunk := np.fromfile(file, _RECORD, max_records)):
            yield chunk


def _records(hash_files: Sequence[Path], max_records: int) -> Iterator[Records]:
    """Of all documents, in chunks of ``max_records`` but for the last."""
    number = 0
    chunk = np.empty(max_records, _RECORD)
    filled = 0
    for path in hash_files:
        with path.open("rb") as file:
            while len(halves := np.fromfile(file, ">u8", 2 * (max_records - filled))):
                end = filled + len(halves) // 2
                chunk["high"][filled:end] = halves[0::2]
                chunk["low"][filled:end] = halves[1::2]
                chunk["number"][filled:end] = np.arange(number, number + end - filled)
                number += end - filled
                filled = end
                if filled == max_records:
                    yield chunk
                    filled = 0
    if filled:
        yield chunk[:filled]
