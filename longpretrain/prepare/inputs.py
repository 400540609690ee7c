"""Files, folders, patterns and standard input -> the list of files to read, in a stable order."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from longpretrain.data.manifest import MANIFEST, PROBLEMS
from longpretrain.errors import InputError

Kind = Literal["txt", "jsonl", "parquet"]
Compression = Literal["none", "gzip", "zstd", "bzip2"]
Documents = Literal["auto", "file", "blank-line"]

KINDS: dict[str, Kind] = {".txt": "txt", ".jsonl": "jsonl", ".parquet": "parquet"}
COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2"}
MAX_DOCUMENT_BYTES = 64 << 20
STDIN = "-"

_WANTED = ".txt, .jsonl or .parquet, plain or packed as .gz, .zst or .bz2"


@dataclass(frozen=True)
class InputFile:
    """A file to read, and its name in the manifest: relative to the folder that was given."""

    path: Path
    name: str
    bytes: int
    kind: Kind
    compression: Compression = "none"

    @property
    def shown(self) -> str:
        """What an error calls it."""
        return "standard input" if self.name == STDIN else f"file {self.path}"


@dataclass(frozen=True)
class Piece:
    """Bytes of an input file that are read on their own; the pieces of a file are all of it."""

    file: int
    """Which of the input files."""

    start: int
    end: int
    row_groups: tuple[int, int] | None = None
    """First and end, of a .parquet; None where nobody could tell: the whole file."""


def find_inputs(
    inputs: Sequence[Path | str],
    *,
    documents: Documents = "auto",
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    stdin: InputFile | None = None,
) -> list[InputFile]:
    """The files behind files, folders (searched to any depth) and glob patterns.

    Args:
        inputs: in the order to be read; what a folder or a pattern stands for is sorted.
        documents: how a .txt divides.
        max_document_bytes: a .txt above it must say so.
        stdin: what "-" stands for (see ``spooled``).

    Raises:
        InputError: an input that is missing, of an unknown kind, there twice, or (with documents
            auto) a .txt too large to be one document.
    """
    found = [file for given in inputs for file in _expand(Path(given), stdin)]
    if not found:
        raise InputError(
            "input", got="none", wanted="files or folders", way_out="Name at least one."
        )
    seen: set[Path] = set()
    for file in found:
        real = file.path.resolve()
        if real in seen:
            raise InputError(
                "standard input" if file.name == STDIN else f"input {file.path}",
                got="the same file twice",
                wanted="every file once",
                way_out="Take one of the overlapping inputs away.",
            )
        seen.add(real)
        is_plain_text = (file.kind, file.compression) == ("txt", "none")
        if is_plain_text and documents == "auto" and file.bytes > max_document_bytes:
            raise InputError(
                "standard input" if file.name == STDIN else f"input {file.path}",
                got=f"one .txt of {file.bytes / 2**20:.0f} MiB",
                wanted=f"at most {max_document_bytes / 2**20:.0f} MiB when nobody says how it "
                "divides",
                way_out="Pass --documents blank-line; or, if it is one document, --documents file "
                "and a larger --max-document-mb.",
            )
    return found


def spooled(path: Path, kind: Kind) -> InputFile:
    """Standard input that was written to a file."""
    return InputFile(path, STDIN, path.stat().st_size, kind)


def kind_of(name: str) -> tuple[Kind, Compression] | None:
    """What a file of this name holds; None for one that nobody here reads."""
    stem, suffix = os.path.splitext(name)  # noqa: PTH122  a name, no path
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]  # noqa: PTH122
    kind = KINDS.get(suffix)
    return (kind, compression or "none") if kind else None


def _expand(given: Path, stdin: InputFile | None) -> list[InputFile]:
    if str(given) == STDIN and stdin:
        return [stdin]
    if given.is_file():
        return [_input_file(given, given.name)]
    if given.is_dir():
        paths = sorted(path for path in _walk(given) if kind_of(path.name) and path.is_file())
        if not paths:
            _refuse(given, "a folder without .txt, .jsonl or .parquet files")
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
    """What lies below a folder, but for hidden files and folders, which are not entered either.

    The list of problems in a corpus is left out, too: the output may lie among the inputs.
    """
    # Path.rglob would leave out, without a word, what it may not read.
    for folder, folders, names in os.walk(root, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        ours = {PROBLEMS} if MANIFEST in names else set()
        yield from (Path(folder, name) for name in {*names} - ours if not name.startswith("."))


def _input_file(path: Path, name: str) -> InputFile:
    kind = kind_of(path.name)
    if not kind:
        raise InputError(
            f"input {path}",
            got=f"a {path.suffix or 'nameless'} file",
            wanted=_WANTED,
            way_out="Unpack or convert it to one of these.",
        )
    # A name on disk need not be UTF-8; the manifest's text is.
    shown = name.encode("utf-8", "backslashreplace").decode("utf-8")
    return InputFile(path, shown, path.stat().st_size, *kind)


def _refuse(given: Path, got: str) -> NoReturn:
    raise InputError(
        f"input {given}", got=got, wanted=f"text to prepare ({_WANTED})",
        way_out="Check the path; a pattern goes in quotes.",
    )  # fmt: skip
