"""Positions of residue classes at the largest sequence: no block's arithmetic overflows.

A head of dilation 1 beside one of millions has a grid of which most blocks are beyond its own
tiles. Such a grid takes long to run; here single blocks of it are asked, under the sanitizer of
undefined behaviour.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from emulation.programs import HERE, compile_units, kernels, link, run, runtime

MOST = 2**29  # kLargestSequence
UNDEFINED = ("-fsanitize=undefined", "-fno-sanitize-recover=all")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("positions")
    parts = kernels([HERE / "program.cpp", HERE / "positions.cu"], *UNDEFINED)
    objects = [*runtime(tmp_path_factory.getbasetemp()), *compile_units(parts, folder)]
    return link(folder / "program", objects, *UNDEFINED)


@pytest.mark.parametrize("tile_steps", [64, 128])
@pytest.mark.parametrize("dilation", [1, 3, 2**25 + 1, MOST // 2, MOST])
def test_every_block_has_its_tile_or_none(program: Path, dilation: int, tile_steps: int) -> None:
    steps = -(-MOST // dilation)
    last = dilation * -(-steps // tile_steps) - 1  # of the head's own blocks
    largest = 2 * MOST  # of the grid, for the sake of another head
    for block in {0, dilation, last, last + 1, MOST - 1, MOST, largest}:
        result = run(program, "block_of_window", MOST, dilation, block, tile_steps)
        assert result.code == 0, f"block {block}: {result.errors}"
        first_step, end, *positions = np.frombuffer(result.output, np.int32).tolist()
        residue, tile = block % dilation, block // dilation
        assert end == -(-(MOST - residue) // dilation)
        if block > last:
            assert first_step >= end, block
            continue
        assert first_step == tile * tile_steps
        for step, position in zip(
            (first_step, first_step + tile_steps - 1), positions, strict=True
        ):
            if step < end:
                assert position == residue + step * dilation
