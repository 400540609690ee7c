"""Documents -> blocks of at most max_tokens -> an endless, seeded order of samples.

Everything is random access by number: block 17 is computed, not reached, so a run's cursor is one
integer and any rank or worker can make any sample.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from longpretrain.data.cuts import Block, Policy, cut
from longpretrain.data.hashing import hash64, hash64_array
from longpretrain.data.selection import Selection
from longpretrain.data.shards import Corpus
from longpretrain.errors import InputError

__all__ = ["Block", "Blocks", "Order", "Policy"]

# Keeps the order's draws apart from other uses of the same seed.
_ORDER = 0x6F72646572


class Blocks:
    """A corpus, or a selection of its documents, cut into sequences ``<s> ... </s>``.

    full_sentences: all documents in order as one stream with a ``</s>`` between two documents, cut
    into chunks of max_tokens - 2 (RoBERTa's FULL-SENTENCES, Liu et al. 2019 section 4.2, as
    Longformer's pretraining cuts it). Every block but the last has exactly max_tokens, so a chunk
    that ends on the ``</s>`` of a document is closed by a second one.

    document: each document on its own in pieces of max_tokens - 2; two never share a block.

    packed: the same pieces, each framed by its own ``<s>`` and ``</s>``, several in a block; what
    ``read`` says beside the ids keeps them apart (data/packing.py).

    Args:
        corpus: the documents.
        policy: how to cut.
        max_tokens: largest length of a block, its special tokens included; at least 4.
        bos_id: id of ``<s>``.
        eos_id: id of ``</s>``.
        selection: which documents take part. None: all.

    Raises:
        InputError: max_tokens is too small, or no document takes part.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        policy: Policy,
        max_tokens: int,
        bos_id: int,
        eos_id: int,
        selection: Selection | None = None,
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
        self.selection = None if selection is None or selection.takes_all else selection
        self._source = int(corpus.fingerprint[:16], 16)
        if self.selection:
            self._source = hash64(self._source, *self.selection.identity)
        self._cut = cut(corpus, policy, max_tokens - 2, (bos_id, eos_id), self.selection)
        self._len = self._cut.facts["blocks"]

    def __len__(self) -> int:
        return self._len

    @property
    def num_documents(self) -> int:
        """Documents that take part."""
        return self._cut.facts["documents"]

    @property
    def num_tokens(self) -> int:
        """Their tokens, without special ones."""
        return self._cut.facts["tokens"]

    @property
    def fill_rate(self) -> float:
        """Share of len(self) x max_tokens positions that hold a token; the rest is padding."""
        return self._cut.facts["filled"] / (self._len * self.max_tokens)

    def __getitem__(self, block: int) -> NDArray[np.int64]:
        """The ids of a block: int64, bos first, eos last, at most max_tokens."""
        return self.read(block).tokens_N

    def read(self, block: int) -> Block:
        """A block with everything that is known of its tokens."""
        if not 0 <= block < self._len:
            raise IndexError(block)
        return self._cut.read(block)

    def sample_id(self, block: int) -> int:
        """A 64-bit identity of (this corpus and selection, this block) that no rank, worker or
        order changes.
        """
        return hash64(self._source, block)


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

    def __reduce__(self) -> tuple[type[Order], tuple[int, int]]:
        # A worker process sorts for itself; a large corpus would make a large pickle.
        return Order, (self.num_samples, self.seed)

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
