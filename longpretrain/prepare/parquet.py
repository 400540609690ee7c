"""The text column of a Parquet file, batch by batch: the one module that imports pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from longpretrain.prepare.unusable import DamagedError, UnusableError

# A batch holds about so much text, should its cells be as large as the average one.
_BATCH_BYTES = 1 << 22
_BATCH_ROWS = 1024


@dataclass(frozen=True)
class RowGroup:
    """What planning has to know of one."""

    start: int
    """Where its bytes begin in the file; those of the first count from 0."""

    text_bytes: int
    """Of the text column, unpacked."""


def row_groups(path: Path, field: str) -> list[RowGroup]:
    """The row groups of a file, in order.

    Raises:
        DamagedError: it is no Parquet file.
        UnusableError: it has no such column of text.
    """
    with _opened(path) as file:
        column = _text_column(file, field)
        groups = []
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            columns = [group.column(i) for i in range(group.num_columns)]
            starts = [c.dictionary_page_offset or c.data_page_offset for c in columns]
            groups.append(
                RowGroup(min(starts) if number else 0, columns[column].total_uncompressed_size)
            )
        return groups


def read_cells(
    source: Path | BinaryIO, field: str, groups: tuple[int, int] | None = None
) -> Iterator[tuple[int, memoryview | None]]:
    """(row of the file from 1, bytes of its text), None for null.

    Memory: a page of the column, of which the writer chose the size, and what a batch holds.

    Args:
        source: a file.
        field: the column.
        groups: first row group, and the one to stop before; None: all.

    Raises:
        DamagedError, UnusableError: as ``row_groups``, or when damage is met on the way.
    """
    with _opened(source) as file:
        column = _text_column(file, field)
        metadata = file.metadata
        first, end = groups or (0, metadata.num_row_groups)
        row = 1 + sum(metadata.row_group(i).num_rows for i in range(first))
        for number in range(first, end):
            group = metadata.row_group(number)
            average = group.column(column).total_uncompressed_size // max(1, group.num_rows)
            rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(1, average)))
            batches = file.iter_batches(
                rows, row_groups=[number], columns=[field], use_threads=False
            )
            for batch in batches:
                for cell in _cells(batch.column(0)):
                    yield row, cell
                    row += 1


@contextmanager
def _opened(source: Path | BinaryIO) -> Iterator[Any]:
    import pyarrow as pa
    from pyarrow import parquet

    # What is freed goes back to the system: a page may be large, and each core has a process.
    pa.set_memory_pool(pa.system_memory_pool())
    try:
        # Pages are read as they are wanted, not a whole row group ahead.
        with parquet.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):
            raise  # the system's
        raise DamagedError(f"no Parquet that can be read ({error})") from error


def _text_column(file: Any, field: str) -> int:
    """Its number among the columns that are stored."""
    import pyarrow as pa

    schema = file.schema_arrow
    found = schema.get_all_field_indices(field)
    way_out = "Name the column of text with --field."
    if len(found) != 1:
        names = ", ".join(schema.names[:8]) or "none"
        got = f"columns {names}" if not found else f"{len(found)} columns {field!r}"
        raise UnusableError(got, f"a column {field!r}", way_out)
    kind = schema.field(found[0]).type
    held = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not _is_text(held) and not pa.types.is_null(held):  # of which each row is told
        raise UnusableError(f"{kind} in column {field!r}", "strings", way_out)
    columns = [file.metadata.schema.column(i).path for i in range(file.metadata.num_columns)]
    return columns.index(field)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    tests = ("is_string", "is_large_string", "is_string_view")
    bytes_tests = ("is_binary", "is_large_binary", "is_binary_view")
    return any(getattr(pa.types, test)(kind) for test in tests + bytes_tests)


def _cells(column: Any) -> Iterator[memoryview | None]:
    """Views of the column's memory: a string is UTF-8 only if who wrote it kept to that."""
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    column = column.cast(pa.large_binary(), safe=False)
    nulls = column.is_null().to_pylist() if column.null_count else [False] * len(column)
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int64, len(column) + 1, 8 * column.offset).tolist()
    view = memoryview(data or b"")
    for null, start, end in zip(nulls, ends, ends[1:], strict=False):
        yield None if null else view[start:end]
