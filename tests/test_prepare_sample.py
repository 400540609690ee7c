"""Samples: all of a small text, a seeded part of a large one, pieces that lose nothing."""

from __future__ import annotations

import tracemalloc

from hypothesis import given, settings
from hypothesis import strategies as st

from longpretrain.data.hashing import hash64
from longpretrain.prepare import sample
from longpretrain.prepare.sample import cut, take_sample


def documents(count: int) -> list[str]:
    return [f"document {number} " + "word " * (number % 7) for number in range(count)]


@settings(derandomize=True, deadline=None)
@given(st.text(alphabet="ab \n\u3000é", max_size=80), st.integers(1, 12))
def test_pieces_are_the_text(text, max_chars):
    pieces = list(cut(text, max_chars))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= max_chars for piece in pieces)


def test_a_piece_begins_with_a_space_and_a_word():
    assert list(cut("one two three four", 10)) == ["one two", " three", " four"]
    assert list(cut("x" * 25, 10)) == ["x" * 10, "x" * 10, "x" * 5]


def test_a_small_text_is_its_own_sample():
    texts = documents(50)
    found = take_sample(iter(texts), 1 << 20, seed=1)
    assert found.pieces == texts
    assert (found.documents, found.bytes) == (50, sum(map(len, texts)))


def test_a_sample_is_drawn_from_everywhere():
    texts = documents(4000)
    found = take_sample(iter(texts), 10_000, seed=1)
    assert 9_900 < found.bytes <= 10_000
    assert found.bytes == sum(len(piece) for piece in found.pieces)
    places = [texts.index(piece) for piece in found.pieces]
    assert places == sorted(places)
    assert found.documents == len(set(places))
    quarters = [sum(place // 1000 == quarter for place in places) for quarter in range(4)]
    assert min(quarters) > 0.15 * len(places)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 300))
def test_it_is_the_smallest_numbers_that_fit(sizes, max_bytes):
    """As sorting all of them would find, whatever comes first."""
    texts = [str(number % 10) * size for number, size in enumerate(sizes)]
    keys = [hash64(sample._SALT, 1, place + 1) for place in range(len(texts))]
    chosen, size = [], 0
    for place in sorted(range(len(texts)), key=keys.__getitem__):
        size += len(texts[place])
        if size > max_bytes:
            break
        chosen.append(place)
    found = take_sample(iter(texts), max_bytes, seed=1)
    assert found.pieces == [texts[place] for place in sorted(chosen)]


def test_it_is_the_same_for_one_seed_and_another_for_another():
    texts = documents(1000)
    first, again, other = (take_sample(iter(texts), 5_000, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.sha256 == again.sha256 != other.sha256
    assert set(first.pieces) != set(other.pieces)


def test_hashes_tell_borders_of_pieces_apart():
    one, two = (take_sample(texts, 1000, 1) for texts in (["ab", "c"], ["a", "bc"]))
    assert one.sha256 != two.sha256


def test_a_long_document_is_sampled_in_pieces(monkeypatch):
    monkeypatch.setattr(sample, "PIECE_CHARS", 100)
    text = " ".join(f"w{number}" for number in range(5000))
    found = take_sample([text], 2_000, seed=3)
    assert found.documents == 1
    assert len(found.pieces) > 15
    assert all(piece in text for piece in found.pieces)


def test_bytes_are_those_of_utf8():
    found = take_sample(["é" * 30, "é" * 30], 100, seed=1)
    assert (len(found.pieces), found.bytes) == (1, 60)


def test_memory_is_that_of_the_sample():
    def texts():
        for number in range(3_000):
            yield f"{number} " + "x" * 10_000

    tracemalloc.start()
    take_sample(texts(), 1 << 20, seed=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 << 20
