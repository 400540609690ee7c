"""The hidden folder where a corpus is made, and which a second run finds again after a crash.

.NAME.preparing/
    lock            held (flock) by the one process, or rank 0, that writes here; says who it is
    plan.json       what is made: settings, tokenizer, version
    units.*         the units of work and the shards, by number (task_list.py)
    stdin-*         standard input as it was read
    parts/KEY/      finished parts (parts.py); names that begin with a dot are unfinished
    shards/         records of finished shards (assemble.py)
    out/            the corpus; renamed to NAME at the end
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from longpretrain.errors import InputError
from longpretrain.files import read_json_object, sync, told_as, write_atomically

PLAN = "plan.json"
_LOCK = "lock"
_MAX_NAME_BYTES = 200  # file systems take 255


class WorkFolder:
    """The folder of one corpus, which only one process at a time has.

    Attributes:
        path: where it is.
        parts, shards, out: its folders.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.parts = path / "parts"
        self.shards = path / "shards"
        self.out = path / "out"

    def make_folders(self) -> None:
        """Makes what is missing, and takes unfinished parts away."""
        for folder in (self.parts, self.shards, self.out):
            folder.mkdir(exist_ok=True)
        for unfinished in self.parts.glob(".*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def agree(self, facts: Mapping[str, str], shown: Mapping[str, str]) -> None:
        """Refuses the folder of another corpus; else writes down what this one is.

        Args:
            facts: what two runs must have in common to share parts.
            shown: how a user calls each of them.
        """
        path = self.path / PLAN
        if path.exists():
            found = read_json_object(path, way_out=_THROW_AWAY)
            differ = [shown[key] for key in facts if found.get(key) != facts[key]]
            if differ and any(self.parts.glob("[!.]*")):
                raise InputError(
                    f"unfinished corpus {self.path}",
                    got=f"parts made with another {', '.join(differ)}",
                    wanted="a new corpus, or the same again",
                    way_out=_THROW_AWAY,
                )
        write_atomically(path, json.dumps(dict(facts), indent=1) + "\n")

    def finished_parts(self) -> int:
        """How many parts would be lost with the folder."""
        return sum(1 for _ in self.parts.glob("[!.]*"))

    def become(self, target: Path, belongs: Callable[[Path], bool]) -> None:
        """Puts ``out`` in the place of the target, in one step; what stood there is removed.

        A process killed between the two renames leaves the old corpus, which was damaged, in the
        work folder, and a second run makes the new one's name.
        """
        old = self.path / "old"
        for folder in [*(p for p in self.out.rglob("*") if p.is_dir()), self.out]:
            sync(folder)
        refuse_foreign(target, belongs)
        with told_as(target, self.out):
            if target.exists() and any(target.iterdir()):
                target.rename(old)
            try:
                self.out.rename(target)
            except BaseException:
                if old.exists():
                    old.rename(target)
                raise
        sync(target.parent)
        self.remove()

    def remove(self) -> None:
        """Removes everything; the lock goes last, so that nobody comes in meanwhile."""
        for path in self.path.iterdir():
            if path.name == _LOCK:
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)


_THROW_AWAY = "Pass --restart to throw those parts away, or choose another --out."


def work_path(target: Path) -> Path:
    """Where a corpus is made: beside it, on the same disk.

    Raises:
        InputError: nothing can be beside the root, or beside a mount point on its disk.
    """
    name = target.name
    if name and target.is_mount():
        raise InputError(
            f"out {target}", got="a mount point, which no finished folder can be renamed to",
            wanted="a new or empty folder", way_out=f"Choose one in it: --out {target / 'corpus'}.",
        )  # fmt: skip
    if not name:
        raise InputError(
            f"out {target}", got="the root of all folders", wanted="a new or empty folder",
            way_out="Choose another --out.",
        )  # fmt: skip
    if len(os.fsencode(name)) > _MAX_NAME_BYTES:
        name = f"{name[:40]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"
    return target.with_name(f".{name}.preparing")


@contextlib.contextmanager
def open_work(target: Path, *, restart: bool, say: Callable[[str], None]) -> Iterator[WorkFolder]:
    """The work folder of a target, locked. It is kept after an error if it holds finished parts.

    Raises:
        InputError: another process has it.
    """
    path = work_path(target)
    with told_as(target, path):
        lock = _lock(path, target, say)
    work = WorkFolder(path)
    try:
        if restart:
            _restart(work)
        with told_as(target, path):
            work.make_folders()
            yield work
    finally:
        try:
            if _is_at(path / _LOCK, lock) and not work.finished_parts():
                work.remove()
        finally:
            os.close(lock)


def _restart(work: WorkFolder) -> None:
    for path in work.path.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


def _lock(path: Path, target: Path, say: Callable[[str], None]) -> int:
    """A descriptor that holds the lock: the system lets go of it when the process ends."""
    while True:
        path.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:
            continue  # its last owner has just removed it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            who = os.pread(descriptor, 200, 0).decode("utf-8", "replace").strip()
            os.close(descriptor)
            raise InputError(
                f"out {target}",
                got=f"another prepare at work on it ({who or 'just begun'})",
                wanted="one at a time",
                way_out="Wait for it, or choose another --out.",
            ) from error
        except OSError as error:
            reason = error.strerror
            say(f"no locks here ({reason}): see that no other prepare writes {target}")
        if _is_at(path / _LOCK, descriptor):
            break
        os.close(descriptor)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    os.ftruncate(descriptor, 0)
    os.pwrite(
        descriptor, f"{socket.gethostname()}, process {os.getpid()}, since {since}\n".encode(), 0
    )
    return descriptor


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one of that name: it may have been removed in between."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def refuse_foreign(target: Path, belongs: Callable[[Path], bool]) -> None:
    """Refuses to replace what is no corpus of ours.

    Raises:
        InputError: a file, or a folder with something else in it.
    """
    if not target.exists():
        return
    if target.is_dir() and (not any(target.iterdir()) or belongs(target)):
        return
    raise InputError(
        f"out {target}",
        got="a folder with other files" if target.is_dir() else "a file",
        wanted="no such folder yet",
        way_out="Choose another --out, or move it away.",
    )
