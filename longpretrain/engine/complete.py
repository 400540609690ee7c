"""The last part of a save: small files, the rename that makes a checkpoint, and ``latest``.

Rank 0 does it once every rank's tensors are on the disk. A kill at any moment leaves the old
checkpoint or the new one as the latest, and hidden folders that the next start removes.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longpretrain.engine import checkpoint, names, retention
from longpretrain.engine.task import Task
from longpretrain.files import sha256, sync


@dataclass(frozen=True, kw_only=True)
class Written:
    """What one rank has put on the disk."""

    hashes: Mapping[str, str] = field(default_factory=dict)
    """sha256 by file name."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes by file name."""
    tensors: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names of tensors by file name."""


def file_name(kind: str, rank: int, ranks: int) -> str:
    """Hugging Face's names for one file or for shards."""
    shard = f"-{rank + 1:05d}-of-{ranks:05d}" if ranks > 1 else ""
    return f"{kind}{shard}.safetensors"


def complete(
    part: Path, final: Path, task: Task, everyone: Sequence[Written], state: Mapping[str, Any]
) -> None:
    """Makes a checkpoint, the latest one, of a folder with every rank's tensors.

    Args:
        part: the hidden folder.
        final: the checkpoint's own name, beside it.
        task: writes the model's config and tokenizer.
        everyone: what each rank wrote.
        state: what state.json holds beside hashes and versions.

    Raises:
        OSError: of the system; what there was stays the latest.
    """
    _write_small_files(part, task, everyone, state)
    sync(part)
    latest = final.parent / names.LATEST
    pointer = final.with_name(f".{final.name}.latest.part")
    old = retention.hidden(final)
    shutil.rmtree(old, ignore_errors=True)
    try:
        # All that needs room is on the disk before the first rename.
        pointer.write_text(final.name + "\n", encoding="utf-8")
        sync(pointer)
        if final.exists():  # damaged, or of a time line that was left
            final.rename(old)
        part.rename(final)
        sync(final.parent)
        pointer.replace(latest)
        sync(final.parent)
    except OSError:
        if old.exists() and not final.exists():
            old.rename(final)
        raise
    finally:
        with contextlib.suppress(OSError):
            pointer.unlink()
    shutil.rmtree(old, ignore_errors=True)


def _write_small_files(
    part: Path, task: Task, everyone: Sequence[Written], state: Mapping[str, Any]
) -> None:
    files: dict[str, str] = {}
    owners: dict[str, str] = {}
    for written in everyone:
        _check_seen(part, written)
        files |= written.hashes
        owners |= {tensor: file for file, tensors in written.tensors.items() for tensor in tensors}
    for kind in ("model", "optimizer"):
        if len(everyone) > 1:
            total = sum((part / f).stat().st_size for f in files if f.startswith(kind))
            index = {
                "metadata": {"total_size": total},
                "weight_map": {t: f for t, f in sorted(owners.items()) if f.startswith(kind)},
            }
            text = json.dumps(index, indent=1)
            (part / f"{kind}.safetensors.index.json").write_text(text, encoding="utf-8")
    task.write_model_files(part)
    for path in sorted(part.iterdir()):
        if path.is_file() and path.name not in files:
            files[path.name] = sha256(path)
            sync(path)
    whole = {
        "format": checkpoint.FORMAT,
        **state,
        "versions": checkpoint.versions(),
        "files": files,
    }
    (part / checkpoint.STATE).write_text(checkpoint.sealed(whole), encoding="utf-8")
    sync(part / checkpoint.STATE)


def _check_seen(part: Path, written: Written) -> None:
    """Every rank's files must have arrived where rank 0 looks."""
    for name, size in written.sizes.items():
        found = (part / name).stat().st_size
        if found != size:
            raise OSError(errno.EIO, f"{found} bytes of {size} arrived", os.fspath(part / name))
