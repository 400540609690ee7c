"""Names out of somebody's file, all of them in one readable line."""

from __future__ import annotations

import re
from collections.abc import Iterable

_LONGEST = 160
_MOST = 200
"""Different texts, layers counted once: far above any model, and below what floods a terminal."""
_LAYER = re.compile(r"(?<=\.layer\.)\d+(?=\.)|(?<=\.layers\.)\d+(?=\.)")


def printable(text: str, longest: int = _LONGEST) -> str:
    """Without characters that a terminal obeys, and cut where it is long."""
    text = "".join(c if c.isprintable() else "?" for c in text)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def listed(texts: Iterable[str], separator: str = "; ") -> str:
    """All texts in their order; those that differ in the number of a layer alone stand as one.

    ``a.layer.0.b`` to ``a.layer.11.b`` become ``a.layer.[0-11].b``.
    """
    layers: dict[str, list[int]] = {}
    for text in texts:
        match = _LAYER.search(text)
        # A number of many digits is no layer's, and too long ones do not convert.
        number = match[0] if match and len(match[0]) < 7 else None
        key = text if number is None or match is None else _LAYER.sub("{}", text, count=1)
        layers.setdefault(key, []).extend([] if number is None else [int(number)])
    shown = []
    for text, numbers in list(layers.items())[:_MOST]:
        where = _ranges(numbers)
        where = where if len(numbers) == 1 else f"[{where}]"
        shown.append(printable(text.replace("{}", where, 1) if numbers else text))
    more = len(layers) - _MOST
    return separator.join(shown) + (f"{separator}and {more} more" if more > 0 else "")


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 5 -> "0-2,5"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
