"""launch.sh as users start it: each way trains, stops and goes on; bad input ends before ranks.

The cells of exactness/launchers.py, two side by side: all ways, and each scenario with one of them
(`make exactness` runs every pair), from a checkout whose path has spaces and letters beyond ASCII.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from exactness.launchers import WAYS, Cells
from exactness.table import Row
from ranks_helper import BIN, ROOT, rank_environment

LAUNCH = ROOT / "launch.sh"
ENDLESS = 100_000
"""Updates that no test waits for."""
BY_NAME = {way.name: way for way in WAYS}
# Going on after an interrupt is a success of that way, too: same losses, world size, status.
SCENARIOS = [
    ("RANKS=2 ./launch.sh", "preemption"),
    ("deepspeed --num_accelerators 2 launch.sh", "Ctrl-C"),
    ("torchrun --nproc-per-node 2 --no-python ./launch.sh", "success"),
    ("LAUNCHER=torchrun RANKS=2 ./launch.sh", "success"),
    ("LAUNCHER=mpirun RANKS=2 ./launch.sh", "success"),
    ("./launch.sh", "success"),
    ("deepspeed launch.sh", "success"),
    ("deepspeed --no_python ./launch.sh", "success"),
    ("LAUNCHER=mpirun RANKS=2 ./launch.sh", "failure"),
]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        env=rank_environment() | environment,
    )


@pytest.fixture(scope="module")
def words(small_run: Path) -> list[str]:
    """A run of two updates."""
    return [
        str(small_run / "recipe.yaml"),
        "schedule.total_steps=2",
        "schedule.warmup_steps=1",
        "evaluate.every_steps=0",
    ]


@pytest.fixture(scope="module")
def strange_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project in a folder whose name is hard on shells, patterns and encodings."""
    checkout = tmp_path_factory.mktemp("checkout") / "мой проект [1] (b+)"
    checkout.mkdir()
    for name in ("longpretrain", "ds_configs", ".venv"):
        (checkout / name).symlink_to(BIN.parent if name == ".venv" else ROOT / name)
    shutil.copy(LAUNCH, checkout)
    return checkout


@pytest.fixture(scope="module")
def rows(small_run: Path, strange_checkout: Path) -> Iterator[dict[tuple[str, str], Future[Row]]]:
    """The cells, running two side by side from now on."""
    recipe = shutil.copy(small_run / "recipe.yaml", strange_checkout / "рецепт 1.yaml")
    cells = Cells(strange_checkout / "runs", Path(recipe), strange_checkout)
    with ThreadPoolExecutor(2) as pool:
        yield {
            (name, scenario): pool.submit(cells.row, BY_NAME[name], scenario)
            for name, scenario in SCENARIOS
        }


@pytest.mark.parametrize(("name", "scenario"), SCENARIOS, ids=lambda value: value)
def test_every_way(rows: dict[tuple[str, str], Future[Row]], name: str, scenario: str) -> None:
    row = rows[name, scenario].result()
    assert row.ok, row


def test_every_way_is_here() -> None:
    covered = {name for name, scenario in SCENARIOS if scenario != "failure"}
    assert covered == set(BY_NAME)


def test_mpirun_under_another_launchers_variables_is_refused(
    words: list[str], tmp_path: Path
) -> None:
    """As in a shell that Slurm's variables were left in: each rank would take itself for alone."""
    command = ["mpirun", "-n", "2", str(LAUNCH), *words, f"run.dir={tmp_path / 'run'}"]
    stale = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_JOB_ID": "7"}
    finished = run(command, **stale)
    assert finished.returncode == 2
    for rank in (0, 1):
        text = f"got rank 0 of 1 from Slurm's SLURM_PROCID and SLURM_NTASKS, but rank {rank} of 2"
        assert text in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "run").exists()


