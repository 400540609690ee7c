"""Rows of position tables: how a table repeats itself, and which rows of another one it holds.

Letters of the shape suffixes: P rows of a table, C channels. Rows are known by their bytes.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longpretrain.convert.lengthen import MAX_SEED
from longpretrain.convert.position_rows import Init, lengthen_positions

_FEWEST_TRAINED = 8
"""New rows that a training may have changed while later ones stand still; fewer are a damage."""
_NEAR = 0.25
"""Of the distance between two rows: within it one is the other, trained for a while."""
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What rows were found to be."""

    told: str
    """In words."""
    ok: bool
    """Whether that may be."""
    limit: str
    """What would have been right."""


def repeats(rows_PC: Tensor, *, learnt: int) -> Finding:
    """How the rows of tokens in one table repeat.

    Args:
        rows_PC: without those of padding.
        learnt: how many were learnt before the model was lengthened; 0: unknown.
    """
    keys, limit = _keys(rows_PC), "all different, or learnt rows end to end"
    period = _period(keys)
    if learnt and period % learnt and learnt < len(keys):
        told = f"rows {period} apart are equal; config.json has {learnt} learnt"
        return Finding(told=told, ok=False, limit=limit)
    found = _of_period(learnt or period, rows_PC, keys, limit)
    if not found.ok and 0 < learnt < period:
        # More were learnt than config.json has: by a training, before it was lengthened again.
        again = _of_period(period, rows_PC, keys, limit)
        return again if again.ok else found
    return found


def _of_period(period: int, rows_PC: Tensor, keys: Sequence[bytes], limit: str) -> Finding:
    """How rows repeat if so many were learnt; 0: none repeats."""
    if not period or period >= len(keys):
        again = len(keys) - len(set(keys))
        told = f"{len(keys)} different rows" if not again else f"{again} rows stand there twice"
        return Finding(told=told, ok=not again, limit=limit)
    wrong = [i for i in range(period, len(keys)) if keys[i] != keys[i % period]]
    alike = len(set(keys[:period])) < period
    if alike:
        told = f"of {period} learnt rows {period - len(set(keys[:period]))} stand there twice"
        return Finding(told=told, ok=False, limit=limit)
    found = _of_new_rows(wrong, period, keys, keys[:period], limit)
    if not found.ok and (moved := _trained(rows_PC, wrong, period, keys)):
        told = f"{moved} of {period} learnt rows or their copies trained since they were copied"
        return Finding(told=told, ok=True, limit=limit)
    return found


def _trained(rows_PC: Tensor, wrong: Sequence[int], period: int, keys: Sequence[bytes]) -> int:
    """How many learnt rows a training moved, or their copies, while others stand still; 0: no
    training leaves such a table.

    Sequences begin at the first position: shorter ones than the learnt rows train the first of
    these alone, and then no copy is any more what its learnt row is. A young training's moves are
    small, and a narrower type of the weights may undo some.

    Args:
        rows_PC: all rows of tokens.
        wrong: those that are no copy of the row that belongs there.
        period: how many were learnt.
        keys: of all rows of tokens.
    """
    learnt, moved = set(keys[:period]), {i % period for i in wrong}
    if len(moved) < _FEWEST_TRAINED or any(keys[i] in learnt for i in wrong):
        return 0
    apart = (rows_PC[1:period].float() - rows_PC[: period - 1].float()).norm(dim=1).median()
    number = torch.tensor(wrong)
    moves = (rows_PC[number].float() - rows_PC[number - period].float()).norm(dim=1)
    far = number[~(moves <= _NEAR * apart)].tolist()
    # Moved far is the learnt row, and so are all before it: these train as often, or more. The
    # copies of a learnt row are still each other's.
    first = max((i % period for i in far), default=-1) + 1
    return len(moved) if moved >= {*range(first)} and max(far, default=0) < 2 * period else 0


def lengthened(
    old_PC: Tensor,
    new_PC: Tensor,
    *,
    kept: int,
    record: Mapping[str, Any] | None,
    deviation: float,
) -> Finding:
    """Which rows of a source's table a longer (or shorter) model's table holds.

    Args:
        old_PC: the source's whole table.
        new_PC: the other model's, in a dtype as wide or narrower.
        kept: rows of padding, at the beginning of both.
        record: `conversion.json` of the other model; without one the way it was made is found.
        deviation: of rows drawn anew.
    """
    learnt, count = len(old_PC) - kept, len(new_PC) - kept
    made: list[Init] = ["copy", "interpolate"]
    said = record or {}
    inits = [init for init in _TOLD if init == said.get("init")] or made
    limit = " or ".join(_limit(init, learnt, count, kept) for init in inits)
    for init in inits:
        wanted_PC = lengthen_positions(
            old_PC, positions=count, kept=kept, init=init, deviation=deviation,
            seed=_seed(said),
        ).to(new_PC.dtype)  # fmt: skip
        if torch.equal(wanted_PC, new_PC):
            told = _TOLD[init] if count > learnt or init == "interpolate" else _SHORTER
            return Finding(told=told.format(learnt, count, count - learnt), ok=True, limit=limit)
    keys, source = _keys(new_PC), _keys(old_PC.to(new_PC.dtype))
    padding = [i for i in range(kept) if keys[i] != source[i]]
    if padding:
        told = f"row {padding[0]} of padding is not the source's"
        return Finding(told=told, ok=False, limit=limit)
    wrong = [i for i in range(count) if keys[kept + i] != source[kept + i % learnt]]
    if record is not None or not wrong or wrong[0] < learnt:
        told = _misplaced(wrong, keys, source, kept)
        return Finding(told=told, ok=False, limit=limit)
    found = _of_new_rows(wrong, learnt, keys[kept:], source, limit)
    copies_PC = old_PC[[kept + i % learnt for i in wrong]].to(new_PC.dtype)
    moved = (new_PC[[kept + i for i in wrong]] - copies_PC).abs().max()
    return dataclasses.replace(found, told=f"{found.told}; at most {moved:.1e} from copies")


