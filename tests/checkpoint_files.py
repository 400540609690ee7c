"""Checkpoints of small files for tests that look at folders and bytes, not at what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longpretrain.engine import checkpoint
from longpretrain.files import sha256

MISSING = object()
FILES = ("model.safetensors", "optimizer.safetensors", "config.json")


def make_checkpoint(run_dir: Path, name: str, *, latest: bool = False, **changes: Any) -> Path:
    """A whole checkpoint; ``changes`` to its state, MISSING takes a key away."""
    folder = run_dir / "checkpoints" / name
    folder.mkdir(parents=True)
    step = int("".join(filter(str.isdecimal, name)) or 500)
    hashes = {}
    for file in FILES:
        (folder / file).write_text(f"{file} {step}")
        hashes[file] = sha256(folder / file)
    counts = {"step": step, "samples_done": 8 * step, "skipped": 0, "updates_applied": step}
    state = {"format": checkpoint.FORMAT, **counts, "task": {"corpus": "c0ffee"}, "files": hashes}
    state |= changes
    left = {key: value for key, value in state.items() if value is not MISSING}
    (folder / checkpoint.STATE).write_text(checkpoint.sealed(left))
    if latest:
        checkpoint.point_at(run_dir, folder)
    return folder


def names(run_dir: Path) -> list[str]:
    """All there is beside the checkpoints."""
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*"))


def flip(path: Path, place: int, bits: int = 1) -> None:
    """Changes one byte of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= bits
    path.write_bytes(data)
