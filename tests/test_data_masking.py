"""Masking: exact budget, special tokens left alone, 80/10/10, uniform replacements, fixed forever.

Statistics use fixed keys and bounds of five standard deviations or more: at a true rate, less than
one key in a million would fail, and these keys do not.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longpretrain.data import hash64, hash64_array, load_tokenizer, mask_tokens
from longpretrain.errors import InputError

SPECIAL = frozenset({0, 1, 2, 3, 99})
MASK = 99
ALL = 1 - 2**-53  # the largest probability that there is below 1
REAL = np.arange(4, 97, dtype=np.int32)

tokens_of = st.lists(st.integers(0, 99), max_size=200).map(lambda ids: np.array(ids, np.int64))


def mask(tokens, key, probability=0.15):
    return mask_tokens(
        tokens, key=key, probability=probability, special_ids=SPECIAL, real_ids=REAL, mask_id=MASK
    )


@settings(derandomize=True, deadline=None, max_examples=300)
@given(tokens_of, st.integers(0, 2**64 - 1), st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_properties(tokens, key, probability):
    before = tokens.copy()
    inputs, positions = mask(tokens, key, probability)
    assert np.array_equal(tokens, before)
    assert inputs.dtype == positions.dtype == np.int64
    maskable = np.flatnonzero(~np.isin(tokens, list(SPECIAL)))
    n = len(maskable)
    # The budget, by its definition.
    rounding = (hash64(key, 1) >> 11) / 2**53
    assert len(positions) == min(max(int(probability * n + rounding), min(n, 1)), n)
    # Sorted, distinct, never a special token; everything else as it was.
    assert np.all(np.diff(positions) > 0)
    assert np.isin(positions, maskable).all()
    others = np.setdiff1d(np.arange(len(tokens)), positions)
    assert np.array_equal(inputs[others], tokens[others])
    # What stands there now: the mask, a real token, or itself; no other special token.
    now, was = inputs[positions], tokens[positions]
    assert np.all((now == MASK) | np.isin(now, REAL) | (now == was))
    # The same key gives the same mask, in any integer type.
    for again in (mask(tokens, key, probability), mask(tokens.astype(np.uint16), key, probability)):
        assert np.array_equal(again[0], inputs)
        assert np.array_equal(again[1], positions)


@pytest.mark.parametrize(
    "tokens", [[], [0, 2], [0, 99, 1, 2, 3]], ids=["empty", "frame", "special"]
)
def test_nothing_to_mask(tokens):
    inputs, positions = mask(np.array(tokens, np.int64), 1)
    assert inputs.tolist() == tokens
    assert positions.dtype == np.int64
    assert len(positions) == 0


def test_at_least_one_token():
    tokens = np.array([0, 50, 2])
    assert all(mask(tokens, key, 0.001)[1].tolist() == [1] for key in range(100))


def test_the_budget_is_the_share_on_average():
    """100 maskable tokens at 12.3 %: 12 or 13 chosen, 13 in 30 % of 20,000 keys (sd 0.32 %)."""
    tokens = np.full(100, 50)
    sizes = np.array([len(mask(tokens, key, 0.123)[1]) for key in range(20_000)])
    assert set(sizes.tolist()) == {12, 13}
    assert abs((sizes == 13).mean() - 0.3) < 5 * 0.0033


def test_every_position_is_as_likely():
    """20,000 keys, 30 of 200 positions: each chosen 3,000 times, sd 50.5; 5.5 sd over 200 cells."""
    tokens = np.full(200, 50)
    count = np.zeros(200)
    for key in range(20_000):
        count[mask(tokens, hash64(key))[1]] += 1
    assert count.sum() == 20_000 * 30
    assert np.abs(count - 3000).max() < 5.5 * 50.5


def test_neighbours_are_chosen_independently():
    """Pairs (i, i+1) both chosen: 30 * 29 / (200 * 199) of 199 pairs, as for a uniform subset."""
    tokens = np.full(200, 50)
    pairs = [int((np.diff(mask(tokens, hash64(key))[1]) == 1).sum()) for key in range(20_000)]
    expected = 199 * 30 * 29 / (200 * 199)
    assert abs(np.mean(pairs) - expected) < 5 * np.std(pairs) / np.sqrt(len(pairs))


@pytest.mark.parametrize("probability", [0, 0.0, 1.0, -0.1, float("nan")])
def test_a_probability_out_of_range_is_refused(probability):
    with pytest.raises(InputError, match=r"probability: got .*; wanted 0 < x < 1"):
        mask(np.full(20, 50), 1, probability)


@pytest.fixture(scope="module")
def roberta():
    return load_tokenizer()


@pytest.fixture(scope="module")
def four_million_chosen(roberta):
    """The id of one real token, and what 4 million chosen ones of it became."""
    word = int(roberta.encode(" world")[0])
    tokens = np.full(100_002, word)
    tokens[0], tokens[-1] = roberta.bos_id, roberta.eos_id
    chosen = []
    for key in range(40):
        inputs, positions = mask_tokens(
            tokens, key=hash64(7, key), probability=ALL, special_ids=roberta.special_ids,
            real_ids=roberta.real_ids, mask_id=roberta.mask_id,
        )  # fmt: skip
        assert positions.tolist() == list(range(1, 100_001))
        chosen.append(inputs[positions])
    return word, np.concatenate(chosen)


def test_eighty_ten_ten(roberta, four_million_chosen):
    """4 million draws: sd of 80 % is 0.0002, of 10 % 0.00015."""
    word, inputs = four_million_chosen
    masked, kept = inputs == roberta.mask_id, inputs == word
    assert abs(masked.mean() - 0.8) < 5 * 0.0002
    assert abs(kept.mean() - 0.1) < 5 * 0.00015
    assert abs((~masked & ~kept).mean() - 0.1) < 5 * 0.00015


def test_replacements_are_uniform_over_the_real_vocabulary(roberta, four_million_chosen):
    """400,000 draws over 50,256 ids: chi-square within 5 sd of its mean, sd sqrt(2 * 50,255)."""
    word, inputs = four_million_chosen
    drawn = inputs[(inputs != roberta.mask_id) & (inputs != word)]
    assert not np.isin(drawn, list(roberta.special_ids)).any()
    counts = np.bincount(drawn, minlength=roberta.vocab_size)
    real = np.setdiff1d(roberta.real_ids, [word])
    assert counts.sum() == counts[real].sum()
    expected = len(drawn) / len(real)
    chi_square = ((counts[real] - expected) ** 2 / expected).sum()
    freedom = len(real) - 1
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)
    # At 8 draws an id, e**-8 of the ids stay undrawn: 17 expected, no block of them.
    undrawn = real[counts[real] == 0]
    assert len(undrawn) < 17 + 5 * np.sqrt(17)
    assert counts[real.min()] + counts[real.max()] > 0


def test_the_whole_real_vocabulary_can_be_drawn(roberta):
    """Four times as many draws reach every single id: 50,257 e**-32 are expected to stay out."""
    drawn = np.zeros(roberta.vocab_size, bool)
    tokens = np.full(800_000, int(roberta.real_ids[0]))
    for key in range(20):
        inputs, _ = mask_tokens(
            tokens, key=key, probability=ALL, special_ids=roberta.special_ids,
            real_ids=roberta.real_ids, mask_id=roberta.mask_id,
        )  # fmt: skip
        drawn[inputs] = True
    assert np.array_equal(np.flatnonzero(drawn), np.append(roberta.real_ids, roberta.mask_id))


def test_a_million_sample_seeds_give_different_masks():
    """Keys (seed, sample, epoch): a million of them differ, and so do the masks they make."""
    samples = np.array([hash64(11, block) for block in range(50_000)], np.uint64)
    grid = np.meshgrid(np.arange(2, dtype=np.uint64), samples, np.arange(10, dtype=np.uint64))
    keys = np.unique(hash64_array(*(part.ravel() for part in grid)))
    assert keys.size == 1_000_000
    tokens = np.full(512, 50)
    masks = {mask(tokens, key)[1].tobytes() for key in keys[::200].tolist()}
    assert len(masks) == 5000


def test_a_mask_never_changes():
    tokens = np.arange(4, 44)
    inputs, positions = mask(tokens, 12345, 0.4)
    assert positions.tolist() == [2, 3, 4, 5, 8, 10, 11, 17, 21, 26, 28, 30, 31, 32, 37, 39]
    assert inputs[positions].tolist() == [
        99,
        99,
        93,
        99,
        99,
        99,
        99,
        93,
        99,
        99,
        32,
        99,
        99,
        99,
        58,
        99,
    ]


def test_it_is_as_documented():
    """docs/data_format.md, written out one token at a time."""
    tokens, key = np.concatenate([[0], np.arange(300) % 93 + 4, [2]]), 77
    inputs, positions = mask(tokens, key)
    maskable = range(1, 301)
    budget = int(0.15 * 300 + (hash64(key, 1) >> 11) / 2**53)
    chosen = sorted(maskable, key=lambda position: hash64(key, 2, position))[:budget]
    assert positions.tolist() == sorted(chosen)
    for position in chosen:
        share = (hash64(key, 3, position) >> 11) / 2**53
        drawn = REAL[hash64(key, 4, position) % len(REAL)]
        expected = MASK if share < 0.8 else drawn if share < 0.9 else tokens[position]
        assert inputs[position] == expected
