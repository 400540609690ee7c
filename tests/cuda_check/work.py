"""What the window kernels compute, tile by tile, beside what the definition asks for.

The kernels take a tile's rows, a block's or a warp's, against tiles of columns from the first
column that a row of the block sees to the last. Here that is counted by going through the same
tiles; how many rows and columns a tile has is read off the launch and the machine code (model.py).

"Columns" are keys, or queries where the rows are keys: a window is the same from both sides.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiling:
    """How a kernel goes through the window of one head.

    Args:
        block_rows: rows that share what is loaded.
        warp_rows: rows of a warp.
        columns: of a tile.
        alignment: a block's first tile begins at a multiple of this.
        skips_by_warp: a warp leaves out tiles that none of its own rows sees.
    """

    block_rows: int
    warp_rows: int
    columns: int
    alignment: int
    skips_by_warp: bool


@dataclass(frozen=True)
class Counts:
    """Of one head: tiles by warp, those that need no mask among them, and tiles by block."""

    warp_tiles: int
    plain_warp_tiles: int
    block_tiles: int


def useful_pairs(tokens: int, one_sided_window: int) -> int:
    """Pairs of row and column within the window."""
    side = min(one_sided_window, tokens - 1)
    return tokens + 2 * (side * (side - 1) // 2 + side * (tokens - side))


def count_tiles(tokens: int, one_sided_window: int, tiling: Tiling) -> Counts:
    """Goes through the blocks of an undilated head; warps of rows beyond the end take no part."""
    warp_tiles = plain = block_tiles = 0
    for first in range(0, tokens, tiling.block_rows):
        last = min(first + tiling.block_rows, tokens) - 1
        begin = max(first - one_sided_window, 0) // tiling.alignment * tiling.alignment
        end = min(last + one_sided_window, tokens - 1)
        starts = range(begin, end + 1, tiling.columns)
        block_tiles += len(starts)
        for warp in range(first, last + 1, tiling.warp_rows):
            warp_last = min(warp + tiling.warp_rows, tokens) - 1
            for start in starts:
                stop = start + tiling.columns - 1
                sees = start <= warp_last + one_sided_window and stop >= warp - one_sided_window
                if not sees and tiling.skips_by_warp:
                    continue
                warp_tiles += 1
                # All rows see all columns, and all columns are tokens.
                plain += (
                    stop < tokens
                    and start >= warp_last - one_sided_window
                    and stop <= warp + one_sided_window
                )
    return Counts(warp_tiles, plain, block_tiles)
