"""Every way to start a run, through success, failure, preemption and Ctrl-C: what it must leave.

``launcher_rows`` runs cells of that table for the exactness matrix; test_launch.py runs some of
them. All start real ranks on the CPU, with ports of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ranks_helper import ROOT, rank_environment

from exactness.table import Row, relative_difference
from longpretrain.ranks import free_port
from longpretrain.report.metrics import read_metrics

SECTION = "Launchers"
SCENARIOS = ("success", "failure", "preemption", "Ctrl-C")
LIMIT = 1e-5
SHORT, LONG = 2, 30
"""Updates of a run, and of one that is interrupted after its second."""
NON_FINITE = "updates in a row that are not finite"


@dataclass(frozen=True, kw_only=True)
class Way:
    """A command that starts ranks, and how a user or a scheduler stops what it started."""

    name: str
    """As a user types it."""
    command: tuple[str, ...]
    """From the project folder; ``PORT`` stands for a free one."""
    environment: Mapping[str, str] = field(default_factory=dict)
    ranks: int
    stopped_by: signal.Signals = signal.SIGTERM
    """What preempts it: sent to the process that was started, SIGINT to its whole group."""


WAYS = (
    Way(name="./launch.sh", command=("./launch.sh",), ranks=1),
    Way(
        name="RANKS=2 ./launch.sh",
        command=("./launch.sh",),
        environment={"RANKS": "2"},
        ranks=2,
        stopped_by=signal.SIGUSR1,
    ),
    Way(
        name="LAUNCHER=torchrun RANKS=2 ./launch.sh",
        command=("./launch.sh",),
        environment={"RANKS": "2", "LAUNCHER": "torchrun"},
        ranks=2,
    ),
    Way(
        name="LAUNCHER=mpirun RANKS=2 ./launch.sh",
        command=("./launch.sh",),
        environment={"RANKS": "2", "LAUNCHER": "mpirun"},
        ranks=2,
        stopped_by=signal.SIGUSR1,
    ),
    # The deepspeed runner dies of SIGTERM and leaves its ranks alone: Ctrl-C is how to stop it.
    Way(
        name="deepspeed launch.sh",
        command=("deepspeed", "--master_port", "PORT", "launch.sh"),
        ranks=1,
        stopped_by=signal.SIGINT,
    ),
    Way(
        name="deepspeed --num_accelerators 2 launch.sh",
        command=("deepspeed", "--num_accelerators", "2", "--master_port", "PORT", "launch.sh"),
        ranks=2,
        stopped_by=signal.SIGINT,
    ),
    Way(
        name="deepspeed --no_python ./launch.sh",
        command=("deepspeed", "--no_python", "--master_port", "PORT", "./launch.sh"),
        ranks=1,
        stopped_by=signal.SIGINT,
    ),
    Way(
        name="torchrun --nproc-per-node 2 --no-python ./launch.sh",
        command=(
            *("torchrun", "--nproc-per-node", "2", "--master-port", "PORT"),
            *("--no-python", "./launch.sh"),
        ),
        ranks=2,
    ),
)


def launcher_rows(
    work: Path,
    recipe: Path,
    *,
    scenarios: Sequence[str] = SCENARIOS,
    ways: Sequence[Way] = WAYS,
    at_once: int = 2,
) -> list[Row]:
    """Runs the cells, ``at_once`` side by side: a start is mostly one process's imports."""
    table = Cells(work, recipe)
    cells = [(way, scenario) for scenario in scenarios for way in ways]
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(lambda cell: table.row(*cell), cells))


