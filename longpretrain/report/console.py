"""What a run prints for people: one aligned line per logged update, and a bar on a terminal."""

from __future__ import annotations

import collections
import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO


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


class Console:
    """Aligned lines for people, on a stream and in log.txt, beside a progress bar on a terminal."""

    COLUMNS = (
        ("step", 5), ("done", 6), ("epoch", 7), ("loss", 8), ("bits", 8), ("lr", 7), ("norm", 8),
        ("tokens/s", 8), ("wait", 6), ("memory", 7), ("MFU", 6), ("ETA", 7),
    )  # fmt: skip
    """Headings and widths: bits per masked token, wait as a share of the time, peak memory."""

    def __init__(
        self, log_path: Path, *, total_steps: int, first_step: int | None, out: TextIO | None
    ) -> None:
        self._total_steps = total_steps
        self._out: TextIO | None = out or sys.stdout
        self._log = log_path.open(
            "w" if first_step is None else "a", encoding="utf-8", errors="backslashreplace"
        )  # a name that is not UTF-8 shall not stop a run
        self._has_header = False
        self._since_shown: list[dict[str, Any]] = []
        # (step, monotonic time) of the last updates: evaluations and checkpoints count in the ETA.
        self._recent: collections.deque[tuple[int, float]] = collections.deque(maxlen=64)
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
        self._recent.append((line["step"], time.monotonic()))
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
        print(text, file=self._log, flush=True)
        if self._out is None:
            return
        try:
            if self._bar is not None:
                self._bar.write(text, file=self._out)
            else:
                print(text, file=self._out, flush=True)
        except OSError as error:  # a closed terminal or pipe must not end a run of days
            self._out = None
            print(f"nothing more on the console: {error}", file=self._log, flush=True)

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
            self._eta(last),
        ]

    def _eta(self, last: Mapping[str, Any]) -> str:
        (first_step, start), (step, now) = self._recent[0], self._recent[-1]
        step_s = (now - start) / (step - first_step) if step > first_step else last["step_s"]
        return duration_text((self._total_steps - step) * step_s)

    def _aligned(self, cells: Sequence[str]) -> str:
        widths = [width for _, width in self.COLUMNS]
        widths[0] = max(widths[0], len(str(self._total_steps)))
        return " ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
