"""A text file that a run appends to for days: trouble with its disk tears no line and ends no run.

Lines that could not be written are kept in memory and written, in order, as soon as there is room.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

MOST_KEPT = 16 << 20
"""Bytes kept in memory while the disk takes none: some ten thousand updates. What comes then is
lost, and counted."""
RETRY_S = 1.0
"""Between two attempts at a disk that refused."""


class LineFile:
    """Appends whole lines, each on the file at once; from any thread.

    Args:
        path: the file, made if missing; of a line that a crash cut short the rest stays away.
        tell: is told once that lines cannot be written, and once that they are again.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, tell: Callable[[str], None]) -> None:
        self.path = path
        self._tell = tell
        self._lock = threading.RLock()  # a signal handler may print in the middle of a print
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        self._descriptor: int | None = os.open(path, flags, 0o666)
        self._kept: list[bytes] = []
        self._kept_bytes, self._lost = 0, 0
        self._is_failing = False
        self._failed_at = 0.0
        size = os.fstat(self._descriptor).st_size
        if size and os.pread(self._descriptor, 1, size - 1) != b"\n":
            self._keep(b"\n")

    @property
    def descriptor(self) -> int:
        """For the system's own writers, such as faulthandler."""
        assert self._descriptor is not None, f"{self.path} is closed"
        return self._descriptor

    @property
    def is_closed(self) -> bool:
        return self._descriptor is None

    def write(self, text: str) -> None:
        """Adds lines; the last newline is set here. What is no UTF-8 is written with escapes."""
        with self._lock:
            if self._descriptor is None:
                return
            self._keep((text + "\n").encode("utf-8", errors="backslashreplace"))
            if not self._is_failing or time.monotonic() - self._failed_at >= RETRY_S:
                self._write_kept()

    def sync(self) -> None:
        """Makes the lines so far survive a crash of the machine, if the disk lets it.

        Other threads may write meanwhile: a disk can take seconds.
        """
        with self._lock:
            if self._descriptor is None:
                return
            self._write_kept()
            descriptor = os.dup(self._descriptor)
        try:
            os.fsync(descriptor)
        except OSError as error:
            with self._lock:
                self._failed(error)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Tries once more to write what is kept; safe to call twice."""
        with self._lock:
            if self._descriptor is None:
                return
            self._write_kept()
            if self._kept:
                lost = len(self._kept) + self._lost
                self._tell(f"{self.path}: closed without its last {lost} lines")
            os.close(self._descriptor)
            self._descriptor = None

    def _keep(self, line: bytes) -> None:
        if self._kept_bytes + len(line) > MOST_KEPT:
            self._lost += 1
            return
        self._kept.append(line)
        self._kept_bytes += len(line)

    def _write_kept(self) -> None:
        assert self._descriptor is not None
        if not self._kept:
            return
        size = None
        try:
            size = os.fstat(self._descriptor).st_size
            left = memoryview(b"".join(self._kept))
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError as error:
            if size is not None:
                with contextlib.suppress(OSError):  # no half of a line stays
                    os.ftruncate(self._descriptor, size)
            self._failed(error)
            return
        late, lost = len(self._kept), self._lost
        self._kept, self._kept_bytes, self._lost = [], 0, 0
        if self._is_failing:
            self._is_failing = False
            more = f", and {lost} are lost" if lost else ""
            self._tell(f"{self.path}: written again, {late} lines late{more}")

    def _failed(self, error: OSError) -> None:
        self._failed_at = time.monotonic()
        if self._is_failing:
            return
        self._is_failing = True
        why = (error.strerror or str(error)).lower()
        self._tell(
            f"{self.path}: {why}; its lines are kept in memory until there is room, up to "
            f"{MOST_KEPT >> 20} MiB; the run goes on"
        )
