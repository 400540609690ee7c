"""Blocks and order: every token once and in order, every sample once per epoch, fixed forever."""

from __future__ import annotations

import itertools
import pickle
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longpretrain.data import Blocks, Order, hash64, packing
from longpretrain.data.blocks import Policy
from longpretrain.data.manifest import Manifest
from longpretrain.data.selection import Selection
from longpretrain.data.shard_writer import ShardWriter
from longpretrain.data.shards import Corpus
from longpretrain.errors import InputError

BOS, EOS = 0, 2

corpora = st.lists(st.integers(1, 40), min_size=1, max_size=15)
"""Lengths of documents."""


def make_corpus(folder, lengths=(), shard_bytes=1 << 20, first=10, documents=()):
    """Documents of the ids first, first + 1, ...: every token of the corpus is told apart. Or these
    documents.
    """
    ids = itertools.count(first)
    documents = documents or [list(itertools.islice(ids, length)) for length in lengths]
    writer = ShardWriter(folder, vocab_size=60_000, shard_bytes=shard_bytes)
    for document in documents:
        writer.add(np.array(document))
    manifest = Manifest(
        tokenizer_fingerprint="f", vocab_size=60_000, dtype="uint16", documents=len(documents),
        tokens=sum(map(len, documents)), shards=writer.finish(),
    )  # fmt: skip
    manifest.write(folder)
    return Corpus.open(folder), documents


def blocks_of(corpus, policy, max_tokens, selection=None):
    return Blocks(
        corpus, policy=policy, max_tokens=max_tokens, bos_id=BOS, eos_id=EOS, selection=selection
    )


@settings(derandomize=True, deadline=None, max_examples=150)
@given(lengths=corpora, max_tokens=st.integers(4, 50), shard_bytes=st.integers(2, 300))
def test_full_sentences(tmp_path_factory, lengths, max_tokens, shard_bytes):
    corpus, documents = make_corpus(tmp_path_factory.mktemp("c"), lengths, shard_bytes)
    blocks = blocks_of(corpus, "full_sentences", max_tokens)
    found = list(blocks)
    assert len(found) == len(blocks)
    assert all(block.dtype == np.int64 for block in found)
    assert all(block[0] == BOS and block[-1] == EOS for block in found)
    # All of the same length but the last; each has a token of a document.
    assert all(len(block) == max_tokens for block in found[:-1])
    assert 3 <= len(found[-1]) <= max_tokens
    assert all((block >= 10).any() for block in found)
    # Put together they are the documents, in order, with one </s> between two.
    stream = np.concatenate([block[1:-1] for block in found]).tolist()
    expected = [*documents[0]]
    for document in documents[1:]:
        expected += [EOS, *document]
    assert stream == expected


