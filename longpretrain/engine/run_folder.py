"""The run folder: which run it belongs to, how the run stands, and moving it aside for a fresh
one.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, Literal

import yaml

from longpretrain.config import Config, differences, to_tree
from longpretrain.errors import InputError
from longpretrain.files import write_atomically
from longpretrain.recipe import from_tree

CONFIG = "config.yaml"
STATUS = "status.json"
State = Literal["running", "done", "preempted", "failed"]


def read_status(run_dir: Path) -> dict[str, Any]:
    """The last status.json of a run; empty if there is none."""
    path = run_dir / STATUS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def write_status(run_dir: Path, state: State, *, reason: str, step: int) -> None:
    """Says how the run stands. Scripts decide by this file: launchers mangle exit codes."""
    status = {"state": state, "reason": reason, "step": step, "time": round(time.time(), 3)}
    write_atomically(run_dir / STATUS, json.dumps(status, indent=1) + "\n")


def check_same_recipe(config: Config) -> None:
    """Refuses a run folder that belongs to another recipe.

    Raises:
        InputError: names the keys that differ.
    """
    path = config.run_dir / CONFIG
    if not path.is_file():
        return
    stored = from_tree(yaml.safe_load(path.read_text(encoding="utf-8")))
    found = differences(stored, config)
    if found:
        listed = "; ".join(f"{key} was {old!r} and is now {new!r}" for key, old, new in found[:5])
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise InputError(
            f"run folder {config.run_dir}",
            got=f"a run of another recipe ({listed}{more})",
            wanted="the recipe it was started with",
            way_out="Give another run.dir, or --fresh to move the old run aside and start anew.",
        )


def open_run(config: Config, *, fresh: bool) -> Path | None:
    """Makes or checks the run folder, on rank 0; returns where an old run was moved to, if it was.

    With ``fresh`` an old run is renamed, not deleted: it may be weeks of work.
    """
    run_dir = config.run_dir
    moved = None
    if fresh and run_dir.exists():
        moved = _free_name(run_dir)
        run_dir.rename(moved)
    check_same_recipe(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(to_tree(config), sort_keys=False)
    write_atomically(run_dir / CONFIG, text)
    return moved


def _free_name(run_dir: Path) -> Path:
    number = 1
    while (name := run_dir.with_name(f"{run_dir.name}.old-{number}")).exists():
        number += 1
    return name
