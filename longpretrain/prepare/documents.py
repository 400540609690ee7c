"""A piece of an input file -> its documents, one at a time; what cannot be read is said.

.txt      a file is a document, or (blank-line) documents are separated by blank lines; a
          byte-order mark at the start is dropped, CRLF becomes LF, and white space around a
          document is dropped
.jsonl    an object per line, its text in one field, taken as it is; blank lines are skipped
.parquet  a row each, its text in one column, taken as it is

Memory is flat: a line is held up to a limit, and no more than one document at a time. Who loops
over documents lets go of one (``del document``) before the next is read: it may be large.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO, Literal

from longpretrain.errors import InputError
from longpretrain.prepare import parquet
from longpretrain.prepare.compressed import CHUNK_BYTES, unpack
from longpretrain.prepare.decode import decode, text_of_json, text_of_lines
from longpretrain.prepare.inputs import MAX_DOCUMENT_BYTES, Documents, InputFile, Piece
from longpretrain.prepare.lines import Line, split_lines
from longpretrain.prepare.unusable import UnusableError

OnError = Literal["stop", "skip", "replace"]

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
# Python's white space in ASCII, of which bytes.strip() knows only six.
_SPACE = b"\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f "
_LIMIT = "Raise --max-document-mb, or pass --on-error skip."


@dataclass(frozen=True)
class ReadOptions:
    """What decides which documents a file holds."""

    documents: Documents = "auto"
    """How a .txt divides; auto is file."""

    field: str = "text"
    """Where an object of .jsonl or a row of .parquet has its text."""

    max_document_bytes: int = MAX_DOCUMENT_BYTES
    """Of a document in .txt, a line of .jsonl, a cell of .parquet; a larger one is an error.

    A text takes four times as much where one of its characters needs four bytes, besides its
    tokens. What a line of .jsonl has beside its large strings takes what Python makes of it: up to
    50 bytes for one where it is all small strings.
    """

    on_error: OnError = "stop"
    """stop raises; skip goes on after what cannot be read; replace, besides, puts U+FFFD in the
    place of invalid UTF-8, of NUL and of lone surrogates."""


@dataclass(slots=True)
class Document:
    """Text and where it is from; one without text is "". Filters may change the text."""

    text: str
    place: str
    mended: bool = False
    """Whether ``replace`` changed it."""


@dataclass(frozen=True, slots=True)
class Problem:
    """A document, or the rest of a file, that was left out."""

    place: str
    reason: str


def read_piece(
    file: InputFile,
    piece: Piece,
    options: ReadOptions,
    on_bytes: Callable[[bytes], None],
    scratch: Path | None = None,
) -> Iterator[Document | Problem]:
    """The documents of a piece, in order.

    Args:
        file: the file that it is of.
        piece: as planned with the same options.
        options: how to read.
        on_bytes: is handed all bytes of the piece, in order, as they are read.
        scratch: a folder for an unpacked .parquet, which has no name there.

    Raises:
        InputError: the file has changed since it was planned; or, where errors stop, what cannot be
            read, with the place.
    """
    return _Reader(file, piece, options, scratch).documents(on_bytes)


class _Reader:
    """Of one piece: knows what to call a place, and what to do about what is wrong there."""

    def __init__(
        self, file: InputFile, piece: Piece, options: ReadOptions, scratch: Path | None
    ) -> None:
        self._file = file
        self._piece = piece
        self._field = options.field
        self._blank_line = options.documents == "blank-line"
        self._most = options.max_document_bytes
        self._stop = options.on_error == "stop"
        self._mend = options.on_error == "replace"
        self._scratch = scratch

    def documents(self, on_bytes: Callable[[bytes], None]) -> Iterator[Document | Problem]:
        with self._file.path.open("rb", buffering=0) as stream:
            part = _PieceBytes(stream, self._file, self._piece, on_bytes)
            try:
                if self._file.kind == "parquet":
                    yield from self._rows(part)
                else:
                    yield from self._texts(unpack(part, self._file.compression))
            except UnusableError as error:  # of the file: what follows is lost
                yield self._problem("", error)
            while part.read(CHUNK_BYTES):
                pass

    # ------------------------------------------------------------------ text
    def _texts(self, chunks: Iterator[bytes]) -> Iterator[Document | Problem]:
        """Of .txt and .jsonl."""
        head, offset = b"", self._piece.start
        if not offset:  # a byte-order mark may be there, of which a chunk may hold a part
            while len(head) < len(_BYTE_ORDER_MARK) and (chunk := next(chunks, b"")):
                head += chunk
            if head.startswith(_BYTE_ORDER_MARK):
                offset = len(_BYTE_ORDER_MARK)
                head = head[offset:]
        chunks = itertools.chain([head], chunks)
        if self._file.kind == "txt" and not self._blank_line:
            yield self._whole_document(chunks, offset)
            return
        lines = split_lines(chunks, self._most, offset)
        if self._file.kind == "txt":
            yield from self._blank_line_documents(lines)
            return
        for number, start, line in lines:
            if line is None or line[:1] == b"{" or not _is_blank(line):
                yield self._json_document(number, start, line)

    def _json_document(
        self, number: int, offset: int, line: bytes | bytearray | None
    ) -> Document | Problem:
        place = self._line(number)
        if line is None:
            return self._problem(place, self._above("line"))
        try:
            text, mended = text_of_json(line, offset, self._field, mend=self._mend)
        except UnusableError as error:
            return self._problem(place, error)
        return self._document(place, text, mended)

    def _blank_line_documents(self, lines: Iterable[Line]) -> Iterator[Document | Problem]:
        begun = bytearray()
        size = first = start = 0  # size may be more than is held
        for number, offset, line in lines:
            if line is not None and _is_blank(line):
                if size:
                    yield self._text_document(self._line(first), start, begun, size)
                begun, size = bytearray(), 0
                continue
            if not size:
                first, start = number, offset
            size += self._most + 2 if line is None else len(line) + 1
            if line is None or size > self._most + 1:
                begun.clear()
            else:
                begun += line
                begun += b"\n"
        if size:
            yield self._text_document(self._line(first), start, begun, size)

    def _whole_document(self, chunks: Iterable[bytes], offset: int) -> Document | Problem:
        data = bytearray()
        for chunk in chunks:
            if len(data) + len(chunk) > self._most:
                return self._problem("", self._above("text"))
            data += chunk
        return self._text_document("", offset, data, len(data) + 1)

    def _text_document(
        self, place: str, offset: int, data: bytearray, size: int
    ) -> Document | Problem:
        """Empties ``data``; ``size`` counts a line end at its end."""
        if size > self._most + 1:
            return self._problem(place, self._above("document"))
        try:
            text, mended = text_of_lines(data, offset, mend=self._mend)
        except UnusableError as error:
            return self._problem(place, error)
        return self._document(place, text, mended)

    # ------------------------------------------------------------------ parquet
    def _rows(self, part: _PieceBytes) -> Iterator[Document | Problem]:
        if self._file.compression == "none":
            yield from self._rows_of(self._file.path)
            return
        with tempfile.TemporaryFile(dir=self._scratch) as unpacked:
            for chunk in unpack(part, self._file.compression):
                unpacked.write(chunk)
            yield from self._rows_of(unpacked)

    def _rows_of(self, source: Path | BinaryIO) -> Iterator[Document | Problem]:
        for row, cell in parquet.read_cells(source, self._field, self._piece.row_groups):
            yield self._row_document(row, cell)

    def _row_document(self, row: int, cell: memoryview | None) -> Document | Problem:
        place = f"row {row}"
        try:
            if cell is None:
                got, wanted = f"null in column {self._field!r}", "text"
                raise UnusableError(got, wanted, "Mend it, or pass --on-error skip.")
            if len(cell) > self._most:
                raise self._above("cell")
            text, mended = decode(cell, 0, mend=self._mend)
        except UnusableError as error:
            return self._problem(place, error)
        return self._document(place, text, mended)

    # ------------------------------------------------------------------ what is handed out
    def _line(self, number: int) -> str:
        after = f" after byte {self._piece.start}" if self._piece.start else ""
        return f"line {number}{after}"

    def _above(self, what: str) -> UnusableError:
        most = f"{self._most / 2**20:.6g} MiB"
        return UnusableError(f"a {what} above {most}", f"at most {most}", _LIMIT)

    def _document(self, place: str, text: str, mended: bool) -> Document:
        name = f"{self._file.name} {place}" if place else self._file.name
        return Document("" if text.isspace() else text, name, mended)

    def _problem(self, place: str, error: UnusableError) -> Problem:
        """What is wrong at a place of the file ("": the file itself), if errors do not stop."""
        place = f" {place}" if place else ""
        if self._stop:
            raise error.told(f"{self._file.shown}{place}") from error
        return Problem(f"{self._file.name}{place}", f"got {error.got}; wanted {error.wanted}")


class _PieceBytes:
    """The bytes of a piece, told as they are read."""

    def __init__(
        self, stream: RawIOBase, file: InputFile, piece: Piece, on_bytes: Callable[[bytes], None]
    ) -> None:
        stream.seek(piece.start)
        self._stream = stream
        self._file = file
        self._left = piece.end - piece.start
        self._on_bytes = on_bytes

    def read(self, most: int, /) -> bytes:
        if not self._left:
            return b""
        data = self._stream.read(min(most, self._left))
        if not data:
            raise InputError(
                self._file.shown,
                got=f"{self._left} bytes fewer than at the start",
                wanted="files that stay as they are",
                way_out="Run it again when nothing writes to the file.",
            )
        self._left -= len(data)
        self._on_bytes(data)
        return data


def _is_blank(line: bytes | bytearray) -> bool:
    """Whether a line, as text, is white space alone."""
    stripped = line.lstrip(_SPACE)
    if not stripped or stripped[0] < 0x80:
        return not stripped
    return stripped.decode("utf-8", "replace").isspace()
