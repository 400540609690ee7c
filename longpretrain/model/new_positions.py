"""A position table of which only the rows of new positions train.

Letters of the shape suffixes: B batch, N tokens, P rows, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEARNT, NEW = "weight", "new_rows"
"""Names of the two parts: parameters of ``LearntAndNewPositions``."""


class LearntAndNewPositions(nn.Module):
    """Rows that stand still and, after them, rows that train: two parameters, looked up as one.

    So the optimizer sees the new rows alone: a gradient that is set to zero would not keep weight
    decay and moments from the others. A state dict has one whole table, under the name that an
    ``nn.Embedding`` in its place has.

    Args:
        table_PC: the whole table.
        first_new: the first row that trains.
    """

    def __init__(self, table_PC: Tensor, first_new: int) -> None:
        super().__init__()
        assert 0 < first_new < len(table_PC), f"row {first_new} of {len(table_PC)}"
        self.first_new = first_new
        # Copies: a view would keep, and hand on, the memory of both parts.
        learnt_PC, new_PC = (part.detach().clone() for part in table_PC.tensor_split([first_new]))
        self.weight = nn.Parameter(learnt_PC, requires_grad=False)
        self.new_rows = nn.Parameter(new_PC)
        self.register_state_dict_post_hook(_join)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_part)  # type: ignore[no-untyped-call]

    def forward(self, position_BN: Tensor) -> Tensor:
        """Rows BNC; whatever the positions, the new rows have a gradient, if of zeros.

        So ranks agree on which parameters have one, and a recomputed layer has an input that asks
        for one.
        """
        first = self.first_new
        learnt_BNC = F.embedding(position_BN.clamp(max=first - 1), self.weight)
        new_BNC = F.embedding((position_BN - first).clamp(min=0), self.new_rows)
        return torch.where((position_BN >= first)[..., None], new_BNC, learnt_BNC)


def _join(
    module: LearntAndNewPositions, state: dict[str, Tensor], prefix: str, *unused: object
) -> None:
    """Of a state dict that is handed out: two parts to one table."""
    parts = [state[prefix + LEARNT], state.pop(prefix + NEW)]
    state[prefix + LEARNT] = torch.cat(parts).detach()


def _part(
    module: LearntAndNewPositions, state: dict[str, Tensor], prefix: str, *unused: object
) -> None:
    """Of a state dict that is read in: one table to two parts. Another shape torch refuses."""
    table_PC = state.get(prefix + LEARNT)
    if table_PC is not None and len(table_PC) > module.first_new:
        first = module.first_new
        state[prefix + LEARNT], state[prefix + NEW] = table_PC[:first], table_PC[first:]
