"""Token shards on disk: a folder of memory-mapped arrays and one manifest (docs/data_format.md).

    tokens-00000.bin    uint16 or uint32, little-endian: the ids of its documents, one after another
    tokens-00000.idx    int64, little-endian: where each document starts; first 0, last the count
    manifest.json       what the folder holds, with size and sha256 of every file

No special tokens are stored, so the length of a sequence can change without preparing again.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from longpretrain.data.manifest import FileRecord, Manifest, ShardRecord
from longpretrain.errors import InputError
from longpretrain.files import sha256

SPAN_DOCUMENTS = 1 << 20
"""Documents that are looked at together: their offsets take 8 MiB."""
_WAY_OUT = "Run `longpretrain prepare` again: it rewrites damaged shards."


@dataclass(frozen=True)
class Shard:
    """One memory-mapped shard of an open corpus."""

    tokens: NDArray[np.integer]
    offsets: NDArray[np.int64]
    first_token: int
    """Tokens of the corpus before this shard."""
    first_document: int
    """Documents of the corpus before this shard."""

    @property
    def num_documents(self) -> int:
        """Documents in this shard."""
        return len(self.offsets) - 1


class Corpus:
    """Documents of token ids, memory-mapped. Open one with ``Corpus.open``."""

    def __init__(self, folder: Path, manifest: Manifest, shards: Sequence[Shard]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.shards = tuple(shards)
        self.fingerprint = manifest.fingerprint
        self._first_documents = [shard.first_document for shard in shards]
        self._first_tokens = [shard.first_token for shard in shards]
        # The same maps without the cost that a memmap adds to every slice.
        self._tokens = [shard.tokens.view(np.ndarray) for shard in shards]

    @classmethod
    def open(cls, folder: Path | str, *, verify: Literal["size", "sha256"] = "size") -> Corpus:
        """Opens a folder that ``longpretrain prepare`` wrote.

        Args:
            folder: the corpus.
            verify: size checks that every file is there with its size, and the .idx files byte by
                byte; sha256 also reads every byte of the .bin files.

        Raises:
            InputError: no corpus, another version, an empty one, a truncated or altered file.
        """
        return cls._open(Path(folder), verify)

    @classmethod
    def _open(cls, folder: Path, verify: Literal["size", "sha256", "nothing"]) -> Corpus:
        manifest = Manifest.read(folder)
        if manifest.tokens == 0:
            raise InputError(
                f"corpus {folder}",
                got="no tokens",
                wanted="at least one document with text",
                way_out="Prepare it from files that hold text.",
            )
        shards = []
        first_token = first_document = 0
        for record in manifest.shards:
            if verify != "nothing":
                _check_file(folder, record.bin, read_all=verify == "sha256")
                # Small, and a wrong border would go unseen: it moves text between documents.
                _check_file(folder, record.idx, read_all=True)
            tokens = np.memmap(
                folder / record.bin.name, np.dtype(manifest.dtype).newbyteorder("<"), mode="r"
            )
            offsets = np.memmap(folder / record.idx.name, "<i8", mode="r").view(np.ndarray)
            if verify != "nothing":
                _check_offsets(folder / record.idx.name, record, offsets, len(tokens))
            shards.append(Shard(tokens, offsets, first_token, first_document))
            first_token += record.tokens
            first_document += record.documents
        return cls(folder, manifest, shards)

    @property
    def num_documents(self) -> int:
        """Documents, none of them empty."""
        return self.manifest.documents

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, without special tokens."""
        return self.manifest.tokens

    @property
    def vocab_size(self) -> int:
        """Ids of the tokenizer that wrote it."""
        return self.manifest.vocab_size

    @property
    def tokenizer_fingerprint(self) -> str:
        """``Tokenizer.fingerprint`` of the tokenizer that wrote it."""
        return self.manifest.tokenizer_fingerprint

    def __len__(self) -> int:
        return self.num_documents

    def document(self, number: int) -> NDArray[np.integer]:
        """The ids of a document: a read-only view into the file, without special tokens."""
        if not 0 <= number < self.num_documents:
            raise IndexError(number)
        shard = self.shards[bisect_right(self._first_documents, number) - 1]
        start, end = shard.offsets[number - shard.first_document :][:2]
        return shard.tokens[start:end]

    def shard_of_token(self, number: int) -> int:
        """Which shard token ``number`` of the corpus lies in."""
        return bisect_right(self._first_tokens, number) - 1

    def gather(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.integer]:
        """The ids of some stretches of tokens, one after another.

        Args:
            starts: numbers of their first tokens, counted through the corpus, ascending.
            lengths: how many each has; none reaches into the next shard.
        """
        first, last = self.shard_of_token(int(starts[0])), self.shard_of_token(int(starts[-1]))
        parts = []
        for shard in range(first, last + 1):
            origin = self._first_tokens[shard]
            if first == last:
                low, high = 0, len(starts)
            else:
                end = origin + len(self._tokens[shard])
                low, high = np.searchsorted(starts, (origin, end)).tolist()
            if low < high:
                places = _places(starts[low:high] - origin, lengths[low:high])
                parts.append(self._tokens[shard][places])
        return np.concatenate(parts)

    def spans(self) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """All documents, a bounded number at a time: (number of the first one, tokens of the corpus
        before each, tokens of each).
        """
        for shard in self.shards:
            for first in range(0, shard.num_documents, SPAN_DOCUMENTS):
                offsets = shard.offsets[first : first + SPAN_DOCUMENTS + 1]
                starts = offsets[:-1] + shard.first_token
                yield shard.first_document + first, starts, np.diff(offsets)

    def require_tokenizer(self, fingerprint: str, *, owner: str) -> None:
        """Checks that the corpus was written with a tokenizer.

        Args:
            fingerprint: ``Tokenizer.fingerprint`` of the tokenizer in use.
            owner: what uses it, for the message, such as ``model runs/demo/long``.

        Raises:
            InputError: it was written with another one, so its ids mean other words.
        """
        if fingerprint != self.tokenizer_fingerprint:
            raise InputError(
                f"corpus {self.folder}",
                got=f"ids of tokenizer {self.tokenizer_fingerprint[:12]}",
                wanted=f"tokenizer {fingerprint[:12]}, that of {owner}",
                way_out="Prepare the corpus with `--tokenizer` and the model's folder.",
            )

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files itself, which this one has checked.
        return _open_checked, (self.folder, self.fingerprint)


