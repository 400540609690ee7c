"""A mix: exact shares of every prefix, random access, and versions that keep the past."""

from __future__ import annotations

import time
from collections.abc import Iterator
from fractions import Fraction
from itertools import count, islice, pairwise, repeat
from math import floor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longpretrain.data.blocks import Order
from longpretrain.data.hashing import hash64
from longpretrain.data.mix import Mix, Shares, Source

parts = st.one_of(
    st.integers(1, 4),
    st.integers(1, 10**12),
    st.fractions(Fraction(1, 10**9), 10**6, max_denominator=10**9),
)
weights = st.lists(parts.map(Fraction), min_size=1, max_size=8)
samples = st.one_of(st.integers(0, 50), st.integers(0, 10**13))
FIBONACCI = (1, 1, 2, 3, 5, 8, 13, 21)


def share(weights: list[Fraction], source: int) -> Fraction:
    return Fraction(weights[source]) / sum(weights)


def by_the_book(weights: list[Fraction]) -> Iterator[int]:
    """The order of sources, from nodes that deal out what comes to them."""
    nodes: list[tuple[Fraction, int, Iterator[int]]] = [
        (weight, place, repeat(place)) for place, weight in enumerate(weights)
    ]
    while len(nodes) > 1:
        nodes.sort(key=lambda node: node[:2])
        (light, _, low), (heavy, _, high) = nodes[:2]
        age = len(weights) + max(0, *(place for _, place, _ in nodes))
        nodes = [*nodes[2:], (light + heavy, age, dealt(light, light + heavy, low, high))]
    return nodes[0][2]


def dealt(
    part: Fraction, whole: Fraction, low: Iterator[int], high: Iterator[int]
) -> Iterator[int]:
    given = 0
    for arrived in count(1):
        wanted = floor((2 * arrived * part + whole) / (2 * whole))
        yield next(low if wanted > given else high)
        given = wanted


class TestShares:
    @given(weights=weights, number=samples)
    def test_every_prefix_holds_the_shares(self, weights: list[Fraction], number: int) -> None:
        """Exactly, in fractions; and the bound is what the module says it is, for any weights."""
        shares = Shares(weights)
        counts, bounds = shares.counts(number), shares.bounds()
        assert sum(counts) == number
        for source, taken in enumerate(counts):
            assert abs(taken - number * share(weights, source)) <= bounds[source]
            assert bounds[source] < Fraction(168, 100)
            assert bounds[source] <= Fraction(len(weights) - 1, 2)  # one error for each split

    @given(weights=weights, number=samples)
    def test_a_sample_is_the_next_of_its_source(self, weights: list[Fraction], number: int) -> None:
        """Random access and counting agree: no sample is lost or taken twice."""
        shares = Shares(weights)
        before, after = shares.counts(number), shares.counts(number + 1)
        source, among = shares.locate(number)
        assert among == before[source]
        assert [a - b for a, b in zip(after, before, strict=True)] == [
            int(other == source) for other in range(len(weights))
        ]

    @given(weights=weights)
    def test_whole_weights_come_out_even(self, weights: list[Fraction]) -> None:
        shares = Shares(weights)
        assert shares.counts(sum(shares.weights)) == shares.weights
        assert Shares([3 * weight for weight in weights]).weights == shares.weights

    @settings(max_examples=60)
    @given(weights=weights)
    def test_as_the_docs_say(self, weights: list[Fraction]) -> None:
        """docs/recipes.md, written out one sample at a time."""
        found = list(islice(by_the_book(weights), 120))
        shares = Shares(weights)
        assert [shares.locate(number)[0] for number in range(120)] == found

    def test_known_order(self) -> None:
        """Written down, as runs depend on it: it may not change from version to version."""

        def order(*weights: int, length: int) -> str:
            shares = Shares([Fraction(weight) for weight in weights])
            return "".join("abcdefgh"[shares.locate(n)[0]] for n in range(length))

        assert order(1, length=3) == "aaa"
        assert order(1, 1, length=6) == "ababab"
        assert order(3, 1, length=8) == "abaaabaa"
        assert order(5, 21, 18, 21, length=65) == (
            "bcdbcdbadcbdcbdcbdabdcbdcbcdbcdbadbcdbcdcbdcbdabdcbdcbdcbadbcdbcd"
        )

    @pytest.mark.parametrize(
        ("weights", "largest"),
        [((1, 1), 0.5), ((1,) * 8, 0.875), ((1,) * 7 + (10**6,), 0.9881), (FIBONACCI, 1.0565)],
        ids=["two", "eight", "large beside small", "fibonacci"],
    )
    def test_bounds(self, weights: tuple[int, ...], largest: float) -> None:
        bounds = Shares([Fraction(weight) for weight in weights]).bounds()
        assert float(max(bounds)) == pytest.approx(largest, abs=1e-4)

    def test_cost(self) -> None:
        """A sample of eight sources in microseconds, also far into a run; some slack for noise."""
        shares = Shares([Fraction(7**n, 3**n) for n in range(8)])
        start = time.process_time()
        for number in range(10**12, 10**12 + 1000):
            shares.locate(number)
        assert (time.process_time() - start) / 1000 < 100e-6


