"""A save under way: what its thread does, how it went, and what its rank tells the others."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from longpretrain.engine.complete import Written
from longpretrain.engine.gather import GatherError
from longpretrain.engine.names import NO_ROOM

CALLED_OFF = "called off"


class CalledOffError(Exception):
    """Another rank failed, or the run ends: what this thread writes is of no use."""


@dataclass
class Job:
    """What a thread does, and how it went."""

    thread: threading.Thread | None = None
    written: Written = field(default_factory=Written)
    problems: list[str] = field(default_factory=list)
    """Of no consequence for the checkpoint, such as an old one that cannot be removed."""
    error: Exception | None = None
    done_bytes: int = 0

    @property
    def is_busy(self) -> bool:
        """Whether its thread runs."""
        return self.thread is not None and self.thread.is_alive()

    def add(self, size: int) -> None:
        """Bytes more that were moved or written."""
        self.done_bytes += size

    def need_gathered(self) -> None:
        """Raises what broke the exchange between the ranks: no rank can agree on how to go on."""
        if isinstance(self.error, GatherError):
            raise self.error


@dataclass
class Save:
    """One save under way, from its beginning to the renamed folder."""

    state: Mapping[str, Any]
    part: Path
    final: Path
    began: float
    phase: Literal["writing", "completing"] = "writing"
    job: Job = field(default_factory=Job)
    waited_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Told:
    """What a rank tells the others at the end of a phase."""

    written: Written = field(default_factory=Written)
    problem: str = ""
    is_bug: bool = False
    is_full: bool = False
    has_overflowed: bool = False


def told(job: Job) -> Told:
    """Of a job that is over."""
    error = job.error
    if error is None:
        return Told(written=job.written)
    return Told(
        problem=_text(error),
        is_bug=not isinstance(error, OSError | CalledOffError | FloatingPointError),
        has_overflowed=isinstance(error, FloatingPointError),
        is_full=isinstance(error, OSError) and error.errno in NO_ROOM,
    )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number of it is an infinity or a NaN. By numpy, which takes one processor: torch
    would take those of the training beside it.
    """
    return bool(np.isfinite(tensor.detach().float().cpu().numpy()).all())


def _text(error: Exception) -> str:
    if isinstance(error, CalledOffError):
        return CALLED_OFF
    if isinstance(error, FloatingPointError):
        return str(error)
    if isinstance(error, OSError) and error.errno:
        where = f": {error.filename}" if error.filename else ""
        return f"{os.strerror(error.errno).lower()}{where}"
    return f"{type(error).__name__}: {error}"
