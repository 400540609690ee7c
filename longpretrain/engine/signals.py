"""Signals that ask a run to stop: it finishes the update, writes a checkpoint, and exits with 75.

SIGUSR1 or SIGUSR2 is Slurm's warning before preemption or the time limit, SIGTERM a launcher's or
scancel's, SIGINT a person's Ctrl-C. A second Ctrl-C stops at once, without a checkpoint; one that
follows within two seconds is taken for an echo of the first.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
ECHO_S = 2.0
"""At a terminal one Ctrl-C reaches a rank twice: from the terminal and from its launcher."""


class StopRequest:
    """Remembers the first signal that asked to stop; use as a context manager around the loop."""

    def __init__(self) -> None:
        self.signal_name = ""
        self._before: dict[signal.Signals, object] = {}
        self._interrupted_at: float | None = None

    def __enter__(self) -> StopRequest:
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @property
    def asked(self) -> bool:
        """Whether this process was asked; the loop agrees on it with the other ranks."""
        return bool(self.signal_name)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at is None:
                self._interrupted_at = now
            elif now - self._interrupted_at > ECHO_S:
                raise KeyboardInterrupt
        self.signal_name = self.signal_name or signal.Signals(number).name