sources = st.lists(
    st.builds(
        Source,
        identity=st.integers(0, 2**64 - 1),
        num_samples=st.integers(1, 9),
        weight=parts.map(Fraction),
        from_sample=st.integers(0, 60),
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda source: source.identity,
).map(lambda found: [Source(**{**vars(found[0]), "from_sample": 0}), *found[1:]])


def source(identity: int, **given: object) -> Source:
    return Source(**{"identity": identity, "num_samples": 5, "weight": Fraction(1), **given})  # type: ignore[arg-type]


class TestMix:
    @settings(max_examples=60)
    @given(sources=sources, seed=st.integers(0, 2**64))
    def test_every_source_is_taken_in_whole_passes(self, sources: list[Source], seed: int) -> None:
        """Over all versions: nothing twice in a pass, nothing left out, none before it joins."""
        mix = Mix(sources, seed)
        seen: list[list[tuple[int, int]]] = [[] for _ in sources]
        for number in range(150):
            assert mix.counts(number) == [len(places) for places in seen]
            place = mix.locate(number)
            assert number >= sources[place.source].from_sample
            seen[place.source].append((place.epoch, place.block))
        for each, places in zip(sources, seen, strict=True):
            assert len(set(places)) == len(places)
            assert [epoch for epoch, _ in places] == [
                n // each.num_samples for n in range(len(places))
            ]
            assert all(0 <= block < each.num_samples for _, block in places)

    @settings(max_examples=60)
    @given(sources=sources, seed=st.integers(0, 2**64), data=st.data())
    def test_the_listing_has_no_say(
        self, sources: list[Source], seed: int, data: st.DataObject
    ) -> None:
        sources += [source(2**64 + n) for n in range(2)]  # some weights that are equal
        others = data.draw(st.permutations(sources))
        one, other = Mix(sources, seed), Mix(others, seed)
        for number in range(100):
            left, right = one.locate(number), other.locate(number)
            assert sources[left.source] == others[right.source]
            assert left[1:] == right[1:]

    @settings(max_examples=60)
    @given(sources=sources, seed=st.integers(0, 2**64), data=st.data())
    def test_a_source_that_joins_leaves_the_past_alone(
        self, sources: list[Source], seed: int, data: st.DataObject
    ) -> None:
        """And from where it joins on, the shares hold again for each version by itself."""
        joins = data.draw(st.integers(1, 120))
        weight = data.draw(parts.map(Fraction))
        identity = max(each.identity for each in sources) + 1
        joined = [*sources, source(identity, weight=weight, from_sample=joins)]
        old, new = Mix(sources, seed), Mix(joined, seed)
        for number in range(joins):
            assert old.locate(number) == new.locate(number)
            assert old.version(number) == new.version(number)
        for number in (joins, joins + 37, joins + 10**9):
            starts = [each.from_sample for each in joined if each.from_sample <= number]
            start = max(starts)
            before, after = new.counts(start), new.counts(number)
            shares = new.shares(number)
            assert sum(shares) == 1
            for place, each in enumerate(joined):
                assert (shares[place] > 0) == (each.from_sample <= number)
                exact = (number - start) * shares[place]
                assert abs(after[place] - before[place] - exact) < Fraction(168, 100)

    def test_versions(self) -> None:
        mix = Mix([source(1), source(2, from_sample=10), source(3, from_sample=10)], seed=1)
        assert [mix.version(n) for n in (0, 9, 10, 10**6)] == [0, 0, 1, 1]
        assert mix.shares(9) == [1, 0, 0]
        assert mix.shares(10) == [Fraction(1, 3)] * 3

    def test_one_source_is_a_run_on_one_corpus(self) -> None:
        """So that a run that began on data.train can go on as a mix."""
        order = Order(5, seed=7)
        mix = Mix([source(1), source(2, from_sample=12)], seed=7)
        assert [mix.locate(n)[1:] for n in range(12)] == [order.locate(n) for n in range(12)]
        assert [m[1:] for m in map(mix.locate, range(12, 40)) if m.source == 0] == [
            order.locate(n) for n in range(12, 26)
        ]
        joined = Order(5, seed=hash64(0x736F75726365, 7, 2))  # as docs/recipes.md says
        assert [m[1:] for m in map(mix.locate, range(12, 40)) if m.source == 1] == [
            joined.locate(n) for n in range(14)
        ]

    def test_the_order_inside_a_source_is_its_own(self) -> None:
        """Other sources and their weights change when a sample comes, not which comes next; other
        seeds and other sources of the same size do change it.
        """

        def inside(mix: Mix, number: int) -> list[tuple[int, int]]:
            places = [mix.locate(n) for n in range(200)]
            return [place[1:] for place in places if place.source == number][:40]

        size = {"num_samples": 30}
        first = inside(Mix([source(1, **size), source(2, **size)], seed=1), 0)
        more = [source(1, **size), source(2), source(3, weight=Fraction(1, 2))]
        assert inside(Mix(more, seed=1), 0) == first
        assert inside(Mix([source(1, **size), source(2, **size)], seed=2), 0) != first
        assert inside(Mix([source(1, **size), source(2, **size)], seed=1), 1) != first

    def test_no_long_runs_of_one_source(self) -> None:
        """What low discrepancy is for: two samples of a source are about 1 / share apart."""
        mix = Mix([source(n, num_samples=100, weight=Fraction(n)) for n in range(1, 9)], seed=1)
        places = [mix.locate(number).source for number in range(3600)]
        for n in range(8):
            at = [number for number, place in enumerate(places) if place == n]
            mean = Fraction(36, n + 1)
            assert len(at) == 3600 / mean
            assert max(right - left for left, right in pairwise(at)) <= 3 * mean
