"""Several sources as one endless, numbered list of samples, in exact proportions over any prefix.

Sample ``number`` is sample k of source s, computed from the number alone and in integers, so the
cursor of a run stays one integer, and ranks and workers take any numbers they like.

**The order.** The sources are the leaves of a Huffman tree over their weights. A node of weight W
with a child of weight w gives that child round(n w / W) of its first n samples and the other child
the rest: one split, exact to half a sample. The error of a source after n samples is the error of
each split above it, scaled down by the splits below that one:

    | count_s(n) - n p_s |  <=  1/2 * sum over nodes v from the leaf to below the root of w_s / w_v

In a Huffman tree a node weighs at least as much as the two below it on the path together, so these
w_v grow like Fibonacci's numbers, and the bound is under 1/2 (1 + 1 + 1/2 + 1/3 + 1/5 + ...) = 1.68
for any number of sources and any weights (``Shares.bounds``). Two sources: 1/2. Eight equal ones:
7/8. Webster's divisor rule, the usual choice, guarantees 1/2 + p_s (S - 2) / 2, which is 3.5 for a
large source beside seven small ones, and has to search for sample n. Tijdeman (The chairman
assignment problem, 1980) gets under 1 for any weights, but only by walking through all samples.

**Versions.** Version v of a mix begins at the v-th sample where a source joins. From there on the
proportions hold for the larger set, and each source goes on from the count that it had.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from longpretrain.data.blocks import Order
from longpretrain.data.hashing import hash64

# Keeps the seeds of sources apart from other uses of a run's seed.
_SOURCE = 0x736F75726365


class _Split(NamedTuple):
    """An inner node: ``low`` gets low_weight of every ``weight`` samples, ``high`` the rest."""

    low_weight: int
    weight: int
    low: _Split | int
    high: _Split | int

    def low_count(self, samples: int) -> int:
        """How many of the first samples are the lower child's: samples * w / W, rounded."""
        return (2 * samples * self.low_weight + self.weight) // (2 * self.weight)


