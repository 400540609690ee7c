"""Packing: first-fit decreasing as the textbook has it, whole buffers, nothing lost."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from longpretrain.data import packing


def one_by_one(sizes: list[int], capacity: int) -> list[int]:
    """First-fit decreasing, a piece at a time."""
    free: list[int] = []
    found = [0] * len(sizes)
    for piece in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fits = [block for block, room in enumerate(free) if room >= sizes[piece]]
        if not fits:
            fits = [len(free)]
            free.append(capacity)
        found[piece] = fits[0]
        free[fits[0]] -= sizes[piece]
    return found


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int]:
    capacity = draw(st.integers(1, 60))
    return draw(st.lists(st.integers(1, capacity), min_size=1, max_size=70)), capacity


@settings(max_examples=300)
@given(problem=problems())
def test_it_is_first_fit_decreasing(problem: tuple[list[int], int]) -> None:
    sizes, capacity = problem
    found = packing.first_fit_decreasing(np.array(sizes), capacity)
    assert found.tolist() == one_by_one(sizes, capacity)


def test_thousands_of_few_sizes_too() -> None:
    """Many equal pieces share many open blocks."""
    sizes = np.random.default_rng(2).integers(1, 8, 3000)
    assert packing.first_fit_decreasing(sizes, 25).tolist() == one_by_one(sizes.tolist(), 25)


@settings(max_examples=100)
@given(problem=problems())
def test_a_pack_is_its_blocks_in_order(problem: tuple[list[int], int]) -> None:
    sizes, capacity = problem
    order, counts = packing.pack(np.array(sizes), capacity)
    assert sorted(order.tolist()) == list(range(len(sizes)))
    blocks = np.split(order, np.cumsum(counts)[:-1])
    assert len(blocks) == len(counts) == max(one_by_one(sizes, capacity)) + 1
    for block in blocks:
        assert len(block)
        assert block.tolist() == sorted(block.tolist())
        assert sum(sizes[piece] for piece in block) <= capacity


@settings(max_examples=100)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    chunk=st.integers(1, 15),
)
def test_documents_are_cut_into_whole_pieces_and_a_rest(lengths: list[int], chunk: int) -> None:
    starts = np.cumsum([0, *lengths[:-1]]) + 5
    pieces, sizes = packing.cut(starts, np.array(lengths), chunk)
    right = [
        (int(start) + at, min(chunk, length - at))
        for start, length in zip(starts, lengths, strict=True)
        for at in range(0, length, chunk)
    ]
    assert list(zip(pieces.tolist(), sizes.tolist(), strict=True)) == right


def test_buffers_are_full_but_the_last(monkeypatch) -> None:
    monkeypatch.setattr(packing, "BUFFER_PIECES", 4)

    def part(first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return np.arange(first, first + count), np.arange(first, first + count) + 100

    parts = [part(0, 3), part(3, 0), part(3, 6), part(9, 1), part(10, 8)]
    found = list(packing.buffers(parts))
    assert [len(starts) for starts, _ in found] == [4, 4, 4, 4, 2]
    assert np.concatenate([starts for starts, _ in found]).tolist() == list(range(18))
    assert all((lengths == starts + 100).all() for starts, lengths in found)
    assert [len(starts) for starts, _ in packing.buffers([part(0, 8)])] == [4, 4]


def test_the_waste_of_a_buffer_is_small() -> None:
    """Lengths as even as can be are the hard case: 98 % at 4,096 from some thousand pieces on."""
    sizes = np.random.default_rng(1).integers(3, 4097, 4000)
    blocks = int(packing.first_fit_decreasing(sizes, 4096).max()) + 1
    assert sizes.sum() / (blocks * 4096) > 0.98


def test_the_size_of_buffers_is_part_of_the_format() -> None:
    """docs/data_format.md: another one would change what block 17 of a packed run is."""
    assert packing.BUFFER_PIECES == 65_536