def _open_checked(folder: Path, fingerprint: str) -> Corpus:
    corpus = Corpus._open(folder, "nothing")
    if corpus.fingerprint != fingerprint:
        raise InputError(
            f"corpus {folder}",
            got=f"fingerprint {corpus.fingerprint[:16]}",
            wanted=f"{fingerprint[:16]}, as it was a moment ago",
            way_out="Another program has replaced it: run this again.",
        )
    return corpus


def _places(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """The numbers of each stretch, start to start + length, one stretch after another."""
    ends = np.cumsum(lengths)
    places: NDArray[np.int64] = np.repeat(starts - (ends - lengths), lengths)
    return places + np.arange(ends[-1])


def _check_offsets(
    path: Path, record: ShardRecord, offsets: NDArray[np.int64], num_tokens: int
) -> None:
    counts = len(offsets) - 1, int(offsets[0]), int(offsets[-1]), num_tokens
    is_rising = all(
        bool((np.diff(offsets[first : first + SPAN_DOCUMENTS + 1]) > 0).all())
        for first in range(0, len(offsets) - 1, SPAN_DOCUMENTS)
    )
    if counts != (record.documents, 0, record.tokens, record.tokens) or not is_rising:
        order = "" if is_rising else ", not rising"
        raise InputError(
            f"shard {path}",
            got=f"offsets {counts[1]} to {counts[2]} of {counts[0]} documents{order}",
            wanted=f"0 to {record.tokens} of {record.documents}, rising",
            way_out=_WAY_OUT,
        )


def _check_file(folder: Path, record: FileRecord, *, read_all: bool) -> None:
    path = folder / record.name
    size = path.stat().st_size if path.is_file() else None
    if size != record.bytes:
        raise InputError(
            f"truncated shard {path}" if size is not None else f"missing shard {path}",
            got="no such file" if size is None else f"{size} bytes",
            wanted=f"{record.bytes} bytes",
            way_out=_WAY_OUT,
        )
    if read_all and (found := sha256(path)) != record.sha256:
        raise InputError(
            f"altered shard {path}",
            got=f"sha256 {found[:12]}",
            wanted=record.sha256[:12],
            way_out=_WAY_OUT,
        )
