"""Documents -> blocks of at most max_tokens -> an endless, seeded order of samples.

Everything is random access by number: block 17 is computed, not reached, so a run's cursor is one
integer and any rank or worker can make any sample.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Literal, assert_never

import numpy as np
from numpy.typing import NDArray

from longpretrain.data.hashing import hash64, hash64_array
from longpretrain.data.shards import Corpus, Shard
from longpretrain.errors import InputError

Policy = Literal["full_sentences", "document"]

# Keeps the order's draws apart from other uses of the same seed.
_ORDER = 0x6F72646572


class Blocks:
    """A corpus cut into sequences ``<s> ... </s>``.

    full_sentences: all documents in order as one stream with a ``</s>`` between two documents, cut
    into chunks of max_tokens - 2 (RoBERTa's FULL-SENTENCES, Liu et al. 2019 section 4.2, as
    Longformer's pretraining cuts it). Every block but the last has exactly max_tokens, so a chunk
    that ends on the ``</s>`` of a document is closed by a second one.

    document: each document on its own in pieces of max_tokens - 2; two never share a block.

    Args:
        corpus: the documents.
        policy: how to cut.
        max_tokens: largest length of a block, its two special tokens included; at least 4.
        bos_id: id of ``<s>``.
        eos_id: id of ``</s>``.
    """

    def __init__(
        self, corpus: Corpus, *, policy: Policy, max_tokens: int, bos_id: int, eos_id: int
    ) -> None:
        if max_tokens < 4:
            raise InputError(
                "max_tokens",
                got=max_tokens,
                wanted="4 or more (two are <s> and </s>)",
                way_out="Set data.max_tokens; 4096 is the published value.",
            )
        self.corpus = corpus
        self.policy = policy
        self.max_tokens = max_tokens
        self.bos_id = bos_id
        self.eos_id = eos_id
        self._chunk = max_tokens - 2
        self._source = int(corpus.fingerprint[:16], 16)
        match policy:
            case "full_sentences":
                self._stream = corpus.num_tokens + corpus.num_documents - 1
                self._len = -(-self._stream // self._chunk)
            case "document":
                self._first_blocks = _first_blocks(corpus, self._chunk)
                self._len = int(self._first_blocks[-1])
            case _:
                assert_never(policy)

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, block: int) -> NDArray[np.int64]:
        """The ids of a block: int64, bos first, eos last, at most max_tokens."""
        if not 0 <= block < self._len:
            raise IndexError(block)
        ids = (
            self._stream_chunk(block)
            if self.policy == "full_sentences"
            else self._document_chunk(block)
        )
        framed = np.empty(len(ids) + 2, np.int64)
        framed[0], framed[1:-1], framed[-1] = self.bos_id, ids, self.eos_id
        return framed

    def sample_id(self, block: int) -> int:
        """A 64-bit identity of (this corpus, this block) that no rank, worker or order changes."""
        return hash64(self._source, block)

    def _document_chunk(self, block: int) -> NDArray[np.integer]:
        number = int(np.searchsorted(self._first_blocks, block, side="right")) - 1
        start = (block - int(self._first_blocks[number])) * self._chunk
        return self.corpus.document(number)[start : start + self._chunk]

    def _stream_chunk(self, block: int) -> NDArray[np.int64]:
        start = block * self._chunk
        end = min(start + self._chunk, self._stream)
        parts = []
        for shard in self.corpus.shards:
            # In the stream each document before this shard took its tokens and one </s>.
            origin = shard.first_token + shard.first_document
            size = len(shard.tokens) + shard.num_documents
            low, high = max(start - origin, 0), min(end - origin, size)
            if low < high:
                parts.append(_shard_stream(shard, low, high, self.eos_id))
        return np.concatenate(parts)


def _shard_stream(shard: Shard, start: int, end: int, eos_id: int) -> NDArray[np.int64]:
    """Positions start to end of one shard's stream, where a ``</s>`` follows each document."""

    def eos_position(document: int) -> int:
        return int(shard.offsets[document + 1]) + document

    documents = range(shard.num_documents)
    first = bisect_left(documents, start, key=eos_position)
    last = bisect_left(documents, end, key=eos_position)
    eos_at = shard.offsets[first + 1 : last + 1] + np.arange(first, last) - start
    ids = np.empty(end - start, np.int64)
    is_token = np.ones(end - start, bool)
    is_token[eos_at] = False
    ids[eos_at] = eos_id
    first_token = start - first
    ids[is_token] = shard.tokens[first_token : first_token + end - start - (last - first)]
    return ids


def _first_blocks(corpus: Corpus, chunk: int) -> NDArray[np.int64]:
    """The number of the first block of each document, and the number of all blocks at the end."""
    counts = [-(-np.diff(shard.offsets) // chunk) for shard in corpus.shards]
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate(counts))])


class Order:
    """An endless sequence of samples: every epoch is a permutation of all blocks.

    Block i of an epoch is sorted by ``hash64(seed, epoch, i)``, so the order depends on the seed
    and the number of samples alone: ranks and workers take any numbers they like.

    Args:
        num_samples: blocks per epoch.
        seed: the run's seed.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        assert num_samples > 0, num_samples
        self.num_samples = num_samples
        self.seed = seed
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def locate(self, number: int) -> tuple[int, int]:
        """(epoch, block) of sample 0, 1, 2, ... of a run."""
        assert number >= 0, number
        epoch, place = divmod(number, self.num_samples)
        return epoch, int(self._permutation(epoch)[place])

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            # Two epochs stay: workers cross the border between them at different times.
            while len(self._epochs) > 1:
                self._epochs.pop(min(self._epochs))
            numbers = np.arange(self.num_samples, dtype=np.uint64)
            keys = hash64_array(_ORDER, self.seed, epoch, numbers)
            self._epochs[epoch] = np.argsort(keys, kind="stable")
        return self._epochs[epoch]
