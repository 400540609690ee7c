"""How a verb tells a user what is wrong: one line on stderr, what, got, wanted, way out; code 2."""

from __future__ import annotations

import re
from pathlib import Path

from longpretrain.cli import main

FORM = re.compile(
    r"longpretrain( \w+)?( \(rank \d+\))?: (?P<what>.+?): got .+?; wanted .+\. .+[.?]"
)


def check_form(stderr: str, verb: str) -> str:
    """The one line that a verb printed; fails if there is another, or if it has another form."""
    lines = stderr.strip().splitlines()
    assert len(lines) == 1, stderr
    assert lines[0].startswith((f"longpretrain {verb}: ", "longpretrain: VERB: ")), lines[0]
    assert FORM.fullmatch(lines[0]), lines[0]
    return lines[0]


def exit_code(*words: object) -> int:
    """Of a verb; argparse leaves by an exception."""
    try:
        return main([str(word) for word in words])
    except SystemExit as left:
        assert isinstance(left.code, int)
        return left.code


def disk(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder: names and contents."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
