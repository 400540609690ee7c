"""Inputs for the tests of preparation: documents written in each way, and read back."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import zstandard
from pyarrow import parquet

from longpretrain.prepare.documents import Document, Problem, ReadOptions, read_piece
from longpretrain.prepare.inputs import Piece, find_inputs
from longpretrain.prepare.units import plan_units

PACK = {
    "": bytes,
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    ".bz2": bz2.compress,
}


def lines(*entries: Any) -> bytes:
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def table(path: Path, texts: Sequence[Any], rows: int = 2, **options: Any) -> Path:
    """A Parquet file with a column of text between two others, ``rows`` in a row group."""
    columns = {"id": list(range(len(texts))), "text": texts, "more": ["x"] * len(texts)}
    parquet.write_table(pa.table(columns), path, row_group_size=rows, **options)
    return path


def read(path: Path, **options: Any) -> list[Document | Problem]:
    """What a file holds, read as one piece; checks that all its bytes are told."""
    return read_pieces(path, None, **options)


def read_pieces(path: Path, unit_bytes: int | None, **options: Any) -> list[Document | Problem]:
    """What a file holds, cut into units; checks that the bytes told are those of each piece."""
    set_ = ReadOptions(**options)
    [file] = find_inputs([path], documents="file")
    data = path.read_bytes()
    pieces = [Piece(0, 0, file.bytes)]
    if unit_bytes:
        pieces = [piece for unit in plan_units([file], set_, unit_bytes) for piece in unit.pieces]
    assert [piece.start for piece in pieces] == [0, *(piece.end for piece in pieces[:-1])]
    assert pieces[-1].end == file.bytes
    found: list[Document | Problem] = []
    for piece in pieces:
        digest = hashlib.sha256()
        found += read_piece(file, piece, set_, digest.update, path.parent)
        assert digest.digest() == hashlib.sha256(data[piece.start : piece.end]).digest()
    return found


def texts(found: Sequence[Document | Problem]) -> list[str]:
    """Of documents, all of which could be read."""
    assert not [item for item in found if isinstance(item, Problem)]
    return [item.text for item in found if isinstance(item, Document)]


def outcomes(found: Sequence[Document | Problem]) -> list[str]:
    """Texts, and the reasons of problems in brackets."""
    return [item.text if isinstance(item, Document) else f"[{item.reason}]" for item in found]
