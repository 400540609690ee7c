"""Which keys a query reaches through its window.

Positions count tokens from the start of the sequence. Global tokens, padding and documents are no
part of a pattern: they differ from row to row of a batch and are tensors of the operator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longpretrain.errors import InputError

# Far beyond any sequence, and small enough that window * dilation is an int64.
LARGEST = 2**31 - 1


def _is_count(number: object, at_least: int) -> bool:
    if not isinstance(number, int) or isinstance(number, bool):
        return False
    return at_least <= number <= LARGEST


@dataclass(frozen=True)
class AttentionPattern:
    """A sliding window, dilated per head (Longformer, section 3.1; autoregressive: section 4).

    A query at position i reaches the key at position j when |i - j| <= one_sided_window * d and
    (i - j) % d == 0, where d is the dilation of the head; a causal pattern asks for j <= i too.

    Args:
        one_sided_window: keys reached on each side, in steps of the dilation; the query's own
            position comes on top. Hugging Face's ``attention_window`` is twice this number.
        dilation: distance in tokens between neighbouring keys of a window, at least 1; one number
            for all heads, or a tuple with one for each head. Like the window, below 2**31.
        causal: keys after the query are out of reach, global ones too.

    Raises:
        InputError: (a ``ValueError``) when a number is out of its range.
    """

    one_sided_window: int
    dilation: int | tuple[int, ...] = 1
    causal: bool = False

    def __post_init__(self) -> None:
        if not _is_count(self.one_sided_window, 0):
            raise InputError(
                "one_sided_window",
                got=repr(self.one_sided_window),
                wanted=f"a whole number from 0 to {LARGEST}",
                way_out="It counts the keys on one side of a query: half of attention_window.",
            )
        one_for_all = not isinstance(self.dilation, tuple)
        each = (self.dilation,) if one_for_all else self.dilation
        assert isinstance(each, tuple)
        if not each or not all(_is_count(one, 1) for one in each):
            raise InputError(
                "dilation",
                got=repr(self.dilation),
                wanted=f"a whole number from 1 to {LARGEST}, or a tuple of them, one for each head",
                way_out="1 means no dilation.",
            )
        if not isinstance(self.causal, bool):
            raise InputError(
                "causal", got=repr(self.causal), wanted="True or False", way_out="Pass a bool."
            )

    def dilation_of_heads(self, num_heads: int) -> tuple[int, ...]:
        """The dilation of each of ``num_heads`` heads, in their order.

        Raises:
            InputError: when the pattern names another number of heads.
        """
        if isinstance(self.dilation, int):
            return (self.dilation,) * num_heads
        if len(self.dilation) != num_heads:
            raise InputError(
                "dilation",
                got=f"{len(self.dilation)} numbers for {num_heads} heads",
                wanted="one for each head",
                way_out="Give as many numbers as there are heads, or a single one for all.",
            )
        return self.dilation

    def reaches(self, query: Any, key: Any, dilation: int) -> Any:
        """Whether the window of a head of that dilation holds the key.

        Args:
            query: position, an integer or an integer array of numpy or torch.
            key: likewise; arrays broadcast.
            dilation: the head's.

        Returns:
            bool, of the broadcast shape.
        """
        distance = query - key
        inside = abs(distance) <= self.one_sided_window * dilation
        inside = inside & (distance % dilation == 0)
        return inside & (distance >= 0) if self.causal else inside

    def num_pairs(self, num_tokens: int, dilation: int) -> int:
        """How many (query, key) pairs one head of that dilation scores in its window.

        The cost of the window: a multiplication of scores takes 2 * D * num_pairs operations.
        """
        reach, causal, pairs = self.one_sided_window, self.causal, 0
        for residue in range(min(dilation, num_tokens)):
            # The tokens of one residue class are an undilated sequence of their own.
            n = (num_tokens - residue + dilation - 1) // dilation
            side = min(reach, n - 1)
            # Query t has min(side, t) keys on its left: a ramp, then a plateau.
            left = side * (side - 1) // 2 + side * (n - side)
            pairs += n + (left if causal else 2 * left)
        return pairs
