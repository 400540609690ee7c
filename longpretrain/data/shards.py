"""Token shards on disk: a folder of memory-mapped arrays and one manifest (docs/data_format.md).

    tokens-00000.bin    uint16 or uint32, little-endian: the ids of its documents, one after another
    tokens-00000.idx    int64, little-endian: where each document starts; first 0, last the count
    manifest.json       what the folder holds, with size and sha256 of every file

No special tokens are stored, so the length of a sequence can change without preparing again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from longpretrain.errors import InputError
from longpretrain.files import read_json_object, sha256

FORMAT = "longpretrain-tokens"
VERSION = 1
MANIFEST = "manifest.json"
SHARD_BYTES = 1 << 29
_WAY_OUT = "Run `longpretrain prepare` again: it rewrites damaged shards."
_DAMAGED = "Remove the folder and run `longpretrain prepare` again."
# A field's annotation -> what its JSON must be.
_JSON_TYPES: dict[str, type] = {
    "str": str, "int": int, "FileRecord": dict, "dict[str, str]": dict,
    "tuple[ShardRecord, ...]": list, "tuple[FileRecord, ...]": list,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """One file as it was written."""

    name: str
    bytes: int
    sha256: str


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
    shards: tuple[ShardRecord, ...]
    sources: tuple[FileRecord, ...] = ()
    """The files it was made from, by the name under the folder that was given."""
    settings: dict[str, str] = field(default_factory=dict)
    """How the files were read."""
    inputs_digest: str = ""
    """sha256 over sources, settings and tokenizer: equal when preparing again changes nothing."""

    @property
    def fingerprint(self) -> str:
        """Identity of the data, sha256 hex: tokenizer and every shard, not where they came from."""
        files = [(shard.bin.sha256, shard.idx.sha256) for shard in self.shards]
        text = json.dumps([FORMAT, VERSION, self.tokenizer_fingerprint, self.dtype, files])
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
        if found != (FORMAT, VERSION):
            raise InputError(
                str(path),
                got=f"format {found[0]} version {found[1]}",
                wanted=f"{FORMAT} version {VERSION}",
                way_out="Prepare the corpus with this version of longpretrain.",
            )
        try:
            values = _checked(cls, tree)
            if values["dtype"] not in ("uint16", "uint32"):
                raise ValueError(f"dtype {values['dtype']}")
            shards = tuple(_shard_record(entry, values["dtype"]) for entry in values.pop("shards"))
            sources = tuple(
                FileRecord(**_checked(FileRecord, entry)) for entry in values.pop("sources", ())
            )
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


class ShardWriter:
    """Writes documents into shards, a new one when the next document would pass shard_bytes.

    A document is never split; one that is larger than shard_bytes has a shard of its own.
    """

    def __init__(self, folder: Path, *, vocab_size: int, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._vocab_size = vocab_size
        self._dtype = dtype_for(vocab_size)
        self._max_tokens = shard_bytes // self._dtype.itemsize
        self._shards: list[ShardRecord] = []
        self._file: BinaryIO | None = None
        self._sha256 = hashlib.sha256()
        self._offsets = [0]

    def add(self, ids: NDArray[np.integer]) -> None:
        """Appends one document, not empty."""
        assert len(ids) and int(ids.max()) < self._vocab_size, "ids of this vocabulary, at least 1"
        if self._file and self._offsets[-1] + len(ids) > self._max_tokens:
            self._finish_shard()
        if not self._file:
            self._file = (self._folder / f"{self._name}.bin").open("wb", buffering=1 << 20)
            self._sha256 = hashlib.sha256()
            self._offsets = [0]
        data = ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._sha256.update(data)
        self._offsets.append(self._offsets[-1] + len(ids))

    def finish(self) -> tuple[ShardRecord, ...]:
        """Closes the last shard and returns the records of all."""
        if self._file:
            self._finish_shard()
        return tuple(self._shards)

    def close(self) -> None:
        """Closes the open file without finishing it: for the way out after an error."""
        if self._file:
            self._file.close()
            self._file = None

    @property
    def _name(self) -> str:
        return f"tokens-{len(self._shards):05d}"

    def _finish_shard(self) -> None:
        assert self._file
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        index = np.array(self._offsets, dtype="<i8").tobytes()
        with (self._folder / f"{self._name}.idx").open("wb") as file:
            file.write(index)
            file.flush()
            os.fsync(file.fileno())
        bin_record = FileRecord(
            name=f"{self._name}.bin",
            bytes=self._offsets[-1] * self._dtype.itemsize,
            sha256=self._sha256.hexdigest(),
        )
        idx_record = FileRecord(
            name=f"{self._name}.idx",
            bytes=len(index),
            sha256=hashlib.sha256(index).hexdigest(),
        )
        self._shards.append(
            ShardRecord(
                documents=len(self._offsets) - 1,
                tokens=self._offsets[-1],
                bin=bin_record,
                idx=idx_record,
            )
        )


@dataclass(frozen=True)
class Shard:
    """One memory-mapped shard of an open corpus."""

    tokens: NDArray[np.integer]
    offsets: NDArray[np.int64]
    first_token: int
    """Tokens of the corpus before this shard."""
    first_document: int
    """Documents of the corpus before this shard."""

    @property
    def num_documents(self) -> int:
        """Documents in this shard."""
        return len(self.offsets) - 1


class Corpus:
    """Documents of token ids, memory-mapped. Open one with ``Corpus.open``."""

    def __init__(self, folder: Path, manifest: Manifest, shards: Sequence[Shard]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.shards = tuple(shards)
        self.fingerprint = manifest.fingerprint
        self._first_documents = np.array([shard.first_document for shard in shards])

    @classmethod
    def open(cls, folder: Path | str, *, verify: Literal["size", "sha256"] = "size") -> Corpus:
        """Opens a folder that ``longpretrain prepare`` wrote.

        Args:
            folder: the corpus.
            verify: size checks that every file is there with its size, and the .idx files byte by
                byte; sha256 also reads every byte of the .bin files.

        Raises:
            InputError: no corpus, another version, an empty one, a truncated or altered file.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if manifest.tokens == 0:
            raise InputError(
                f"corpus {folder}",
                got="no tokens",
                wanted="at least one document with text",
                way_out="Prepare it from files that hold text.",
            )
        shards = []
        first_token = first_document = 0
        for record in manifest.shards:
            _check_file(folder, record.bin, read_all=verify == "sha256")
            # Small, and a wrong border would go unseen: it moves text from document to document.
            _check_file(folder, record.idx, read_all=True)
            shards.append(_map_shard(folder, manifest.dtype, record, first_token, first_document))
            first_token += record.tokens
            first_document += record.documents
        return cls(folder, manifest, shards)

    @property
    def num_documents(self) -> int:
        """Documents, none of them empty."""
        return self.manifest.documents

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, without special tokens."""
        return self.manifest.tokens

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer that wrote it."""
        return self.manifest.vocab_size

    @property
    def tokenizer_fingerprint(self) -> str:
        """``Tokenizer.fingerprint`` of the tokenizer that wrote it."""
        return self.manifest.tokenizer_fingerprint

    def __len__(self) -> int:
        return self.num_documents

    def document(self, number: int) -> NDArray[np.integer]:
        """The ids of a document: a read-only view into the file, without special tokens."""
        if not 0 <= number < self.num_documents:
            raise IndexError(number)
        shard = self.shards[int(np.searchsorted(self._first_documents, number, side="right")) - 1]
        start, end = shard.offsets[number - shard.first_document :][:2]
        return shard.tokens[start:end]

    def require_tokenizer(self, fingerprint: str, *, owner: str) -> None:
        """Checks that the corpus was written with a tokenizer.

        Args:
            fingerprint: ``Tokenizer.fingerprint`` of the tokenizer in use.
            owner: what uses it, for the message, such as ``model runs/demo/long``.

        Raises:
            InputError: it was written with another one, so its ids mean other words.
        """
        if fingerprint != self.tokenizer_fingerprint:
            raise InputError(
                f"corpus {self.folder}",
                got=f"ids of tokenizer {self.tokenizer_fingerprint[:12]}",
                wanted=f"tokenizer {fingerprint[:12]}, that of {owner}",
                way_out="Prepare the corpus with `--tokenizer` and the model's folder.",
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files itself; pickling the maps would copy the corpus.
        return Corpus.open, (self.folder,)


def _map_shard(
    folder: Path, dtype: str, record: ShardRecord, first_token: int, first_document: int
) -> Shard:
    tokens = np.memmap(folder / record.bin.name, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
    offsets = np.memmap(folder / record.idx.name, dtype="<i8", mode="r")
    counts = len(offsets) - 1, int(offsets[0]), int(offsets[-1]), len(tokens)
    is_rising = bool((np.diff(offsets) > 0).all())
    if counts != (record.documents, 0, record.tokens, record.tokens) or not is_rising:
        order = "" if is_rising else ", not rising"
        raise InputError(
            f"shard {folder / record.idx.name}",
            got=f"offsets {counts[1]} to {counts[2]} of {counts[0]} documents{order}",
            wanted=f"0 to {record.tokens} of {record.documents}, rising",
            way_out=_WAY_OUT,
        )
    return Shard(tokens, offsets, first_token, first_document)


def _check_file(folder: Path, record: FileRecord, *, read_all: bool) -> None:
    path = folder / record.name
    size = path.stat().st_size if path.is_file() else None
    if size != record.bytes:
        raise InputError(
            f"truncated shard {path}" if size is not None else f"missing shard {path}",
            got="no such file" if size is None else f"{size} bytes",
            wanted=f"{record.bytes} bytes",
            way_out=_WAY_OUT,
        )
    if read_all and (found := sha256(path)) != record.sha256:
        raise InputError(
            f"altered shard {path}",
            got=f"sha256 {found[:12]}",
            wanted=record.sha256[:12],
            way_out=_WAY_OUT,
        )


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
