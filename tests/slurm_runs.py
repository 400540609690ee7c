"""Training jobs on the Slurm testbed: submitted, watched, cut off, compared with a whole run."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranks_helper import ROOT, rank_environment
from safetensors.numpy import load_file
from slurm_testbed import Job, Testbed, processes

from longpretrain.engine.names import read_status
from longpretrain.report.metrics import read_metrics

ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
ONE_CPU = ("--gpus-per-node=0", "--cpus-per-task=1")


@dataclass(frozen=True)
class Run:
    """A job that trains in a run folder of its own."""

    cluster: Testbed
    number: str
    run_dir: Path
    log: Path

    def until(self, is_reached: Callable[[Job], bool], wanted: str, timeout_s: float = 240) -> Job:
        """Waits for the job; what it printed says why it did not get there."""
        deadline = time.monotonic() + timeout_s
        lifted: set[int] = set()
        while True:
            job = self.cluster.job(self.number)
            if is_reached(job):
                return job
            goes_on = job.state not in ENDS and time.monotonic() < deadline
            assert goes_on, f"{wanted}: {job}\n{self.printed()}"
            if job.reason == "BeginTime" and job.restarts not in lifted:
                # Slurm holds a requeued job for two minutes; a start in the very second in which it
                # was ended would be refused (its credential is revoked).
                lifted.add(job.restarts)
                when = ("update", f"JobId={self.number}", "StartTime=now+3")
                self.cluster.run("scontrol", *when, check=False)
            time.sleep(0.2)

    def until_step(self, step: int, *, restarts: int) -> None:
        """Waits until the attempt after so many restarts has made this update."""
        self.until(
            lambda job: job.restarts == restarts and self.steps_made(restarts) >= step,
            f"update {step} after {restarts} restarts",
        )

    def steps_made(self, restarts: int) -> int:
        """The last update of the attempt after so many restarts; 0 before its first."""
        attempts = re.split(r"step \d+: (?:started|resumed): ", self.printed())[1:]
        if len(attempts) <= restarts:
            return 0
        made = re.findall(r"^ +(\d+) +\d+\.\d%", attempts[restarts], re.MULTILINE)
        return int(made[-1]) if made else 0

    def ended(self, state: str = "COMPLETED", timeout_s: float = 240) -> Job:
        """Waits for the end of the job, which must be this one."""
        return self.until(lambda job: job.state == state, state, timeout_s)

    def printed(self) -> str:
        """Its log so far."""
        return self.log.read_text() if self.log.is_file() else ""

    def events(self) -> list[dict[str, Any]]:
        """The events in its journal."""
        return [line for line in self.lines() if line["kind"] == "event"]

    def lines(self) -> list[dict[str, Any]]:
        """Its journal."""
        return read_metrics(self.run_dir / "metrics.jsonl")

    def sample_ids(self) -> list[list[int]]:
        """By update, the samples that ranks collated; fails if an update is missing or twice."""
        lines = [line for line in self.lines() if line["kind"] == "train"]
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        return [line["sample_ids"] for line in lines]

    def status(self) -> dict[str, Any]:
        """Its status.json."""
        return read_status(self.run_dir)

    def kill_rank(self, rank: int, *marks: str) -> None:
        """kill -9; ``marks`` are variables that its environment must have."""
        for pid in processes(self.cluster.folder):
            with contextlib.suppress(OSError):
                place = Path("/proc") / str(pid)
                words = (place / "cmdline").read_bytes().decode().split("\0")
                env = (place / "environ").read_bytes().decode().split("\0")
                wanted = {f"SLURM_JOB_ID={self.number}", f"SLURM_PROCID={rank}", *marks}
                if wanted <= set(env) and "-u" in words and "launch.sh" in " ".join(words):
                    os.kill(pid, signal.SIGKILL)
                    return
        raise AssertionError(f"no rank {rank} of job {self.number}")


def submit(
    cluster: Testbed,
    folder: Path,
    recipe: Path,
    options: Sequence[str],
    *words: str,
    checkout: Path = ROOT,
    command: Sequence[str] = ("sbatch",),
    **environment: str,
) -> Run:
    """Submits slurm/pretrain.sbatch; the run is in FOLDER/run, the job's log in FOLDER/log."""
    folder.mkdir(parents=True)
    log, run_dir = folder / "log", folder / "run"
    script = [str(checkout / "slurm" / "pretrain.sbatch")] if command == ("sbatch",) else []
    finished = subprocess.run(
        [*command, *options, *script, str(recipe), f"run.dir={run_dir}", *words],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=checkout,
        env=cluster.in_shell(rank_environment())
        | {"SBATCH_OUTPUT": str(log), "SBATCH_TIMELIMIT": "30"}
        | environment,
    )
    found = re.search(r"Submitted batch job (\d+)", finished.stdout)
    assert found, finished.stdout + finished.stderr
    return Run(cluster=cluster, number=found[1], run_dir=run_dir, log=log)


