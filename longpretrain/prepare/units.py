"""Input files -> units of work of about one size, fixed by the inputs and settings alone.

A large .jsonl, or .txt of documents between blank lines, is cut where a document begins; a .parquet
between row groups; a packed file cannot be cut. Small pieces, in their order, share a unit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any, BinaryIO

from longpretrain.prepare import parquet
from longpretrain.prepare.documents import ReadOptions
from longpretrain.prepare.inputs import InputFile, Piece
from longpretrain.prepare.unusable import UnusableError

UNIT_BYTES = 16 << 20

_UNPACKED = 4  # bytes of text that a packed byte is counted as
_OPENING_BYTES = 1 << 12  # what a file costs besides its text, so that a unit has not too many
_LOOK_BYTES = 1 << 16
_BLANK = b" \t\r\f\v"


@dataclass(frozen=True)
class Unit:
    """Pieces that are read one after another, and become one part of the corpus."""

    number: int
    pieces: tuple[Piece, ...]

    def to_json(self) -> dict[str, Any]:
        return {"number": self.number, "pieces": [list(astuple(piece)) for piece in self.pieces]}

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Unit:
        pieces = (
            Piece(file, start, end, (groups[0], groups[1]) if groups else None)
            for file, start, end, groups in tree["pieces"]
        )
        return cls(tree["number"], tuple(pieces))


def plan_units(
    files: Sequence[InputFile], options: ReadOptions, unit_bytes: int = UNIT_BYTES
) -> list[Unit]:
    """The units of some files, in corpus order.

    Raises:
        InputError: where errors stop, a .parquet that is none, or without the column of text.
    """
    units: list[Unit] = []
    taken: list[Piece] = []
    total = 0
    for piece, weight in _pieces(files, options, unit_bytes):
        if taken and total + weight > unit_bytes:
            units.append(Unit(len(units), tuple(taken)))
            taken, total = [], 0
        taken.append(piece)
        total += weight
    if taken:
        units.append(Unit(len(units), tuple(taken)))
    return units


def _pieces(
    files: Sequence[InputFile], options: ReadOptions, unit_bytes: int
) -> Iterator[tuple[Piece, int]]:
    """Each with the bytes of text that it stands for, more or less."""
    for number, file in enumerate(files):
        if file.compression != "none":
            whole = Piece(number, 0, file.bytes)
            yield whole, _UNPACKED * file.bytes + _OPENING_BYTES
        elif file.kind == "parquet":
            yield from _parquet_pieces(number, file, options, unit_bytes)
        elif file.kind == "txt" and options.documents != "blank-line":
            yield Piece(number, 0, file.bytes), file.bytes + _OPENING_BYTES
        else:
            for start, end in _cuts(file, unit_bytes):
                yield Piece(number, start, end), end - start + (0 if start else _OPENING_BYTES)


def _cuts(file: InputFile, unit_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, end) of pieces, each of about so many bytes, or as many as its one document has."""
    start = 0
    with file.path.open("rb", buffering=_LOOK_BYTES) as stream:
        while file.bytes - start > unit_bytes:
            end = _document_start(stream, start + unit_bytes, blank_line=file.kind == "txt")
            if end >= file.bytes:
                break
            yield start, end
            start = end
    yield start, file.bytes


def _document_start(stream: BinaryIO, at: int, *, blank_line: bool) -> int:
    """A border between documents, at or soon after a byte; the end of the file if none is."""
    at -= 1  # the line end before the byte may be the one that counts
    stream.seek(at)
    is_first = True  # of the lines seen, which may have begun earlier
    is_blank = True  # so far
    while part := stream.readline(_LOOK_BYTES):
        at += len(part)
        is_blank = is_blank and not part.strip(_BLANK + b"\n")
        if part.endswith(b"\n"):
            if not blank_line or (is_blank and not is_first):
                return at
            is_first, is_blank = False, True
    return at


def _parquet_pieces(
    number: int, file: InputFile, options: ReadOptions, unit_bytes: int
) -> Iterator[tuple[Piece, int]]:
    try:
        groups = parquet.row_groups(file.path, options.field)
    except UnusableError as error:
        if options.on_error == "stop":
            raise error.told(file.shown) from error
        groups = []  # reading it says so again, and goes on
    starts = [group.start for group in groups] + [file.bytes]
    if not groups or starts != sorted(starts):
        yield Piece(number, 0, file.bytes), file.bytes + _OPENING_BYTES
        return
    first, weight = 0, _OPENING_BYTES
    for i, group in enumerate(groups):
        if i > first and weight + group.text_bytes > unit_bytes:
            yield Piece(number, starts[first], starts[i], (first, i)), weight
            first, weight = i, 0
        weight += group.text_bytes
    yield Piece(number, starts[first], file.bytes, (first, len(groups))), weight
