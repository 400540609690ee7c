"""What the files of a run are called, and what the small ones say: known without torch, whose
import takes seconds that a job of Slurm may not have left.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from longpretrain.files import read_json_object

CONFIG = "config.yaml"
STATUS = "status.json"
ATTEMPTS = "attempts.json"
LOCK = ".lock"
LATEST = "latest"


def read_status(run_dir: Path) -> dict[str, Any]:
    """The last status.json of a run; empty if there is none."""
    path = run_dir / STATUS
    return read_json_object(path, way_out="Remove the file.") if path.is_file() else {}


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