@settings(derandomize=True, deadline=None, max_examples=150)
@given(lengths=corpora, max_tokens=st.integers(4, 50), shard_bytes=st.integers(2, 300))
def test_document_blocks_never_mix(tmp_path_factory, lengths, max_tokens, shard_bytes):
    corpus, documents = make_corpus(tmp_path_factory.mktemp("c"), lengths, shard_bytes)
    blocks = blocks_of(corpus, "document", max_tokens)
    found = [block.tolist() for block in blocks]
    assert len(found) == len(blocks)
    assert all(block[0] == BOS and block[-1] == EOS for block in found)
    assert all(3 <= len(block) <= max_tokens for block in found)
    owner = {i: number for number, document in enumerate(documents) for i in document}
    assert all(len({owner[i] for i in block[1:-1]}) == 1 for block in found)
    pieces = itertools.chain.from_iterable(block[1:-1] for block in found)
    assert list(pieces) == list(itertools.chain.from_iterable(documents))
    # No piece is cut shorter than it must be.
    assert len(found) == sum(-(-length // (max_tokens - 2)) for length in lengths)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(lengths=corpora, max_tokens=st.integers(4, 50), shard_bytes=st.integers(2, 300))
def test_packed_blocks_keep_documents_apart(tmp_path_factory, lengths, max_tokens, shard_bytes):
    corpus, _ = make_corpus(tmp_path_factory.mktemp("c"), lengths, shard_bytes)
    blocks = blocks_of(corpus, "packed", max_tokens)
    alone = [block.tolist() for block in blocks_of(corpus, "document", max_tokens)]
    found = []
    for number in range(len(blocks)):
        block = blocks.read(number)
        assert block.tokens_N.dtype == np.int64
        assert block.document_N.dtype == block.position_N.dtype == np.int32
        assert np.array_equal(blocks[number], block.tokens_N)
        assert len(block.tokens_N) <= max_tokens
        starts = np.flatnonzero(block.tokens_N == BOS)
        assert starts[0] == 0
        pieces = np.split(block.tokens_N, starts[1:])
        for document, (start, piece) in enumerate(zip(starts, pieces, strict=True)):
            at = slice(start, start + len(piece))
            assert block.document_N[at].tolist() == [document] * len(piece)
            assert block.position_N[at].tolist() == list(range(len(piece)))
            found.append(piece.tolist())
    # The pieces of the policy "document", each once.
    assert sorted(found) == sorted(alone)
    filled = sum(map(len, alone))
    assert blocks.fill_rate == pytest.approx(filled / (max_tokens * len(blocks)))


@pytest.mark.parametrize("policy", get_args(Policy))
class TestAccess:
    def test_any_block_alone_is_the_same(self, tmp_path, policy):
        corpus, _ = make_corpus(tmp_path, [7, 30, 1, 1, 22, 64, 3], shard_bytes=50)
        blocks = blocks_of(corpus, policy, 9)
        in_order = list(blocks)
        for number in reversed(range(len(blocks))):
            again = blocks_of(Corpus.open(tmp_path), policy, 9)[number]
            assert np.array_equal(again, in_order[number])

    def test_there_is_no_block_outside(self, tmp_path, policy):
        corpus, _ = make_corpus(tmp_path, [7, 30])
        blocks = blocks_of(corpus, policy, 9)
        for number in (-1, len(blocks)):
            with pytest.raises(IndexError):
                blocks[number]

    @pytest.mark.parametrize("max_tokens", [-1, 0, 2, 3])
    def test_too_few_tokens(self, tmp_path, policy, max_tokens):
        corpus, _ = make_corpus(tmp_path, [7])
        with pytest.raises(InputError, match=f"max_tokens: got {max_tokens}; wanted 4 or more"):
            blocks_of(corpus, policy, max_tokens)

    def test_sample_ids(self, tmp_path, policy):
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        corpus, _ = make_corpus(tmp_path / "a", [70, 30])
        other, _ = make_corpus(tmp_path / "b", [70, 31])
        first, second = blocks_of(corpus, policy, 9), blocks_of(other, policy, 9)
        ids = {source.sample_id(i) for source in (first, second) for i in range(10_000)}
        assert len(ids) == 20_000
        assert first.sample_id(3) == hash64(int(corpus.fingerprint[:16], 16), 3)


def test_small_buffers_pack_the_same_pieces(tmp_path, monkeypatch):
    """A piece never leaves its buffer, and each buffer has an index of its own."""
    corpus, _ = make_corpus(tmp_path, [7, 30, 1, 1, 22, 64, 3, 9, 9], shard_bytes=50)
    whole = blocks_of(corpus, "packed", 20)
    monkeypatch.setattr(packing, "BUFFER_PIECES", 3)
    small = blocks_of(corpus, "packed", 20)
    pieces = sum(1 for block in whole for token in block if token == BOS)
    assert -(-pieces // 3) <= len(small) != len(whole)
    tokens = [sorted(np.concatenate(list(blocks)).tolist()) for blocks in (whole, small)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("policy", get_args(Policy))
def test_blocks_travel_to_another_process(tmp_path, policy):
    corpus, _ = make_corpus(tmp_path, [40] * 300)
    blocks = blocks_of(corpus, policy, 9, Selection(min_tokens=2))
    data = pickle.dumps(blocks)
    assert len(data) < 3000
    again = pickle.loads(data)
    assert [block.tolist() for block in again] == [block.tolist() for block in blocks]
    assert again.sample_id(3) == blocks.sample_id(3)


def test_fill_rates_by_hand(tmp_path):
    corpus, _ = make_corpus(tmp_path, [3, 1, 2])
    rates = [blocks_of(corpus, policy, 6).fill_rate for policy in get_args(Policy)]
    assert rates == [12 / 12, 12 / 18, 12 / 18]


def test_blocks_by_hand(tmp_path):
    corpus, _ = make_corpus(tmp_path, [3, 1, 2])  # 10 11 12 | 13 | 14 15
    full = [block.tolist() for block in blocks_of(corpus, "full_sentences", 6)]
    assert full == [[0, 10, 11, 12, 2, 2], [0, 13, 2, 14, 15, 2]]
    alone = [block.tolist() for block in blocks_of(corpus, "document", 4)]
    assert alone == [[0, 10, 11, 2], [0, 12, 2], [0, 13, 2], [0, 14, 15, 2]]
    packed = [block.tolist() for block in blocks_of(corpus, "packed", 9)]
    assert packed == [[0, 10, 11, 12, 2, 0, 14, 15, 2], [0, 13, 2]]


class TestOrder:
    @settings(derandomize=True, deadline=None, max_examples=100)
    @given(st.integers(1, 60), st.integers(0, 2**63), st.integers(1, 5), st.integers(1, 4))
    def test_ranks_and_workers_share_every_epoch_out(self, samples, seed, ranks, workers):
        """Whoever takes a number, in whatever order it asks, gets its sample, once an epoch."""
        epochs = 3
        seen = []
        for rank, worker in itertools.product(range(ranks), range(workers)):
            order = Order(samples, seed)
            numbers = range(samples * epochs)[rank * workers + worker :: ranks * workers]
            seen += [order.locate(number) for number in reversed(numbers)]
        assert sorted(seen) == [(e, b) for e in range(epochs) for b in range(samples)]

    def test_epochs_and_seeds_differ(self):
        orders = [
            tuple(Order(100, seed).locate(epoch * 100 + i)[1] for i in range(100))
            for seed in range(5) for epoch in range(5)
        ]  # fmt: skip
        assert len(set(orders)) == 25
        assert tuple(range(100)) not in orders

    def test_any_number_may_be_asked_for(self):
        order = Order(1000, 3)
        numbers = [0, 999, 1000, 123_456_789, 2_500, 0, 10**15]
        found = [order.locate(number) for number in numbers]
        assert [epoch for epoch, _ in found] == [0, 0, 1, 123_456, 2, 0, 10**12]
        assert found[0] == found[5]
        assert found == [Order(1000, 3).locate(number) for number in numbers]

    def test_each_place_is_as_likely(self):
        """20 samples, 20,000 epochs: each at each place 1,000 times, sd 30.8; 400 cells."""
        order = Order(20, 11)
        count = np.zeros((20, 20))
        for number in range(20 * 20_000):
            count[number % 20, order.locate(number)[1]] += 1
        assert np.abs(count - 1000).max() < 5.5 * 30.8

    def test_the_order_never_changes(self):
        order = Order(10, 1)
        found = [order.locate(number) for number in range(30)]
        assert [epoch for epoch, _ in found] == [0] * 10 + [1] * 10 + [2] * 10
        assert [block for _, block in found] == [
            3,
            2,
            4,
            0,
            7,
            8,
            1,
            6,
            9,
            5,
            8,
            3,
            4,
            2,
            5,
            9,
            6,
            0,
            7,
            1,
            3,
            8,
            4,
            6,
            0,
            7,
            5,
            2,
            1,
            9,
        ]
        assert Order(1_600_000, 42).locate(2_000_000) == (1, 184643)

    def test_it_is_as_documented(self):
        order = Order(50, 9)
        expected = sorted(range(50), key=lambda block: hash64(0x6F72646572, 9, 2, block))
        assert [order.locate(100 + place) for place in range(50)] == [(2, b) for b in expected]
