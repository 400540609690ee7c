"""A position table of another length."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Init = Literal["copy", "random", "interpolate"]
"""How the new rows are made: see ``lengthen.convert``."""


def lengthen_positions(
    table_PC: Tensor, *, positions: int, kept: int, init: Init, deviation: float, seed: int
) -> Tensor:
    """A position table with ``kept + positions`` rows.

    Args:
        table_PC: the learnt table; P rows of C channels, the first ``kept`` of them for padding.
        positions: rows for tokens in the new table.
        kept: rows that stay as they are.
        init: as in ``convert``.
        deviation: standard deviation of random rows.
        seed: of random rows.
    """
    padding_PC, learnt_PC = table_PC[:kept], table_PC[kept:]
    number = torch.arange(positions)
    if init == "interpolate":
        last = len(learnt_PC) - 1
        place = number.double() * last / max(positions - 1, 1)
        below = place.long()
        # Rounded once: half types are too coarse for the shares.
        work_PC = learnt_PC.to(torch.promote_types(learnt_PC.dtype, torch.float32))
        share = (place - below)[:, None].to(work_PC.dtype)
        low_PC, high_PC = work_PC[below], work_PC[(below + 1).clamp(max=last)]
        # Where the place is a whole number this is the row itself, bit for bit.
        rows_PC = (low_PC + share * (high_PC - low_PC)).to(learnt_PC.dtype)
    else:
        rows_PC = learnt_PC[number % len(learnt_PC)]
    if init == "random" and positions > len(learnt_PC):
        generator = torch.Generator().manual_seed(seed)
        count = positions - len(learnt_PC)
        drawn_PC = torch.randn(count, table_PC.shape[1], generator=generator)
        rows_PC[len(learnt_PC) :] = (drawn_PC * deviation).to(table_PC.dtype)
    return torch.cat([padding_PC, rows_PC])


def position_origin(old: int, known: int, new: int, kept: int, init: Init) -> str:
    """A sentence on where the rows came from.

    Args:
        old: the source's rows for tokens.
        known: how many of them were learnt; the others were lengthened before.
        new: rows for tokens in the new table.
        kept: rows of padding before them.
        init: as in ``convert``.
    """
    these = f"{old} learnt rows" if known == old else f"{old} rows ({known} of them learnt)"
    if new <= old and init != "interpolate":
        how = f"the first {new} of {these}"
    else:
        how = {
            "copy": f"{these} copied end to end over {new}",
            "random": f"{these} and {new - old} random ones",
            "interpolate": f"{these} interpolated to {new}",
        }[init]
    rows = f"rows 0 to {kept - 1}" if kept > 1 else "row 0"
    return f"position embeddings: {how}; {rows} kept"
