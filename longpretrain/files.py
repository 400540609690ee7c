"""Files and folders that a crash never leaves half-written: temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from longpretrain.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: Path, text: str) -> None:
    """Replaces a text file (UTF-8, newlines as given): whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with part.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Puts a file's bytes, or a folder's names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The hash of a file, as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a safetensors file, readable by whom the umask lets; it is on the disk afterwards."""
    from safetensors.torch import save_file  # it needs torch, which data preparation does without

    path.touch()
    mode = path.stat().st_mode  # safetensors makes a file that its owner alone may read
    save_file(dict(tensors), path, metadata={"format": "pt"})
    path.chmod(mode)
    sync(path)


@contextlib.contextmanager
def fresh_folder(target: Path | str, *, belongs: Callable[[Path], bool]) -> Iterator[Path]:
    """A folder beside the target to write to; at the end it becomes the target, else it goes.

    Files are on the disk before the name is. A folder that stood there is renamed away first and
    removed last, so that no moment leaves a mixture of both.

    Args:
        target: the folder to make; its parents are made too.
        belongs: whether an existing, non-empty folder may be replaced.

    Raises:
        InputError: the target is a file, or a folder that does not belong to us.
    """
    target = Path(target).absolute()
    replaces = target.is_dir() and any(target.iterdir())
    if (target.exists() and not target.is_dir()) or (replaces and not belongs(target)):
        got = "a folder with other files" if target.is_dir() else "a file"
        raise InputError(
            str(target), got=got, wanted="no such folder yet",
            way_out="Choose another name, or move it away.",
        )  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.new-{os.getpid()}")
    old = target.with_name(f".{target.name}.old-{os.getpid()}")
    shutil.rmtree(fresh, ignore_errors=True)  # of a process that was killed, with this number
    try:
        fresh.mkdir()
        yield fresh
        for path in sorted(fresh.rglob("*")):
            sync(path)
        sync(fresh)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        sync(target.parent)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
