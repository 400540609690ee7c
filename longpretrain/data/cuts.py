"""The ways to cut documents into blocks, each with random access by a number and its index.

A block is found by bisection, over shards and over an index that is built once (block_index.py), so
it costs the same in a corpus of any size.

Letters: N tokens of a block.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from longpretrain.data import packing
from longpretrain.data.block_index import BlockIndex, IndexWriter, load_index
from longpretrain.data.selection import Selection
from longpretrain.data.shards import Corpus, Shard
from longpretrain.errors import InputError

Policy = Literal["full_sentences", "document", "packed"]


@dataclass(frozen=True, kw_only=True)
class Block:
    """One sequence, unpadded; the last two only where documents are packed."""

    tokens_N: NDArray[np.int64]
    """Ids, each ``<s>`` and ``</s>`` included."""
    document_N: NDArray[np.int32] | None = None
    """Which document of the block a token is of, from 0, never falling."""
    position_N: NDArray[np.int32] | None = None
    """Place in its document, from 0 at its ``<s>``."""


class Cut(Protocol):
    """One way to cut a corpus. ``facts``: documents, tokens, blocks, and of all positions of the
    blocks those that are filled.
    """

    facts: dict[str, int]

    def read(self, block: int) -> Block:
        """A block, its number in range."""
        ...


def cut(
    corpus: Corpus, policy: Policy, chunk: int, frame: tuple[int, int], selection: Selection | None
) -> Cut:
    """A corpus, or a selection of its documents, cut into blocks of at most chunk + 2 tokens.

    Args:
        corpus: the documents.
        policy: how to cut (``Blocks``).
        chunk: tokens of a block beside two special ones.
        frame: ids of ``<s>`` and ``</s>``.
        selection: which documents take part. None: all.
    """
    if policy == "full_sentences" and selection is None:
        return _Stream(corpus, chunk, frame)
    cuts: dict[Policy, type[_ChosenStream] | type[_Documents] | type[_Packed]] = {
        "full_sentences": _ChosenStream,
        "document": _Documents,
        "packed": _Packed,
    }
    chosen = cuts[policy]
    key: dict[str, object] = {
        "corpus": corpus.fingerprint,
        "policy": policy,
        "max_tokens": chunk + 2,
        "selection": selection and selection.identity,
    }
    if policy == "packed":
        key["buffer_pieces"] = packing.BUFFER_PIECES

    def build(writer: IndexWriter) -> dict[str, int]:
        return chosen.build(corpus, chunk, selection, writer)

    index = load_index(corpus.folder, key, corpus.num_documents, build)
    return chosen(corpus, chunk, frame, index)


class _Stream:
    """full_sentences of all documents: where a block begins follows from the offsets alone."""

    def __init__(self, corpus: Corpus, chunk: int, frame: tuple[int, int]) -> None:
        self._corpus, self._chunk, self._frame = corpus, chunk, frame
        self._stream = corpus.num_tokens + corpus.num_documents - 1
        # In the stream each document before a shard took its tokens and one </s>.
        self._origins = [shard.first_token + shard.first_document for shard in corpus.shards]
        blocks = -(-self._stream // chunk)
        self.facts = {
            "documents": corpus.num_documents,
            "tokens": corpus.num_tokens,
            "blocks": blocks,
            "filled": self._stream + 2 * blocks,
        }

    def read(self, block: int) -> Block:
        start = block * self._chunk
        end = min(start + self._chunk, self._stream)
        shards = self._corpus.shards
        parts = []
        for number in range(bisect_right(self._origins, start) - 1, len(shards)):
            origin, shard = self._origins[number], shards[number]
            if origin >= end:
                break
            size = len(shard.tokens) + shard.num_documents
            low, high = max(start - origin, 0), min(end - origin, size)
            parts.append(_shard_stream(shard, low, high, self._frame[1]))
        return _framed(np.concatenate(parts), self._frame)


def _shard_stream(shard: Shard, start: int, end: int, eos_id: int) -> NDArray[np.int64]:
    """Positions start to end of one shard's stream, where a ``</s>`` follows each document."""

    def eos_position(document: int) -> int:
        return int(shard.offsets[document + 1]) + document

    documents = range(shard.num_documents)
    first = bisect_left(documents, start, key=eos_position)
    last = bisect_left(documents, end, key=eos_position)
    eos_at = shard.offsets[first + 1 : last + 1] + np.arange(first, last) - start
    first_token = start - first
    tokens = shard.tokens[first_token : first_token + end - start - (last - first)]
    return _with_eos(tokens, eos_at, eos_id)


