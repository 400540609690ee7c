"""Selections: the documents that they name, however the corpus grows or is cut into shards."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_data_blocks import BOS, EOS, blocks_of, corpora, make_corpus

from longpretrain.data import Blocks, Corpus, hash64
from longpretrain.data.selection import Selection
from longpretrain.errors import InputError

THIRD = Fraction(1, 3)


def documents_of(blocks: Blocks) -> set[int]:
    """First tokens of the documents that blocks of one document each hold."""
    return {int(token) for block in blocks for token in block if token not in (BOS, EOS)}


class TestSelection:
    @settings(max_examples=60)
    @given(
        first=st.integers(0, 10**9),
        lengths=st.lists(st.integers(1, 30), min_size=1, max_size=40),
        least=st.integers(0, 20),
        share=st.fractions(Fraction(1, 50), 1),
        seed=st.integers(0, 2**64),
    )
    def test_it_is_as_documented(
        self, first: int, lengths: list[int], least: int, share: Fraction, seed: int
    ) -> None:
        chosen = Selection(min_tokens=least, share=share, seed=seed).chosen(
            first, np.array(lengths)
        )
        limit = share * 2**64
        right = [
            length >= least and hash64(0x73656C656374, seed, first + place) < int(limit)
            for place, length in enumerate(lengths)
        ]
        assert chosen.tolist() == right

    def test_the_share_is_kept_and_seeds_are_independent(self) -> None:
        """100,000 draws at 1/3: sd 149; at 1/9, of two seeds: sd 99."""
        lengths = np.ones(100_000, np.int64)
        one, other = (Selection(share=THIRD, seed=seed).chosen(0, lengths) for seed in (1, 2))
        assert abs(int(one.sum()) - 33_333) < 5 * 149
        assert abs(int((one & other).sum()) - 11_111) < 5 * 99

    def test_a_larger_share_holds_a_smaller(self) -> None:
        lengths = np.ones(1000, np.int64)
        small = Selection(share=THIRD, seed=5).chosen(0, lengths)
        large = Selection(share=Fraction(1, 2), seed=5).chosen(0, lengths)
        assert (large | ~small).all()
        assert large.sum() > small.sum()

    def test_what_takes_all(self) -> None:
        assert Selection().takes_all
        assert Selection(min_tokens=1, seed=7).takes_all
        assert not Selection(min_tokens=2).takes_all
        assert not Selection(share=THIRD).takes_all
        assert Selection(min_tokens=9, seed=7).identity == Selection(min_tokens=9).identity
        assert Selection(share=THIRD, seed=7).identity != Selection(share=THIRD).identity
        one, none = Selection(share=THIRD, min_tokens=1), Selection(share=THIRD)
        assert one.identity == none.identity, "no document is empty"

    @pytest.mark.parametrize("share", [Fraction(0), Fraction(-1, 3), Fraction(4, 3)])
    def test_a_share_is_one(self, share: Fraction) -> None:
        with pytest.raises(InputError, match=f"share of a selection: got {share}"):
            Selection(share=share)

    def test_a_length_is_one(self) -> None:
        with pytest.raises(InputError, match="min_tokens of a selection: got -1"):
            Selection(min_tokens=-1)


class TestSelected:
    """Blocks of a selection."""

    @pytest.mark.parametrize("policy", ["full_sentences", "document", "packed"])
    @settings(max_examples=40)
    @given(
        lengths=corpora,
        max_tokens=st.integers(4, 50),
        shard_bytes=st.integers(2, 300),
        least=st.integers(0, 30),
        seed=st.integers(0, 9),
    )
    def test_they_are_those_of_a_corpus_of_these_documents(
        self,
        tmp_path_factory: pytest.TempPathFactory,
        policy: str,
        lengths: list[int],
        max_tokens: int,
        shard_bytes: int,
        least: int,
        seed: int,
    ) -> None:
        folder = tmp_path_factory.mktemp("c")
        (folder / "all").mkdir()
        (folder / "chosen").mkdir()
        corpus, documents = make_corpus(folder / "all", lengths, shard_bytes)
        selection = Selection(min_tokens=least, share=Fraction(2, 3), seed=seed)
        chosen = np.flatnonzero(selection.chosen(0, np.array(lengths))).tolist()
        if not chosen:
            with pytest.raises(InputError, match=r"selection from corpus .*: got none of its"):
                blocks_of(corpus, policy, max_tokens, selection)
            return
        blocks = blocks_of(corpus, policy, max_tokens, selection)
        alone = make_corpus(folder / "chosen", documents=[documents[n] for n in chosen])[0]
        right = blocks_of(alone, policy, max_tokens)
        assert [block.tolist() for block in blocks] == [block.tolist() for block in right]
        for name in ("num_documents", "num_tokens", "fill_rate"):
            assert getattr(blocks, name) == getattr(right, name), name

    def test_a_corpus_that_grows_keeps_its_choice(self, tmp_path: Path) -> None:
        (tmp_path / "small").mkdir()
        (tmp_path / "large").mkdir()
        small, _ = make_corpus(tmp_path / "small", [1] * 200, 50)
        large, _ = make_corpus(tmp_path / "large", [1] * 300, 70)
        selection = Selection(share=THIRD, seed=3)
        before = documents_of(blocks_of(small, "document", 4, selection))
        after = documents_of(blocks_of(large, "document", 4, selection))
        assert before
        assert {token for token in after if token < 10 + 200} == before

    def test_one_that_takes_all_changes_nothing(self, tmp_path: Path) -> None:
        corpus, _ = make_corpus(tmp_path, [5, 6])
        blocks = blocks_of(corpus, "document", 6, Selection(min_tokens=1))
        assert blocks.selection is None
        assert blocks.sample_id(2) == blocks_of(corpus, "document", 6).sample_id(2)

    def test_sample_ids_tell_selections_apart(self, tmp_path: Path) -> None:
        corpus, _ = make_corpus(tmp_path, [5, 6, 7, 8, 9, 10])
        selections = [None, Selection(min_tokens=6), Selection(min_tokens=7)]
        selections += [Selection(share=Fraction(1, 2), seed=seed) for seed in (1, 2)]
        found = {
            blocks_of(corpus, "document", 6, selection).sample_id(0) for selection in selections
        }
        assert len(found) == len(selections)
        again = blocks_of(Corpus.open(tmp_path), "document", 6, selections[1])
        assert again.sample_id(0) in found
