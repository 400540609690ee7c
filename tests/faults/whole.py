"""What is on the disk: which checkpoints are whole, and whether two runs are the same, read by
nothing of the package but safetensors and JSON.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from exactness.runs import differences
from safetensors.torch import load_file

COUNTS = ("step", "samples_done", "skipped", "updates_applied")


def step_folders(run_dir: Path) -> list[Path]:
    """Checkpoints of a run by step, whole or not."""
    found = (run_dir / "checkpoints").glob("step-*")
    return sorted((p for p in found if p.is_dir()), key=lambda p: int(p.name.split("-")[1]))


def half_written(run_dir: Path) -> list[Path]:
    """What a save in progress has, or one that was killed has left."""
    try:
        return [p for p in (run_dir / "checkpoints").iterdir() if p.name.endswith(".part")]
    except OSError:
        return []


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint holds every byte that its state.json says it had."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        files = state["files"]
        kinds = {name.split(".")[0].split("-")[0] for name in files}
        return {"model", "optimizer"} <= kinds and all(
            hashlib.sha256((folder / name).read_bytes()).hexdigest() == wanted
            for name, wanted in files.items()
        )
    except (OSError, ValueError, KeyError):
        return False


def newest_whole(run_dir: Path) -> int:
    """The step of the newest whole checkpoint; 0 if there is none."""
    steps = [int(p.name.split("-")[1]) for p in step_folders(run_dir) if is_whole(p)]
    return max(steps, default=0)


def pointed_at(run_dir: Path) -> int:
    """The step that ``latest`` names; 0 if there is none."""
    try:
        text = (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8")
    except OSError:
        return 0
    return int(text.strip().removeprefix("step-"))


def state_of(run_dir: Path) -> dict[str, Any]:
    """state.json of the newest checkpoint."""
    return dict(json.loads((step_folders(run_dir)[-1] / "state.json").read_bytes()))


def status_of(run_dir: Path) -> dict[str, Any]:
    """status.json, or nothing."""
    path = run_dir / "status.json"
    return dict(json.loads(path.read_bytes())) if path.is_file() else {}


def train_lines(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of updates in metrics.jsonl, as far as they are whole."""
    try:
        rows = (run_dir / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except OSError:
        return []
    return [line for row in rows if (line := json.loads(row))["kind"] == "train"]


def not_the_same(run_dir: Path, reference: Path) -> list[str]:
    """How a run that suffered differs from one that did not: nothing may."""
    found = differences(run_dir, reference)
    mine, theirs = state_of(run_dir), state_of(reference)
    found += [f"{key} {mine[key]}" for key in COUNTS if mine[key] != theirs[key]]
    lines = train_lines(run_dir)
    if [line["step"] for line in lines] != list(range(1, len(lines) + 1)):
        found.append("an update is missing or twice in metrics.jsonl")
    return found


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found
