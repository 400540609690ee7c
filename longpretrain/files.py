"""Files and folders that a crash never leaves half-written: temporary name, fsync, rename."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from longpretrain.errors import InputError

PROBE = ".longpretrain-probe-"
_SHOWN = 40
"""Characters of a name that its temporary name shows: file systems take 255 bytes."""
_HEX = "[0-9a-f]" * 32


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replaces a file, whole or not at all; text is written in UTF-8, newlines as given."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    part = path.with_name(f".{path.name[:_SHOWN]}.{uuid.uuid4().hex}.part")
    try:
        with told_as(path, part):
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def remove_parts(path: Path) -> None:
    """Removes what a kill in the middle of ``write_atomically`` left beside a file. Only for who is
    the only one to write it.
    """
    for part in path.parent.glob(f".{glob.escape(path.name[:_SHOWN])}.{_HEX}.part"):
        with contextlib.suppress(OSError):
            part.unlink()


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


@contextlib.contextmanager
def told_as(path: Path, part: Path) -> Iterator[None]:
    """Lets an error of the system name the path that a user knows, not the temporary one."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:  # of a write, which knows no name
            error.filename = str(path)
        elif str(error.filename).startswith(str(part)):
            error.filename = str(path) + str(error.filename).removeprefix(str(part))
            if str(error.filename2) == error.filename:  # of the rename
                error.filename2 = None
        raise


def need_writable(folder: Path, *, what: str, way_out: str) -> None:
    """Writes and removes a file, in a folder or in the nearest one above it that exists.

    Permission bits alone do not tell: think of a read-only mount, a quota, or root on NFS.

    Raises:
        InputError: it cannot; ``what`` names the folder for the user.
    """
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        # Where the system can, the file has no name at all; who looks meanwhile ignores PROBE.
        with tempfile.TemporaryFile(dir=place, prefix=PROBE) as file:
            file.write(b"longpretrain")
    except OSError as error:
        within = "" if place == folder.absolute() else f" in {place}"
        raise InputError(
            f"{what} {folder}",
            got=f"{(error.strerror or str(error)).lower()}{within}",
            wanted="a place to write to",
            way_out=way_out,
        ) from error


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
    fresh = target.with_name(f".{target.name[:_SHOWN]}.new-{unique}")
    old = target.with_name(f".{target.name[:_SHOWN]}.old-{unique}")
    try:
        with told_as(target, fresh):
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
