"""What somebody's file says, as text that a terminal and a card may show."""

from __future__ import annotations

from pathlib import Path

from longpretrain.model.listing import printable

_LONGEST = 100


def shown(value: object, longest: int = _LONGEST) -> str:
    """A name or an option out of a file on one short line, with no character that a terminal obeys.

    Args:
        value: text or a number; of anything that holds more, its kind alone is told.
        longest: characters at most.
    """
    if isinstance(value, dict | list | tuple):
        return f"a {type(value).__name__}"
    if value is not None and not isinstance(value, str | bool | int | float | Path):
        return "an object that does not read"
    return printable(str(value), longest)
