"""What decides the bytes of a corpus, apart from its inputs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import longpretrain
from longpretrain.data.manifest import VERSION, SourceRecord
from longpretrain.data.tokenizer import Tokenizer, load_tokenizer
from longpretrain.errors import InputError
from longpretrain.prepare.documents import ReadOptions
from longpretrain.prepare.filters import Filters
from longpretrain.prepare.split import Split

FACTS = {
    "version": "version of longpretrain",
    "tokenizer": "--tokenizer",
    "documents": "--documents",
    "field": "--field",
    "filters": "--filter",
    "valid": "--valid",
}
"""What two runs must have in common to share parts, and what a user calls it."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Of one preparation; pickles, and is small: every task is handed it."""

    read: ReadOptions
    filters: Filters
    split: Split
    tokenizer_folder: Path | None
    tokenizer_fingerprint: str
    vocab_size: int
    shard_bytes: int

    @property
    def needs_hashes(self) -> bool:
        """Whether documents are told apart by their text."""
        return self.filters.deduplicate or self.split.share is not None

    @property
    def facts(self) -> dict[str, str]:
        """What decides a part, but for what is allowed to be wrong with the inputs."""
        return {
            "version": f"{longpretrain.__version__}, format {VERSION}",
            "tokenizer": self.tokenizer_fingerprint,
            "documents": _documents(self.read),
            "field": self.read.field,
            "filters": ", ".join(self.filters.names),
            "valid": str(self.split),
        }

    def as_manifest(self) -> dict[str, str]:
        """What the manifest says of them."""
        return {
            "documents": _documents(self.read),
            "field": self.read.field,
            "filters": ", ".join(self.filters.names),
            "max_document_bytes": str(self.read.max_document_bytes),
            "on_error": self.read.on_error,
            "shard_bytes": str(self.shard_bytes),
            "valid": str(self.split),
        }

    def inputs_digest(self, sources: Sequence[SourceRecord]) -> str:
        """Equal when preparing again changes nothing."""
        return inputs_digest(VERSION, self.tokenizer_fingerprint, self.as_manifest(), sources)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded once in each process.

        Raises:
            InputError: this process finds another one than the first did.
        """
        key = (self.tokenizer_folder, self.tokenizer_fingerprint)
        if key not in _loaded:
            tokenizer = load_tokenizer(self.tokenizer_folder)
            if tokenizer.fingerprint != self.tokenizer_fingerprint:
                raise InputError(
                    f"tokenizer {self.tokenizer_folder}",
                    got="another one at this rank than at rank 0, or one that has just changed",
                    wanted="the same everywhere",
                    way_out="Give a --tokenizer on a shared file system, and leave it alone.",
                )
            _loaded.clear()
            _loaded[key] = tokenizer
        return _loaded[key]


_loaded: dict[tuple[Path | None, str], Tokenizer] = {}


def digest(tree: Mapping[str, Any] | Sequence[Any]) -> str:
    """sha256 of something as JSON, hexadecimal."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def inputs_digest(
    version: int,
    tokenizer_fingerprint: str,
    settings: Mapping[str, str],
    sources: Sequence[SourceRecord],
) -> str:
    """The digest of a manifest of that version, by what it says itself."""
    files = [(source.name, source.bytes, source.sha256) for source in sources]
    return digest([version, tokenizer_fingerprint, settings, files])


def _documents(read: ReadOptions) -> str:
    return "file" if read.documents == "auto" else read.documents