def test_ranks_left_in_the_shell_do_not_make_launch_sh_a_rank_of_one(
    words: list[str], tmp_path: Path
) -> None:
    stale = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    finished = run([str(LAUNCH), *words, f"run.dir={tmp_path / 'run'}"], RANKS="2", **stale)
    assert finished.returncode == 2
    assert "world size: got 1 from RANK and WORLD_SIZE; wanted 2" in finished.stderr


@pytest.mark.parametrize(
    ("environment", "is_rank"),
    [
        pytest.param({}, True, id="srun ./launch.sh"),
        pytest.param({"SLURM_PTY_PORT": "9"}, False, id="in a shell of srun --pty"),
        pytest.param({"SLURM_PTY_PORT": "9", "PMI_RANK": "0", "PMI_SIZE": "1"}, False, id="PMI"),
        pytest.param(
            {"SLURM_PTY_PORT": "9", "LONGPRETRAIN_LAUNCHER": "srun"}, True, id="its own srun there"
        ),
    ],
)
def test_a_slurm_step_is_a_rank_unless_it_is_a_shell(
    words: list[str], environment: dict[str, str], is_rank: bool
) -> None:
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    finished = run([str(LAUNCH), *words, "--dry-run"], **step, **environment)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.startswith("srun --overlap --kill-on-bad-exit=1") != is_rank


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
    assert "--dry-run" not in first, "it is to be pasted"
    assert yaml.safe_load(rest)["schedule"]["total_steps"] == 2


@pytest.mark.parametrize(
    ("visible", "more", "wanted"),
    [
        (None, {}, "deepspeed --quiet --num_accelerators 8 --master_port"),
        ("2,3", {}, "deepspeed --quiet --include localhost:2,3 --master_port"),
        ("2,3", {"RANKS": "1"}, "deepspeed --quiet --include localhost:2 --master_port"),
        ("", {}, "deepspeed --quiet --num_accelerators 1 --master_port"),
        ("-1", {}, "deepspeed --quiet --num_accelerators 1 --master_port"),
        ("GPU-a,GPU-b", {"LAUNCHER": "torchrun"}, "torchrun --nproc-per-node 2 --master-port"),
        (
            "2,3",
            {"RANKS": "4"},
            "launch.sh: RANKS: got 4; wanted at most 2, as CUDA_VIS",
        ),
        ("GPU-a", {}, "launch.sh: CUDA_VISIBLE_DEVICES: got GPU-a; wanted numbers, the only names"),
    ],
)
def test_the_gpus_that_are_visible(
    words: list[str], tmp_path: Path, visible: str | None, more: dict[str, str], wanted: str
) -> None:
    """Eight of them, said to be there by a stand-in for nvidia-smi."""
    stand_in = tmp_path / "nvidia-smi"
    stand_in.write_text(
        '#!/bin/sh\nfor n in 0 1 2 3 4 5 6 7; do echo "GPU $n: X (UUID: GPU-$n)"; done\n'
        "echo '  MIG 1g.10gb     Device  0: (UUID: MIG-0)'\n"
    )
    stand_in.chmod(0o755)
    more = more | {"PATH": f"{tmp_path}:{rank_environment()['PATH']}"}
    if visible is not None:
        more["CUDA_VISIBLE_DEVICES"] = visible
    told = run([str(LAUNCH), *words, "--dry-run"], **more)
    text = told.stderr if wanted.startswith("launch.sh") else told.stdout
    assert text.replace("\\", "").startswith(wanted)