class Cells:
    """Runs single cells; what they are compared with runs once.

    Args:
        work: where their run folders go.
        recipe: a small run.
        root: the project folder to start them from.
    """

    def __init__(self, work: Path, recipe: Path, root: Path = ROOT) -> None:
        self._work = work
        self._root = root
        self._words = [
            str(recipe),
            "schedule.warmup_steps=1",
            "schedule.decay=constant",  # the curve of few updates is the beginning of that of many
            "evaluate.every_steps=0",
            "model.dropout=0",  # the curve is then the same for every world size
            "model.attention_dropout=0",
        ]
        self._reference: list[float] = []
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            # We are a background job of a shell. What inherits that cannot trap a Ctrl-C.
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self._lock = threading.Lock()

    def row(self, way: Way, scenario: str) -> Row:
        """Runs one cell."""
        run_dir = self._work / re.sub(r"\W+", "-", f"{scenario} {way.name}") / "run"
        run_dir.parent.mkdir(parents=True)
        problems: list[str] = []
        measured = ""
        try:
            if scenario == "failure":
                measured = self._fail(way, run_dir, problems)
            elif scenario == "success":
                measured = self._succeed(way, run_dir, problems)
            else:
                by = signal.SIGINT if scenario == "Ctrl-C" else way.stopped_by
                measured = self._interrupt(way, run_dir, by, problems)
        finally:
            problems += [f"left over: {line}" for line in end_left_overs(run_dir)]
        return Row(
            section=SECTION,
            cell=f"{way.name}, {scenario}",
            against="the reason and the step of its checkpoint"
            if scenario == "failure"
            else "one process without a launcher",
            wanted="failed" if scenario == "failure" else f"<= 1e-5 relative, on {way.ranks}",
            measured="; ".join([measured, *problems] if measured else problems),
            ok=not problems,
        )

    def _expected(self, updates: int) -> list[float]:
        """The curve of one process that no launcher started."""
        with self._lock:
            if not self._reference:
                run_dir = self._work / "reference" / "run"
                run_dir.parent.mkdir(parents=True)
                command = (sys.executable, "-m", "longpretrain", "train")
                alone = Way(name="alone", command=command, ranks=1)
                code = wait_for(self._start(alone, run_dir, LONG))
                assert code == 0, output_of(run_dir)
                self._reference = losses(run_dir)
        return self._reference[:updates]

    def _start(self, way: Way, run_dir: Path, updates: int, *more: str) -> subprocess.Popen[bytes]:
        words = [*self._words, f"run.dir={run_dir}", f"schedule.total_steps={updates}"]
        return start(way, [*words, *(more or ("checkpoint.every_steps=0",))], run_dir, self._root)

    def _succeed(self, way: Way, run_dir: Path, problems: list[str]) -> str:
        self._go_to_the_end(way, run_dir, SHORT, problems)
        return self._compare(way, run_dir, SHORT, problems)

    def _fail(self, way: Way, run_dir: Path, problems: list[str]) -> str:
        """A rate that no weights survive: 20 updates in a row are non-finite."""
        more = ("optim.lr=1e30", "checkpoint.every_steps=1")
        code = wait_for(self._start(way, run_dir, 100, *more))
        status = status_of(run_dir)
        latest = (run_dir / "checkpoints" / "latest").read_text().strip()
        _expect(problems, code != 0, "exit code 0")
        _expect(problems, status.get("state") == "failed", f"status {status}")
        _expect(problems, NON_FINITE in str(status.get("reason")), f"status {status}")
        _expect(problems, latest == _folder(status), f"{latest} is the checkpoint of {status}")
        return f"failed at step {status.get('step')}"

    def _interrupt(self, way: Way, run_dir: Path, by: signal.Signals, problems: list[str]) -> str:
        """Stops the run after its second update, and goes on to the end."""
        process = self._start(way, run_dir, LONG)
        wait_until(lambda: has_logged(run_dir, 2), process, run_dir)
        if by == signal.SIGINT:
            os.killpg(process.pid, by)  # as a terminal does
        else:
            process.send_signal(by)
        code = wait_for(process)
        wait_until(lambda: not left_overs(run_dir), None, run_dir)
        status = status_of(run_dir)
        step = int(str(status.get("step", 0)))
        _expect(problems, code != 0, "exit code 0 though interrupted")
        _expect(problems, status.get("state") == "preempted", f"status {status}")
        _expect(problems, 2 <= step < LONG, f"interrupted at step {step}")
        kept = run_dir / "checkpoints"
        _expect(problems, (kept / _folder(status) / "state.json").is_file(), "no checkpoint")
        latest = (kept / "latest").read_text().strip() if (kept / "latest").is_file() else "nothing"
        _expect(problems, latest == _folder(status), f"latest names {latest}, not step {step}")
        if problems:
            return output_of(run_dir)[-300:]
        self._go_to_the_end(way, run_dir, LONG, problems)
        return self._compare(way, run_dir, LONG, problems)

    def _go_to_the_end(self, way: Way, run_dir: Path, updates: int, problems: list[str]) -> None:
        code = wait_for(self._start(way, run_dir, updates))
        status = status_of(run_dir)
        _expect(problems, code == 0, f"exit code {code}: {output_of(run_dir)[-300:]}")
        _expect(problems, status.get("state") == "done", f"status {status}")
        _expect(problems, status.get("step") == updates, f"status {status}")

    def _compare(self, way: Way, run_dir: Path, updates: int, problems: list[str]) -> str:
        sizes = world_sizes(run_dir)
        _expect(problems, sizes == {way.ranks}, f"world size {sizes}")
        difference = relative_difference(losses(run_dir), self._expected(updates))
        _expect(problems, difference <= LIMIT, "the curve differs")
        return "equal" if difference == 0 else f"{difference:.1e}"