def differing_rows(one_PC: Tensor, two_PC: Tensor) -> str:
    """Which rows of two tables of one shape differ, in words."""
    rows = [i for i, (a, b) in enumerate(zip(_keys(one_PC), _keys(two_PC), strict=True)) if a != b]
    return f"{len(rows)} rows, from {rows[0]} to {rows[-1]}" if rows else "no row"


def _seed(record: Mapping[str, Any]) -> int:
    seed = record.get("seed")
    return seed if isinstance(seed, int) and 0 <= seed <= MAX_SEED else 0


_TOLD: dict[Init, str] = {
    "copy": "{0} learnt rows copied end to end over {1}",
    "random": "{0} learnt rows and {2} drawn anew",
    "interpolate": "{0} learnt rows interpolated to {1}",
}
_SHORTER = "the first {1} of {0} learnt rows"


def _limit(init: Init, learnt: int, count: int, kept: int) -> str:
    told = _TOLD[init] if count > learnt or init == "interpolate" else _SHORTER
    return f"{told.format(learnt, count, count - learnt)}, after the {kept} of padding"


def _of_new_rows(
    wrong: Sequence[int], learnt: int, keys: Sequence[bytes], source: Sequence[bytes], limit: str
) -> Finding:
    """Of a table whose learnt rows are right: new rows are copies, or none of the source's.

    Args:
        wrong: those that are no copy of the row that belongs there, counted from the first token.
        learnt: how many are.
        keys: of all rows of tokens.
        source: of rows that could have been copied.
        limit: what is right.
    """
    count = len(keys)
    if not wrong:
        told = _TOLD["copy"].format(learnt, count)
        return Finding(told=told, ok=True, limit=limit)
    known = set(source)
    strange = [i for i in wrong if keys[i] in known]
    end = learnt + len(wrong)
    in_a_row = wrong[-1] + 1 == end
    if strange or not in_a_row or (end < count and len(wrong) < _FEWEST_TRAINED):
        few = (strange or list(wrong))[:_SHOWN]
        what = "hold another learnt row" if strange else "hold none of the learnt rows"
        told = f"{len(strange) or len(wrong)} of {count} rows {what}: of tokens {_some(few, wrong)}"
        return Finding(told=told, ok=False, limit=limit)
    rest = f", {count - end} copies" if end < count else ""
    told = f"{learnt} learnt rows, {len(wrong)} random ones or trained since{rest}"
    return Finding(told=told, ok=True, limit=limit)


def _misplaced(
    wrong: Sequence[int], keys: Sequence[bytes], source: Sequence[bytes], kept: int
) -> str:
    """Of a table with rows of tokens that are wrong: where they come from instead."""
    learnt = len(source) - kept
    places: dict[bytes, int] = {}
    for number, key in enumerate(source):
        places.setdefault(key, number)
    found = [(i, places[keys[kept + i]]) for i in wrong if keys[kept + i] in places]
    told = f"{len(wrong)} of {len(keys) - kept} rows are wrong"
    if not found:
        return f"{told}: no row of the source at {kept + wrong[0]}" if wrong else told
    first, place = found[0]
    shifts = Counter(place - (kept + i % learnt) for i, place in found)
    shift = shifts.most_common(1)[0][0]
    return (
        f"{told}, shifted by {shift:+d}: row {kept + first} is the source's {place}, "
        f"not {kept + first % learnt}"
    )


def _period(keys: Sequence[bytes]) -> int:
    """How far apart rows are equal, most of them; 0: none are."""
    last: dict[bytes, int] = {}
    apart: Counter[int] = Counter()
    for number, key in enumerate(keys):
        if key in last:
            apart[number - last[key]] += 1
        last[key] = number
    return apart.most_common(1)[0][0] if apart else 0


def _keys(table_PC: Tensor) -> list[bytes]:
    data = table_PC.detach().contiguous().view(torch.uint8).numpy()
    return [row.tobytes() for row in data]


def _some(few: Sequence[int], wrong: Sequence[int]) -> str:
    more = len(wrong) - len(few)
    return ", ".join(map(str, few)) + (f" and {more} more" if more > 0 else "")
