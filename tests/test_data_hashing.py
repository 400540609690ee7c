"""hash64: golden values, the vectorised twin, and no collision among a million keys."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longpretrain.data import hash64, hash64_array

words = st.integers(-(1 << 70), 1 << 70)


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((), 0),
        ((0,), 0xE220A8397B1DCDAF),
        ((1,), 0x910A2DEC89025CC1),
        ((1, 2, 3), 0xD0734750FDE362B3),
        ((-1,), 0xE4D971771B652C20),
    ],
    ids=str,
)
def test_values_never_change(parts, expected):
    # hash64(0) is the first output of splitmix64 seeded with 0, as published.
    assert hash64(*parts) == expected


@settings(derandomize=True, deadline=None, max_examples=100)
@given(st.lists(words, min_size=1, max_size=5))
def test_the_vectorised_hash_is_the_same(parts):
    array = hash64_array(*parts[:-1], np.array([parts[-1] % 2**64, 7], np.uint64))
    assert array.tolist() == [hash64(*parts), hash64(*parts[:-1], 7)]


@settings(derandomize=True, deadline=None, max_examples=100)
@given(words, words)
def test_every_part_and_its_place_count(a, b):
    assert hash64(a, b) != hash64(a, b + 1)
    assert hash64(a) != hash64(a, 0)
    if (a - b) % 2**64:
        assert hash64(a, b) != hash64(b, a)


def test_takes_numpy_integers():
    assert hash64(np.int64(-3), np.uint64(5)) == hash64(-3, 5)


def test_a_million_keys_are_distinct():
    seeds, samples, epochs = np.meshgrid(np.arange(10), np.arange(10_000), np.arange(10))
    parts = [part.ravel().astype(np.uint64) for part in (seeds, samples, epochs)]
    assert np.unique(hash64_array(*parts)).size == 1_000_000
