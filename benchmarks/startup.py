"""From the command to the first update: seconds under each launcher, two ranks on the CPU.

    python benchmarks/startup.py                      # every launcher here, 3 rounds: 2 minutes
    python benchmarks/startup.py --rounds 1 --only torchrun
    python benchmarks/startup.py --words model.path=models/long data.train=data/train

Prints a table: the median of the rounds, the slowest, and where the time went. One round before
them warms the caches and does not count. The model is a RoBERTa of two layers unless --words say
otherwise; weights take more (they are read, hashed and compared on every rank). ``ranks there`` is
when every rank had its model and all had agreed; the rest is DeepSpeed's start and the update.
CPU time is that of all processes: on a machine with fewer idle cores than ranks it becomes seconds.

A benchmark does not fail: the exit code says whether it ran (2: it could not), never how fast.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from machine import HERE, describe_machine, num_cores

sys.path.insert(0, str(HERE.parent / "tests"))

from ranks_helper import BIN, ROOT, rank_environment
from slurm_testbed import testbed, why_no_slurm
from small_run import make_small_run

from longpretrain.ranks import free_port

RANKS = 2
LIMIT_S = 15.0
"""What a start may take, with caches warm."""
TIMEOUT_S = 300.0
OPEN_MPI = ROOT / "build" / "openmpi" / "bin" / "mpirun"
ROOT_MAY = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


@dataclass(frozen=True, kw_only=True)
class Start:
    """One start: seconds since the command."""

    there_s: float
    first_update_s: float
    end_s: float
    cpu_s: float


def ways() -> dict[str, tuple[list[str], dict[str, str]]]:
    """As a user types it -> command, environment; those that this machine has."""
    launch, port = str(ROOT / "launch.sh"), str(free_port())
    ranks = {"RANKS": str(RANKS)}
    found: dict[str, tuple[list[str], dict[str, str]]] = {
        "RANKS=2 ./launch.sh": ([launch], ranks),
        "LAUNCHER=torchrun ./launch.sh": ([launch], ranks | {"LAUNCHER": "torchrun"}),
        "LAUNCHER=mpirun ./launch.sh": ([launch], ranks | {"LAUNCHER": "mpirun"}),
        "deepspeed launch.sh": (
            ["deepspeed", "--num_accelerators", str(RANKS), "--master_port", port, launch],
            {},
        ),
        "torchrun launch.sh": (
            ["torchrun", "--nproc-per-node", str(RANKS), "--standalone", launch],
            {},
        ),
        "mpirun (MPICH) ./launch.sh": ([str(BIN / "mpirun"), "-n", str(RANKS), launch], {}),
    }
    if OPEN_MPI.is_file():
        found["mpirun (Open MPI) ./launch.sh"] = (
            [str(OPEN_MPI), "--oversubscribe", "-n", str(RANKS), launch],
            ROOT_MAY,
        )
    if not why_no_slurm():
        found["srun ./launch.sh"] = (["srun", "-N2", f"-n{RANKS}", launch], {})
    return found


def measure(command: Sequence[str], environment: dict[str, str], run_dir: Path) -> Start:
    """Starts a run of two updates and watches its journal."""
    journal = run_dir / "metrics.jsonl"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    there = first = None
    with (run_dir.parent / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            [*command, f"run.dir={run_dir}"],
            env=rank_environment() | environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while process.poll() is None:
            text = journal.read_text(encoding="utf-8") if journal.is_file() else ""
            now = time.monotonic() - began
            there = there or (now if "\n" in text else None)
            first = first or (now if '"kind": "train"' in text else None)
            if now > TIMEOUT_S:
                break
            time.sleep(0.02)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode or there is None or first is None:
        text = (run_dir.parent / "output.txt").read_text(encoding="utf-8", errors="replace")
        raise SystemExit(f"{' '.join(command)} did not run:\n{text[-2000:]}")
    return Start(
        there_s=there,
        first_update_s=first,
        end_s=time.monotonic() - began,
        cpu_s=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
    )


def table(found: dict[str, list[Start]]) -> str:
    """Aligned lines for people."""
    head = ("start", "first update", "slowest", "ranks there", "end", "CPU", f"<= {LIMIT_S:g} s")
    rows = [head]
    for name, starts in found.items():
        first = [start.first_update_s for start in starts]
        middle = [
            statistics.median(getattr(start, key) for start in starts)
            for key in ("there_s", "end_s", "cpu_s")
        ]
        is_quick = "yes" if statistics.median(first) <= LIMIT_S else "no"
        times = [statistics.median(first), max(first), *middle]
        cells = [f"{s:.1f} s" for s in times]
        if times[-1] < 1:
            cells[-1] = "-"  # Slurm's ranks are not our children: nobody tells their time
        rows.append((name, *cells, is_quick))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(pairs))
        for pairs in (list(zip(row, widths, strict=True)) for row in rows)
    )


@contextlib.contextmanager
def slurm(is_wanted: bool) -> Iterator[dict[str, str]]:
    """A Slurm of two nodes on this machine, as the tests use it."""
    if not is_wanted:
        yield {}
        return
    with testbed() as cluster:
        yield cluster.environment


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="of each launcher, 1 or more (3)")
    parser.add_argument("--cold", action="store_true", help="no round before, to warm the caches")
    parser.add_argument("--only", default="", help="launchers whose name holds this")
    parser.add_argument("--words", nargs="*", default=[], help="recipe keys, as key=value")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args(arguments)
    chosen = {name: way for name, way in ways().items() if options.only in name}
    if not chosen or options.rounds < 1:
        parser.error(f"--rounds 1 or more, --only a part of one of: {', '.join(ways())}")
    folder = Path(tempfile.mkdtemp(prefix="longpretrain-startup-"))
    found: dict[str, list[Start]] = {name: [] for name in chosen}
    try:
        recipe = make_small_run(folder) / "recipe.yaml"
        words = ["schedule.total_steps=2", "schedule.warmup_steps=1", "evaluate.every_steps=0"]
        words += ["checkpoint.every_steps=0", *options.words]
        with slurm(any(name.startswith("srun") for name in chosen)) as cluster:
            for number in range(options.cold, options.rounds + 1):
                for name, (command, more) in chosen.items():
                    run_dir = folder / f"{number}-{list(chosen).index(name)}" / "run"
                    run_dir.parent.mkdir()
                    whole = [*command, str(recipe), *words]
                    environment = more | (cluster if name.startswith("srun") else {})
                    start = measure(whole, environment, run_dir)
                    found[name] += [start] * (number > 0)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    machine = describe_machine()
    load = machine["load_average_at_start"][0]
    print(f"{machine['cpu']}, {num_cores()} cores, load {load:.1f} of other programs and ourselves")
    print(table(found))
    if options.json:
        numbers = {name: [vars(start) for start in starts] for name, starts in found.items()}
        text = json.dumps({"machine": machine, "starts": numbers}, indent=1)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
