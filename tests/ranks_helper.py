"""Starts ranks for tests: torchrun over rank_driver.py, on this machine, with free ports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Finished:
    """What a driven group of ranks left."""

    exit_codes: list[int]
    output: str


def rank_environment() -> dict[str, str]:
    """The environment of a user's shell: no launcher's variables, the project and its tools
    found.
    """
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RANKS")
    families = ("SLURM_", "PMI", "OMPI_", "TORCHELASTIC_", "CROSS_", "LONGPRETRAIN_", "LAUNCHER")
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in foreign and not key.startswith(families)
    }
    return env | {
        "PATH": f"{BIN}:{env['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }


def drive(
    folder: Path, ranks: int, commands: Sequence[dict[str, Any]], *, driver: str = "rank_driver.py"
) -> Finished:
    """Runs train commands one after another on ``ranks`` processes; see rank_driver.py."""
    folder.mkdir(parents=True, exist_ok=True)
    listing = folder / "commands.json"
    listing.write_text(json.dumps(list(commands)), encoding="utf-8")
    listing.with_suffix(".codes").unlink(missing_ok=True)
    finished = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            str(ranks),
            "--standalone",
            str(ROOT / "tests" / driver),
            str(listing),
        ],
        cwd=ROOT,
        env=rank_environment(),
        check=False,
        capture_output=True,
        text=True,
        timeout=900,
    )
    output = finished.stdout + finished.stderr
    codes = listing.with_suffix(".codes")
    ended = codes.is_file()
    assert ended, f"rank 0 did not end (exit code {finished.returncode}):\n{output[-4000:]}"
    return Finished(json.loads(codes.read_text(encoding="utf-8")), output)