class Shares:
    """An endless order of sources in which each has its share of every prefix.

    Args:
        weights: of the sources, more than 0. Equal weights are told apart by their places.
    """

    def __init__(self, weights: Sequence[Fraction]) -> None:
        assert weights, weights
        assert min(weights) > 0, weights
        scale = math.lcm(*(weight.denominator for weight in weights))
        whole = [int(weight * scale) for weight in weights]
        common = math.gcd(*whole)
        self.weights = [weight // common for weight in whole]
        self._root = _huffman(self.weights)

    def locate(self, number: int) -> tuple[int, int]:
        """(source, number among the samples of that source) of sample 0, 1, 2, ..."""
        node = self._root
        while isinstance(node, _Split):
            before = node.low_count(number)
            if node.low_count(number + 1) > before:
                node, number = node.low, before
            else:
                node, number = node.high, number - before
        return node, number

    def counts(self, samples: int) -> list[int]:
        """How many of the first samples are each source's."""
        found = [0] * len(self.weights)
        todo: list[tuple[_Split | int, int]] = [(self._root, samples)]
        while todo:
            node, count = todo.pop()
            if isinstance(node, _Split):
                low = node.low_count(count)
                todo += [(node.low, low), (node.high, count - low)]
            else:
                found[node] = count
        return found

    def bounds(self) -> list[Fraction]:
        """How far each source's count can be from its share of a prefix, by the sum above."""
        found = [Fraction(0)] * len(self.weights)
        todo: list[tuple[_Split | int, int, Fraction]] = [(self._root, 0, Fraction(0))]
        while todo:
            node, weight, error = todo.pop()
            if isinstance(node, _Split):
                for child, part in (
                    (node.low, node.low_weight),
                    (node.high, node.weight - node.low_weight),
                ):
                    more = error * Fraction(part, weight) if weight else Fraction(0)
                    todo.append((child, part, more + Fraction(1, 2)))
            else:
                found[node] = error
        return found


def _huffman(weights: Sequence[int]) -> _Split | int:
    """The two lightest become one, until one is left; ties by place, so that the tree is one."""
    heap: list[tuple[int, int, _Split | int]] = [
        (w, place, place) for place, w in enumerate(weights)
    ]
    heapq.heapify(heap)
    for place in itertools.count(len(weights)):
        if len(heap) == 1:
            break
        low_weight, _, low = heapq.heappop(heap)
        high_weight, _, high = heapq.heappop(heap)
        weight = low_weight + high_weight
        heapq.heappush(heap, (weight, place, _Split(low_weight, weight, low, high)))
    return heap[0][2]


@dataclass(frozen=True, kw_only=True)
class Source:
    """What the order has to know of a source."""

    identity: int
    """64 bits that name the corpus and the documents chosen of it."""
    num_samples: int
    """Samples of one pass over it."""
    weight: Fraction
    """Its share of the samples, relative to the other sources'."""
    from_sample: int = 0
    """The sample of the run at which it joins."""


class Place(NamedTuple):
    """Where a sample of a run is: its source's number, the pass over that source, the block."""

    source: int
    epoch: int
    block: int


@dataclass(frozen=True)
class _Version:
    """A stretch of a run with the same sources: which, and what each had before."""

    start: int
    members: list[int]
    shares: Shares
    before: list[int]


class Mix:
    """An endless sequence of samples from several sources; the order they are listed in has no say.

    Inside a source the order is an ``Order``, seeded by the run's seed and the source's identity:
    what else is in the mix does not change it. A source that is alone at sample 0 has the run's
    seed itself, so a run on one corpus is a mix of one, and others can join it.

    Args:
        sources: no two of one identity; at least one is there from sample 0.
        seed: the run's seed.
    """

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        self.sources = list(sources)
        assert len({source.identity for source in sources}) == len(sources), sources
        starts = sorted({source.from_sample for source in sources})
        assert starts[0] == 0, starts
        self._versions = [_Version(0, *self._members(0), [0] * len(sources))]
        for start in starts[1:]:
            self._versions.append(_Version(start, *self._members(start), self.counts(start)))
        self._starts = starts
        is_alone = len(self._versions[0].members) == 1
        self._orders = [
            Order(
                source.num_samples,
                seed=seed
                if is_alone and source.from_sample == 0
                else hash64(_SOURCE, seed, source.identity),
            )
            for source in sources
        ]

    def _members(self, start: int) -> tuple[list[int], Shares]:
        """The sources of a version in an order of their own, not the listing's."""
        members = sorted(
            (n for n, source in enumerate(self.sources) if source.from_sample <= start),
            key=lambda n: self.sources[n].identity,
        )
        return members, Shares([self.sources[n].weight for n in members])

    def version(self, number: int) -> int:
        """The version of the mix that sample ``number`` belongs to, from 0."""
        return bisect_right(self._starts, number) - 1

    def locate(self, number: int) -> Place:
        """Where sample 0, 1, 2, ... of a run is."""
        assert number >= 0, number
        version = self._versions[self.version(number)]
        member, among_new = version.shares.locate(number - version.start)
        source = version.members[member]
        epoch, block = self._orders[source].locate(version.before[source] + among_new)
        return Place(source, epoch, block)

    def counts(self, samples: int) -> list[int]:
        """How many of the first samples of a run are each source's."""
        assert samples >= 0, samples
        starts = [version.start for version in self._versions]
        version = self._versions[bisect_right(starts, samples) - 1]
        found = list(version.before)
        new = version.shares.counts(samples - version.start)
        for source, count in zip(version.members, new, strict=True):
            found[source] += count
        return found

    def shares(self, number: int) -> list[Fraction]:
        """Each source's share of the samples around ``number``; 0 where it has not joined."""
        version = self._versions[self.version(number)]
        total = sum(version.shares.weights)
        found = [Fraction(0)] * len(self.sources)
        for source, weight in zip(version.members, version.shares.weights, strict=True):
            found[source] = Fraction(weight, total)
        return found
