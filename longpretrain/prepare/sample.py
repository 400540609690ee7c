"""A sample of documents' text that fits in memory: the same for the same documents and seed.

Text is cut into pieces, each piece has a number by a hash of the seed and its place, and the sample
is the pieces with the smallest numbers: no look ahead, and every piece is as likely as another.
"""

from __future__ import annotations

import hashlib
import heapq
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from longpretrain.data.hashing import hash64

PIECE_CHARS = 1 << 12
_SALT = 0x73616D706C65  # "sample": other uses of one seed draw other numbers
_SPACE = re.compile(r"\s(?=\S)")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Pieces of text in the order of the documents."""

    pieces: list[str]
    documents: int
    """Documents that a piece is from."""
    bytes: int
    """Of the pieces in UTF-8."""

    @property
    def sha256(self) -> str:
        """Of the pieces."""
        digest = hashlib.sha256()
        for piece in self.pieces:
            data = piece.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


def take_sample(documents: Iterable[str], max_bytes: int, seed: int) -> Sample:
    """A sample of at most max_bytes, or all text if that is no more.

    Memory: the sample, and a document.
    """
    heap: list[tuple[int, int, int, str]] = []  # (-number, place, document, piece): largest first
    size = place = 0
    limit = 1 << 64
    for number, document in enumerate(documents):
        for piece in cut(document, PIECE_CHARS):
            place += 1
            key = hash64(_SALT, seed, place)
            if key >= limit:
                continue
            heapq.heappush(heap, (-key, place, number, piece))
            size += len(piece.encode())
            while size > max_bytes:
                largest, _, _, dropped = heapq.heappop(heap)
                size -= len(dropped.encode())
                limit = -largest  # what is dropped once must not make room for a larger one
    heap.sort(key=lambda entry: entry[1])
    return Sample(
        pieces=[piece for *_, piece in heap],
        documents=len({number for _, _, number, _ in heap}),
        bytes=size,
    )


def cut(text: str, max_chars: int) -> Iterator[str]:
    """Pieces of at most max_chars, cut before a word: its space comes with it, if there is one."""
    start = 0
    while len(text) - start > max_chars:
        # Words are far shorter than half a piece; what has none is cut anywhere.
        end = start + max_chars
        spaces = [match.start() for match in _SPACE.finditer(text, end - max_chars // 2, end)]
        stop = spaces[-1] if spaces and spaces[-1] > start else end
        yield text[start:stop]
        start = stop
    if start < len(text):
        yield text[start:]
