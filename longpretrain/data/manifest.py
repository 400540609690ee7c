"""manifest.json: what a corpus folder holds, checked as it is read (docs/data_format.md)."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from longpretrain.errors import InputError
from longpretrain.files import read_json_object

FORMAT = "longpretrain-tokens"
VERSION = 2
READABLE = (1, 2)
"""Versions that can be read: 1 knows no pieces of sources, filters, problems and splits."""
MANIFEST = "manifest.json"
PROBLEMS = "problems.jsonl"
SHARD_BYTES = 1 << 29
_DAMAGED = "Remove the folder and run `longpretrain prepare` again."
# A field's annotation -> what its JSON must be.
_JSON_TYPES: dict[str, type] = {
    "str": str, "int": int, "FileRecord": dict, "dict[str, str]": dict,
    "tuple[ShardRecord, ...]": list, "tuple[SourceRecord, ...]": list,
    "tuple[PieceRecord, ...]": list, "tuple[dict[str, Any], ...]": list,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file as it was written."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class PieceRecord:
    """A stretch of an input file, from one byte to another."""

    start: int
    end: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SourceRecord:
    """An input file as it was read."""

    name: str
    """Below the folder that was given."""
    bytes: int
    sha256: str
    """Of the file; of one that was read in pieces, of their digests (32 bytes each) in a row."""
    pieces: tuple[PieceRecord, ...] = ()
    """In order, from the first byte to the last; empty for a file that was read as a whole."""


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """One pair of .bin and .idx."""

    documents: int
    tokens: int
    bin: FileRecord
    idx: FileRecord


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a corpus folder holds."""

    tokenizer_fingerprint: str
    vocab_size: int
    dtype: str
    documents: int
    tokens: int
    empty_documents: int = 0
    """Documents without text, which were skipped."""
    mended_documents: int = 0
    """Documents that ``--on-error replace`` changed."""
    problems: int = 0
    """Documents, or rests of files, that ``--on-error skip`` left out."""
    first_problems: tuple[dict[str, Any], ...] = ()
    """place and reason of the first of them; all of them are in problems.jsonl."""
    filters: tuple[dict[str, Any], ...] = ()
    """What each filter saw, dropped and changed, with examples."""
    split: str = ""
    """train or valid where the documents were split in two. The counts above, but for documents and
    tokens, are those of both together, and so are the sources."""
    shards: tuple[ShardRecord, ...]
    sources: tuple[SourceRecord, ...] = ()
    """The files it was made from."""
    settings: dict[str, str] = field(default_factory=dict)
    """How the files were read."""
    inputs_digest: str = ""
    """sha256 over sources, settings and tokenizer: equal when preparing again changes nothing."""

    @property
    def fingerprint(self) -> str:
        """Identity of the data, sha256 hex: tokenizer and every shard, not where they came from."""
        files = [(shard.bin.sha256, shard.idx.sha256) for shard in self.shards]
        # 1: the version of the arrays, which version 2 of the manifest did not change.
        text = json.dumps([FORMAT, 1, self.tokenizer_fingerprint, self.dtype, files])
        return hashlib.sha256(text.encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Writes manifest.json into the folder, durably."""
        tree = {"format": FORMAT, "version": VERSION, **asdict(self)}
        with (folder / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(tree, file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads manifest.json.

        Raises:
            InputError: there is none, it is of another version, or what it says cannot be: a key
                that is missing or of another type, a file that does not lie in the folder, sizes
                and counts that do not fit together.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise InputError(
                f"corpus {folder}",
                got="no manifest.json" if folder.is_dir() else "no such folder",
                wanted="a folder written by `longpretrain prepare`",
                way_out="Run `longpretrain prepare INPUT... --out DIR` first.",
            )
        tree = read_json_object(path, way_out=_DAMAGED)
        found = tree.pop("format", None), tree.pop("version", None)
        if found not in [(FORMAT, version) for version in READABLE]:
            raise InputError(
                str(path),
                got=f"format {found[0]} version {found[1]}",
                wanted=f"{FORMAT} version {' or '.join(map(str, READABLE))}",
                way_out="Prepare the corpus with this version of longpretrain.",
            )
        try:
            values = _checked(cls, tree)
            if values["dtype"] not in ("uint16", "uint32"):
                raise ValueError(f"dtype {values['dtype']}")
            shards = tuple(_shard_record(entry, values["dtype"]) for entry in values.pop("shards"))
            sources = tuple(_source_record(entry) for entry in values.pop("sources", ()))
            for key in ("filters", "first_problems"):
                values[key] = tuple(_checked_object(entry) for entry in values.pop(key, ()))
            counts = sum(s.documents for s in shards), sum(s.tokens for s in shards)
            if counts != (values["documents"], values["tokens"]):
                raise ValueError("counts that do not add up")
        except ValueError as error:
            raise InputError(
                str(path), got=error, wanted="the manifest of a corpus", way_out=_DAMAGED
            ) from error
        return cls(shards=shards, sources=sources, **values)


def dtype_for(vocab_size: int) -> np.dtype[Any]:
    """The smallest little-endian type that holds the ids of a vocabulary."""
    return np.dtype("<u2") if vocab_size < 1 << 16 else np.dtype("<u4")


def _shard_record(tree: object, dtype: str) -> ShardRecord:
    values = _checked(ShardRecord, tree)
    for key in ("bin", "idx"):
        values[key] = record = FileRecord(**_checked(FileRecord, values[key]))
        is_plain = record.name not in ("", "..") and Path(record.name).name == record.name
        if not is_plain or set(record.name) & set("\\\0"):
            raise ValueError(f"file name {record.name!r}, not that of a file in the folder")
    shard = ShardRecord(**values)
    sizes = shard.tokens * np.dtype(dtype).itemsize, 8 * (shard.documents + 1)
    if not 1 <= shard.documents <= shard.tokens or (shard.bin.bytes, shard.idx.bytes) != sizes:
        raise ValueError(f"counts that do not fit the sizes of {shard.bin.name}")
    return shard


def _source_record(tree: object) -> SourceRecord:
    values = _checked(SourceRecord, tree)
    pieces = [PieceRecord(**_checked(PieceRecord, entry)) for entry in values.pop("pieces", ())]
    borders = [0, *(piece.end for piece in pieces)]
    if pieces and (borders[:-1] != [p.start for p in pieces] or borders[-1] != values["bytes"]):
        raise ValueError(f"pieces of {values['name']!r:.40} that do not make up the file")
    return SourceRecord(**values, pieces=tuple(pieces))


def _checked_object(tree: object) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ValueError(f"a {type(tree).__name__} for an object")
    return tree


def _checked(record: type, tree: object) -> dict[str, Any]:
    """The keys of a JSON object, once they are a record's and each of its type, else ValueError."""
    if not isinstance(tree, Mapping):
        raise ValueError(f"a {type(tree).__name__} for a {record.__name__}")
    wanted = {f.name: f for f in fields(record)}
    required = {n for n, f in wanted.items() if f.default is f.default_factory is MISSING}
    if tree.keys() - wanted.keys() or required - tree.keys():
        raise ValueError(f"keys {sorted(tree)} for a {record.__name__}")
    for name, value in tree.items():
        kind = _JSON_TYPES[str(wanted[name].type)]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"{name} {value!r:.40}, no {kind.__name__}")
        if isinstance(value, int) and value < 0:
            raise ValueError(f"{name} {value}")
    return dict(tree)
