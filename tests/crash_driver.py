"""Kills a preparation at each of its steps on the disk, one after another, and goes on from there.

``crash_driver.py INPUTS PLACE``: prepares INPUTS once without a kill, then, for each step, in a
process that kills itself before it and in one that goes on. Prints how many steps there were; fails
if any corpus differs. Processes are forked, so each takes a fraction of a second.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from longpretrain.data import load_tokenizer
from longpretrain.prepare import prepare

STEPS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "fcntl.flock"}
OPTIONS = {
    "unit_bytes": 3000, "shard_bytes": 1000, "valid": "0.3", "filters": ["deduplicate"],
    "on_error": "skip",
}  # fmt: skip


def is_step(event: str, values: tuple[Any, ...]) -> bool:
    """Whether it changes the disk: a kill between two such steps is as one before the second."""
    if event == "open":
        return bool((values[2] or 0) & (os.O_CREAT | os.O_TRUNC))
    return event in STEPS


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def run(inputs: Path, out: Path, *, die_at: int = -1) -> bool:
    """Prepares in a process of its own, which dies before its step number die_at; True: it did."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, values: tuple[object, ...]) -> None:
            nonlocal seen
            if is_step(event, values):
                if seen == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(count)
        prepare([inputs], out, **OPTIONS)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def main(inputs: Path, place: Path) -> None:
    load_tokenizer()
    run(inputs, place / "whole" / "corpus")
    wanted = contents(place / "whole" / "corpus")
    step = 0
    while True:
        out = place / f"{step}" / "corpus"
        if not run(inputs, out, die_at=step):
            break
        kept = len(list(out.parent.glob(".corpus.preparing/parts/[!.]*")))
        assert not run(inputs, out)
        assert contents(out) == wanted, f"after a kill before step {step}"
        left = sorted(path.name for path in out.parent.iterdir())
        assert left == ["corpus"], f"after a kill before step {step}: {left}"
        shutil.rmtree(out.parent)
        print(step, kept)
        step += 1
    print("steps", step)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
