"""Chunks of bytes -> lines, none of which is held beyond a limit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

Line = tuple[int, int, bytes | bytearray | None]
"""Number from 1, offset in bytes, and the bytes without their end: None above the limit.

A line that spans chunks is a bytearray, which the receiver may empty to free the memory.
"""


def split_lines(chunks: Iterable[bytes], max_bytes: int, offset: int = 0) -> Iterator[Line]:
    """The lines that some chunks make up, the first at ``offset``; the last may lack its end."""
    number = 1
    begun = bytearray()  # of a line that no chunk so far has ended
    begun_bytes = 0  # may be more than are held
    for chunk in chunks:
        parts = chunk.split(b"\n")
        rest = parts.pop()
        for part in parts:
            size = begun_bytes + len(part)
            if size > max_bytes:
                yield number, offset, None
            elif begun_bytes:
                begun += part
                yield number, offset, begun
            else:
                yield number, offset, part
            begun, begun_bytes = bytearray(), 0
            number += 1
            offset += size + 1
        begun_bytes += len(rest)
        if begun_bytes <= max_bytes:
            begun += rest
        else:
            begun = bytearray()
    if begun_bytes:
        yield number, offset, None if begun_bytes > max_bytes else begun