def _with_eos(
    tokens: NDArray[np.integer], eos_at: NDArray[np.int64], eos_id: int
) -> NDArray[np.int64]:
    """The tokens with ``</s>`` at these places of the result."""
    ids = np.empty(len(tokens) + len(eos_at), np.int64)
    is_token = np.ones(len(ids), bool)
    is_token[eos_at] = False
    ids[eos_at] = eos_id
    ids[is_token] = tokens
    return ids


def _framed(ids: NDArray[np.integer], frame: tuple[int, int]) -> Block:
    framed = np.empty(len(ids) + 2, np.int64)
    framed[0], framed[1:-1], framed[-1] = frame[0], ids, frame[1]
    return Block(tokens_N=framed)


class _ChosenStream:
    """full_sentences of some documents.

    Index: for each of them ``first``, where it begins in the stream, and ``start``, its first token
    in the corpus; one more ``first`` where a further document would begin.
    """

    def __init__(
        self, corpus: Corpus, chunk: int, frame: tuple[int, int], index: BlockIndex
    ) -> None:
        self._corpus, self._chunk, self._frame, self._index = corpus, chunk, frame, index
        self.facts = index.facts
        self._stream = index.facts["tokens"] + index.facts["documents"] - 1

    @staticmethod
    def build(
        corpus: Corpus, chunk: int, selection: Selection | None, writer: IndexWriter
    ) -> dict[str, int]:
        documents = place = 0
        for _, starts, lengths in _chosen(corpus, selection):
            ends = place + np.cumsum(lengths + 1)
            writer.append("first", ends - lengths - 1)
            writer.append("start", starts)
            documents, place = documents + len(lengths), int(ends[-1])
        writer.append("first", np.array([place]))
        blocks = -(-(place - 1) // chunk)
        return {
            "documents": documents,
            "tokens": place - documents,
            "blocks": blocks,
            "filled": place - 1 + 2 * blocks,
        }

    def read(self, block: int) -> Block:
        start = block * self._chunk
        end = min(start + self._chunk, self._stream)
        low = int(np.searchsorted(self._index["first"], start, side="right")) - 1
        high = int(np.searchsorted(self._index["first"], end, side="left"))
        first = self._index["first"][low : high + 1]
        begin = np.maximum(first[:-1], start)
        lengths = np.minimum(first[1:] - 1, end) - begin
        starts = self._index["start"][low:high] + (begin - first[:-1])
        eos_at = first[1:] - 1 - start
        tokens = self._corpus.gather(starts, lengths)
        ids = _with_eos(tokens, eos_at[eos_at < end - start], self._frame[1])
        return _framed(ids, self._frame)


class _Documents:
    """Pieces of documents, each a block.

    Index: for each document ``first``, its first block, and ``number`` unless all take part; one
    more ``first``, the number of blocks.
    """

    def __init__(
        self, corpus: Corpus, chunk: int, frame: tuple[int, int], index: BlockIndex
    ) -> None:
        self._corpus, self._chunk, self._frame, self._index = corpus, chunk, frame, index
        self.facts = index.facts
        self._has_all = index.facts["documents"] == corpus.num_documents

    @staticmethod
    def build(
        corpus: Corpus, chunk: int, selection: Selection | None, writer: IndexWriter
    ) -> dict[str, int]:
        documents = tokens = blocks = 0
        for numbers, _, lengths in _chosen(corpus, selection):
            pieces = -(-lengths // chunk)
            ends = blocks + np.cumsum(pieces)
            writer.append("first", ends - pieces)
            if selection:
                writer.append("number", numbers)
            documents, blocks = documents + len(lengths), int(ends[-1])
            tokens += int(lengths.sum())
        writer.append("first", np.array([blocks]))
        filled = tokens + 2 * blocks
        return {"documents": documents, "tokens": tokens, "blocks": blocks, "filled": filled}

    def read(self, block: int) -> Block:
        first = self._index["first"]
        place = int(np.searchsorted(first, block, side="right")) - 1
        number = place if self._has_all else int(self._index["number"][place])
        start = (block - int(first[place])) * self._chunk
        return _framed(self._corpus.document(number)[start : start + self._chunk], self._frame)


class _Packed:
    """Pieces of documents, several in a block.

    Index: for each piece, block after block, ``start``, its first token in the corpus, and
    ``length``; for each block ``first``, its first piece, and one more, the number of pieces.
    """

    def __init__(
        self, corpus: Corpus, chunk: int, frame: tuple[int, int], index: BlockIndex
    ) -> None:
        self._corpus, self._frame, self._index = corpus, frame, index
        self.facts = index.facts

    @staticmethod
    def build(
        corpus: Corpus, chunk: int, selection: Selection | None, writer: IndexWriter
    ) -> dict[str, int]:
        documents = tokens = pieces = blocks = 0

        def count() -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
            nonlocal documents, tokens
            for _, starts, lengths in _chosen(corpus, selection):
                documents, tokens = documents + len(lengths), tokens + int(lengths.sum())
                yield packing.cut(starts, lengths, chunk)

        for starts, lengths in packing.buffers(count()):
            order, counts = packing.pack(lengths + 2, chunk + 2)
            writer.append("start", starts[order])
            writer.append("length", lengths[order].astype(np.int32))
            writer.append("first", pieces + np.cumsum(counts) - counts)
            pieces, blocks = pieces + len(order), blocks + len(counts)
        writer.append("first", np.array([pieces]))
        filled = tokens + 2 * pieces
        return {"documents": documents, "tokens": tokens, "blocks": blocks, "filled": filled}

    def read(self, block: int) -> Block:
        low, high = self._index["first"][block : block + 2].tolist()
        lengths = self._index["length"][low:high].astype(np.int64)
        framed = lengths + 2
        ends = np.cumsum(framed)
        tokens_N = np.empty(ends[-1], np.int64)
        is_token = np.ones(ends[-1], bool)
        for at, special in zip((ends - framed, ends - 1), self._frame, strict=True):
            tokens_N[at], is_token[at] = special, False
        tokens_N[is_token] = self._corpus.gather(self._index["start"][low:high], lengths)
        return Block(
            tokens_N=tokens_N,
            document_N=np.repeat(np.arange(high - low, dtype=np.int32), framed),
            position_N=np.arange(ends[-1], dtype=np.int32)
            - np.repeat((ends - framed).astype(np.int32), framed),
        )


def _chosen(
    corpus: Corpus, selection: Selection | None
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]]:
    """The documents that take part, a bounded number at a time and never none: their numbers, first
    tokens and lengths.
    """
    found = False
    for first, starts, lengths in corpus.spans():
        chosen = np.arange(len(lengths))
        if selection:
            chosen = chosen[selection.chosen(first, lengths)]
        if len(chosen):
            found = True
            yield first + chosen, starts[chosen], lengths[chosen]
    if not found:
        assert selection, "a corpus has a document"
        raise InputError(
            f"selection from corpus {corpus.folder}",
            got=f"none of its {corpus.num_documents:,} documents",
            wanted="at least one",
            way_out=f"Take shorter ones than {selection.min_tokens:,} tokens, or more than "
            f"{selection.share} of them; or leave the source out.",
        )
