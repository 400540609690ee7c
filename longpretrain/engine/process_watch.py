"""A process on this machine, watched from outside: whether it runs, is stopped, or how it ended."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import select
import signal
import threading
import time
from pathlib import Path

_STATE, _PARENT, _EXIT_STATUS = 0, 1, 49
"""Of /proc/PID/stat, counted from the state on."""
_LOOK_S = 0.05


class Watched:
    """A process of this machine.

    Args:
        pid: its number.
        is_parent: whether it started this process; then one that has ended is watched, too.

    Raises:
        OSError: it has ended already, and is not the parent.
    """

    def __init__(self, pid: int, *, is_parent: bool = False) -> None:
        self.pid = pid
        self._stopped_since: float | None = None
        self.is_paused = False
        """Whether ``stopped_s`` last saw it stopped together with its launcher."""
        self.handle = _parent_handle(pid) if is_parent else _handle(pid)
        """Readable from the process's end on. An epoll over several gives the order of ends."""

    @property
    def has_ended(self) -> bool:
        """Whether it has."""
        return bool(select.select([self.handle], [], [], 0)[0])

    def ends_within(self, patience_s: float) -> bool:
        """Waits for its end."""
        return bool(select.select([self.handle], [], [], max(0.0, patience_s))[0])

    def kill(self) -> None:
        """Ends it, even if it is stopped."""
        if not self.has_ended:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)

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
        is_stopped = fields is not None and fields[_STATE] in "Tt"
        self.is_paused = is_stopped and launcher is not None and launcher[_STATE] in "Tt"
        if not is_stopped or self.is_paused:
            self._stopped_since = None
            return 0.0
        if self._stopped_since is None:
            self._stopped_since = now
        return now - self._stopped_since

    def forget_pause(self) -> None:
        """Time in which the watching process was stopped itself does not count."""
        self._stopped_since = None


def _parent_handle(pid: int) -> int:
    """A descriptor that is readable once the parent has ended, which it may have done before."""
    with contextlib.suppress(ProcessLookupError):
        handle = _handle(pid)
        if os.getppid() == pid:
            return handle
        os.close(handle)  # the number is another's by now
    reader, writer = os.pipe()
    os.close(writer)
    return reader


def _handle(pid: int) -> int:
    """A descriptor that is readable once the process has ended."""
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno != errno.ENOSYS:  # Linux before 5.3
            raise
    if not runs(pid):
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
    reader, writer = os.pipe()

    def look() -> None:
        while runs(pid):
            time.sleep(_LOOK_S)
        os.close(writer)

    threading.Thread(target=look, daemon=True).start()
    return reader


def runs(pid: int) -> bool:
    """Whether a process of this machine does; one that ended and was not waited for does not."""
    fields = _fields(pid)
    return fields is not None and fields[_STATE] != "Z"


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
