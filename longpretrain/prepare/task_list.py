"""What each numbered task is to do, in a file: a worker reads its own entry and no other.

A corpus may have a million small files; a worker that held the list of them all would not be flat
in memory. NAME.jsonl has a line per task, NAME.idx where each begins (int64, one more at the end).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from longpretrain.errors import InputError


def write_tasks(folder: Path, name: str, entries: Iterable[Any]) -> int:
    """Writes the list anew; returns the number of tasks."""
    starts = [0]
    with (folder / f"{name}.jsonl").open("wb") as file:
        for entry in entries:
            starts.append(starts[-1] + file.write(json.dumps(entry).encode() + b"\n"))
    (folder / f"{name}.idx").write_bytes(np.array(starts, "<i8").tobytes())
    return len(starts) - 1


def read_task(folder: Path, name: str, number: int) -> Any:
    """One entry.

    Raises:
        InputError: this process, on another host than the first, does not see the list.
    """
    try:
        with (folder / f"{name}.idx").open("rb") as file:
            file.seek(8 * number)
            start, end = np.frombuffer(file.read(16), "<i8").tolist()
        with (folder / f"{name}.jsonl").open("rb") as file:
            file.seek(start)
            return json.loads(file.read(end - start))
    except FileNotFoundError as error:
        raise InputError(
            f"folder {folder.parent}",
            got="another folder at this rank than at rank 0",
            wanted="one that all nodes see",
            way_out="Give an --out on a shared file system.",
        ) from error
