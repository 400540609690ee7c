"""Input files -> documents of text, one at a time, strict about what they are.

.txt    a file is a document, or (blank-line) documents are separated by blank lines; a byte-order
        mark at the start is dropped, CRLF becomes LF, and white space around a document is dropped
.jsonl  an object per line, its text in one field, taken as it is
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from longpretrain.data.tokenizer import check_text
from longpretrain.errors import InputError

Documents = Literal["auto", "file", "blank-line"]
SUFFIXES = (".txt", ".jsonl")

# Above this `auto` doubts that a whole .txt is one document: it would be held in memory at once.
AUTO_MAX_BYTES = 1 << 28

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class InputFile:
    """A file to read, and its name in the manifest: relative to the folder that was given."""

    path: Path
    name: str
    bytes: int


def find_inputs(inputs: Sequence[Path | str], documents: Documents = "auto") -> list[InputFile]:
    """The files behind files, folders (searched to any depth) and glob patterns, in a stable order.

    Raises:
        InputError: an input that is missing, of an unknown kind, there twice, or (with documents
            auto) a .txt too large to be one document.
    """
    found = [file for given in inputs for file in _expand(Path(given))]
    if not found:
        raise InputError(
            "input", got="none", wanted="files or folders", way_out="Name at least one."
        )
    seen: set[Path] = set()
    for file in found:
        real = file.path.resolve()
        if real in seen:
            raise InputError(
                f"input {file.path}",
                got="the same file twice",
                wanted="every file once",
                way_out="Take one of the overlapping inputs away.",
            )
        seen.add(real)
        if file.path.suffix == ".txt" and documents == "auto" and file.bytes > AUTO_MAX_BYTES:
            raise InputError(
                f"input {file.path}",
                got=f"one .txt of {file.bytes / 2**20:.0f} MiB",
                wanted=f"at most {AUTO_MAX_BYTES / 2**20:.0f} MiB when nobody says how it divides",
                way_out="Pass --documents blank-line, or --documents file if it is one document.",
            )
    return found


def read_documents(
    file: InputFile, *, documents: Documents, field: str, on_bytes: Callable[[bytes], None]
) -> Iterator[str]:
    """The documents of a file, "" for one without text.

    Args:
        file: what to read.
        documents: how a .txt is divided.
        field: where a line of .jsonl has its text.
        on_bytes: is handed all bytes of the file, in order, as they are read.

    Raises:
        InputError: not UTF-8, not JSON, or no text in the field; names the file and the place.
    """
    if file.path.suffix == ".jsonl":
        return _jsonl_documents(file, field, on_bytes)
    if documents == "blank-line":
        return _blank_line_documents(file, on_bytes)
    return _whole_document(file, on_bytes)


def _expand(given: Path) -> list[InputFile]:
    if given.is_file():
        return [_input_file(given, given.name)]
    if given.is_dir():
        paths = sorted(path for path in _walk(given) if path.suffix in SUFFIXES and path.is_file())
        if not paths:
            _refuse(given, "a folder without .txt or .jsonl files")
        root = given.resolve()
        return [_input_file(p, f"{root.name}/{p.relative_to(given).as_posix()}") for p in paths]
    if not glob.has_magic(str(given)):
        _refuse(given, "no such file or folder")
    # Path.glob takes no absolute patterns.
    matches = (Path(match) for match in glob.glob(str(given), recursive=True))  # noqa: PTH207
    files = sorted(path for path in matches if path.is_file())
    if not files:
        _refuse(given, "a pattern that matches no file")
    return [_input_file(path, path.name) for path in files]


def _raise(error: OSError) -> NoReturn:
    raise error


def _walk(root: Path) -> Iterator[Path]:
    """What lies below a folder, but for hidden files and folders, which are not entered either."""
    # Path.rglob would leave out, without a word, what it may not read.
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _input_file(path: Path, name: str) -> InputFile:
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"input {path}",
            got=f"a {path.suffix or 'nameless'} file",
            wanted=" or ".join(SUFFIXES),
            way_out="Unpack or convert it to one of these.",
        )
    # A name on disk need not be UTF-8; the manifest's text is.
    shown = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return InputFile(path, shown, path.stat().st_size)


def _refuse(given: Path, got: str) -> NoReturn:
    raise InputError(
        f"input {given}", got=got, wanted="text to prepare (.txt, .jsonl)",
        way_out="Check the path; a pattern goes in quotes.",
    )  # fmt: skip


def _whole_document(file: InputFile, on_bytes: Callable[[bytes], None]) -> Iterator[str]:
    data = file.path.read_bytes()
    on_bytes(data)
    mark = len(_BYTE_ORDER_MARK) if data.startswith(_BYTE_ORDER_MARK) else 0
    yield _decode(data[mark:], file, mark).replace("\r\n", "\n").strip()


def _blank_line_documents(file: InputFile, on_bytes: Callable[[bytes], None]) -> Iterator[str]:
    lines: list[str] = []
    for _, line in _lines(file, on_bytes):
        if line.strip():
            lines.append(line.removesuffix("\n").removesuffix("\r"))
        elif lines:
            yield "\n".join(lines).strip()
            lines = []
    if lines:
        yield "\n".join(lines).strip()


def _jsonl_documents(
    file: InputFile, field: str, on_bytes: Callable[[bytes], None]
) -> Iterator[str]:
    for number, line in _lines(file, on_bytes):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _bad_line(file, number, f"no JSON ({error})") from error
        if not isinstance(entry, dict):
            raise _bad_line(file, number, f"a JSON {type(entry).__name__}")
        text = entry.get(field)
        if not isinstance(text, str):
            keys = ", ".join(sorted(entry)[:8])
            got = (
                f"{type(text).__name__} in field {field!r}" if field in entry else f"fields {keys}"
            )
            raise _bad_line(file, number, got, wanted=f"text in field {field!r}")
        try:
            check_text(text)
        except InputError as error:
            raise _bad_line(file, number, error.got, wanted=error.wanted) from error
        yield text if text.strip() else ""


def _lines(file: InputFile, on_bytes: Callable[[bytes], None]) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end): decoded one by one, no line end is inside a character."""
    offset = 0
    with file.path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            on_bytes(line)
            mark = number == 1 and line.startswith(_BYTE_ORDER_MARK)
            skip = len(_BYTE_ORDER_MARK) if mark else 0
            yield number, _decode(line[skip:], file, offset + skip)
            offset += len(line)


def _decode(data: bytes, file: InputFile, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"file {file.path}",
            got=f"byte 0x{data[error.start]:02x} at offset {offset + error.start}",
            wanted="UTF-8 text",
            way_out="Convert it, for example: iconv -f WINDOWS-1252 -t UTF-8 FILE.",
        ) from error


def _bad_line(
    file: InputFile, number: int, got: str, wanted: str = "a JSON object with the text in a field"
) -> InputError:
    return InputError(
        f"file {file.path} line {number}", got=got, wanted=wanted,
        way_out="Mend the line, or name the field with --field.",
    )  # fmt: skip