def start(
    way: Way, words: Sequence[str], run_dir: Path, root: Path = ROOT
) -> subprocess.Popen[bytes]:
    """Starts a run as the leader of a process group, as a shell at a terminal does."""
    command = [str(free_port()) if word == "PORT" else word for word in way.command]
    with (run_dir.parent / "output.txt").open("ab") as output:
        return subprocess.Popen(
            [*command, *words],
            cwd=root,
            env=rank_environment() | way.environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def wait_for(process: subprocess.Popen[bytes], timeout_s: float = 240) -> int:
    """Its exit code; a process that does not end is killed and the wait raises."""
    try:
        return process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def wait_until(
    is_so: Callable[[], bool],
    process: subprocess.Popen[bytes] | None,
    run_dir: Path,
    timeout_s: float = 120,
) -> None:
    """Asks often; fails when the process ends before, or after a while."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        ended = process is not None and process.poll() is not None
        if ended or time.monotonic() > deadline:
            why = "it ended too early" if ended else f"not so after {timeout_s:g} s"
            raise AssertionError(f"{why}: {output_of(run_dir)[-3000:]}")
        time.sleep(0.02)


def has_logged(run_dir: Path, step: int) -> bool:
    """Whether the journal shows an update."""
    journal = run_dir / "metrics.jsonl"
    return journal.is_file() and f'"step": {step},' in journal.read_text(encoding="utf-8")


def losses(run_dir: Path) -> list[float]:
    """The loss of every update, in order."""
    lines = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def world_sizes(run_dir: Path) -> set[int]:
    """The world sizes that the run had, as it says when it starts and goes on."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    return {line["world_size"] for line in lines if "world_size" in line}


def status_of(run_dir: Path) -> dict[str, object]:
    """status.json, or nothing."""
    path = run_dir / "status.json"
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def output_of(run_dir: Path) -> str:
    """What the run printed."""
    return (run_dir.parent / "output.txt").read_text(encoding="utf-8", errors="replace")


def left_overs(run_dir: Path) -> dict[int, str]:
    """Processes that have the run folder in their command line."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # gone meanwhile
            words = path.read_bytes().split(b"\0")
            if f"run.dir={run_dir}".encode() in words:
                found[int(path.parent.name)] = b" ".join(words[:4]).decode(errors="replace")
    return found


def end_left_overs(run_dir: Path, patience_s: float = 15) -> Iterable[str]:
    """Kills what is still there after a moment, and names it."""
    deadline = time.monotonic() + patience_s
    while left_overs(run_dir) and time.monotonic() < deadline:
        time.sleep(0.1)
    found = left_overs(run_dir)
    for number in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)
    return found.values()


def _folder(status: Mapping[str, object]) -> str:
    return f"step-{int(str(status.get('step', 0))):06d}"


def _expect(problems: list[str], is_so: bool, otherwise: str) -> None:
    if not is_so:
        problems.append(otherwise)
