"""launch.sh as users start it: each way trains, signals leave a checkpoint, bad input ends before
ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from ranks_helper import ROOT, rank_environment

from longpretrain.report.metrics import read_metrics

LAUNCH = ROOT / "launch.sh"


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        env=rank_environment() | environment,
    )


def losses(run_dir: Path) -> list[float]:
    lines = read_metrics(run_dir / "metrics.jsonl")
    return [line["loss"] for line in lines if line["kind"] == "train"]


def status(run_dir: Path) -> dict[str, object]:
    return dict(json.loads((run_dir / "status.json").read_text()))


@pytest.fixture(scope="module")
def words(small_run: Path) -> list[str]:
    """A run of two updates without dropout: its curve is the same for every launcher and world
    size."""
    return [
        str(small_run / "recipe.yaml"),
        "schedule.total_steps=2",
        "schedule.warmup_steps=1",
        "evaluate.every_steps=0",
        "model.dropout=0",
        "model.attention_dropout=0",
    ]


@pytest.fixture(scope="module")
def plain_losses(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The curve by plain ./launch.sh: one rank on a CPU."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    finished = run([str(LAUNCH), *words, f"run.dir={run_dir}"])
    assert finished.returncode == 0, finished.stderr[-2000:]
    assert status(run_dir)["state"] == "done"
    return losses(run_dir)


@pytest.mark.parametrize(
    ("command", "environment", "ranks"),
    [
        pytest.param([str(LAUNCH)], {"RANKS": "2"}, 2, id="RANKS=2"),
        pytest.param(["deepspeed", "--num_accelerators", "2", str(LAUNCH)], {}, 2, id="deepspeed"),
        pytest.param([str(LAUNCH)], {"RANKS": "2", "LAUNCHER": "torchrun"}, 2, id="torchrun"),
        pytest.param([str(LAUNCH)], {"RANKS": "2", "LAUNCHER": "mpirun"}, 2, id="mpirun"),
    ],
)
def test_every_way_to_start_trains_the_same(
    words: list[str],
    plain_losses: list[float],
    tmp_path: Path,
    command: list[str],
    environment: dict[str, str],
    ranks: int,
) -> None:
    port = str(20_000 + os.getpid() % 10_000)
    environment = environment | {"MASTER_PORT": port}
    if command[0] == "deepspeed":
        command = [*command[:1], "--master_port", port, *command[1:]]
    finished = run([*command, *words, f"run.dir={tmp_path / 'run'}"], **environment)
    assert finished.returncode == 0, (finished.stdout + finished.stderr)[-3000:]
    assert status(tmp_path / "run")["state"] == "done"
    started = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]
    assert started["world_size"] == ranks
    assert losses(tmp_path / "run") == pytest.approx(plain_losses, rel=1e-5)


def test_preemption_leaves_a_checkpoint(words: list[str], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    command = [str(LAUNCH), *words, f"run.dir={run_dir}", "schedule.total_steps=100000"]
    with subprocess.Popen(
        command,
        env=rank_environment() | {"RANKS": "2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        deadline = time.monotonic() + 120
        metrics = run_dir / "metrics.jsonl"
        while not metrics.is_file() or '"step": 2,' not in metrics.read_text():
            assert time.monotonic() < deadline, "two updates took more than two minutes"
            assert process.poll() is None, process.communicate()[0][-3000:]
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        output = process.communicate(timeout=120)[0]
    ended = status(run_dir)
    assert ended["state"] == "preempted", output[-3000:]
    step = int(str(ended["step"]))
    assert (run_dir / "checkpoints" / f"step-{step:06d}" / "state.json").is_file()
    assert (run_dir / "checkpoints" / "latest").read_text().strip() == f"step-{step:06d}"
    assert "SIGUSR1" in str(ended["reason"]) or "another rank" in str(ended["reason"])


def test_bad_input_ends_before_ranks_start(words: list[str], tmp_path: Path) -> None:
    bad = [*words, f"run.dir={tmp_path / 'run'}", "batch.global_sequences=3"]
    finished = run([str(LAUNCH), *bad], RANKS="2")
    assert finished.returncode == 2
    assert finished.stdout == ""
    assert re.fullmatch(r"longpretrain train: .*: got 3; wanted a multiple .*\n", finished.stderr)
    assert not (tmp_path / "run").exists()


def test_wrong_world_size_is_refused(words: list[str], tmp_path: Path) -> None:
    """A rank that finds itself alone where two were announced must not train."""
    command = ["python", str(LAUNCH), *words, f"run.dir={tmp_path / 'run'}"]
    finished = run(command, LONGPRETRAIN_WORLD_SIZE="2")
    assert finished.returncode == 2
    assert "world size: got 1 from alone; wanted 2" in finished.stderr
    assert not (tmp_path / "run").exists()


def test_dry_run_prints_command_and_recipe(words: list[str]) -> None:
    finished = run([str(LAUNCH), *words, "--dry-run"], RANKS="2")
    assert finished.returncode == 0
    first, rest = finished.stdout.split("\n", 1)
    assert "--num_accelerators 2" in first
    assert yaml.safe_load(rest)["schedule"]["total_steps"] == 2


def test_unknown_launcher_is_refused(words: list[str]) -> None:
    finished = run([str(LAUNCH), *words], LAUNCHER="ssh")
    assert finished.returncode == 2
    assert "got ssh; wanted deepspeed, torchrun, mpirun or srun" in finished.stderr


def test_wrong_ranks_are_refused(words: list[str]) -> None:
    finished = run([str(LAUNCH), *words], RANKS="two")
    assert finished.returncode == 2
    assert "RANKS: got two; wanted 1 or more" in finished.stderr


@pytest.fixture
def batch(tmp_path: Path) -> Callable[..., tuple[int, str]]:
    """Runs slurm/pretrain.sbatch in a folder with a launch.sh and a scontrol that only take
    notes."""
    import shutil
    import sys

    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").symlink_to(sys.executable)
    notes = tmp_path / "notes"

    def submit(state: str | None, *words: str, restarts: int = 0) -> tuple[int, str]:
        notes.write_text("")
        # Ranks take seconds, and file times tick in milliseconds.
        writes = f'sleep 0.1; mkdir -p run; echo \'{{\n "state": "{state}"}}\' > run/status.json'
        for path, text in (
            ("launch.sh", f'echo "launch $*" >> notes; {writes if state else "exit 2"}'),
            (".venv/bin/scontrol", f'echo "scontrol $*" >> {notes}'),
        ):
            (tmp_path / path).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / path).chmod(0o755)
        time.sleep(0.02)  # file times are compared
        finished = subprocess.run(
            ["bash", "slurm/pretrain.sbatch", "demo", f"run.dir={tmp_path / 'run'}", *words],
            check=False,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            env=rank_environment()
            | {
                "SLURM_SUBMIT_DIR": str(tmp_path),
                "SLURM_JOB_ID": "7",
                "SLURM_RESTART_COUNT": str(restarts),
            },
        )
        return finished.returncode, notes.read_text() + finished.stderr

    return submit


def test_sbatch_requeues_what_this_attempt_left_preempted(
    batch: Callable[..., tuple[int, str]],
) -> None:
    code, notes = batch("preempted", "--fresh")
    assert code == 0
    assert "--fresh" in notes
    assert "scontrol requeue 7" in notes
    code, notes = batch("done", "--fresh", restarts=1)
    assert code == 0
    assert "--fresh" not in notes  # a requeued job goes on
    assert "scontrol" not in notes


def test_sbatch_does_not_requeue_a_broken_run_for_ever(
    batch: Callable[..., tuple[int, str]],
) -> None:
    batch("preempted")
    code, notes = batch(None, restarts=1)  # refused before ranks ran: the old status stands
    assert code == 2
    assert "scontrol" not in notes


def test_sbatch_script_reads_the_cluster_facts() -> None:
    """Its directives ask for what the engine handles: a warning, a requeue, appended logs."""
    text = (ROOT / "slurm" / "pretrain.sbatch").read_text()
    for directive in ("--signal=B:USR1@120", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {directive}\n" in text
    assert "source slurm/env.sh" in text
