"""Reads a corpus folder by docs/data_format.md alone: nothing of longpretrain, no numpy.

Another program that trains on our shards would do what this does; the tests hold it against ours.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class FormatError(Exception):
    """The folder is not what the page says."""


class ShardReader:
    """A corpus folder, checked and read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = json.loads(
            (folder / "manifest.json").read_text(encoding="utf-8")
        )
        need(self.manifest["format"] == "longpretrain-tokens", "format")
        need(self.manifest["version"] in (1, 2), "version")
        width = {"uint16": 2, "uint32": 4}[self.manifest["dtype"]]
        need(width == (2 if self.manifest["vocab_size"] < 65_536 else 4), "width of an id")
        self._width = width
        self.shards = [self._read_shard(shard) for shard in self.manifest["shards"]]
        need(sum(len(starts) - 1 for _, starts in self.shards) == self.manifest["documents"], "sum")
        need(sum(starts[-1] for _, starts in self.shards) == self.manifest["tokens"], "tokens")

    def documents(self) -> Iterator[tuple[int, ...]]:
        """The ids of all documents in order."""
        kind = {2: "H", 4: "I"}[self._width]
        for data, starts in self.shards:
            for document in range(len(starts) - 1):
                first, end = starts[document], starts[document + 1]
                stretch = data[self._width * first : self._width * end]
                yield struct.unpack(f"<{end - first}{kind}", stretch)

    def check_ids(self) -> None:
        """Every id is one of the vocabulary."""
        for ids in self.documents():
            need(max(ids) < self.manifest["vocab_size"], "an id beyond the vocabulary")

    def check_shards(self) -> None:
        """A shard is closed when the next document would take it past shard_bytes."""
        limit = int(self.manifest["settings"]["shard_bytes"])
        for number, (data, starts) in enumerate(self.shards):
            need(len(data) <= limit or len(starts) == 2, "a shard past the limit")
            if number:
                before = len(self.shards[number - 1][0])
                need(before + self._width * starts[1] > limit, "a shard closed too early")

    def check_sources(self, folder: Path) -> None:
        """The inputs that lie in a folder are those that were read."""
        for source in self.manifest["sources"]:
            data = (folder / source["name"]).read_bytes()
            need(len(data) == source["bytes"], "size of a source")
            pieces = source.get("pieces", [])
            digests = []
            end = 0
            for piece in pieces:
                need(piece["start"] == end, "pieces that follow each other")
                end = piece["end"]
                digests.append(hashlib.sha256(data[piece["start"] : end]))
                need(digests[-1].hexdigest() == piece["sha256"], "sha256 of a piece")
            whole = b"".join(digest.digest() for digest in digests) if pieces else data
            need(not pieces or end == len(data), "pieces up to the end")
            need(hashlib.sha256(whole).hexdigest() == source["sha256"], "sha256 of a source")

    def problems(self) -> list[dict[str, str]]:
        """What --on-error left out."""
        path = self.folder / "problems.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines]
        need(len(found) == self.manifest["problems"], "number of problems")
        need(found[:20] == self.manifest["first_problems"], "the first problems")
        return found

    def _read_shard(self, shard: dict[str, Any]) -> tuple[bytes, tuple[int, ...]]:
        data, index = (self._read_file(shard[key]) for key in ("bin", "idx"))
        need(len(data) == self._width * shard["tokens"], "size of a .bin")
        need(len(index) == 8 * (shard["documents"] + 1), "size of a .idx")
        starts = struct.unpack(f"<{shard['documents'] + 1}q", index)
        need(starts[0] == 0 and starts[-1] == shard["tokens"], "first and last of a .idx")
        need(all(starts[d] < starts[d + 1] for d in range(len(starts) - 1)), "rising starts")
        return data, starts

    def _read_file(self, record: dict[str, Any]) -> bytes:
        data = (self.folder / record["name"]).read_bytes()
        need(len(data) == record["bytes"], f"size of {record['name']}")
        need(hashlib.sha256(data).hexdigest() == record["sha256"], f"sha256 of {record['name']}")
        return data


def is_for_validation(text: str, share: tuple[int, int]) -> bool:
    """The rule of --valid, for a share as numerator and denominator."""
    digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
    return int.from_bytes(digest, "big") < (share[0] << 128) // share[1]


def need(holds: bool, what: str) -> None:
    if not holds:
        raise FormatError(what)
