"""Pieces of documents put together into blocks: first-fit decreasing inside a bounded buffer.

Each piece goes, largest first, into the first block that has room for it. The waste of that rule
vanishes as the buffer grows (Johnson 1973 bounds it at 11/9 of the optimum for any sizes; with
thousands of pieces of real text it is far below a percent). Pieces of one size are placed together
with a few array operations, so that a buffer costs its number of different sizes, not of pieces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

BUFFER_PIECES = 1 << 16
"""Pieces that are packed together. Part of the format of cached indexes: changing it changes every
packed corpus (docs/data_format.md)."""


def first_fit_decreasing(sizes: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The block, from 0, of each piece; no block holds more than ``capacity``.

    Args:
        sizes: of the pieces, each 1 to capacity. Among equal ones the earlier goes first.
        capacity: of a block.
    """
    assert len(sizes), "at least one piece"
    assert 1 <= int(sizes.min()) <= int(sizes.max()) <= capacity
    order = np.argsort(-sizes, kind="stable")
    different, counts = np.unique(sizes, return_counts=True)
    free = np.full(len(sizes), capacity, np.int64)  # of blocks that are in use; the rest is ahead
    used = placed = 0
    blocks = np.empty(len(sizes), np.int64)
    for size, count in zip(different[::-1].tolist(), counts[::-1].tolist(), strict=True):
        # Equal pieces fill the first block that has room, then the next one: so that many each.
        open_blocks = np.flatnonzero(free[:used] >= size)[:count]
        fits = free[open_blocks] // size
        new = max(0, -(-(count - int(fits.sum())) // (capacity // size)))
        open_blocks = np.concatenate([open_blocks, np.arange(used, used + new)])
        fits = np.concatenate([fits, np.full(new, capacity // size)])
        used += new
        before = np.cumsum(fits) - fits
        taken = np.clip(count - before, 0, fits)
        free[open_blocks] -= taken * size
        blocks[order[placed : placed + count]] = np.repeat(open_blocks, taken)
        placed += count
    return blocks


def pack(sizes: NDArray[np.int64], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pieces of one buffer in the order of their blocks.

    Returns:
        Numbers of the pieces, block after block and ascending inside one; and how many each block
        has.
    """
    blocks = first_fit_decreasing(sizes, capacity)
    return np.argsort(blocks, kind="stable"), np.bincount(blocks)


def cut(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], chunk: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Documents -> pieces of ``chunk`` tokens, a shorter last one each: starts and lengths."""
    counts = -(-lengths // chunk)
    ends = np.cumsum(counts)
    before = (np.arange(ends[-1]) - np.repeat(ends - counts, counts)) * chunk
    pieces = np.minimum(np.repeat(lengths, counts) - before, chunk)
    return np.repeat(starts, counts) + before, pieces


def buffers(
    parts: Iterable[tuple[NDArray[np.int64], NDArray[np.int64]]],
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """The same starts and lengths, ``BUFFER_PIECES`` at a time and a last, smaller rest."""
    starts, lengths = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for more_starts, more_lengths in parts:
        starts, lengths = np.append(starts, more_starts), np.append(lengths, more_lengths)
        whole = len(starts) - len(starts) % BUFFER_PIECES
        for low in range(0, whole, BUFFER_PIECES):
            yield starts[low : low + BUFFER_PIECES], lengths[low : low + BUFFER_PIECES]
        starts, lengths = starts[whole:], lengths[whole:]
    if len(starts):
        yield starts, lengths
