"""Runs `longpretrain train` commands one after another in this rank: a start costs seconds, once.

    torchrun --nproc-per-node 2 tests/rank_driver.py COMMANDS.json

COMMANDS is a list of {"arguments": [...], "stop_after": step or null}. With ``stop_after`` the
process sends itself SIGUSR1, as Slurm would, when metrics.jsonl shows that step. Rank 0 leaves its
exit codes in COMMANDS.codes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from longpretrain.cli import main
from longpretrain.engine import zero


def stop_after(run_dir: Path, step: int) -> threading.Thread:
    """Sends this process SIGUSR1 once the run has logged a step."""
    metrics = run_dir / "metrics.jsonl"

    def watch() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if metrics.is_file() and f'"step": {step},' in metrics.read_text(encoding="utf-8"):
                os.kill(os.getpid(), signal.SIGUSR1)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def drive(commands: list[dict[str, object]]) -> list[int]:
    """Runs the commands; the process group is joined once."""
    zero.stop_ranks = lambda: None
    codes = []
    for command in commands:
        arguments = [str(word) for word in command["arguments"]]  # type: ignore[attr-defined]
        step = command.get("stop_after")
        if step is not None and os.environ["RANK"] == "0":
            run_dir = next(word for word in arguments if word.startswith("run.dir="))
            stop_after(Path(run_dir.removeprefix("run.dir=")), int(str(step)))
        codes.append(main(["train", *arguments]))
    return codes


if __name__ == "__main__":
    listing = Path(sys.argv[1])
    exit_codes = drive(json.loads(listing.read_text(encoding="utf-8")))
    if os.environ["RANK"] == "0":
        listing.with_suffix(".codes").write_text(json.dumps(exit_codes), encoding="utf-8")