def weights(run_dir: Path) -> dict[str, Any]:
    """Of the newest checkpoint."""
    return _tensors(run_dir, "model*.safetensors")


def bits(run_dir: Path) -> dict[str, bytes]:
    """Weights and moments of the newest checkpoint."""
    return {name: array.tobytes() for name, array in _tensors(run_dir, "*.safetensors").items()}


def _tensors(run_dir: Path, files: str) -> dict[str, Any]:
    folder = run_dir / "checkpoints" / (run_dir / "checkpoints" / "latest").read_text().strip()
    return {
        f"{re.split('[-.]', path.name)[0]} {name}": array
        for path in sorted(folder.glob(files))
        for name, array in load_file(path).items()
    }


@dataclass(frozen=True)
class Preempted:
    """What many preemptions of one job did to its run."""

    tried: int
    resumed: int
    """Attempts that went on at the very update where the one before had stopped."""
    same_samples: bool
    """Each once, in the same order as in a run that was not preempted."""
    same_bits: bool
    """Of the final weights and moments."""
    slowest_stop_s: float
    """From Slurm's signal until the job was back in the queue."""


def preempt(
    cluster: Testbed,
    folder: Path,
    recipe: Path,
    *,
    times: int,
    seed: int = 1,
    steps: int = 40,
    options: Sequence[str] = (),
) -> Preempted:
    """Trains on two nodes, once undisturbed and once with this many preemptions, at random moments
    between the first updates of an attempt and its last.
    """
    words = (f"schedule.total_steps={steps}", "checkpoint.every_steps=7", "log.sample_ids=true")
    words += ("evaluate.every_steps=0",)
    options = ("--nodes=2", "--ntasks-per-node=1", *ONE_CPU, *options)
    whole = submit(cluster, folder / "whole", recipe, options, *words)
    cut = submit(cluster, folder / "cut", recipe, options, *words)
    draw = random.Random(seed)
    share, resumed, slowest_s, stopped = steps // (times + 1), 0, 0.0, 0
    for attempt in range(times):
        cut.until_step(stopped + draw.randint(1, max(1, share // 2)), restarts=attempt)
        began = time.monotonic()
        cluster.run("scancel", "--signal=USR1", "--batch", cut.number)
        cut.until(lambda job, n=attempt: job.restarts == n + 1, "a requeue")  # type: ignore[misc]
        slowest_s = max(slowest_s, time.monotonic() - began)
        stopped = int(cut.status()["step"])
        assert stopped < steps, f"the run was done before preemption {attempt + 1} of {times}"
        told = f"step {stopped}: resumed: "
        cut.until_step(stopped + 1, restarts=attempt + 1)
        resumed += told in cut.printed()
    cut.ended()
    whole.ended()
    return Preempted(
        tried=times,
        resumed=resumed,
        same_samples=cut.sample_ids() == whole.sample_ids(),
        same_bits=bits(cut.run_dir) == bits(whole.run_dir),
        slowest_stop_s=slowest_s,
    )
