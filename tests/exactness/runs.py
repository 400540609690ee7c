"""Runs of our engine for the matrix: chains of legs, each leg on its own number of ranks.

A start of ranks costs seconds, so all legs of one place in their chains and of one number of ranks
go through one torchrun (tests/rank_driver.py), in the order given.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ranks_helper import drive
from safetensors.torch import load_file

from exactness.plain_loop import Curve
from longpretrain.report.metrics import deterministic, read_metrics

NO_DROPOUT = ("model.dropout=0", "model.attention_dropout=0")


@dataclass(frozen=True)
class Leg:
    """One start of a run: ``stop_after`` sends it SIGUSR1 once it has logged that update."""

    ranks: int
    overrides: tuple[str, ...] = ()
    stop_after: int | None = None


@dataclass(frozen=True)
class Chain:
    """One run, by one start or by several, each of which goes on where the last one stopped."""

    name: str
    legs: tuple[Leg, ...]


def run_chains(work: Path, recipe: Path, chains: Sequence[Chain]) -> None:
    """Runs them all; run folders are ``work / name``.

    Raises:
        AssertionError: a leg did not end as it should: preempted where it was stopped, else done.
    """
    assert len({chain.name for chain in chains}) == len(chains), "a name twice"
    longest = max((len(chain.legs) for chain in chains), default=0)
    for place in range(longest):
        here = [(chain.name, chain.legs[place]) for chain in chains if place < len(chain.legs)]
        for ranks in sorted({leg.ranks for _, leg in here}):
            _drive(work, recipe, place, ranks, [(n, leg) for n, leg in here if leg.ranks == ranks])


def _drive(
    work: Path, recipe: Path, place: int, ranks: int, legs: Sequence[tuple[str, Leg]]
) -> None:
    commands = [
        {
            "arguments": [str(recipe), f"run.dir={work / name}", *leg.overrides],
            "stop_after": leg.stop_after,
        }
        for name, leg in legs
    ]
    finished = drive(work / f"leg{place}-ranks{ranks}", ranks, commands)
    wanted = [75 if leg.stop_after else 0 for _, leg in legs]
    wrong = [
        f"{name}: {code}"
        for (name, _), code, right in zip(legs, finished.exit_codes, wanted, strict=True)
        if code != right
    ]
    assert not wrong, f"exit codes of {', '.join(wrong)}\n{finished.output[-4000:]}"


def curve(run_dir: Path) -> Curve:
    """Losses, norms and (if logged) sample ids of a run's updates; none missing, none twice."""
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return Curve(
        [line["loss"] for line in lines],
        [line["grad_norm"] for line in lines],
        [line["sample_ids"] for line in lines if "sample_ids" in line],
    )


def resumed_at(run_dir: Path) -> list[int]:
    """Steps at which the run was taken up again."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [line["step"] for line in lines if line.get("event", "").startswith("resumed")]


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Weights and moments of a run's last checkpoint."""
    latest = (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    found: dict[str, torch.Tensor] = {}
    for path in sorted((run_dir / "checkpoints" / latest).glob("*.safetensors")):
        found |= load_file(path)
    return found


def differences(left: Path, right: Path) -> list[str]:
    """What of two runs is not the same bits: metrics, weights, moments."""
    first, second = (deterministic(read_metrics(run / "metrics.jsonl")) for run in (left, right))
    found = [] if first == second else [f"metrics ({_first_difference(first, second)})"]
    here, there = tensors(left), tensors(right)
    if here.keys() != there.keys():
        found.append("tensor names")
    found += [n for n in here if n in there and not torch.equal(here[n], there[n])]
    return found


def _first_difference(left: Iterable[dict[str, Any]], right: Iterable[dict[str, Any]]) -> str:
    for one, other in zip(left, right, strict=False):
        for key in one:
            if one[key] != other.get(key):
                return f"step {one['step']} {key}: {json.dumps(one[key])[:40]}"
    return "length"
