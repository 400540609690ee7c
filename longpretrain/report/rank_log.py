"""What one rank printed: ``logs/rank-00000.txt`` in the run folder, a part for each attempt.

Launchers mix the output of all ranks, or keep rank 0's alone; here each rank's own stands, with
the time of every line: what Python prints, warnings, tracebacks, and the stacks of all threads when
the system ends the process by a fatal signal such as SIGSEGV. What native code writes (NCCL_DEBUG)
does not pass here: it is in the launcher's output.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from longpretrain.errors import tell
from longpretrain.report.line_file import LineFile

FOLDER = "logs"
_MOST_BEFORE = 1000
"""Lines kept until the run folder is known to be ours."""


class RankLog:
    """Copies stdout and stderr while its block runs; a context manager.

    What was printed before ``begin`` is written then; a rank that is refused leaves no file.

    Args:
        rank: this process's number, which names the file.
        about: what the head line says beside time, rank, host and process.
    """

    def __init__(self, rank: int, about: str) -> None:
        self._rank, self._about = rank, about
        self._before: list[str] = []
        self._file: LineFile | None = None
        self._lock = threading.RLock()
        self._tees: dict[str, _Tee] = {}
        self._had_faulthandler = False

    def __enter__(self) -> Self:
        self._had_faulthandler = faulthandler.is_enabled()
        _enable_faulthandler()
        for name in ("stdout", "stderr"):
            self._tees[name] = _Tee(getattr(sys, name), self)
            setattr(sys, name, self._tees[name])
        now = _clock()
        self._before = [
            f"--- {now} UTC, rank {self._rank}: {self._about}; host {socket.gethostname()},"
            f" process {os.getpid()} ---"
        ]
        return self

    def begin(self, run_dir: Path) -> None:
        """Begins this attempt's part in the file; where it cannot, one line says so."""
        path = run_dir / FOLDER / f"rank-{self._rank:05d}.txt"
        with self._lock:
            try:
                path.parent.mkdir(exist_ok=True)
                self._file = LineFile(path, self._tell)
            except OSError as error:
                self._before = []
                why = (error.strerror or str(error)).lower()
                self._tell(f"{path}: {why}; no log of this rank")
                return
            self._file.write("\n".join(self._before))
            self._before = []
            faulthandler.enable(self._file.descriptor)

    def take(self, text: str) -> None:
        """One line, without its newline."""
        with self._lock:
            line = f"{_clock()} {text}"
            if self._file is not None:
                self._file.write(line)
            elif self._before and len(self._before) < _MOST_BEFORE:
                self._before.append(line)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for name, tee in self._tees.items():
            tee.end()
            if getattr(sys, name) is tee:
                setattr(sys, name, tee.stream)
        if error is not None:  # the command line may tell it in one line; here it is whole
            for line in "".join(traceback.format_exception(error)).splitlines():
                self.take(line)
        self.take("--- ends ---" if kind is None else f"--- ends by {kind.__name__} ---")
        faulthandler.disable()  # the file's number may soon be another file's
        if self._had_faulthandler:
            _enable_faulthandler()
        with self._lock:
            if self._file is not None:
                self._file.close()
            self._file, self._before = None, []

    def _tell(self, text: str) -> None:
        stream = self._tees["stderr"].stream
        with contextlib.suppress(OSError, ValueError):
            tell(f"rank {self._rank}: {text}", stream)


class _Tee:
    """A stream whose lines go to the log as well; all else of it is the stream's own."""

    def __init__(self, stream: TextIO, log: RankLog) -> None:
        self.stream = stream
        self._log: RankLog | None = log
        self._line = ""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        with self._lock:  # threads print, too
            log = self._log
            if log is not None:
                *whole, rest = (self._line + text).split("\n")
                # A bar on a terminal ends no line in days: what it wrote over is gone at once.
                self._line = _last_shown(rest) + "\r" * rest.endswith("\r")
                for line in whole:
                    log.take(_last_shown(line))
        return self.stream.write(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def end(self) -> None:
        """Hands over an unfinished line; from now on nothing is copied."""
        with self._lock:
            log, self._log = self._log, None
        if log is not None and _last_shown(self._line).strip():
            log.take(_last_shown(self._line))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _last_shown(line: str) -> str:
    """What a terminal shows in the end: a progress bar writes over itself."""
    return line.rstrip("\r").rpartition("\r")[2]


def _enable_faulthandler() -> None:
    """On the process's own stderr; where that is closed there is nowhere to tell."""
    with contextlib.suppress(OSError, ValueError, AttributeError, RuntimeError):
        faulthandler.enable(sys.__stderr__ or sys.stderr)


def _clock() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
