"""A unit of the inputs -> a part: a folder with the tokens of its documents, in the work folder.

    parts/KEY/
        SPLIT.bin       ids, as in a shard (SPLIT is tokens, train or valid)
        SPLIT.idx       int64: where each document starts, and the end
        SPLIT.hash      16 bytes a document, only where documents are told apart by their text
        SPLIT.places    a line a document: where it is from, only for --filter deduplicate
        problems.jsonl  what was left out
        part.json       counts, and the hashes of the files

The folder is made under another name and renamed, so it is whole or not there. KEY is a hash of all
that decides what is in it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longpretrain.data.manifest import PROBLEMS, dtype_for
from longpretrain.errors import InputError
from longpretrain.files import read_json_object, sync, write_atomically
from longpretrain.prepare.chunked import ChunkedFile, ChunkedWriter
from longpretrain.prepare.deduplicate import document_hash
from longpretrain.prepare.documents import Document, Problem, read_piece
from longpretrain.prepare.inputs import InputFile, Piece
from longpretrain.prepare.settings import Settings, digest
from longpretrain.prepare.task_list import read_task
from longpretrain.prepare.units import Unit
from longpretrain.prepare.workers import Tick

UNITS = "units"
"""Name of the list of tasks."""
PARTS = "parts"
_RECORD = "part.json"

# Text tokenized at a time: large against the cost of a call, small against memory.
_BATCH_CHARS = 1 << 20
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class Work:
    """What tasks share."""

    folder: Path
    settings: Settings

    def part(self, key: str) -> Path:
        """The folder of a part."""
        return self.folder / PARTS / key

    def finished_parts(self) -> set[str]:
        """Keys of all parts, of whatever inputs."""
        folder = self.folder / PARTS
        names = (path.name for path in folder.iterdir()) if folder.exists() else ()
        return {name for name in names if not name.startswith(".")}


@dataclass(frozen=True, kw_only=True)
class SplitRecord:
    """The documents of a part that belong to one corpus."""

    documents: int
    tokens: int
    files: Mapping[str, ChunkedFile]
    """By suffix: bin, idx, hash, places."""


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """A finished part."""

    key: str
    splits: Mapping[str, SplitRecord]
    pieces: tuple[tuple[int, int, str], ...]
    """Of the unit, in order: first byte, end, sha256 of the bytes as they were read."""
    empty_documents: int
    mended_documents: int
    problems: int
    problems_file: ChunkedFile | None
    """What was left out, if anything was."""
    filters: tuple[Mapping[str, Any], ...]
    on_error: str
    max_document_bytes: int

    @property
    def content(self) -> str:
        """Identity of what a corpus takes from it."""
        return digest([self.key, {name: asdict(split) for name, split in self.splits.items()}])

    def fits(self, settings: Settings) -> bool:
        """Whether these settings, which share its key, would make the same part."""
        read = settings.read
        if (self.on_error, self.max_document_bytes) == (read.on_error, read.max_document_bytes):
            return True
        # Without a fault in the text it does not matter what would have been done about one.
        is_clean = self.problems == self.mended_documents == 0
        return is_clean and self.max_document_bytes <= read.max_document_bytes

    def write(self, folder: Path) -> None:
        """Writes part.json."""
        write_atomically(folder / _RECORD, json.dumps(asdict(self)) + "\n")


def read_part(folder: Path) -> PartRecord:
    """A finished part.

    Raises:
        InputError, KeyError, TypeError: part.json is damaged.
    """
    tree = read_json_object(folder / _RECORD)
    splits = {
        name: SplitRecord(
            documents=split["documents"],
            tokens=split["tokens"],
            files={suffix: _file(file) for suffix, file in split["files"].items()},
        )
        for name, split in tree.pop("splits").items()
    }
    pieces = tuple((start, end, sha256) for start, end, sha256 in tree.pop("pieces"))
    problems = tree.pop("problems_file")
    return PartRecord(
        **tree | {"filters": tuple(tree["filters"])},
        splits=splits,
        pieces=pieces,
        problems_file=problems and _file(problems),
    )


def _file(tree: Mapping[str, Any]) -> ChunkedFile:
    return ChunkedFile(tree["bytes"], tuple(tree["sha256"]))


def find_part(folder: Path, settings: Settings) -> PartRecord | None:
    """A finished part that can be used again; its files are there with their sizes."""
    try:
        part = read_part(folder)
        for path, file in files_of(folder, part):
            if path.stat().st_size != file.bytes:
                return None
    except (InputError, KeyError, TypeError, ValueError, OSError):
        return None
    return part if part.fits(settings) else None


def file_of(folder: Path, split: str, suffix: str) -> Path:
    """A file of a part."""
    return folder / f"{split or 'tokens'}.{suffix}"


def files_of(folder: Path, part: PartRecord) -> Iterator[tuple[Path, ChunkedFile]]:
    """All files of a part but its record."""
    for name, split in part.splits.items():
        for suffix, file in split.files.items():
            yield file_of(folder, name, suffix), file
    if part.problems_file:
        yield folder / PROBLEMS, part.problems_file


def unit_entry(unit: Unit, files: Mapping[int, tuple[InputFile, int]], settings: Settings) -> Any:
    """A unit for the list of tasks, with the key of its part.

    Args:
        unit: pieces of some files.
        files: those files by number, each with the time of its last change.
        settings: decide the key.
    """
    used = {
        number: [
            str(file.path), file.name, file.bytes, file.kind, file.compression, changed,
        ]
        for number, (file, changed) in files.items()
    }  # fmt: skip
    pieces = [(used[p.file], p.start, p.end, p.row_groups) for p in unit.pieces]
    key = digest([settings.facts, pieces])[:32]
    return {"key": key, "unit": unit.to_json(), "files": used}


def make_part(work: Work, number: int, tick: Tick) -> PartRecord:
    """Makes the part of a unit: the task of the first phase.

    Raises:
        InputError: the input cannot be read, or has changed meanwhile.
    """
    entry = read_task(work.folder, UNITS, number)
    files = {int(number): values for number, values in entry["files"].items()}
    target = work.part(entry["key"])
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    fresh.mkdir()
    try:
        with ExitStack() as held:
            maker = _Maker(work.settings, fresh, tick, held)
            for piece in Unit.from_json(entry["unit"]).pieces:
                path, name, size, kind, compression, changed = files[piece.file]
                file = InputFile(Path(path), name, size, kind, compression)
                need_unchanged(file, changed)
                maker.read(file, piece)
                need_unchanged(file, changed)
            part = maker.finish(entry["key"])
        part.write(fresh)
        shutil.rmtree(target, ignore_errors=True)  # damaged, or of other settings
        fresh.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return part


def need_unchanged(file: InputFile, changed: int) -> None:
    """Refuses an input that another program writes to."""
    status = file.path.stat()
    if (status.st_size, status.st_mtime_ns) != (file.bytes, changed):
        raise InputError(
            file.shown,
            got="a file that has changed since the preparation began",
            wanted="a file that stays as it is",
            way_out="Run it again when nobody writes to it any more.",
        )


class _Maker:
    """Reads documents, makes tokens of them, and writes these as they come."""

    def __init__(self, settings: Settings, folder: Path, tick: Tick, held: ExitStack) -> None:
        self._settings = settings
        self._folder = folder
        self._tick = tick
        self._held = held
        self._tokenizer = settings.tokenizer()
        self._filters = settings.filters.start()
        self._writers = {
            name: _SplitWriter(folder, name, settings, held) for name in settings.split.names
        }
        self._batch: list[Document] = []
        self._batch_chars = 0
        self._pieces: list[tuple[int, int, str]] = []
        self._problems: ChunkedWriter | None = None
        self._problem_count = self._empty = self._mended = 0

    def read(self, file: InputFile, piece: Piece) -> None:
        sha256 = hashlib.sha256()

        def on_bytes(data: bytes) -> None:
            sha256.update(data)
            self._tick(len(data))

        for found in read_piece(file, piece, self._settings.read, on_bytes, self._folder):
            if isinstance(found, Problem):
                self._add_problem(found)
            else:
                self._add(found)
            del found  # may be large, and the next one too
        self._pieces.append((piece.start, piece.end, sha256.hexdigest()))

    def finish(self, key: str) -> PartRecord:
        self._encode()
        return PartRecord(
            key=key,
            splits={name: writer.finish() for name, writer in self._writers.items()},
            pieces=tuple(self._pieces),
            empty_documents=self._empty,
            mended_documents=self._mended,
            problems=self._problem_count,
            problems_file=self._problems.finish() if self._problems else None,
            filters=tuple(report.to_json() for report in self._filters.reports),
            on_error=self._settings.read.on_error,
            max_document_bytes=self._settings.read.max_document_bytes,
        )

    def _add_problem(self, problem: Problem) -> None:
        if not self._problems:
            self._problems = ChunkedWriter(self._folder / PROBLEMS)
            self._held.callback(self._problems.close)
        entry = {"place": problem.place, "reason": problem.reason}
        self._problems.write(json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        self._problem_count += 1

    def _add(self, document: Document) -> None:
        self._mended += document.mended
        if document.text:
            document = self._filters.clean(document)
        if not document.text:
            self._empty += 1
            return
        self._batch.append(document)
        self._batch_chars += len(document.text)
        if self._batch_chars >= _BATCH_CHARS or len(self._batch) == _BATCH_DOCUMENTS:
            self._encode()

    def _encode(self) -> None:
        ids = self._tokenizer.encode_batch([document.text for document in self._batch])
        for document, document_ids in zip(self._batch, ids, strict=True):
            if not len(document_ids):  # the tokenizer's normaliser may drop all there is
                self._empty += 1
            elif self._filters.keep(document, len(document_ids)):
                self._put(document, document_ids)
        for writer in self._writers.values():
            writer.flush()
        self._batch = []
        self._batch_chars = 0

    def _put(self, document: Document, ids: NDArray[np.integer]) -> None:
        if self._settings.needs_hashes:
            key = document_hash(document.text)
            self._writers[self._settings.split.of(key)].add(ids, key, document.place)
        else:
            (writer,) = self._writers.values()
            writer.add(ids)


class _SplitWriter:
    """The files of one split."""

    def __init__(self, folder: Path, name: str, settings: Settings, held: ExitStack) -> None:
        self._dtype = dtype_for(settings.vocab_size)
        self._vocab_size = settings.vocab_size
        suffixes = ["bin", "idx"]
        suffixes += ["hash"] if settings.needs_hashes else []
        suffixes += ["places"] if settings.filters.deduplicate else []
        self._files = {suffix: ChunkedWriter(file_of(folder, name, suffix)) for suffix in suffixes}
        for writer in self._files.values():
            held.callback(writer.close)
        self._documents = self._tokens = 0
        self._ids: list[NDArray[np.integer]] = []
        self._files["idx"].write(bytes(8))

    def add(self, ids: NDArray[np.integer], document_hash: bytes = b"", place: str = "") -> None:
        """Takes one document, not empty."""
        self._ids.append(ids)
        if document_hash:
            self._files["hash"].write(document_hash)
        if "places" in self._files:
            self._files["places"].write(place.replace("\n", " ").encode() + b"\n")

    def flush(self) -> None:
        """Writes what was taken."""
        if not self._ids:
            return
        for ids in self._ids:
            assert int(ids.max()) < self._vocab_size, "ids of this vocabulary"
            # As it lies in memory: a document may be large, and a copy of it as well.
            self._files["bin"].write(ids.astype(self._dtype, copy=False).data.cast("B"))
        ends = self._tokens + np.cumsum([len(ids) for ids in self._ids], dtype="<i8")
        self._files["idx"].write(ends.astype("<i8", copy=False).tobytes())
        self._documents += len(self._ids)
        self._tokens = int(ends[-1])
        self._ids = []

    def finish(self) -> SplitRecord:
        """Puts the files on the disk."""
        return SplitRecord(
            documents=self._documents,
            tokens=self._tokens,
            files={suffix: writer.finish() for suffix, writer in self._files.items()},
        )
