"""Blocks, order and cursor as algebra: how files are cut, who asks, and in what order, change
nothing; every split of a run over ranks takes each sample exactly once an epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_blocks import BOS, EOS, blocks_of, corpora, make_corpus

from longpretrain.config import BatchConfig, Config
from longpretrain.data import Order, hash64
from longpretrain.data.blocks import Policy
from longpretrain.data.selection import Selection
from longpretrain.engine.loader import Loader
from longpretrain.engine.loop import accumulation_steps
from longpretrain.errors import InputError
from longpretrain.ranks import Ranks
from longpretrain.schedule import update_numbers

each_policy = pytest.mark.parametrize("policy", get_args(Policy))
SEEDS = st.integers(0, 2**64)


def factors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def splits(draw: st.DrawFn, global_sequences: int) -> dict[str, int]:
    """A way to share an update out: ranks x micro-batches x sequences of each."""
    ranks = draw(st.sampled_from(factors(global_sequences)))
    micro = draw(st.sampled_from(factors(global_sequences // ranks)))
    return {
        "world_size": ranks,
        "micro_sequences": micro,
        "accumulation": global_sequences // ranks // micro,
    }


SIZES = st.integers(1, 24)
"""Sequences of an update."""


def numbers_of(update: int, size: int, split: dict[str, int], rank: int) -> list[range]:
    return update_numbers(update, global_sequences=size, rank=rank, **split)


class TestBlocks:
    @each_policy
    @settings(max_examples=60)
    @given(
        lengths=corpora,
        max_tokens=st.integers(4, 50),
        shard_bytes=st.tuples(st.integers(2, 300), st.integers(2, 300)),
        data=st.data(),
    )
    def test_the_cut_into_shards_changes_no_block(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        policy: Policy,
        lengths: list[int],
        max_tokens: int,
        shard_bytes: tuple[int, int],
        data: Any,
    ) -> None:
        """Asked for in any order, and again."""
        one, other = (
            blocks_of(make_corpus(tmp_path_factory.mktemp("c"), lengths, s)[0], policy, max_tokens)
            for s in shard_bytes
        )
        assert len(one) == len(other)
        right = [block.tolist() for block in one]
        for number in data.draw(st.lists(st.integers(0, len(one) - 1), max_size=20)):
            assert other[number].tolist() == right[number]
        assert [block.tolist() for block in other] == right

    @pytest.mark.parametrize("policy", ["full_sentences", "document"])
    @settings(max_examples=60)
    @given(lengths=corpora, max_tokens=st.tuples(st.integers(4, 50), st.integers(4, 50)))
    def test_the_length_of_blocks_changes_no_token(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        policy: Policy,
        lengths: list[int],
        max_tokens: tuple[int, int],
    ) -> None:
        """Each token of each document, once and in order, whatever the length; no block is too
        long, and each begins and ends as promised.
        """
        corpus, documents = make_corpus(tmp_path_factory.mktemp("c"), lengths)
        for most in max_tokens:
            found = [block.tolist() for block in blocks_of(corpus, policy, most)]
            assert all(len(block) <= most for block in found)
            assert all((block[0], block[-1]) == (BOS, EOS) for block in found)
            tokens = [i for block in found for i in block if i not in (BOS, EOS)]
            assert tokens == list(itertools.chain(*documents))

    @each_policy
    @pytest.mark.parametrize(
        "selection", [None, Selection(min_tokens=3, share=Fraction(3, 4))], ids=["all", "some"]
    )
    @settings(max_examples=40)
    @given(lengths=corpora, max_tokens=st.integers(4, 50), seed=SEEDS)
    def test_an_epoch_holds_every_token_once(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        policy: Policy,
        selection: Selection | None,
        lengths: list[int],
        max_tokens: int,
        seed: int,
    ) -> None:
        """Of every document that takes part, in one block or another of the epoch's order, and the
        tokens of a document in theirs.
        """
        corpus, documents = make_corpus(tmp_path_factory.mktemp("c"), [*lengths, 40, 41, 42])
        chosen = [document for n, document in enumerate(documents) if takes(selection, n, document)]
        blocks = blocks_of(corpus, policy, max_tokens, selection)
        order = Order(len(blocks), seed)
        taken = [order.locate(number)[1] for number in range(2 * len(blocks))]
        for epoch in (taken[: len(blocks)], taken[len(blocks) :]):
            tokens = [i for number in epoch for i in blocks[number] if i not in (BOS, EOS)]
            assert sorted(tokens) == list(itertools.chain(*chosen))
        assert blocks.num_tokens == sum(map(len, chosen))
        assert blocks.num_documents == len(chosen)


def takes(selection: Selection | None, number: int, document: list[int]) -> bool:
    return selection is None or bool(selection.chosen(number, np.array([len(document)]))[0])


class TestOrder:
    @settings(max_examples=100)
    @given(samples=st.integers(1, 60), seed=SEEDS, data=st.data())
    def test_any_access_pattern(self, samples: int, seed: int, data: Any) -> None:
        """Back and forth over many epochs, by one that remembers and by one that starts anew."""
        order = Order(samples, seed)
        straight = [Order(samples, seed).locate(number) for number in range(5 * samples)]
        for number in data.draw(st.lists(st.integers(0, 5 * samples - 1), max_size=60)):
            assert order.locate(number) == straight[number]
        for epoch in range(5):
            taken = straight[epoch * samples : (epoch + 1) * samples]
            assert sorted(taken) == [(epoch, block) for block in range(samples)]

    @settings(max_examples=100)
    @given(
        samples=st.integers(25, 60), seed=SEEDS, epochs=st.sets(st.integers(0, 10**9), min_size=3)
    )
    def test_epochs_differ(self, samples: int, seed: int, epochs: set[int]) -> None:
        """And seeds. Two orders of 25 are equal once in 25! = 1.6e25 draws."""

        def of(seed: int, epoch: int) -> tuple[int, ...]:
            order = Order(samples, seed)
            return tuple(order.locate(epoch * samples + i)[1] for i in range(samples))

        orders = [of(seed, epoch) for epoch in epochs] + [of(seed + 1, min(epochs))]
        assert len(set(orders)) == len(orders)

    @settings(max_examples=60)
    @given(samples=st.integers(1, 40), seed=SEEDS, epoch=st.integers(0, 10**6))
    def test_a_sample_is_sorted_by_its_hash(self, samples: int, seed: int, epoch: int) -> None:
        order = Order(samples, seed)
        found = [order.locate(epoch * samples + place) for place in range(samples)]
        expected = sorted(range(samples), key=lambda i: hash64(0x6F72646572, seed, epoch, i))
        assert found == [(epoch, block) for block in expected]


class TestCursor:
    @settings(max_examples=150)
    @given(size=SIZES, update=st.integers(1, 10**9), data=st.data())
    def test_an_update_is_shared_out_exactly(self, size: int, update: int, data: Any) -> None:
        """Every number of [(u - 1) S, u S) goes to one place; micro-batch by micro-batch over the
        ranks, the numbers run on.
        """
        split = data.draw(splits(size))
        ranks = [numbers_of(update, size, split, rank) for rank in range(split["world_size"])]
        assert all(len(groups) == split["accumulation"] for groups in ranks)
        flat = [number for turn in zip(*ranks, strict=True) for group in turn for number in group]
        assert flat == list(range((update - 1) * size, update * size))
        assert all(len(group) == split["micro_sequences"] for groups in ranks for group in groups)

    @settings(max_examples=100)
    @given(samples=st.integers(1, 40), size=SIZES, seed=SEEDS, data=st.data())
    def test_every_epoch_holds_every_sample_once(
        self, samples: int, size: int, seed: int, data: Any
    ) -> None:
        """Also where an update spans the border of two epochs, or several whole ones, and the split
        changes at every restart.
        """
        epochs = 3
        order, taken, update = Order(samples, seed), [], 1
        while (update - 1) * size < epochs * samples:
            split = data.draw(splits(size), label=f"split from update {update}")
            for _ in range(data.draw(st.integers(1, 1 + epochs * samples // size))):
                for rank in range(split["world_size"]):
                    groups = numbers_of(update, size, split, rank)
                    taken += [order.locate(number) for number in itertools.chain(*groups)]
                update += 1
        whole = sorted(place for place in taken if place[0] < epochs)
        assert whole == [(epoch, block) for epoch in range(epochs) for block in range(samples)]
        assert len(set(taken)) == len(taken)

    @settings(max_examples=40)
    @given(size=SIZES, data=st.data())
    def test_the_loop_collates_those_numbers(self, size: int, data: Any) -> None:
        """Through its thread, from any step on, with gaps as a restart makes them."""
        total = 30
        split = data.draw(splits(size))
        steps = data.draw(st.lists(st.integers(1, total), min_size=1, max_size=4))
        ranks = Ranks(
            rank=data.draw(st.integers(0, split["world_size"] - 1)), world_size=split["world_size"]
        )
        batch = BatchConfig(global_sequences=size, micro_sequences=split["micro_sequences"])
        config = Config(batch=batch)
        accumulation = accumulation_steps(config, ranks.world_size)
        assert accumulation == split["accumulation"]
        with Loader(config, NumbersOnly(), ranks, accumulation) as batches:
            for step in itertools.chain.from_iterable((s, s + 1) for s in steps):
                right = numbers_of(step, size, split, ranks.rank)
                assert batches.get(step) == [list(group) for group in right]

    @settings(max_examples=100)
    @given(size=st.integers(1, 60), ranks=st.integers(1, 9), micro=st.integers(1, 9))
    def test_a_batch_divides_or_is_refused(self, size: int, ranks: int, micro: int) -> None:
        """The sizes that the refusal names would do."""
        config = Config(batch=BatchConfig(global_sequences=size, micro_sequences=micro))
        if size % (ranks * micro) == 0:
            assert accumulation_steps(config, ranks) * ranks * micro == size
            return
        with pytest.raises(InputError) as refused:
            accumulation_steps(config, ranks)
        for global_sequences, its_micro in _named_choices(refused.value.way_out, size, micro):
            assert global_sequences % (ranks * its_micro) == 0


def _named_choices(way_out: str, size: int, micro: int) -> Iterator[tuple[int, int]]:
    for part in way_out.rstrip(".").split("; or "):
        numbers = [int(word.rstrip(",")) for word in part.split() if word.rstrip(",").isdigit()]
        assert numbers, part
        by_micro = "micro_sequences" in part
        yield from ((size, n) if by_micro else (n, micro) for n in numbers)


class NumbersOnly:
    """A task whose samples are their numbers."""

    def sample(self, number: int) -> int:
        return number

    def collate(self, samples: list[int]) -> list[int]:
        return samples