@pytest.mark.parametrize("visible", ["", "-1"])
def test_hidden_gpus_stay_hidden_from_a_rank(visible: str) -> None:
    """As deepspeed starts it, which sets the variable anew."""
    shown = "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    head = LAUNCH.read_text().split("sys.path.insert")[0].split("<<'pass'")[1].split("\n", 2)[2]
    code = [sys.executable, "-c", f"{head}\n{shown}"]
    assert run(code, CUDA_VISIBLE_DEVICES="0", LONGPRETRAIN_NO_GPU="1").stdout == "''\n"
    assert run(code, CUDA_VISIBLE_DEVICES="0").stdout == "'0'\n"
    line = next(line for line in LAUNCH.read_text().splitlines() if "LONGPRETRAIN_NO_GPU=1" in line)
    bash = ["bash", "-c", f'{line}; echo "$LONGPRETRAIN_NO_GPU"']
    assert run(bash, CUDA_VISIBLE_DEVICES=visible).stdout == "1\n"
    assert run(bash, CUDA_VISIBLE_DEVICES="2,3").stdout == "\n"


def test_unknown_launcher_is_refused(words: list[str]) -> None:
    finished = run([str(LAUNCH), *words], LAUNCHER="ssh")
    assert finished.returncode == 2
    assert "got ssh; wanted deepspeed, torchrun, mpirun, srun or sbatch" in finished.stderr


def test_wrong_ranks_are_refused(words: list[str]) -> None:
    finished = run([str(LAUNCH), *words], RANKS="two")
    assert finished.returncode == 2
    assert "RANKS: got two; wanted 1 or more" in finished.stderr


def test_dry_run_of_sbatch_prints_what_would_be_submitted(words: list[str]) -> None:
    finished = run([str(LAUNCH), *words, "--dry-run"], LAUNCHER="sbatch")
    assert finished.returncode == 0, finished.stderr
    script = (ROOT / "slurm" / "pretrain.sbatch").read_text()
    for directive in ("--signal=B:USR1@120", "--requeue", "--open-mode=append"):
        assert f"#SBATCH {directive}\n" in script
    command, rest = finished.stdout.split("\n", 1)
    assert command.startswith(f"sbatch {ROOT}/slurm/pretrain.sbatch {words[0]} ")
    assert rest.startswith(script)
    assert yaml.safe_load(rest.removeprefix(script))["schedule"]["total_steps"] == 2


def test_the_cluster_facts_reach_sbatch_and_srun(
    words: list[str], strange_checkout: Path, tmp_path: Path
) -> None:
    shutil.copytree(ROOT / "slurm", strange_checkout / "slurm", dirs_exist_ok=True)
    with (strange_checkout / "slurm" / "env.sh").open("a") as file:
        file.write("sbatch_options=(--partition=gpu '--comment=two words')\n")
        file.write("LONGPRETRAIN_CONTAINER='apptainer exec --nv image.sif'\n")
    launch = str(strange_checkout / "launch.sh")
    finished = run([launch, *words, "--dry-run"], LAUNCHER="sbatch")
    assert finished.stdout.startswith("sbatch --partition=gpu --comment=two\\ words "), finished
    finished = run([launch, *words, "--dry-run"], SLURM_JOB_ID="7", SLURM_NTASKS="16")
    expected = "srun --kill-on-bad-exit=1 --ntasks 16 apptainer exec --nv image.sif "
    assert finished.stdout.startswith(expected), finished


def test_a_job_takes_nothing_of_the_submitting_machine(
    words: list[str], strange_checkout: Path, tmp_path: Path
) -> None:
    """A login node has no GPU, and no job's variables; a site's script reads what is not set."""
    shutil.copytree(ROOT / "slurm", strange_checkout / "slurm", dirs_exist_ok=True)
    env_sh = strange_checkout / "slurm" / "env.sh"
    lines = env_sh.read_text().splitlines()
    lines = [
        line.removeprefix("# ") if "scontrol show hostnames" in line else line for line in lines
    ]
    assert any(line.startswith("[[ -z ${SLURM_JOB_NODELIST:-} ]] ||") for line in lines)
    env_sh.write_text("\n".join([*lines, ': "$OF_NO_SITE"', ""]))
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/sh\nenv\necho "words: $*"\n')
    sbatch.chmod(0o755)
    path = f"{sbatch.parent}:{rank_environment()['PATH']}"
    launch = str(strange_checkout / "launch.sh")
    finished = run([launch, *words], LAUNCHER="sbatch", PATH=path, DS_ACCELERATOR="")
    assert finished.returncode == 0, finished.stderr
    said = finished.stdout.splitlines()
    assert f"words: {strange_checkout}/slurm/pretrain.sbatch {' '.join(words)}" in said
    passed_on = {line.split("=")[0]: line for line in said if "=" in line}
    assert passed_on["DS_ACCELERATOR"] == "DS_ACCELERATOR="
    assert not {"LAUNCHER", "MASTER_ADDR", "LONGPRETRAIN_WORLD_SIZE"} & set(passed_on)


