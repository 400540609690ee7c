"""A rank that is killed is named under every launcher, whatever the launcher does to the others."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ranks_helper import ROOT, rank_environment
from slurm_testbed import testbed, why_no_slurm
from watched import ranks_of, sentinels, until

from longpretrain.ranks import free_port

LAUNCHERS = ("torchrun", "mpirun", "deepspeed", "srun")
IN_TIME_S = 15.0


@dataclass(frozen=True)
class Ended:
    """What was left of a run whose rank 1 was killed."""

    process: str
    status: dict[str, Any]
    named_s: float
    ended_s: float
    code: int
    output: str
    ranks: dict[int, int]


def kill_a_rank(launcher: str, recipe: Path, folder: Path) -> Ended:
    """Starts two ranks, kills rank 1 in mid-run, and waits for the launcher's end."""
    run_dir = folder / "run"
    words = [f"run.dir={run_dir}", "schedule.total_steps=100000", "evaluate.every_steps=0"]
    words += ["checkpoint.every_steps=0", "checkpoint.every_minutes=60"]
    environment = rank_environment()
    environment |= {"RANKS": "2", "LAUNCHER": launcher, "MASTER_PORT": str(free_port())}
    command = [str(ROOT / "launch.sh"), str(recipe), *words]
    with contextlib.ExitStack() as held:
        if launcher == "srun":
            bed = held.enter_context(testbed())
            environment |= bed.environment
            environment["PATH"] = f"{rank_environment()['PATH']}:{bed.environment['PATH']}"
            command = ["salloc", "--quiet", "-N2", "--ntasks-per-node=1", *command]
        output = held.enter_context((folder / "output.txt").open("w", encoding="utf-8"))
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
        held.callback(end, process, run_dir)
        metrics = run_dir / "metrics.jsonl"

        def trains() -> bool:
            told = (folder / "output.txt").read_text(encoding="utf-8", errors="replace")
            assert process.poll() is None, told[-3000:]
            text = metrics.read_text(encoding="utf-8") if metrics.is_file() else ""
            return text.count('"kind": "train"') > 3 and len(ranks_of(run_dir)) == 2

        until(trains, "no training", timeout_s=300)
        ranks = ranks_of(run_dir)
        struck = time.monotonic()
        os.kill(ranks[1], signal.SIGKILL)
        until(lambda: status(run_dir)["state"] != "running", "status.json says that it runs")
        named_s = time.monotonic() - struck
        code = process.wait(120)
        ended_s = time.monotonic() - struck
        until(lambda: not ranks_of(run_dir), "ranks are left")
    return Ended(
        process=f"process {ranks[1]}",
        status=status(run_dir),
        named_s=named_s,
        ended_s=ended_s,
        code=code,
        output=(folder / "output.txt").read_text(encoding="utf-8", errors="replace"),
        ranks=ranks,
    )


def status(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
    return found


def end(process: subprocess.Popen[bytes], run_dir: Path) -> None:
    """Leaves nothing behind, however the test ends."""
    for pid in ranks_of(run_dir).values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def ended(
    small_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Ended]]]:
    """One run under each launcher, two side by side: a start is mostly imports."""
    with ThreadPoolExecutor(2) as pool:
        yield {
            launcher: pool.submit(
                kill_a_rank, launcher, small_run / "recipe.yaml", tmp_path_factory.mktemp(launcher)
            )
            for launcher in LAUNCHERS
            if launcher != "srun" or not why_no_slurm()
        }


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_dead_rank_is_named(ended: dict[str, Future[Ended]], launcher: str) -> None:
    if launcher not in ended:
        pytest.skip(why_no_slurm())
    run = ended[launcher].result()
    # Who started the rank may take its exit status away before anybody else can look.
    wanted = rf"rank 1 \({run.process} on \S+\) died( of SIGKILL)? after step \d+: .+"
    assert re.fullmatch(wanted, run.status["reason"]), run.status
    assert run.status["state"] == "failed", "not preempted, though launchers send SIGTERM"
    assert run.code not in (0, 75)
    assert run.named_s < IN_TIME_S
    told = run.output.count(run.status["reason"])
    assert 1 <= told <= 2, run.output[-3000:]
    assert f"{ROOT / 'longpretrain'}/" not in run.output, "a traceback of ours"


def test_no_sentinel_is_left(ended: dict[str, Future[Ended]]) -> None:
    ranks = {pid for run in ended.values() for pid in run.result().ranks.values()}
    until(lambda: not ranks & {facts["pid"] for _, facts in sentinels()}, "sentinels are left")
