"""Packed files -> their bytes, a bounded amount at a time; what is cut short or damaged is said.

Each format may hold several packed pieces one after another (``cat a.gz b.gz``), as its own tools
read it. Bytes that are no such piece are damage, not the end.
"""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

from longpretrain.prepare.inputs import Compression
from longpretrain.prepare.unusable import DamagedError, UnusableError

CHUNK_BYTES = 1 << 20
_READ_BYTES = 1 << 16  # packed bytes read at a time

_REPACK = "Unpack and pack it again without --long, or pass --on-error skip."
_ZSTD_MAGIC = 0xFD2FB528
_ZSTD_SKIPPABLE = range(0x184D2A50, 0x184D2A60)
_ZSTD_REPEATED = 1  # a block of one byte, repeated


class Readable(Protocol):
    """As much of a file as is needed here."""

    def read(self, most: int, /) -> bytes: ...


def unpack(stream: Readable, compression: Compression) -> Iterator[bytes]:
    """The bytes that a stream packs, in chunks of at most ``CHUNK_BYTES``.

    Raises:
        UnusableError: says what is wrong; the rest of the stream is unread.
    """
    source = _Source(stream)
    if compression == "zstd":
        yield from _unpack_zstd(source)
    elif compression == "none":
        while chunk := source.read(CHUNK_BYTES):
            yield chunk
    else:
        yield from _unpack_pieces(source, compression)


class _Source:
    """A stream whose bytes are counted."""

    def __init__(self, stream: Readable) -> None:
        self._stream = stream
        self._ahead = b""
        self.bytes = 0

    def read(self, most: int) -> bytes:
        data, self._ahead = self._ahead or self._stream.read(most), b""
        self.bytes += len(data)
        return data

    def more(self) -> bool:
        """Whether there is another byte."""
        if not self._ahead:
            self._ahead = self._stream.read(1)
        return bool(self._ahead)

    def exactly(self, count: int, compression: Compression) -> bytes:
        parts = []
        while count and (data := self.read(count)):
            parts.append(data)
            count -= len(data)
        if count:
            raise DamagedError(f"{compression} data that end early, after {self.bytes} bytes")
        return b"".join(parts)


class _Decompressor(Protocol):
    """Of one packed piece."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """zlib's decompressor in the manner of bz2's, which keeps the bytes that it has not used."""

    def __init__(self) -> None:
        self._piece = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._piece.eof

    @property
    def unused_data(self) -> bytes:
        return self._piece.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._piece.decompress(self._piece.unconsumed_tail + data, max_length)


def _unpack_pieces(source: _Source, compression: Compression) -> Iterator[bytes]:
    new: Callable[[], _Decompressor] = _Gzip if compression == "gzip" else bz2.BZ2Decompressor
    packed = source.read(_READ_BYTES)
    is_any = False  # data of this format
    while packed or not is_any:
        piece = new()
        while not piece.eof:
            try:
                out = piece.decompress(packed, CHUNK_BYTES)
            except (zlib.error, OSError) as error:
                got = f"{'damaged' if is_any else 'no'} {compression} data ({error})"
                raise DamagedError(f"{got}, before byte {source.bytes}") from error
            if out:
                yield out
                is_any = True
            packed = b""
            # With room left over, all that it was given is used up.
            if not piece.eof and len(out) < CHUNK_BYTES:
                packed = source.read(_READ_BYTES)
                if not packed:
                    got = f"{compression} data that end early, after {source.bytes} bytes"
                    raise DamagedError(got)
        is_any = True
        packed = piece.unused_data or source.read(_READ_BYTES)
        if compression == "gzip":  # zeros fill up what was written to blocks of a tape
            while packed and not (packed := packed.lstrip(b"\0")):
                packed = source.read(_READ_BYTES)


def _unpack_zstd(source: _Source) -> Iterator[bytes]:
    """Frame by frame, and block by block: so the end of each is known, and what comes out bounded.

    The library's own stream reader takes a frame that is cut short for its end, and a block of four
    bytes may stand for 128 KiB (RFC 8878, section 3.1.1).
    """
    import zstandard

    first = True
    while first or source.more():
        start = source.bytes
        magic = int.from_bytes(source.exactly(4, "zstd"), "little")
        if magic in _ZSTD_SKIPPABLE:
            size = int.from_bytes(source.exactly(4, "zstd"), "little")
            for at in range(0, size, _READ_BYTES):
                source.exactly(min(_READ_BYTES, size - at), "zstd")
        elif magic == _ZSTD_MAGIC:
            try:
                yield from _unpack_frame(source)
            except zstandard.ZstdError as error:
                if "too much memory" in str(error):
                    got, way_out = "zstd data with a window above 128 MiB", _REPACK
                    raise UnusableError(got, "a smaller one", way_out) from error
                got = f"damaged zstd data ({error}), before byte {source.bytes}"
                raise DamagedError(got) from error
        else:
            raise DamagedError(f"{'no' if first else 'damaged'} zstd data, at byte {start}")
        first = False


def _unpack_frame(source: _Source) -> Iterator[bytes]:
    """What follows a frame's magic number."""
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    descriptor = source.exactly(1, "zstd")
    flags = descriptor[0]
    single_segment, checksum = flags >> 5 & 1, flags >> 2 & 1
    content_size_bytes = (single_segment, 2, 4, 8)[flags >> 6]
    dictionary_bytes = (0, 1, 2, 4)[flags & 3]
    rest = source.exactly(1 - single_segment + dictionary_bytes + content_size_bytes, "zstd")
    frame.decompress(_ZSTD_MAGIC.to_bytes(4, "little") + descriptor + rest)
    last = 0
    while not last:
        header = source.exactly(3, "zstd")
        fields = int.from_bytes(header, "little")
        last, kind, size = fields & 1, fields >> 1 & 3, fields >> 3
        block = source.exactly(1 if kind == _ZSTD_REPEATED else size, "zstd")
        if out := frame.decompress(header + block):
            yield out
    if checksum and (out := frame.decompress(source.exactly(4, "zstd"))):
        yield out
    assert frame.eof, "a frame ends with its last block"
