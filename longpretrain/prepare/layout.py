"""Which documents go into which shard: the rule of docs/data_format.md, on offsets alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# Documents looked at together; a packed file may hold any number of them.
BLOCK_DOCUMENTS = 1 << 18


@dataclass(frozen=True)
class Slice:
    """Documents of a part, from one number to another, the duplicates among them included."""

    part: int
    start: int
    end: int


@dataclass
class ShardLayout:
    """What a shard is made of."""

    documents: int = 0
    tokens: int = 0
    slices: list[Slice] = field(default_factory=list)

    def add(self, part: int, start: int, end: int, *, documents: int, tokens: int) -> None:
        """Appends documents."""
        last = self.slices[-1] if self.slices else None
        if last and (last.part, last.end) == (part, start):
            self.slices[-1] = Slice(part, last.start, end)
        else:
            self.slices.append(Slice(part, start, end))
        self.documents += documents
        self.tokens += tokens


def lay_out(
    indexes: Sequence[Path],
    kept: Callable[[int], NDArray[np.bool_] | None],
    max_tokens: int,
) -> Iterator[ShardLayout]:
    """Shards in order: a new one starts when the next document would pass max_tokens.

    Args:
        indexes: the .idx file of each part, in corpus order.
        kept: which documents of a part stay; None: all.
        max_tokens: of a shard; a larger document has one of its own.
    """
    shard = ShardLayout()
    for part, path in enumerate(indexes):
        offsets = np.memmap(path, "<i8", mode="r")
        mask = kept(part)
        for start in range(0, len(offsets) - 1, BLOCK_DOCUMENTS):
            lengths = np.diff(offsets[start : start + BLOCK_DOCUMENTS + 1])
            numbers = np.arange(start, start + len(lengths))
            if mask is not None:
                stays = mask[start : start + len(lengths)]
                lengths, numbers = lengths[stays], numbers[stays]
            yield from _fill(shard, part, lengths, numbers, max_tokens)
    if shard.documents:
        yield shard


def _fill(
    shard: ShardLayout,
    part: int,
    lengths: NDArray[np.int64],
    numbers: NDArray[np.int64],
    max_tokens: int,
) -> Iterator[ShardLayout]:
    """Adds documents to a shard; one that is full is yielded, and ``shard`` emptied."""
    ends = np.cumsum(lengths)
    taken = 0
    while taken < len(ends):
        before = int(ends[taken - 1]) if taken else 0
        room = max_tokens - shard.tokens
        fit = int(np.searchsorted(ends, before + room, side="right")) - taken
        if fit <= 0 and shard.documents:
            yield ShardLayout(shard.documents, shard.tokens, shard.slices)
            shard.documents, shard.tokens, shard.slices = 0, 0, []
            continue
        last = taken + max(fit, 1) - 1
        shard.add(
            part, int(numbers[taken]), int(numbers[last]) + 1,
            documents=last + 1 - taken, tokens=int(ends[last]) - before,
        )  # fmt: skip
        taken = last + 1
