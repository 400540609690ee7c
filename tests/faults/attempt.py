"""One start of a run's ranks, by a nursery or by a launcher: who they are, what they said, that all
of them end.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ranks_helper import ROOT, rank_environment

from faults.nursery import Nursery
from longpretrain.ranks import free_port

PLAIN, TORCHRUN, DEEPSPEED = "plain processes", "torchrun", "deepspeed"
WAYS = (PLAIN, TORCHRUN, DEEPSPEED)
_LEAD = {
    TORCHRUN: "torchrun --nproc-per-node RANKS --master-port PORT",
    DEEPSPEED: "deepspeed --quiet --num_accelerators RANKS --master_port PORT",
}
PATIENCE_S = 120.0
"""How long anything may take on a machine that is busy with other things."""


@dataclass
class Attempt:
    """Ranks of one start; use as a context manager: nothing is left running at its end."""

    run_dir: Path
    words: Sequence[str]
    nursery: Nursery
    way: str = PLAIN
    ranks: int = 2
    environment: dict[str, str] = field(default_factory=dict)
    output: Path = Path("-")
    """What they print; by default a file beside the run folder."""
    faults: dict[int, dict[str, object]] = field(default_factory=dict)
    """By rank, see hook.py; for plain processes."""
    _launcher: subprocess.Popen[bytes] | None = None
    _forked: dict[int, int] = field(default_factory=dict)
    _seen: set[int] = field(default_factory=set)

    def __enter__(self) -> Attempt:
        self.run_dir.parent.mkdir(parents=True, exist_ok=True)
        if self.output == Path("-"):
            self.output = self.run_dir.with_name(f"{self.run_dir.name}.txt")
        words = [*self.words, f"run.dir={self.run_dir}"]
        # A rank that is killed before it has reached the others is waited for; not so long here.
        join = {"LONGPRETRAIN_JOIN_TIMEOUT_S": "60"}
        environment = rank_environment() | join | self.environment
        port = str(free_port())
        if self.way == PLAIN:
            for rank in range(self.ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.ranks)}
                place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                self._forked[rank] = self.nursery.fork(
                    words, environment | own | place, self.output, self.faults.get(rank)
                )
            return self
        filled = {"RANKS": str(self.ranks), "PORT": port}
        lead = [filled.get(word, word) for word in f"{_LEAD[self.way]} launch.sh".split()]
        with self.output.open("ab") as output:
            self._launcher = subprocess.Popen(
                [*lead, *words],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill_all()

    def forked(self, rank: int) -> int:
        """The process of a rank of ours, be it there or not."""
        return self._forked[rank]

    def processes(self) -> dict[int, int]:
        """The process of each rank that is there now."""
        if self.way == PLAIN:
            return {rank: number for rank, number in self._forked.items() if is_alive(number)}
        found: dict[int, int] = {}
        for number in sorted(_of_run(self.run_dir), reverse=True):
            rank = _environment_of(number).get("RANK", "")
            if rank.isdecimal():
                found[int(rank)] = number  # the first of them, if a loader has workers
        self._seen |= set(found.values())
        return found

    def all_processes(self) -> set[int]:
        """Ranks, what they and their watchdogs started, and the launcher."""
        if self.way == PLAIN:
            ranks = set(self._forked.values())
            return _of_sessions(ranks) | _watchers(ranks)
        own = {self._launcher.pid} if self._launcher and self._launcher.poll() is None else set()
        return own | _of_run(self.run_dir) | _watchers(self._seen)

    def wait(self, timeout_s: float = PATIENCE_S) -> bool:
        """Whether every process has ended by then."""
        return until(lambda: not self.all_processes() and None not in self.codes(), timeout_s)

    def codes(self) -> list[int | None]:
        """Exit codes of the ranks; of the launcher alone, if there is one."""
        if self._launcher is not None:
            return [self._launcher.poll()]
        return [self.nursery.exit_code(number) for number in self._forked.values()]

    def kill_launcher(self) -> None:
        """Kills it alone; its ranks stay."""
        assert self._launcher is not None
        self._launcher.kill()

    def kill_all(self) -> set[int]:
        """Kills what is left, and says what that was."""
        found = self.all_processes()
        for number in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        until(lambda: not self.all_processes(), 20)
        if self._launcher is not None:
            self._launcher.wait(20)
        return found

    def said(self) -> str:
        """All that this and earlier attempts at the run printed."""
        if not self.output.is_file():  # they have only just been started
            return ""
        return self.output.read_text(encoding="utf-8", errors="replace")


def saving(recipe: Path, steps: int, every: int, *more: str) -> list[str]:
    """Words of a run that saves often, and says which samples each update took."""
    return [
        str(recipe),
        f"schedule.total_steps={steps}",
        f"checkpoint.every_steps={every}",
        "evaluate.every_steps=0",
        "log.sample_ids=true",
        *more,
    ]


def until(is_so: Callable[[], object], timeout_s: float, pause_s: float = 0.01) -> bool:
    """Asks often, for a while."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
    return True


def is_alive(number: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    text = of_proc(number, "stat").decode(errors="replace").rpartition(")")[2].split()
    return bool(text) and text[0] not in ("Z", "X")


def parent_of(number: int) -> int:
    """The process that started it, or took it over; 0 if it is gone."""
    text = of_proc(number, "stat").decode(errors="replace").rpartition(")")[2].split()
    return int(text[1]) if text else 0


def _of_sessions(sessions: set[int]) -> set[int]:
    found = set()
    for number in _all():
        text = of_proc(number, "stat").decode(errors="replace").rpartition(")")[2].split()
        if text and int(text[3]) in sessions and text[0] not in ("Z", "X"):
            found.add(number)
    return found


def _of_run(run_dir: Path) -> set[int]:
    """Processes that have the run folder in their command line."""
    word = f"run.dir={run_dir}".encode()
    return {number for number in _all() if word in of_proc(number, "cmdline").split(b"\0")}


def _watchers(ranks: set[int]) -> set[int]:
    """The watchdogs' processes of these ranks: in a session of their own, they name the rank's
    process in their command line.
    """
    wanted = [f'"pid": {number}, "dead_after_s"'.encode() for number in ranks]
    return {
        number
        for number in _all()
        if any(words in of_proc(number, "cmdline") for words in wanted) and is_alive(number)
    }


def _environment_of(number: int) -> dict[str, str]:
    words = of_proc(number, "environ").decode(errors="replace").split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def _all() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]  # noqa: PTH208


def of_proc(number: int, name: str) -> bytes:
    """What the system tells of a process; nothing if it is gone."""
    try:
        return Path(f"/proc/{number}/{name}").read_bytes()
    except OSError:
        return b""
