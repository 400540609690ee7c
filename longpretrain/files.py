"""Files and folders that a crash never leaves half-written: temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longpretrain.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def write_atomically(path: Path, text: str) -> None:
    """Replaces a text file (UTF-8, newlines as given): whole or not at all."""
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    with part.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync(path.parent)


def read_json_object(
    path: Path, *, way_out: str = "The file is damaged: get it again from where it came."
) -> dict[str, Any]:
    """A JSON object from a file in UTF-8.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(tree, dict):
            return tree
        got = f"a {type(tree).__name__}"
    except FileNotFoundError:
        got = "no such file"
    except (OSError, ValueError, RecursionError) as error:
        got = str(error)
    raise InputError(f"file {path}", got=got, wanted="a JSON object in UTF-8", way_out=way_out)


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
    removed last, so that no moment leaves a mixture of both. Only a process that is killed outright
    leaves a hidden folder behind, ``.NAME.new-...``; nothing removes it, for another host may be
    writing it.

    Args:
        target: the folder to make; its parents are made too, a link is followed.
        belongs: whether an existing, non-empty folder may be replaced; asked at the start and
            again just before it is.

    Raises:
        InputError: the target is a file, or a folder that does not belong to us.
    """
    target = Path(target).resolve()
    _refuse_foreign(target, belongs)
    target.parent.mkdir(parents=True, exist_ok=True)
    # A process number would not do: hosts that share the file system share the numbers.
    unique = uuid.uuid4().hex
    fresh = target.with_name(f".{target.name}.new-{unique}")
    old = target.with_name(f".{target.name}.old-{unique}")
    try:
        fresh.mkdir()
        yield fresh
        for path in sorted(fresh.rglob("*")):
            sync(path)
        sync(fresh)
        _refuse_foreign(target, belongs)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
        sync(target.parent)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _refuse_foreign(target: Path, belongs: Callable[[Path], bool]) -> None:
    if not target.exists():
        return
    if target.is_dir() and (not any(target.iterdir()) or belongs(target)):
        return
    got = "a folder with other files" if target.is_dir() else "a file"
    raise InputError(
        str(target), got=got, wanted="no such folder yet",
        way_out="Choose another name, or move it away.",
    )  # fmt: skip
