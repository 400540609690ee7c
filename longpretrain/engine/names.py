"""What the files of a run are called, and what the small ones say: known without torch, whose
import takes seconds that a job of Slurm may not have left.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
from pathlib import Path
from typing import Any, Literal

from longpretrain.files import read_json_object, write_atomically

CONFIG = "config.yaml"
STATUS = "status.json"
ATTEMPTS = "attempts.json"
LOCK = ".lock"
LATEST = "latest"
State = Literal["running", "done", "preempted", "failed"]
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
"""What the system says of a full disk, and of a full share of one."""


def read_status(run_dir: Path) -> dict[str, Any]:
    """The last status.json of a run; empty if there is none."""
    path = run_dir / STATUS
    return read_json_object(path, way_out="Remove the file.") if path.is_file() else {}


def write_status(run_dir: Path, state: State, *, reason: str, step: int) -> None:
    """Says how the run stands. Scripts decide by this file: launchers mangle exit codes."""
    status = {"state": state, "reason": reason, "step": step, "time": round(time.time(), 3)}
    text = json.dumps(status, indent=1) + "\n"
    try:
        write_atomically(run_dir / STATUS, text)
    except OSError as error:
        if error.errno not in NO_ROOM or not _overwrite(run_dir / STATUS, text.encode()):
            raise


def _overwrite(path: Path, data: bytes) -> bool:
    """Writes over a file in place: a full disk has no room for a second one beside it."""
    try:
        with path.open("r+b") as file:
            file.write(data)
            file.truncate()
            os.fsync(file.fileno())
    except OSError:
        return False
    return True


def step_of(folder: Path) -> int | None:
    """The step that a folder of a run is named after; None for any other name."""
    found = re.fullmatch(r"step-([0-9]{1,18})", folder.name)
    return int(found[1]) if found else None


def pointed_at(run_dir: Path) -> str:
    """What ``checkpoints/latest`` says; nothing if it is no file of text."""
    try:
        text = (run_dir / "checkpoints" / LATEST).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.strip()