def test_no_python_is_told(tmp_path: Path, words: list[str]) -> None:
    shutil.copy(LAUNCH, tmp_path / "launch.sh")
    for tool in ("env", "bash", "dirname", "readlink"):
        (tmp_path / tool).symlink_to(str(shutil.which(tool)))
    finished = run([str(tmp_path / "launch.sh"), *words], PATH=str(tmp_path))
    assert finished.returncode == 2
    assert f"python: got none on PATH and no {tmp_path}/.venv; wanted" in finished.stderr


def test_a_recipe_that_does_not_read_is_not_submitted(words: list[str]) -> None:
    finished = run([str(LAUNCH), *words, "optim.lr=fast"], LAUNCHER="sbatch")
    assert finished.returncode == 2
    assert "recipe key optim.lr: got " in finished.stderr


def test_ranks_of_a_job_are_its_tasks(words: list[str]) -> None:
    finished = run([str(LAUNCH), *words], LAUNCHER="sbatch", RANKS="2")
    assert finished.returncode == 2
    assert "RANKS: got 2 with LAUNCHER=sbatch; wanted the tasks of a job" in finished.stderr


def signalled_while_it_starts(words: list[str], run_dir: Path, child: str) -> tuple[int, str]:
    """Sends USR1 to launch.sh as soon as a process of this kind is there; exit code and output."""
    started = subprocess.Popen(
        [str(LAUNCH), *words, f"run.dir={run_dir}", f"schedule.total_steps={ENDLESS}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=rank_environment() | {"RANKS": "1"},
        start_new_session=True,
    )
    try:
        found = ["pgrep", "-f", f"{child}.*{run_dir}"]
        deadline = time.monotonic() + 120
        while subprocess.run(found, check=False, stdout=subprocess.DEVNULL).returncode:
            assert started.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        started.send_signal(signal.SIGUSR1)
        output, _ = started.communicate(timeout=120)
    finally:
        subprocess.run(["pkill", "-KILL", "-f", f"{run_dir}"], check=False)
        started.wait()
    return started.returncode, output


def test_a_signal_while_recipe_and_data_are_checked_is_not_lost(
    words: list[str], tmp_path: Path
) -> None:
    code, output = signalled_while_it_starts(words, tmp_path / "run", "train --check")
    assert "stopped by USR1 before the ranks started" in output, output
    assert code != 0
    assert not (tmp_path / "run").exists()


def test_a_signal_while_a_rank_starts_is_not_lost(words: list[str], tmp_path: Path) -> None:
    """A rank that does not listen yet is told again every 2 s: many updates of so small a model, or
    none. Whichever comes then is the last, and is in a checkpoint.
    """
    run_dir = tmp_path / "run"
    code, output = signalled_while_it_starts(words, run_dir, r"python\S* -u \S*launch.sh")
    found = re.search(r"^preempted: SIGUSR1, at step (\d+);", output, flags=re.MULTILINE)
    assert found, output
    step = int(found[1])
    assert 1 <= step < ENDLESS
    assert code != 0
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", step), output
    newest = (run_dir / "checkpoints" / "latest").read_text().strip()
    assert newest == f"step-{step:06d}"
    assert json.loads((run_dir / "checkpoints" / newest / "state.json").read_text())["step"] == step
