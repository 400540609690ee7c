"""Which documents of a corpus take part: a rule as data, the same on every rank and for ever."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from longpretrain.data.hashing import hash64_array
from longpretrain.errors import InputError

# Keeps these draws apart from other uses of the same seed.
_SELECTION = 0x73656C656374


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Documents of at least ``min_tokens``, and of these a share, drawn by number.

    Document n, counted through all shards, is drawn when ``hash64(constant, seed, n)`` is below
    ``share * 2**64``. So the choice is the same however the corpus is cut into shards, it stays
    when documents are added at the end, a larger share holds a smaller one of the same seed, and
    no token is read.

    Raises:
        InputError: a number out of range.
    """

    min_tokens: int = 0
    """Shorter documents are left out; special tokens do not count."""
    share: Fraction = Fraction(1)
    """Share of the documents, 0 < share <= 1; of those left out by length as well, which drops
    out."""
    seed: int = 0
    """Draws of another seed are independent: give each source its own."""

    def __post_init__(self) -> None:
        if self.min_tokens < 0:
            raise InputError(
                "min_tokens of a selection", got=self.min_tokens, wanted="0 or more",
                way_out="Leave it out to take documents of any length.",
            )  # fmt: skip
        if not 0 < self.share <= 1:
            raise InputError(
                "share of a selection", got=self.share, wanted="0 < share <= 1",
                way_out="Leave it out to take all documents, or leave the source out.",
            )  # fmt: skip

    @property
    def takes_all(self) -> bool:
        """Whether no document can be left out."""
        return self.min_tokens <= 1 and self.share == 1

    @property
    def identity(self) -> tuple[int, int, int, int]:
        """What tells it from another one: min_tokens, numerator and denominator, seed."""
        # A whole corpus is the same whatever the seed, and no document is empty.
        seed = self.seed if self.share < 1 else 0
        least = self.min_tokens if self.min_tokens > 1 else 0
        return least, self.share.numerator, self.share.denominator, seed

    def chosen(self, first: int, lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether documents first, first + 1, ... of these lengths take part."""
        chosen = lengths >= self.min_tokens
        if self.share < 1:
            numbers = np.arange(first, first + len(lengths), dtype=np.uint64)
            limit = int(self.share * (1 << 64))
            chosen &= hash64_array(_SELECTION, self.seed, numbers) < np.uint64(limit)
        return chosen
