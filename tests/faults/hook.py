"""Makes a rank die, or the system refuse it, just before its n-th change of the disk.

An audit hook sees what Python is about to do to the file system; what it raises, the call raises.
Writes to an open file are not seen, so a full disk in the middle of a file needs a real one.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

HIT = "disk fault"
"""What a rank says when it refuses a step."""
STEPS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link"}


def install(fault: Mapping[str, Any]) -> None:
    """Counts the changes below a folder whose path holds ``within``; acts at number ``at``.

    ``errors`` is how many calls from there on fail, with ``errno``; 0 kills the process instead,
    and -1 makes the call, and each after it, wait for ever.
    """
    seen = 0

    def count(event: str, values: tuple[Any, ...]) -> None:
        nonlocal seen
        if not _changes_the_disk(event, values) or fault["within"] not in _path(values):
            return
        if seen >= fault["at"]:
            if not fault["errors"]:
                os.kill(os.getpid(), signal.SIGKILL)
            while fault["errors"] < 0:
                time.sleep(3600)
            if seen == fault["at"]:
                os.write(2, f"{HIT}: {event} {_path(values)}\n".encode())
            if seen < fault["at"] + fault["errors"]:
                seen += 1
                raise OSError(fault["errno"], os.strerror(fault["errno"]), _path(values))
        seen += 1

    sys.addaudithook(count)


def _changes_the_disk(event: str, values: tuple[Any, ...]) -> bool:
    if event == "open":
        return bool((values[2] or 0) & (os.O_CREAT | os.O_TRUNC))
    return event in STEPS


def _path(values: tuple[Any, ...]) -> str:
    path = values[0]
    return os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
