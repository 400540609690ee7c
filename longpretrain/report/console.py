"""What a run prints for people: one aligned line per logged update, and a bar on a terminal."""

from __future__ import annotations

import collections
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from longpretrain.errors import tell
from longpretrain.report.line_file import LineFile


def duration_text(seconds: float) -> str:
    """A time span for people: 42s, 3m12s, 1h02m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def count_text(number: float) -> str:
    """A count in at most five characters for people: 987, 12.3k, 140k, 1.2M."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 999.5 or unit == "T":
            break
        number /= 1000
    digits = 0 if unit == "" or abs(number) >= 99.95 else 1
    return f"{number:.{digits}f}{unit}"


class Eta:
    """How long the rest of a run takes: its updates, and the pauses between them.

    Args:
        total_steps: updates of the run.
        pause_every_steps: updates between the longest pauses (evaluations, checkpoints): one that
            comes early in an attempt is not taken for one after every update. 0: not known.
    """

    def __init__(self, total_steps: int, pause_every_steps: int) -> None:
        self._total_steps, self._every = total_steps, pause_every_steps
        self._step_s: collections.deque[float] = collections.deque(maxlen=64)
        self._first_step: int | None = None
        self._paused_s = 0.0
        self._last_at = 0.0

    def update(self, step: int, step_s: float) -> float:
        """Takes an update that has just ended; returns seconds until the last one has."""
        now = time.monotonic()
        if self._first_step is None:
            self._first_step = step
        else:
            if step == self._first_step + 1:
                self._step_s.clear()  # the first update of an attempt is slower than any other
            self._paused_s += max(0.0, now - self._last_at - step_s)
        self._last_at = now
        self._step_s.append(step_s)
        mean_s = sum(self._step_s) / len(self._step_s)
        return (self._total_steps - step) * (mean_s + self._pause_s(step, self._first_step))

    def _pause_s(self, step: int, first_step: int) -> float:
        """Mean pause before an update; pauses follow updates whose number ``every`` divides."""
        if not self._every:
            return self._paused_s / max(1, step - first_step)
        periods = (step - 1) // self._every - (first_step - 1) // self._every
        return self._paused_s / (periods * self._every or max(step - first_step, 1))


class Console:
    """Aligned lines for people, on a stream and in log.txt, beside a progress bar on a terminal."""

    COLUMNS = (
        ("step", 5), ("done", 6), ("epoch", 7), ("loss", 8), ("bits", 8), ("lr", 7), ("norm", 8),
        ("tokens/s", 8), ("wait", 6), ("memory", 7), ("MFU", 6), ("ETA", 7),
    )  # fmt: skip
    """Headings and widths: bits per masked token, wait as a share of the time, peak memory."""

    def __init__(
        self,
        log_path: Path,
        *,
        total_steps: int,
        first_step: int | None,
        pause_every_steps: int = 0,
        out: TextIO | None,
    ) -> None:
        self._total_steps = total_steps
        self._out: TextIO | None = out or sys.stdout
        self._log = LineFile(log_path, self._show)
        self._has_header = False
        self._since_shown: list[dict[str, Any]] = []
        self._eta = Eta(total_steps, pause_every_steps)
        self._left_s = 0.0
        self._bar: Any = None
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total_steps,
                initial=first_step or 0,
                unit="step",
                leave=False,
                dynamic_ncols=True,
            )

    def update(self, line: dict[str, Any], *, is_shown: bool) -> None:
        """Takes a train line in; loss and speed of a shown line are means since the last one."""
        self._since_shown.append(line)
        self._left_s = self._eta.update(line["step"], line["step_s"])
        if self._bar is not None:
            self._bar.update(line["step"] - self._bar.n)
        if not is_shown:
            return
        if not self._has_header:
            self._has_header = True
            self.say(self._aligned([name for name, _ in self.COLUMNS]))
        self.say(self._aligned(self._cells(self._since_shown)))
        self._since_shown = []

    def say(self, text: str) -> None:
        """One line, above the bar if there is one."""
        self._log.write(text)
        self._show(text)

    def _show(self, text: str) -> None:
        if self._out is None:
            return
        try:
            if self._bar is not None:
                self._bar.write(text, file=self._out)
            else:
                tell(text, self._out)
        except OSError as error:  # a closed terminal or pipe must not end a run of days
            self._out = None
            self._log.write(f"nothing more on the console: {error}")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._log.close()

    def _cells(self, lines: Sequence[Mapping[str, Any]]) -> list[str]:
        last = lines[-1]
        scored = [line for line in lines if line["loss"] is not None]
        masked_tokens = sum(line["masked_tokens"] for line in scored)
        loss = math.nan
        if masked_tokens:
            loss = sum(line["loss"] * line["masked_tokens"] for line in scored) / masked_tokens
        seconds = sum(line["step_s"] for line in lines) or math.inf
        norm = last["grad_norm"]
        return [
            str(last["step"]),
            f"{last['step'] / self._total_steps:.1%}",
            f"{last['epoch']:.3f}" if isinstance(last["epoch"], float) else str(last["epoch"]),
            f"{loss:.4f}",
            f"{loss / math.log(2):.4f}",
            f"{last['lr']:.1e}",
            "-" if norm is None else f"{norm:.3f}" if norm < 1000 else f"{norm:.1e}",
            count_text(sum(line["tokens"] for line in lines) / seconds),
            f"{sum(line['data_wait_s'] for line in lines) / seconds:.1%}",
            count_text(last["memory_peak_mb"] * 1e6) + "B",
            "-" if last["mfu"] is None else f"{last['mfu']:.1%}",
            duration_text(self._left_s),
        ]

    def _aligned(self, cells: Sequence[str]) -> str:
        widths = [width for _, width in self.COLUMNS]
        widths[0] = max(widths[0], len(str(self._total_steps)))
        return " ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
