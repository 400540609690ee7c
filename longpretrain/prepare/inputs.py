"""Files, folders, patterns and standard input -> the list of files to read, in a stable order.

Nothing is lost without a word: what has one of our names and cannot be read is an error, and what
is left out for its name is counted.
"""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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

# What preparation writes into a corpus, which may lie among the inputs.
_CORPUS = re.compile(r"tokens-\d{5,}\.(bin|idx)|" + re.escape(MANIFEST) + "|" + re.escape(PROBLEMS))
_INDEX = re.compile(r"tokens-\d{5,}\.idx")
_MOST_SUFFIXES = 5  # that are named of what is left out

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
    warn: Callable[[str], None] = lambda line: None,
) -> list[InputFile]:
    """The files behind files, folders and glob patterns.

    A folder is searched to any depth, through links, too; so is one that a pattern matches. What
    is hidden and the files of corpora that were prepared here are no inputs.

    Args:
        inputs: in the order to be read; what a folder or a pattern stands for is sorted.
        documents: how a .txt divides.
        max_document_bytes: a .txt above it must say so.
        stdin: what "-" stands for (see ``spooled``).
        warn: is told, in a line, how many files of the folders are of no kind that is read here.

    Raises:
        InputError: an input that is missing, of an unknown kind, no file (a pipe, a link to
            nothing), there twice, or (with documents auto) a .txt too large to be one document.
    """
    left_out: Counter[str] = Counter()
    found = [file for given in inputs for file in _expand(Path(given), stdin, left_out)]
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
    if left_out:
        warn(_told(left_out))
    return found


def spooled(path: Path, kind: Kind) -> InputFile:
    """Standard input that was written to a file."""
    return InputFile(path, STDIN, path.stat().st_size, kind)


def kind_of(name: str) -> tuple[Kind, Compression] | None:
    """What a file of this name holds; None for one that nobody here reads."""
    stem, suffix = os.path.splitext(name.lower())  # noqa: PTH122  a name, no path
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = os.path.splitext(stem)[1]  # noqa: PTH122
    kind = KINDS.get(suffix)
    return (kind, compression or "none") if kind else None


def _expand(given: Path, stdin: InputFile | None, left_out: Counter[str]) -> list[InputFile]:
    if str(given) == STDIN and stdin:
        return [stdin]
    if os.path.lexists(given):
        if given.is_dir():
            return _of_folder(given, left_out) or _refuse(
                given, "a folder without .txt, .jsonl or .parquet files"
            )
        return [_input_file(given, given.name)]
    if not glob.has_magic(str(given)):
        _refuse(given, "no such file or folder")
    # Path.glob takes no absolute patterns.
    matches = sorted(Path(match) for match in glob.glob(str(given), recursive=True))  # noqa: PTH207
    found: list[InputFile] = []
    folders: set[Path] = set()
    for path in matches:
        if not folders.isdisjoint(path.parents):
            continue  # found already: ** matches a folder and what is in it
        if path.is_dir():
            folders.add(path)
            found += _of_folder(path, left_out)
        else:
            found.append(_input_file(path, path.name))
    return found or _refuse(given, "a pattern that matches no file to read")


def _of_folder(root: Path, left_out: Counter[str]) -> list[InputFile]:
    paths = []
    for path in _walk(root):
        if kind_of(path.name):
            paths.append(path)
        else:
            left_out[path.suffix] += 1
    name = root.resolve().name
    return [_input_file(p, f"{name}/{p.relative_to(root).as_posix()}") for p in sorted(paths)]


def _walk(root: Path) -> Iterator[Path]:
    """The files below a folder, but for hidden ones and those of a corpus.

    Hidden folders are not entered, and no folder below itself, where a link may lead.
    """
    waiting = [(root, frozenset[tuple[int, int]]())]
    while waiting:
        folder, above = waiting.pop()
        status = folder.stat()
        above |= {(status.st_dev, status.st_ino)}
        # Path.rglob would leave out, without a word, what it may not read.
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))  # noqa: PTH208
        is_corpus = MANIFEST in names and any(map(_INDEX.fullmatch, names))
        for name in names:
            path = folder / name
            if path.is_dir():
                status = path.stat()
                if (status.st_dev, status.st_ino) not in above:
                    waiting.append((path, above))
            elif not (is_corpus and _CORPUS.fullmatch(name)):
                yield path


def _told(left_out: Counter[str]) -> str:
    """What was left out, in a line."""
    kinds = sorted(left_out.items(), key=lambda kind: (-kind[1], kind[0]))
    shown = [f"{count} {ascii(suffix)[1:-1] or 'without suffix'}" for suffix, count in kinds]
    if len(shown) > _MOST_SUFFIXES:
        shown[_MOST_SUFFIXES:] = ["others"]
    total = left_out.total()
    files = "a file" if total == 1 else f"{total} files"
    return f"left out {files} of other kinds ({', '.join(shown)}); wanted {_WANTED}"


def _input_file(path: Path, name: str) -> InputFile:
    if not path.is_file():
        _refuse_special(path)
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


def _refuse_special(path: Path) -> NoReturn:
    """Of what is there, and neither file nor folder."""
    if path.exists():
        raise InputError(
            f"input {path}", got="a pipe, socket or device", wanted="a file",
            way_out="Name a file, or have a program write to `longpretrain prepare -`.",
        )  # fmt: skip
    raise InputError(
        f"input {path}", got="a link to nothing", wanted="a file",
        way_out="Mend the link, or take it away.",
    )  # fmt: skip


def _refuse(given: Path, got: str) -> NoReturn:
    raise InputError(
        f"input {given}", got=got, wanted=f"text to prepare ({_WANTED})",
        way_out="Check the path; a pattern goes in quotes.",
    )  # fmt: skip
