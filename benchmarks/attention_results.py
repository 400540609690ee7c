"""What a run of the benchmark found, as plain data, and the questions that are asked of it.

Tables, targets and plots read the same JSON that is written: ``--redraw`` makes them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from attention_ours import HEAD_SIZE
from attention_peers import NET_OF

from longpretrain.attention import AttentionPattern

OPERATIONS = (
    "Useful operations: 2 * D for each reached pair and product. Forward has two products (scores, "
    "values). Backward is counted with five, as FlashAttention's papers do: one of them computes "
    "the scores again, as the forward keeps none; the share of peak without it (four, six in "
    "forward+backward) stands beside."
)

Row = dict[str, Any]
Where = Mapping[str, int]


@dataclass(frozen=True)
class Results:
    """The content of a results file."""

    data: dict[str, Any]

    def row(
        self,
        section: str,
        case: str,
        dtype: str,
        call: str,
        where: Where | None = None,
        *,
        condition: str = "default",
    ) -> Row | None:
        """The row of a time; ``where`` overrides tokens, heads or window of the headline."""
        shape = {**self._headline_shape(), **(where or {})}
        wanted = {"section": section, "case": case, "dtype": dtype, "call": call, **shape}
        wanted["condition"] = condition
        return _first(self.data["timings"], wanted)

    def time_ms(
        self,
        section: str,
        case: str,
        dtype: str,
        call: str,
        where: Where | None = None,
        *,
        net: bool = True,
        condition: str = "default",
    ) -> float | None:
        """A median; of a module, unless ``net`` is False, less its projections."""
        row = self.row(section, case, dtype, call, where, condition=condition)
        if row is None:
            return None
        rest = 0.0
        if net and case in NET_OF:
            projections = self.row(section, NET_OF[case], dtype, call, where, condition=condition)
            if projections is None:
                return None
            rest = projections["median_ms"]
        return float(row["median_ms"]) - rest

    def ratio(
        self, section: str, case: str, dtype: str, call: str, *, condition: str = "default"
    ) -> float | None:
        """The time of a case as a multiple of the time of ours, at the headline's shape."""
        time_ms = self.time_ms(section, case, dtype, call, condition=condition)
        ours_ms = self.time_ms(section, "ours", dtype, call, condition=condition)
        return None if time_ms is None or not ours_ms else time_ms / ours_ms

    def memory(self, case: str, dtype: str, tokens: int) -> Row | None:
        """The row of a memory measurement."""
        where = {**self._headline_shape(), "tokens": tokens}
        return _first(self.data["memory"], {"case": case, "dtype": dtype, **where})

    def peak_share(
        self,
        section: str,
        dtype: str,
        call: str,
        *,
        condition: str = "default",
        recomputed: bool = True,
    ) -> float | None:
        """Useful operations of ours at the headline shape, as a share of the processor's peak."""
        peak = self.data["peak"].get(f"{section} {condition} {dtype}")
        time_ms = self.time_ms(section, "ours", dtype, call, condition=condition)
        if peak is None or time_ms is None:
            return None
        tokens, heads, attention_window = self._headline_shape().values()
        operations = useful_operations(
            tokens=tokens, heads=heads, attention_window=attention_window, call=call,
            recomputed=recomputed,
        )  # fmt: skip
        return float(operations / (time_ms * 1e-3) / (peak * 1e9))

    def _headline_shape(self) -> dict[str, int]:
        shape = self.data["headline_shape"]
        return {name: shape[name] for name in ("tokens", "heads", "attention_window")}


def useful_operations(
    *,
    tokens: int,
    heads: int,
    attention_window: int,
    call: str,
    positions: tuple[int, ...] = (0,),
    recomputed: bool = True,
) -> int:
    """Multiplications and additions for the pairs that are reached, none for padding.

    Forward multiplies each reached pair of query and key twice (scores, values), 2 * D operations
    each. Backward does it four times by the definition, and a fifth time if ``recomputed``, for
    the scores that the forward did not keep: FlashAttention's papers count so, and with five our
    numbers can be held beside theirs. A local query reaches its window and the global keys outside
    of it; a global query reaches all keys, and its ordinary row is not wanted.
    """
    pattern = AttentionPattern(attention_window // 2)
    pairs = pattern.num_pairs(tokens, 1)
    query = np.arange(tokens)
    is_local = ~np.isin(query, positions)
    for position in positions:
        in_window = pattern.reaches(query, position, 1)
        pairs += int((~in_window & is_local).sum())  # the global key's column
        pairs += tokens - int(in_window.sum())  # its query's row, instead of the ordinary one
    products = {"forward": 2, "forward+backward": 7 if recomputed else 6}[call]
    return products * 2 * HEAD_SIZE * pairs * heads


def _first(rows: list[Row], wanted: dict[str, Any]) -> Row | None:
    for row in rows:
        if all(row.get(key) == value for key, value in wanted.items()):
            return row
    return None
