"""Ranks that work and meet with an accident; forked from one process, as imports cost seconds.

    python tests/watchdog_ranks.py < SCENES

A scene is a line of JSON: folder, ranks, at (the rank that has the accident), accident, step, and
dead_after_s and hung_after_s of the watchdog. Of each rank the folder gets out-N.txt; when all have
ended, a line of JSON with their exit codes, their pids, and the seconds that each took from the
accident on, goes to standard output.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from longpretrain.config import WatchdogConfig
from longpretrain.engine import run_folder
from longpretrain.engine.watchdog import Watchdog
from longpretrain.ranks import Ranks, free_port

STEPS = 60
PAUSED = {"pause of all": (False, True), "pause by Ctrl-Z": (True, False)}
"""Accident -> whether the launcher is stopped, and whether the sentinels are, besides the ranks."""


def accident(kind: str, scene: dict[str, Any]) -> None:
    """What happens to one rank."""
    (Path(scene["folder"]) / "accident").touch()
    if kind.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[kind])
    elif kind == "leave":
        os._exit(0)
    elif kind == "error":
        raise OSError(5, "Input/output error")
    elif kind == "hang":
        time.sleep(3600)
    elif kind == "hang in C":
        library, lock = ctypes.PyDLL(None), ctypes.create_string_buffer(64)
        library.sem_init(lock, 0, 0)
        library.sem_wait(lock)  # holds the interpreter, and no signal ends it
    elif kind in PAUSED:
        for _ in range(50):  # a second of its own time, most of it after the pause
            time.sleep(0.02)
    elif kind == "busy in C":
        ctypes.PyDLL(None).usleep(int(2.5e6 * scene["dead_after_s"]))
    elif kind in ("sentinel", "node"):
        sentinel = sentinel_of(os.getpid())
        # Rank 0's has its listener, its own end, and one for each rank.
        while not is_connected(sentinel, sockets=2 + scene["ranks"] if scene["at"] == 0 else 1):
            time.sleep(0.1)
        time.sleep(0.5)  # until the hub has seen it, too
        os.kill(sentinel, signal.SIGKILL)
        if kind == "node":
            os.kill(os.getpid(), signal.SIGKILL)


def pause(pids: list[int], scene: dict[str, Any]) -> None:
    """Stops all once a rank waits for it, for longer than ranks may stand still, in a process of
    its own.
    """
    launcher = os.getpid()
    if os.fork():
        return
    try:
        os.setsid()  # who ends the launcher and the ranks must not leave sentinels stopped
        os.close(1)
        deadline = time.monotonic() + 60
        while not (Path(scene["folder"]) / "accident").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        with_launcher, with_sentinels = PAUSED[scene["accident"]]
        sentinels = [sentinel_of(pid) for pid in pids]
        group = [launcher] * with_launcher + pids + sentinels * with_sentinels
        for pid in group:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(scene["hung_after_s"] + 1)
        for pid in reversed(group):  # sentinels look before their ranks go on
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
    finally:
        os._exit(0)


def sentinel_of(pid: int) -> int:
    """The number of a rank's: it is the only child."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    return int(children.split()[0])


def is_connected(sentinel: int, *, sockets: int) -> bool:
    """Whether a sentinel has reached its hub; that of rank 0 listens, connects and accepts."""
    with contextlib.suppress(OSError):  # descriptors come and go
        links = [str(path.readlink()) for path in Path(f"/proc/{sentinel}/fd").iterdir()]
        return sum("socket" in link for link in links) >= sockets
    return False


def run_rank(ranks: Ranks, scene: dict[str, Any]) -> None:
    """One rank up to the end of all steps."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ranks.master_port)}
    dist.init_process_group("gloo", rank=ranks.rank, world_size=ranks.world_size)
    run_dir = Path(scene["folder"])
    if ranks.is_first:
        run_folder.write_status(run_dir, "running", reason="test", step=0)
    dist.barrier()
    settings = WatchdogConfig(
        dead_after_s=scene["dead_after_s"], hung_after_s=scene["hung_after_s"]
    )
    with Watchdog(ranks, settings) as watchdog:
        if scene["accident"] == "signals":  # launchers send them to all they find
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
                os.kill(sentinel_of(os.getpid()), number)
        if scene["accident"] in PAUSED:  # all sentinels are there, as in a run that goes on
            while not watchdog.is_up:
                time.sleep(0.01)
            dist.barrier()
        watchdog.opened(run_dir)
        with watchdog.telling():
            for step in range(1, STEPS + 1):
                watchdog.mark(f"step {step}: batch")
                if step == scene["step"] and ranks.rank == scene["at"]:
                    accident(scene["accident"], scene)
                if step == scene["step"] and scene["accident"] == "all fail":
                    raise FloatingPointError("too many updates without effect")
                watchdog.mark(f"step {step}: forward and backward")
                dist.all_reduce(torch.ones(1))
                time.sleep(0.03)
            dist.barrier()
    print("through", flush=True)
    dist.destroy_process_group()


def fork_rank(rank: int, port: int, scene: dict[str, Any]) -> int:
    """A process of its own for one rank."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(Path(scene["folder"]) / f"out-{rank}.txt", os.O_CREAT | os.O_WRONLY, 0o644)
        os.dup2(out, 1)
        os.dup2(out, 2)
        torch.set_num_threads(1)
        run_rank(Ranks(rank=rank, world_size=scene["ranks"], master_port=port), scene)
        code = 0
    except BaseException as error:
        print(f"raised {type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def play(scene: dict[str, Any]) -> dict[str, Any]:
    """Starts the ranks of a scene and waits for all."""
    port = free_port()
    pids = {fork_rank(rank, port, scene): rank for rank in range(scene["ranks"])}
    if scene["accident"] in PAUSED:
        pause(list(pids), scene)
    codes: dict[int, int] = {}
    ended: dict[int, float] = {}
    struck: float | None = None
    deadline = time.monotonic() + 60
    while len(codes) < len(pids) and time.monotonic() < deadline:
        if struck is None and (Path(scene["folder"]) / "accident").exists():
            struck = time.monotonic()
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            codes[pids[pid]] = os.waitstatus_to_exitcode(status)
            ended[pids[pid]] = time.monotonic() - (struck or time.monotonic())
        time.sleep(0.01)
    for pid, rank in pids.items():
        if rank not in codes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    count = range(scene["ranks"])
    return {
        "codes": [codes.get(rank) for rank in count],
        "seconds": [ended.get(rank) for rank in count],
        "pids": list(pids),
    }


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(play(json.loads(line))), flush=True)
