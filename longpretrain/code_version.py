"""Which code runs here: hashes of what Python and the kernels were made from, and the git commit.

A version number does not tell a node whose checkout is a day older, or whose compiled library was
built from other sources; these hashes do.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from pathlib import Path

from longpretrain.attention import library_path
from longpretrain.files import sha256

_PACKAGE = Path(__file__).resolve().parent
_SHOWN = 12
"""Hexadecimal digits that tell two versions apart, and that a person can compare."""


@functools.cache
def code_version() -> dict[str, str]:
    """``code`` and ``library``, by hash, and ``commit`` where there is one.

    Read once, so that it stays what the process began with when a checkout changes under it.
    """
    commit = _commit(_PACKAGE.parent)
    return {
        "code": _hash_of_sources(_PACKAGE)[:_SHOWN],
        "library": _hash_of_library()[:_SHOWN],
        **({"commit": commit[:_SHOWN]} if commit else {}),
    }


def _hash_of_sources(package: Path) -> str:
    """Of the names and bytes of all that a package's behaviour is written in."""
    found = hashlib.sha256()
    for path in sorted([*package.rglob("*.py"), *package.rglob("*.yaml")]):
        content = path.read_bytes()
        name = path.relative_to(package).as_posix()
        found.update(f"{name}\0{len(content)}\0".encode())
        found.update(content)
    return found.hexdigest()


def _hash_of_library() -> str:
    """Of the compiled library that the attention loads; "none" where it runs without."""
    path = library_path()
    return sha256(path) if path and path.is_file() else "none"


def _commit(checkout: Path) -> str:
    """The commit that a checkout is at, or "": read by hand, as git may be missing on a node, or
    refuse another user's folder. It does not tell whether files were changed since: the hash does.
    """
    with contextlib.suppress(OSError, ValueError):
        git = checkout / ".git"
        if git.is_file():  # a worktree: the file names its folder
            git = checkout / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        shared = git / "commondir"
        common = git / shared.read_text(encoding="utf-8").strip() if shared.is_file() else git
        loose = common / name
        if loose.is_file():
            return loose.read_text(encoding="utf-8").strip()
        for line in (common / "packed-refs").read_text(encoding="utf-8").splitlines():
            if line.endswith(f" {name}"):
                return line.split()[0]
    return ""
