"""A process on this machine, watched from outside: whether it runs, is stopped, or how it ended."""

from __future__ import annotations

import os
import secrets
import signal
from pathlib import Path

_STATE, _PARENT, _EXIT_STATUS = 0, 1, 49
"""Of /proc/PID/stat, counted from the state on."""


class Watched:
    """A process that runs when this is made.

    Args:
        pid: its number.

    Raises:
        OSError: it has ended already.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.handle = os.pidfd_open(pid)
        """Readable from the process's end on. An epoll over several gives the order of ends."""
        self._stopped_since: float | None = None

    def how_it_ended(self) -> str:
        """In words, of one that has. Whoever started it may have taken the answer away already."""
        fields = _fields(self.pid)
        return in_words(int(fields[_EXIT_STATUS]) if fields and fields[_STATE] == "Z" else None)

    def stopped_s(self, now: float) -> float:
        """For how long it has been stopped (SIGSTOP, a debugger); 0 if it runs.

        Ctrl-Z at a terminal stops a run's launcher as well: that is a pause.
        """
        fields = _fields(self.pid)
        launcher = _fields(int(fields[_PARENT])) if fields else None
        is_paused = bool(launcher) and launcher is not None and launcher[_STATE] in "Tt"
        if not fields or fields[_STATE] not in "Tt" or is_paused:
            self._stopped_since = None
            return 0.0
        if self._stopped_since is None:
            self._stopped_since = now
        return now - self._stopped_since

    def forget_pause(self) -> None:
        """Time in which the watching process was stopped itself does not count."""
        self._stopped_since = None


def in_words(status: int | None) -> str:
    """How a process ended, by what ``waitpid`` would tell; None: nobody knows."""
    if status is None:
        return "died"
    number = status & 0x7F
    if not number:
        return f"ended with exit code {status >> 8}"
    try:
        return f"died of {signal.Signals(number).name}"
    except ValueError:
        return f"died of signal {number}"


def place() -> str:
    """Where process numbers mean the same: one boot of one machine, and one namespace of them."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    try:
        return boot.read_text(encoding="ascii").strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return secrets.token_hex(8)  # nobody else's


def _fields(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.rpartition(")")[2].split()
