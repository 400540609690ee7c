"""Runs `longpretrain train` commands one after another in this rank: a start costs seconds, once.

    torchrun --nproc-per-node 2 tests/rank_driver.py COMMANDS.json

COMMANDS is a list of {"arguments": [...], "stop_after": step or null}. With ``stop_after`` the
process sends itself SIGUSR1, as Slurm would, once metrics.jsonl has that step. Rank 0 leaves its
exit codes in COMMANDS.codes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from longpretrain.cli import main
from longpretrain.engine import zero
from longpretrain.report.metrics import MetricsLog


@contextlib.contextmanager
def stopped_after(step: int | None) -> Iterator[None]:
    """Sends this process SIGUSR1 as soon as its run has logged a step; None does nothing."""
    report = MetricsLog.report

    def and_stop(self: MetricsLog, line: Mapping[str, Any]) -> None:
        report(self, line)
        if (line["kind"], line["step"]) == ("train", step):
            os.kill(os.getpid(), signal.SIGUSR1)

    MetricsLog.report = and_stop  # type: ignore[method-assign]
    try:
        yield
    finally:
        MetricsLog.report = report  # type: ignore[method-assign]


def drive(commands: list[dict[str, object]]) -> list[int]:
    """Runs the commands; the process group is joined once."""
    zero.stop_ranks = lambda: None
    codes = []
    for command in commands:
        arguments = [str(word) for word in command["arguments"]]  # type: ignore[attr-defined]
        step = command.get("stop_after") if os.environ["RANK"] == "0" else None
        with stopped_after(None if step is None else int(str(step))):
            codes.append(main(["train", *arguments]))
    return codes


if __name__ == "__main__":
    listing = Path(sys.argv[1])
    exit_codes = drive(json.loads(listing.read_text(encoding="utf-8")))
    if os.environ["RANK"] == "0":
        listing.with_suffix(".codes").write_text(json.dumps(exit_codes), encoding="utf-8")
