"""slurm/*.sbatch on a real Slurm of four nodes on this machine (slurm_testbed.py).

All jobs are submitted at once, each with a thread that watches it and does to it what a cluster
does: the tests wait for their own.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import slurm_runs
from ranks_helper import BIN, ROOT, rank_environment
from slurm_runs import ONE_CPU, Preempted, Run
from slurm_testbed import Testbed, processes, testbed, why_no_slurm

from longpretrain.engine.names import pointed_at

pytestmark = pytest.mark.skipif(bool(why_no_slurm()), reason=why_no_slurm())

STEPS = 40
COMMON = ("log.sample_ids=true", "evaluate.every_steps=0", f"schedule.total_steps={STEPS}")
# Hidden dropout is drawn anew by each rank: without it, any number of them takes the same path.
# More updates, too: Slurm is to preempt it before it is done.
PLAIN = (
    *COMMON[:2], "schedule.total_steps=60", "model.dropout=0", "checkpoint.every_steps=5",
)  # fmt: skip
QUIET = ("--exclude=n3,n4",)  # where nothing happens to a node
ENDLESS = ("schedule.total_steps=100000", "checkpoint.every_steps=100000")


@dataclass(frozen=True)
class Scenarios:
    """What the jobs of this file do, one function each; ``folder`` gets a folder per job."""

    cluster: Testbed
    folder: Path
    recipe: Path

    def submit(self, name: str, *options: str, words: tuple[str, ...]) -> Run:
        """A training job of its own."""
        options = (*options, *QUIET, *ONE_CPU)
        return slurm_runs.submit(self.cluster, self.folder / name, self.recipe, options, *words)

    def preempted(self) -> Preempted:
        folder = self.folder / "preempted"
        return slurm_runs.preempt(
            self.cluster, folder, self.recipe, times=1, steps=STEPS, options=QUIET
        )

    def elastic(self) -> Run:
        """Two tasks each on two nodes; one dies; on one node; a more urgent job takes it; on two
        again.
        """
        run = slurm_runs.submit(
            self.cluster,
            self.folder / "elastic",
            self.recipe,
            ("--nodes=1-2", "--ntasks-per-node=2", "--exclude=n1,n2", *ONE_CPU),
            *PLAIN,
        )
        run.until_step(7, restarts=0)
        run.until(lambda job: bool(pointed_at(run.run_dir)), "a checkpoint")  # of step 5
        self.cluster.lose_node("n4")
        run.until_step(12, restarts=1)
        urgent = ("-p", "urgent", "-w", "n3", "--cpus-per-task=8", "--wrap", "sleep 1")
        self.cluster.run("sbatch", "--output=/dev/null", *urgent)
        run.until(lambda job: job.restarts == 2, "a requeue")
        self.cluster.return_node("n4")
        run.ended()
        return run

    def end_of_time(self) -> Run:
        """Its time is cut down to what --signal announces; then, on its way again, scancel."""
        options = ("--nodes=1", "--ntasks-per-node=1", "--signal=B:USR1@55")
        run = self.submit("time", *options, words=(*COMMON[:2], *ENDLESS))
        run.until_step(2, restarts=0)
        self.cluster.run("scontrol", "update", f"JobId={run.number}", "TimeLimit=1")
        run.until(lambda job: job.restarts == 1, "a requeue")
        self.cluster.run("scontrol", "update", f"JobId={run.number}", "TimeLimit=30")
        run.until_step(1 + int(run.status()["step"]), restarts=1)
        self.cluster.run("scancel", run.number)
        run.ended("CANCELLED")
        return run

    def crashing(self) -> Run:
        """Each attempt loses its rank; submitted by launch.sh in a checkout with its own env.sh."""
        checkout = self.folder / "a checkout"
        own_env = (ROOT / "slurm" / "env.sh").read_text()
        own_env += "sbatch_options=(--nodes=1 --ntasks-per-node=1 "
        own_env += f"{' '.join((*QUIET, *ONE_CPU))})\nexport LONGPRETRAIN_MAX_RESTARTS=1\n"
        own_env += "LONGPRETRAIN_CONTAINER='env IN_CONTAINER=yes'\n"
        shutil.copytree(ROOT / "slurm", checkout / "slurm")
        (checkout / "slurm" / "env.sh").write_text(own_env)
        shutil.copy(ROOT / "launch.sh", checkout)
        for name in ("longpretrain", "ds_configs", ".venv"):
            (checkout / name).symlink_to(BIN.parent if name == ".venv" else ROOT / name)
        run = slurm_runs.submit(
            self.cluster, self.folder / "crash", self.recipe, (), *COMMON[:2], *ENDLESS,
            checkout=checkout, command=(str(checkout / "launch.sh"),), LAUNCHER="sbatch",
        )  # fmt: skip
        for restarts in (0, 1):
            run.until_step(1, restarts=restarts)
            run.kill_rank(0, "IN_CONTAINER=yes")
        run.ended("FAILED")
        return run

    def bad_input(self) -> Run:
        words = (*COMMON, "batch.global_sequences=3")
        run = self.submit("bad", "--nodes=1", "--ntasks-per-node=2", words=words)
        run.ended("FAILED")
        return run

    def in_an_allocation(self) -> Run:
        """./launch.sh in salloc: two ranks on one node."""
        run_dir, log = self.folder / "salloc" / "run", self.folder / "salloc" / "log"
        run_dir.parent.mkdir()
        finished = subprocess.run(
            ["salloc", "-w", "n1", "-n2", *ONE_CPU, "./launch.sh", self.recipe, *PLAIN,
             f"run.dir={run_dir}"],
            check=False, capture_output=True, text=True, timeout=240, cwd=ROOT,
            env=self.cluster.in_shell(rank_environment()),
        )  # fmt: skip
        log.write_text(finished.stdout + finished.stderr)
        assert finished.returncode == 0, log.read_text()
        number = re.search(r"Granted job allocation (\d+)", finished.stderr)
        assert number
        return Run(cluster=self.cluster, number=number[1], run_dir=run_dir, log=log)

    def prepared(self) -> str:
        """slurm/prepare.sbatch over two nodes."""
        text, out = self.recipe.parent / "text" / "train", self.folder / "prepared"
        return self.script("prepare.sbatch", "-n2", "-N2", words=(text, "--out", out))

    def evaluated(self, made: Future[Run]) -> str:
        """slurm/evaluate.sbatch, of a run, as soon as that is done."""
        valid = self.recipe.parent / "data" / "valid"
        words = (made.result().run_dir, "--data", valid, "--max-tokens", "128")
        return self.script("evaluate.sbatch", words=words)

    def script(self, name: str, *options: str, words: tuple[object, ...]) -> str:
        """Submits another script, and waits for it; returns what it printed."""
        log = self.folder / f"{name}.log"
        finished = subprocess.run(
            ["sbatch", "--wait", f"--output={log}", "--time=9", *QUIET, *ONE_CPU, *options,
             "--ntasks-per-node=1", ROOT / "slurm" / name, *words],
            check=False, capture_output=True, text=True, timeout=240, cwd=ROOT,
            env=self.cluster.in_shell(rank_environment()),
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr + log.read_text()
        return log.read_text()


Started = dict[str, Future]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Testbed]:
    with testbed(nodes=4) as found:
        yield found


@pytest.fixture(scope="module")
def scenarios(
    cluster: Testbed, tmp_path_factory: pytest.TempPathFactory, small_run: Path
) -> Scenarios:
    folder = tmp_path_factory.mktemp("slurm")
    return Scenarios(cluster, folder, small_run / "recipe.yaml")


@pytest.fixture(scope="module")
def started(scenarios: Scenarios) -> Iterator[Started]:
    names = ("elastic", "end_of_time", "preempted", "crashing", "bad_input")
    with ThreadPoolExecutor(len(names) + 3) as pool:
        begun = {
            name: pool.submit(getattr(scenarios, name))
            for name in (*names, "in_an_allocation", "prepared")
        }
        evaluated = pool.submit(scenarios.evaluated, begun["in_an_allocation"])
        yield {**begun, "evaluated": evaluated}


def test_evaluate_on_a_node(started: Started) -> None:
    assert "bits" in started["evaluated"].result()
    run = started["in_an_allocation"].result()
    assert (run.run_dir / "evaluation.json").is_file()


def test_a_preempted_job_is_requeued_and_goes_on_to_the_same_bits(started: Started) -> None:
    found = started["preempted"].result()
    assert (found.resumed, found.same_samples, found.same_bits) == (1, True, True), found


def test_an_elastic_job_goes_on_with_the_nodes_there_are(started: Started) -> None:
    """Across the loss of a node and a preemption by Slurm; no sample is lost or comes twice."""
    run, whole = started["elastic"].result(), started["in_an_allocation"].result()
    begun = [event for event in run.events() if "world_size" in event]
    assert [(e["world_size"], e["accumulation"]) for e in begun] == [(4, 1), (2, 2), (4, 1)]
    changed = [event["changed"] for event in run.events() if "changed" in event]
    assert changed == [
        "world size 4 -> 2, accumulation 1 -> 2",
        "world size 2 -> 4, accumulation 2 -> 1",
    ]
    assert "other than before: world size 4 -> 2, accumulation 1 -> 2" in run.printed()
    assert run.status()["state"] == "done"
    assert run.sample_ids() == whole.sample_ids()
    losses = [
        [line["loss"] for line in each.lines() if line["kind"] == "train"] for each in (run, whole)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    weights, wanted = slurm_runs.weights(run.run_dir), slurm_runs.weights(whole.run_dir)
    assert weights.keys() == wanted.keys()
    assert max(abs(weights[name] - wanted[name]).max() for name in wanted) < 1e-5  # 1e-7 measured


def test_the_end_of_its_time_is_survived_and_scancel_is_the_end(started: Started) -> None:
    run = started["end_of_time"].result()
    printed = run.printed()
    assert "preempted: SIGUSR1" in printed
    assert f"job {run.number} is requeued" in printed
    assert "resumed: " in printed
    status = run.status()
    assert status["state"] == "preempted"
    assert status["reason"] in ("SIGTERM", "SIGUSR1")  # it gets both
    newest = (run.run_dir / "checkpoints" / "latest").read_text().strip()
    assert newest == f"step-{status['step']:06d}"
    assert run.cluster.job(run.number).restarts == 1


def test_a_crash_is_not_requeued_for_ever(started: Started) -> None:
    run = started["crashing"].result()
    job = run.cluster.job(run.number)
    assert (job.state, job.restarts) == ("FAILED", 1)
    assert "1 restart brought no new checkpoint after that of step 0" in run.printed()
    assert run.status()["state"] != "done"


def test_bad_input_is_never_requeued(started: Started) -> None:
    run = started["bad_input"].result()
    job = run.cluster.job(run.number)
    assert (job.state, job.restarts, job.exit_code) == ("FAILED", 0, "2:0")
    assert "got 3; wanted a multiple of 2 ranks" in run.printed()
    assert "would fail again in the same way" in run.printed()
    assert not run.run_dir.exists()


def test_launch_sh_in_an_allocation(started: Started) -> None:
    run = started["in_an_allocation"].result()
    first = run.events()[0]
    assert (first["world_size"], first["launcher"]) == (2, "srun")


def test_prepare_on_two_nodes(started: Started, scenarios: Scenarios, small_run: Path) -> None:
    started["prepared"].result()
    wanted = small_run / "data" / "train"
    found = scenarios.folder / "prepared"
    names = sorted(path.name for path in wanted.glob("[!.]*"))  # other tests leave hidden indices
    assert "manifest.json" in names
    for name in names:
        assert (found / name).read_bytes() == (wanted / name).read_bytes(), name


def test_a_testbed_takes_everything_down_even_if_its_owner_is_killed(tmp_path: Path) -> None:
    """And stands beside another one."""
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "from slurm_testbed import testbed\n"
        "with testbed(nodes=1) as cluster:\n"
        "    cluster.run('sbatch', '--output=/dev/null', '--wrap', 'setsid sleep 600')\n"
        "    print(cluster.folder, flush=True)\n"
        "    time.sleep(600)\n"
    )
    words = [str(BIN / "python"), "-c", script, str(ROOT / "tests")]
    owner = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert owner.stdout is not None
    folder = Path(owner.stdout.readline().strip())
    try:
        _until(lambda: any(_is_sleep(pid) for pid in processes(folder)))
    finally:
        owner.kill()
        owner.wait()
    _until(lambda: not folder.exists())
    assert processes(folder) == []


def _is_sleep(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes().startswith(b"sleep\0")
    except OSError:
        return False


def _until(is_reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_reached():
        assert time.monotonic() < deadline
        time.sleep(0.1)
