"""Where the blocks of a corpus are: built once, kept beside the shards, memory-mapped.

One file for each key (corpus, way of cutting, selection), written under a name of its own and
renamed, so that ranks may build it at the same time: they write the same bytes. A file that is
damaged, or of another key, is built again.

    8 bytes     length of the header, little-endian
    header      JSON in UTF-8: key, facts, and of each array its name, dtype and length; then spaces
    arrays      one after another, each at a multiple of 64 bytes from the start of the file
    32 bytes    sha256 of all before
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import uuid
import weakref
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from longpretrain.errors import tell

PREFIX = ".index-"
"""Names of index files in a corpus folder begin so; they are no part of the corpus."""
VERSION = 1
_ALIGNMENT = 64
_DIGEST = hashlib.sha256().digest_size
_LONG = 1_000_000
"""Documents whose index takes long enough to say so."""

Build = Callable[["IndexWriter"], Mapping[str, int]]
"""Writes the arrays and returns facts about them."""


class BlockIndex:
    """Memory-mapped arrays by name, and a few whole numbers about them."""

    def __init__(
        self, path: Path, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, int]
    ) -> None:
        self.path = path
        self.facts = dict(facts)
        self._arrays = dict(arrays)

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._arrays[name]

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker maps the file that this process has checked.
        return _map, (self.path,)


class IndexWriter:
    """Takes arrays piece by piece, in any order, without holding them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held = contextlib.ExitStack()
        self._parts: dict[str, BinaryIO] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}

    def append(self, name: str, values: NDArray[Any]) -> None:
        """Adds values at the end of an array; the first ones decide its type."""
        if name not in self._parts:
            self._dtypes[name] = values.dtype.newbyteorder("<")
            part = tempfile.TemporaryFile(dir=self._folder, prefix=PREFIX)  # noqa: SIM115
            self._parts[name] = self._held.enter_context(part)
        self._parts[name].write(values.astype(self._dtypes[name], copy=False).tobytes())

    def write(self, path: Path, key: str, facts: Mapping[str, int]) -> None:
        """Puts the arrays into one file."""
        arrays = []
        for name, part in self._parts.items():
            dtype = self._dtypes[name]
            arrays.append([name, dtype.str, part.tell() // dtype.itemsize])
            part.write(bytes(-part.tell() % _ALIGNMENT))
            part.seek(0)
        header = json.dumps({"key": key, "facts": dict(facts), "arrays": arrays}).encode()
        header += b" " * (-(8 + len(header)) % _ALIGNMENT)
        beginning = BytesIO(len(header).to_bytes(8, "little") + header)
        sha256 = hashlib.sha256()
        with path.open("wb") as file:
            for source in (beginning, *self._parts.values()):
                while data := source.read(1 << 20):
                    sha256.update(data)
                    file.write(data)
            file.write(sha256.digest())

    def close(self) -> None:
        """Removes the parts."""
        self._held.close()


def load_index(folder: Path, key: Mapping[str, object], documents: int, build: Build) -> BlockIndex:
    """The index of a key: the one beside the shards, or a new one.

    Where the folder cannot be written, the index is built into a temporary file of this process,
    and one line on standard error says so.

    Args:
        folder: of the corpus.
        key: everything that the index follows from; plain data.
        documents: of the corpus, for the line that a long wait begins with.
        build: writes the arrays.
    """
    text = json.dumps({"version": VERSION, **key}, sort_keys=True)
    path = folder / f"{PREFIX}{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    was_there = path.exists()  # asked first: another rank may put one there at any moment
    found = _read(path, text)
    if found:
        return found
    if was_there:
        tell(f"{path}: damaged, so it is built again")
    if documents >= _LONG:
        tell(f"{folder}: indexing the blocks of {documents:,} documents, once")
    try:
        return _build_beside(path, text, build)
    except OSError as error:
        private = Path(tempfile.gettempdir())
        reason = error.strerror or str(error)
        tell(f"{folder}: the index of its blocks cannot be kept there ({reason}): in {private}")
        return _build_private(private, text, build)


def _build_beside(path: Path, key: str, build: Build) -> BlockIndex:
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        _write(part, key, build)
        # Whoever was quicker wrote the same bytes and may have mapped them already.
        found = _read(path, key)
        if found:
            return found
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return _map(path)


def _build_private(folder: Path, key: str, build: Build) -> BlockIndex:
    descriptor, name = tempfile.mkstemp(prefix="longpretrain-index-", dir=folder)
    os.close(descriptor)
    try:
        _write(Path(name), key, build)
        index = _map(Path(name))
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    # Kept under its name for the workers of this process, which map it as well.
    weakref.finalize(index, Path(name).unlink, missing_ok=True)
    return index


def _write(path: Path, key: str, build: Build) -> None:
    writer = IndexWriter(path.parent)
    try:
        facts = build(writer)
        writer.write(path, key, facts)
    finally:
        writer.close()


def _read(path: Path, key: str) -> BlockIndex | None:
    """The index in a file, or None if it is not whole or not of this key."""
    try:
        if _is_whole(path) and _read_header(path)[0]["key"] == key:
            return _map(path)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _is_whole(path: Path) -> bool:
    left, sha256 = path.stat().st_size - _DIGEST, hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(min(max(left, 0), 1 << 20)):
            sha256.update(data)
            left -= len(data)
        return left == 0 and file.read() == sha256.digest()


def _read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the arrays begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(length)), 8 + length


def _map(path: Path) -> BlockIndex:
    tree, start = _read_header(path)
    # One map for all arrays.
    data = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    arrays = {}
    for name, dtype, length in tree["arrays"]:
        end = start + length * np.dtype(dtype).itemsize
        arrays[name] = data[start:end].view(dtype)
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
    return BlockIndex(path, arrays, tree["facts"])
