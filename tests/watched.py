"""Finds the ranks of a run, by the sentinels beside them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def sentinels() -> Iterator[tuple[int, dict[str, Any]]]:
    """All of this machine: the number of each process, and the facts it was started with."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            words = (folder / "cmdline").read_text(encoding="utf-8").split("\0")
            if "longpretrain.engine.sentinel" in words[4]:
                yield int(folder.name), json.loads(words[5])


def ranks_of(run_dir: Path) -> dict[int, int]:
    """rank -> process of a run whose command names its folder."""
    found = {}
    for _, facts in sentinels():
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{facts['pid']}/cmdline").read_text(encoding="utf-8")
            if f"run.dir={run_dir}" in command.split("\0"):
                found[int(facts["rank"])] = int(facts["pid"])
    return found


def until(is_so: Callable[[], bool], what: str, *, timeout_s: float = 120.0) -> None:
    """Asks again and again."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
