"""Makes a rank die, or the system refuse it, just before its n-th change of the disk; or strikes it
at a call.

An audit hook sees what Python is about to do to the file system; what it raises, the call raises.
Writes to an open file are not seen, so a full disk in the middle of a file needs a real one.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longpretrain.engine import saver

HIT = "disk fault"
"""What a rank says when it refuses a step."""
_SAVE = re.compile(r"/(\.step-\d+\.[0-9a-f]{8}\.part)")
"""What a save is called until it is whole."""
STEPS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.link"}


def install_any(fault: Mapping[str, Any]) -> None:
    """Whichever of these is meant."""
    if "call" in fault:
        install_at_a_call(fault)
    elif "plan" in fault:
        install_in_saves(fault)
    else:
        install(fault)


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


def install_in_saves(fault: Mapping[str, Any]) -> None:
    """The same, counted anew in each save of this process.

    ``plan`` says, by the number of a save, before which step of it to act; save 0 is what comes
    before the first, and None ends the process there, unharmed so far. ``checkpoints`` is the
    folder; ``errors`` is how many calls fail, one after the other, in turn as ``errnos`` say, or 0.
    """
    saver._PAUSE_S = 0.2  # a run that ends gives the disk seconds between its attempts
    plan = {int(save): at for save, at in fault["plan"].items()}
    folder = Path(fault["checkpoints"])
    known = {path.name for path in folder.glob(".*")}  # that killed saves left
    save = seen = refused = 0

    def count(event: str, values: tuple[Any, ...]) -> None:
        nonlocal save, seen, refused
        if not _changes_the_disk(event, values):
            return
        path = _path(values)
        if f"{folder}/" not in path:
            return
        part = _SAVE.search(path)
        if part and part[1] not in known:
            known.add(part[1])
            save, seen = save + 1, 0
        if save in plan and plan[save] is None:
            os.kill(os.getpid(), signal.SIGKILL)
        if plan.get(save) == seen:
            os.write(2, f"{HIT}: save {save}, step {seen}: {event} {path}\n".encode())
            if not fault["errors"]:
                os.kill(os.getpid(), signal.SIGKILL)
            refused = fault["errors"]
        seen += 1
        if refused:
            refused -= 1
            number = fault["errnos"][(plan.get(save) or 0) % len(fault["errnos"])]
            raise OSError(number, os.strerror(number), path)

    sys.addaudithook(count)


def install_at_a_call(fault: Mapping[str, Any]) -> None:
    """Sends this process a signal just before or after it calls a function.

    ``call`` names it as in "longpretrain.training:agree_to_start", in the module that calls it;
    ``number`` is the signal, and ``when`` is "before" or "after". The signal waits for a file
    ``flag`` to be there; with number 0 the file is made instead.
    """
    module, _, path = fault["call"].partition(":")
    *outer, name = path.split(".")
    holder = functools.reduce(getattr, outer, importlib.import_module(module))
    function, flag = getattr(holder, name), Path(fault["flag"])

    def strike() -> None:
        if not fault["number"]:
            flag.touch()
            return
        while not flag.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), fault["number"])

    @functools.wraps(function)
    def struck(*values: Any, **more: Any) -> Any:
        if fault["when"] == "before":
            strike()
        result = function(*values, **more)
        strike()
        return result

    setattr(holder, name, struck)


def _changes_the_disk(event: str, values: tuple[Any, ...]) -> bool:
    if event == "open":
        return bool((values[2] or 0) & (os.O_CREAT | os.O_TRUNC))
    return event in STEPS


def _path(values: tuple[Any, ...]) -> str:
    path = values[0]
    return os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
