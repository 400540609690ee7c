"""A program run once: how long it took, the processor time, and the memory of each process.

Linux alone: it reads /proc.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PERIOD_S = 0.02


@dataclass(frozen=True)
class Ran:
    """What a program took."""

    wall_s: float
    cpu_s: float
    """User and system time of it and of all processes that it started and waited for."""
    peaks_mb: tuple[float, ...]
    """The most memory (VmHWM) that each of its processes had, the largest first."""
    output: str


class FailedError(Exception):
    """A program ended with an error."""


def run_measured(
    command: Sequence[object], *, env: Mapping[str, str] | None = None, folder: Path
) -> Ran:
    """Runs a program to its end.

    Args:
        command: its words.
        env: added to the environment.
        folder: where it runs, and where what it prints is kept.

    Raises:
        FailedError: it ended with a code other than 0.
    """
    words = [str(word) for word in command]
    peaks: dict[int, float] = {}
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    with out.open("wb") as out_file, err.open("wb") as err_file:
        started = time.perf_counter()
        process = subprocess.Popen(
            words, stdout=out_file, stderr=err_file, cwd=folder, env={**os.environ, **(env or {})}
        )
        while True:
            _look(process.pid, peaks)
            done, status, used = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            time.sleep(PERIOD_S)
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = err.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise FailedError(f"{' '.join(words[:3])}: code {process.returncode}: {said[-1:]}")
    return Ran(
        wall_s=wall_s,
        cpu_s=used.ru_utime + used.ru_stime,
        peaks_mb=tuple(sorted(peaks.values(), reverse=True)),
        output=out.read_text(encoding="utf-8", errors="replace"),
    )


def _look(pid: int, peaks: dict[int, float]) -> None:
    """Notes the peaks so far of a process and of those below it; one that has gone is left out."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text(encoding="ascii").split()
        ]
    except OSError:
        return
    _, found, rest = status.partition("VmHWM:")
    if found:  # not of a process that is ending
        peaks[pid] = max(peaks.get(pid, 0.0), int(rest.split()[0]) / 1000 * 1.024)
    for child in children:
        _look(child, peaks)
