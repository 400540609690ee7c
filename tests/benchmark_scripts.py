"""Lets a test import the programs of benchmarks/."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@contextlib.contextmanager
def scripts_importable() -> Iterator[None]:
    """Scripts of one folder import each other by bare names, as Python lets the started one do."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield
    finally:
        sys.path.remove(str(BENCHMARKS))
