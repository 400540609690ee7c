"""What the corpora are to hold -> their manifests, and the list of what was left out of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from longpretrain.data.manifest import (
    PROBLEMS,
    Manifest,
    PieceRecord,
    ShardRecord,
    SourceRecord,
    dtype_for,
)
from longpretrain.errors import InputError
from longpretrain.files import sync
from longpretrain.prepare.filters import FilterReport
from longpretrain.prepare.finished import combined
from longpretrain.prepare.inputs import InputFile
from longpretrain.prepare.parts import PartRecord, Work
from longpretrain.prepare.units import Unit

_SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Corpora:
    """Finished shards."""

    shards: Mapping[str, Sequence[ShardRecord]]
    """By split."""
    filters: Sequence[FilterReport]


def need_text(work: Work, parts: Sequence[PartRecord], files: Sequence[InputFile]) -> None:
    """Refuses a corpus without documents.

    Raises:
        InputError: says what became of them.
    """
    counts = {
        name: sum(part.splits[name].documents for part in parts)
        for name in work.settings.split.names
    }
    if all(counts.values()):
        return
    if any(counts.values()):
        (empty,) = (name for name, count in counts.items() if not count)
        raise InputError(
            f"{empty} documents",
            got=f"none of {sum(counts.values())}",
            wanted="at least one for training and one for validation",
            way_out="Choose another --valid, or give more documents.",
        )
    became = [f"{sum(part.empty_documents for part in parts)} empty documents"]
    problems = sum(part.problems for part in parts)
    if problems:
        first = json.loads(next(_problems(work, parts)))
        became.append(f"{problems} left out, the first at {first['place']}: {first['reason']}")
    dropped = sum(report["dropped"] for part in parts for report in part.filters)
    if dropped:
        became.append(f"{dropped} dropped by filters")
    raise InputError(
        f"input {files[0].name}" if len(files) == 1 else f"{len(files)} input files",
        got=f"no text ({', '.join(became)})",
        wanted="at least one document with text",
        way_out="Check the inputs.",
    )


def write_corpora(
    work: Work,
    files: Sequence[InputFile],
    units: Sequence[Unit],
    parts: Sequence[PartRecord],
    corpora: Corpora,
) -> Manifest:
    """Writes what lies beside the shards; returns the first manifest."""
    sources = _sources(files, units, parts)
    settings = work.settings
    manifests = []
    for split, shards in corpora.shards.items():
        folder = work.folder / "out" / split
        _remove_others(folder, shards, list(corpora.shards))
        problems = _write_problems(folder / PROBLEMS, work, parts)
        manifest = Manifest(
            tokenizer_fingerprint=settings.tokenizer_fingerprint,
            vocab_size=settings.vocab_size,
            dtype=dtype_for(settings.vocab_size).name,
            documents=sum(shard.documents for shard in shards),
            tokens=sum(shard.tokens for shard in shards),
            empty_documents=sum(part.empty_documents for part in parts),
            mended_documents=sum(part.mended_documents for part in parts),
            problems=sum(part.problems for part in parts),
            first_problems=tuple(problems),
            filters=tuple(report.to_json() for report in corpora.filters),
            split=split,
            shards=tuple(shards),
            sources=sources,
            settings=settings.as_manifest(),
            inputs_digest=settings.inputs_digest(sources),
        )
        manifest.write(folder)
        manifests.append(manifest)
    return manifests[0]


def _sources(
    files: Sequence[InputFile], units: Sequence[Unit], parts: Sequence[PartRecord]
) -> tuple[SourceRecord, ...]:
    """The inputs as they were read: pieces of a file lie in units that follow each other."""
    pieces: list[list[PieceRecord]] = [[] for _ in files]
    for unit, part in zip(units, parts, strict=True):
        for piece, (start, end, sha256) in zip(unit.pieces, part.pieces, strict=True):
            pieces[piece.file].append(PieceRecord(start=start, end=end, sha256=sha256))
    return tuple(
        SourceRecord(
            name=file.name,
            bytes=file.bytes,
            sha256=combined([piece.sha256 for piece in own]),
            pieces=tuple(own) if len(own) > 1 else (),
        )
        for file, own in zip(files, pieces, strict=True)
    )


def _remove_others(folder: Path, shards: Sequence[ShardRecord], splits: Sequence[str]) -> None:
    """Takes away what an interrupted run of other inputs left."""
    ours = {record.name for shard in shards for record in (shard.bin, shard.idx)} | set(splits)
    for path in folder.iterdir():
        if path.name not in ours:
            path.unlink()


def _write_problems(path: Path, work: Work, parts: Sequence[PartRecord]) -> list[dict[str, Any]]:
    """All problems in corpus order, into a file if there are any; returns the first of them."""
    if not any(part.problems for part in parts):
        return []
    with path.open("wb") as file:
        for line in _problems(work, parts):
            file.write(line)
    sync(path)
    with path.open("rb") as file:
        return [json.loads(line) for line in islice(file, _SHOWN_PROBLEMS)]


def _problems(work: Work, parts: Sequence[PartRecord]) -> Iterator[bytes]:
    for part in parts:
        if part.problems:
            with (work.part(part.key) / PROBLEMS).open("rb") as file:
                yield from file
