"""What stands at the output already: nothing, the corpus that is asked for, or something else."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from longpretrain.data.manifest import (
    MANIFEST,
    PROBLEMS,
    VERSION,
    Manifest,
    PieceRecord,
    SourceRecord,
)
from longpretrain.data.shards import Corpus
from longpretrain.errors import InputError
from longpretrain.files import read_json_object
from longpretrain.prepare.inputs import InputFile
from longpretrain.prepare.settings import Settings
from longpretrain.prepare.split import TRAIN, VALID

_OURS = re.compile(r"tokens-\d{5,}\.(bin|idx)|\.index-.+|" + re.escape(PROBLEMS))
_READ_BYTES = 1 << 20


def find_finished(
    out: Path, files: Sequence[InputFile], settings: Settings, workers: int
) -> Manifest | None:
    """The (first) manifest of an output that is up to date; None when there is something to do.

    Raises:
        InputError: something else stands there.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    folders = _folders(out)
    manifests = [Manifest.read(folder) for folder in folders]
    _need_version(folders[0])
    names = tuple(manifest.split for manifest in manifests)
    if names != settings.split.names or not _same_inputs(manifests[0], files, settings, workers):
        raise InputError(
            f"out {out}",
            got="a corpus of other inputs, settings or tokenizer",
            wanted="a new or empty folder",
            way_out="Choose another --out, or remove this folder first.",
        )
    try:
        for folder in folders:
            Corpus.open(folder, verify="sha256")
    except InputError:
        return None  # damaged: write it again
    if not all(map(_lists_problems, folders, manifests)):
        return None
    return manifests[0]


def is_corpus(folder: Path) -> bool:
    """Whether a folder holds a corpus of ours, whole or damaged, and nothing else."""
    if {path.name for path in folder.iterdir()} == {TRAIN, VALID}:
        return all(is_corpus(folder / name) for name in (TRAIN, VALID))
    try:
        Manifest.read(folder)
    except InputError:
        return False
    names = {path.name for path in folder.iterdir()} - {MANIFEST}
    return all(_OURS.fullmatch(name) for name in names)


def combined(digests: Sequence[str]) -> str:
    """The sha256 of a file that was read in pieces (docs/data_format.md)."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


def _lists_problems(folder: Path, manifest: Manifest) -> bool:
    """Whether problems.jsonl is what the manifest says of it."""
    path = folder / PROBLEMS
    if not manifest.problems:
        return not path.exists()
    try:
        with path.open("rb") as file:
            first = [json.loads(line) for line in islice(file, len(manifest.first_problems))]
            count = len(first) + sum(1 for _ in file)
    except (OSError, ValueError):
        return False
    return (first, count) == (list(manifest.first_problems), manifest.problems)


def _folders(out: Path) -> list[Path]:
    if out.is_dir():
        if (out / MANIFEST).is_file():
            return [out]
        if all((out / name / MANIFEST).is_file() for name in (TRAIN, VALID)):
            return [out / TRAIN, out / VALID]
    raise InputError(
        f"out {out}",
        got="something that is no corpus",
        wanted="a new or empty folder",
        way_out="Choose another --out.",
    )


def _need_version(folder: Path) -> None:
    version = read_json_object(folder / MANIFEST)["version"]
    if version != VERSION:
        raise InputError(
            f"out {folder}",
            got=f"a corpus of format version {version}",
            wanted=f"a new or empty folder: this version of longpretrain writes version {VERSION}",
            way_out="It can still be trained on as it is. Choose another --out to make it anew.",
        )


def _same_inputs(
    manifest: Manifest, files: Sequence[InputFile], settings: Settings, workers: int
) -> bool:
    """Reads all inputs if names and sizes are those of the manifest."""
    sources = manifest.sources
    if [(s.name, s.bytes) for s in sources] != [(file.name, file.bytes) for file in files]:
        return False
    if manifest.inputs_digest != settings.inputs_digest(sources):
        return False  # other settings: no need to read
    stretches = [
        (file.path, piece.start, piece.end)
        for file, source in zip(files, sources, strict=True)
        for piece in (source.pieces or [PieceRecord(start=0, end=file.bytes, sha256="")])
    ]
    with ThreadPoolExecutor(workers) as pool:  # hashing lets go of the interpreter's lock
        digests = iter(list(pool.map(lambda stretch: _sha256(*stretch), stretches)))
    found = [_found(source, digests) for source in sources]
    return manifest.inputs_digest == settings.inputs_digest(found)


def _found(source: SourceRecord, digests: Iterator[str]) -> SourceRecord:
    number = max(1, len(source.pieces))
    own = [next(digests) for _ in range(number)]
    return SourceRecord(name=source.name, bytes=source.bytes, sha256=combined(own))


def _sha256(path: Path, start: int, end: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while start < end and (data := file.read(min(_READ_BYTES, end - start))):
            digest.update(data)
            start += len(data)
    return digest.hexdigest()
