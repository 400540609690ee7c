"""TensorBoard events of a run: the numbers of metrics.jsonl once more. They never end a run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


class TensorBoard:
    """Writes scalars; where it cannot, it says so once and tries again at every ``flush``.

    Args:
        folder: for the event files.
        first_step: readers drop what an earlier, longer attempt wrote from this step on.
        say: takes a line for people.
    """

    def __init__(self, folder: Path, first_step: int, say: Callable[[str], None]) -> None:
        self._folder, self._first_step, self._say = folder, first_step, say
        self._writer: Any = None
        self._last_step = first_step - 1
        self._is_failing = False
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            say(f"no TensorBoard events: {error}; metrics.jsonl has the same numbers")
            return
        self._open: Callable[..., Any] = SummaryWriter
        self._renew()

    def scalars(self, group: str, line: Mapping[str, Any], names: Sequence[str]) -> None:
        """Takes those fields of a line that are there and no null."""
        if self._writer is None:
            return
        try:
            for name in names:
                if line.get(name) is not None:
                    self._writer.add_scalar(f"{group}/{name}", line[name], line["step"])
            self._last_step = line["step"]
        except OSError as error:
            self._fail(error)

    def flush(self) -> None:
        """Puts the events so far into the file."""
        if self._writer is not None:
            try:
                self._writer.flush()
            except OSError as error:
                self._fail(error)
        elif self._is_failing:
            self._renew()

    def close(self) -> None:
        """Safe to call twice."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError):
                writer.close()

    def _renew(self) -> None:
        try:
            self._writer = self._open(log_dir=str(self._folder), purge_step=self._first_step)
            self._writer.flush()
        except OSError as error:
            self._fail(error)
            return
        if self._is_failing:
            self._is_failing = False
            self._say("TensorBoard events are written again")

    def _fail(self, error: OSError) -> None:
        self.close()
        self._first_step = self._last_step + 1  # of the next file: what was written stays
        if not self._is_failing:
            self._is_failing = True
            why = (error.strerror or str(error)).lower()
            self._say(f"{self._folder}: {why}; TensorBoard events are left out until there is room")
