"""Golden step losses: tables under tests/golden/ that a run must repeat to the last bit.

They catch what a comparison of two runs of today cannot: a change that moves all trainers alike.
Floating-point bits depend on which vector instructions the libraries pick, so golden runs pin them:
torch's and our own plainest kernels, MKL's reproducible mode, one thread. What is left is named by
``machine()``; elsewhere the tables are compared within 1e-5 (bf16: 2e-4), with a warning.

    python -m exactness.golden --write      # after a change that is meant to change the numbers
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from ranks_helper import ROOT
from small_run import make_small_run

from exactness.plain_loop import plain_loop
from exactness.runs import NO_DROPOUT, Chain, Leg, curve, run_chains
from exactness.table import Row, equal, within
from longpretrain.attention.fused import kernel_facts
from longpretrain.recipe import load_recipe

TABLES = Path(__file__).resolve().parents[1] / "golden" / "step_losses.json"
PINNED = {
    "ATEN_CPU_CAPABILITY": "default",
    "LONGPRETRAIN_CPU_LEVEL": "plain",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}
UPDATES = 20
BASE = (
    f"schedule.total_steps={UPDATES}",
    "schedule.warmup_steps=4",
    "optim.lr=3e-3",
    "optim.weight_decay=0.1",
    "evaluate.every_steps=0",
)
RUNS = {
    "engine, zero1, 2 ranks, fp32, dropout on": ("precision=fp32",),
    "engine, zero3, 2 ranks, bf16, dropout on": (
        "precision=bf16",
        "zero.config=ds_configs/zero3.json",
    ),
    "engine, zero0, 2 ranks, fp32, global token, dropout on": (
        "precision=fp32",
        "zero.config=ds_configs/zero0.json",
        "model.global_tokens=first",
    ),
}
SECTION = f"Golden losses: {UPDATES} updates, instruction sets pinned"


def machine() -> dict[str, str]:
    """What the bits still depend on."""
    described = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    lines = (line for line in described.splitlines() if line.startswith(("flags", "Features")))
    flags = set(next(lines, "").split())
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        # libm picks its exp and tanh by the first two, torch its bf16 products by the others
        "cpu": " ".join(sorted(flags & {"fma", "avx2", "avx512bw", "avx512_bf16", "amx_bf16"})),
        "attention": _attention(),
    }


def _attention() -> str:
    """The backend that auto picks for the runs' dtypes and, of ours, what its bits depend on."""
    facts = kernel_facts()
    if not facts:
        return "portable"
    return f"fused, {facts['used']} kernels compiled by {facts['compiler']}"


def golden_rows(work: Path, recipe: Path) -> list[Row]:
    """Every table against a run of now, in a process with pinned instructions."""
    kept = json.loads(TABLES.read_text(encoding="utf-8"))
    found = run_pinned(work)
    same_machine = kept["machine"] == found["machine"]
    if not same_machine:
        warnings.warn(
            f"golden losses are of {kept['machine']}, this is {found['machine']}: limits, not bits",
            stacklevel=1,
        )
    rows = []
    for name, losses in kept["losses"].items():
        now = found["losses"].get(name, [])
        if same_machine:
            different = [
                f"update {step}: {a!r} was {b!r}"
                for step, (a, b) in enumerate(zip(now, losses, strict=False), 1)
                if a != b
            ]
            if len(now) != len(losses):
                different.append("length")
            rows.append(equal(SECTION, name, "tests/golden/step_losses.json", different))
        else:
            against = f"tests/golden, of another machine ({kept['machine']})"
            limit = 2e-4 if "bf16" in name else 1e-5
            rows.append(within(SECTION, name, against, now, losses, limit))
    return rows


def run_pinned(work: Path) -> dict[str, dict]:
    """The golden runs, made in another process: torch reads these variables when it is imported."""
    work.mkdir(parents=True, exist_ok=True)
    out = work / "found.json"
    subprocess.run(
        [sys.executable, "-m", "exactness.golden", "--out", str(out)],
        cwd=ROOT,
        env=os.environ | PINNED | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        check=True,
        timeout=600,
    )
    return dict(json.loads(out.read_text(encoding="utf-8")))


def _make(out: Path) -> None:
    assert all(os.environ.get(key) == value for key, value in PINNED.items()), "not pinned"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        recipe = make_small_run(work / "small") / "recipe.yaml"
        chains = {
            name: Chain(f"run-{number}", (Leg(2, (*BASE, *words)),))
            for number, (name, words) in enumerate(RUNS.items())
        }
        run_chains(work, recipe, list(chains.values()))
        losses = {name: curve(work / chain.name).losses for name, chain in chains.items()}
        config = load_recipe(str(recipe), [*BASE, *NO_DROPOUT])
        losses["plain loop, fp32, dropout off"] = plain_loop(config, UPDATES).losses
    tree = {"machine": machine(), "losses": losses}
    out.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        with tempfile.TemporaryDirectory() as place:
            fresh = run_pinned(Path(place))
        TABLES.parent.mkdir(exist_ok=True)
        TABLES.write_text(json.dumps(fresh, indent=1) + "\n", encoding="utf-8")
    else:
        assert sys.argv[1] == "--out", sys.argv
        _make(Path(sys.argv[2]))
