"""What two runs left, compared: one that never stopped and one that went on from its middle."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

NEAR = 2e-2
"""Nats that the loss may differ where other ranks do the sums in another order."""


def facts(run_dir: Path) -> dict[str, Any]:
    """What the table shows of an uninterrupted run."""
    lines = [line for line in metrics(run_dir) if line["kind"] == "train"]
    started = next(line for line in metrics(run_dir) if "device" in line)
    return {
        "device": started["device"],
        "world_size": started["world_size"],
        "steps": lines[-1]["step"],
        "skipped": lines[-1]["skipped"],
        "first_loss": lines[0]["loss"],
        "last_loss": lines[-1]["loss"],
        "loss_scales": [line["loss_scale"] for line in lines if "loss_scale" in line],
        "step_s": statistics.median(line["step_s"] for line in lines[1:] or lines),
    }


def wrong(row: dict[str, Any], steps: int, resumed: Path) -> list[str]:
    """What must hold of any case."""
    starts = [
        line for line in metrics(resumed) if str(line.get("event", "")).startswith("resumed: ")
    ]
    checks = {
        f"it ended at update {row['steps']}": row["steps"] == steps,
        "the loss is not finite": math.isfinite(row["last_loss"]),
        f"the loss did not fall: {row['first_loss']:.3f} to {row['last_loss']:.3f}": (
            row["last_loss"] < row["first_loss"]
        ),
        f"{row['skipped']} of {row['steps']} updates were skipped": row["skipped"] <= steps // 2,
        "the copy did not go on from the middle": [0 < s["step"] < steps for s in starts] == [True],
    }
    return [what for what, holds in checks.items() if not holds]


def differences(whole: Path, resumed: Path) -> list[str]:
    """Between the ends of two runs that should be one: tensors, losses, loss scales."""
    import torch

    from longpretrain.report.metrics import deterministic

    first, second = tensors(whole), tensors(resumed)
    if first.keys() != second.keys():
        return ["the checkpoints hold other tensors"]
    other = [name for name in first if not torch.equal(first[name], second[name])]
    found = [f"{len(other)} of {len(first)} tensors differ, such as {other[0]}"] if other else []
    if deterministic(metrics(whole)) != deterministic(metrics(resumed)):
        found.append("the metrics differ")
    scales = [state(run).get("loss_scaling", {}) for run in (whole, resumed)]
    if scales[0] != scales[1]:
        found.append("the states of the loss scale differ")
    if facts(whole)["loss_scales"] and not scales[0]:
        found.append("the checkpoint holds no loss scale")
    return found


def near(whole: Path, resumed: Path) -> list[str]:
    """Where the ranks are others: the same samples, nearly the same losses."""
    pairs = list(zip(*(_trained(run) for run in (whole, resumed)), strict=True))
    worst = max(abs(a["loss"] - b["loss"]) for a, b in pairs)
    found = [] if worst <= NEAR else [f"the losses differ by up to {worst:.2g} nats"]
    if any(a["sample_ids"] != b["sample_ids"] for a, b in pairs):
        found.append("other samples, or in another order")
    return found


def _trained(run_dir: Path) -> list[dict[str, Any]]:
    return [line for line in metrics(run_dir) if line["kind"] == "train"]


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Lines of a run's journal."""
    from longpretrain.report.metrics import read_metrics

    return read_metrics(run_dir / "metrics.jsonl")


def state(run_dir: Path) -> dict[str, Any]:
    """Of its last checkpoint."""
    found: dict[str, Any] = json.loads((last(run_dir) / "state.json").read_text(encoding="utf-8"))
    return found


def tensors(run_dir: Path) -> dict[str, Any]:
    """Weights and moments of its last checkpoint."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted(last(run_dir).glob("*.safetensors")):
        found |= load_file(path)
    return found


def last(run_dir: Path) -> Path:
    """The checkpoint that a run would go on from."""
    pointer = run_dir / "checkpoints" / "latest"
    return pointer.parent / pointer.read_text(encoding="utf-8").strip()
