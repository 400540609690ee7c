"""The documents of some inputs, in order and in this process: for those that make no corpus."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from longpretrain.prepare.documents import Document, ReadOptions, read_piece
from longpretrain.prepare.filters import Filters
from longpretrain.prepare.inputs import STDIN, Kind, find_inputs
from longpretrain.prepare.spool import spool
from longpretrain.prepare.units import plan_units


def read_texts(
    inputs: Sequence[Path],
    options: ReadOptions,
    filters: Filters,
    scratch: Path,
    *,
    stdin_format: Kind = "txt",
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = lambda line: None,
) -> Iterator[str]:
    """Texts, cleaned by the filters of text; those of tokens do not count here.

    Args:
        inputs: as for ``prepare``.
        options: how to read them.
        filters: what to do to the text.
        scratch: a folder for standard input.
        stdin_format: what standard input holds.
        progress: is told (bytes done, bytes in all).
        warn: is told what of the inputs is left out.

    Raises:
        InputError: as for ``prepare``.
    """
    stdin = None
    if Path(STDIN) in inputs:
        stdin = spool(sys.stdin.buffer, scratch, stdin_format)
    files = find_inputs(
        inputs,
        documents=options.documents,
        max_document_bytes=options.max_document_bytes,
        stdin=stdin,
        warn=warn,
    )
    total = sum(file.bytes for file in files)
    done = 0

    def on_bytes(data: bytes) -> None:
        nonlocal done
        done += len(data)
        progress(done, total)

    run = filters.start()
    for unit in plan_units(files, options):
        for piece in unit.pieces:
            for found in read_piece(files[piece.file], piece, options, on_bytes, scratch):
                if isinstance(found, Document) and found.text:
                    yield run.clean(found).text
                del found
