"""Text files -> token shards: read in order, encode in parallel, write in order.

The result does not depend on the number of workers, byte for byte. It is made in a folder beside
``out`` and renamed at the end, so ``out`` is whole or not there; a second run finds it up to date.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import re
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from longpretrain.data.documents import Documents, InputFile, find_inputs, read_documents
from longpretrain.data.shards import (
    MANIFEST,
    SHARD_BYTES,
    VERSION,
    Corpus,
    FileRecord,
    Manifest,
    ShardRecord,
    ShardWriter,
    dtype_for,
)
from longpretrain.data.tokenizer import Tokenizer, load_tokenizer
from longpretrain.errors import InputError
from longpretrain.files import fresh_folder, sha256

Progress = Callable[[int, int], None]
"""Called with (bytes of text done, bytes in all)."""

# Text handed to a worker at a time: large against the cost of handing over, small against memory.
_BATCH_CHARS = 1 << 20
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class _Batch:
    texts: list[str]
    bytes_read: int
    """Bytes of all inputs that were read when the batch was full."""


@dataclass(frozen=True)
class _Encoded:
    ids: NDArray[np.integer]
    lengths: list[int]


def prepare(
    inputs: Sequence[Path | str],
    out: Path | str,
    *,
    tokenizer_folder: Path | str | None = None,
    workers: int = 1,
    documents: Documents = "auto",
    field: str = "text",
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Manifest:
    """Tokenizes documents into a corpus folder.

    Safe to run twice: the same inputs, settings and tokenizer leave a whole ``out`` as it is and
    write one with damaged shards anew. A damaged manifest is refused: nothing else says what the
    folder is. With more than one worker a script needs the usual ``if __name__ ==
    "__main__"`` guard, for workers are spawned.

    Args:
        inputs: .txt and .jsonl files, folders with such files, or glob patterns.
        out: the folder to make.
        tokenizer_folder: a Hugging Face tokenizer folder. None: RoBERTa's BPE.
        workers: processes that encode; the result is the same for any number.
        documents: how a .txt is divided: file, one document a file; blank-line, documents separated
            by blank lines; auto, as file, but a very large .txt is refused.
        field: key of the text in a line of .jsonl.
        progress: is told how far it is.
        shard_bytes: a new shard starts before this size is passed.

    Returns:
        The manifest of ``out``.

    Raises:
        InputError: see documents.py for the inputs; nothing but empty documents; an ``out`` that
            holds something else or a damaged manifest. Nothing is left behind.
    """
    out = Path(out)
    if workers < 1:
        raise InputError("workers", got=workers, wanted="1 or more", way_out="Set --workers.")
    files = find_inputs(inputs, documents)
    tokenizer = load_tokenizer(tokenizer_folder)
    kind = "file" if documents == "auto" else documents
    settings = {"documents": kind, "field": field, "shard_bytes": str(shard_bytes)}
    done = _finished(out, files, settings, tokenizer)
    if done:
        return done
    reader = _Reader(files, documents, field)
    with (
        fresh_folder(out, belongs=_is_corpus) as folder,
        _encoder(tokenizer, tokenizer_folder, workers) as encoder,
        closing(
            ShardWriter(folder, vocab_size=tokenizer.vocab_size, shard_bytes=shard_bytes)
        ) as writer,
    ):
        _write(writer, reader, encoder(reader.batches()), progress)
        manifest = _manifest(writer.finish(), reader, settings, tokenizer)
        manifest.write(folder)
    return manifest


def _write(
    writer: ShardWriter,
    reader: _Reader,
    batches: Iterator[tuple[_Batch, _Encoded]],
    progress: Progress | None,
) -> None:
    """Writes documents; one that the tokenizer makes no token of is counted as empty."""
    for batch, encoded in batches:
        start = 0
        for length in encoded.lengths:
            if length:
                writer.add(encoded.ids[start : start + length])
            start += length
        reader.empty_documents += encoded.lengths.count(0)
        if progress:
            progress(batch.bytes_read, reader.total_bytes)


def _manifest(
    shards: tuple[ShardRecord, ...],
    reader: _Reader,
    settings: dict[str, str],
    tokenizer: Tokenizer,
) -> Manifest:
    sources = tuple(reader.sources)
    if not shards:
        raise InputError(
            f"input {sources[0].name}" if len(sources) == 1 else f"{len(sources)} input files",
            got=f"no text ({reader.empty_documents} empty documents)",
            wanted="at least one document with text",
            way_out="Check the inputs.",
        )
    return Manifest(
        tokenizer_fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        dtype=dtype_for(tokenizer.vocab_size).name,
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        empty_documents=reader.empty_documents,
        shards=shards,
        sources=sources,
        settings=settings,
        inputs_digest=_inputs_digest(sources, settings, tokenizer),
    )


class _Reader:
    """Reads all files in order; knows afterwards what they were."""

    def __init__(self, files: Sequence[InputFile], documents: Documents, field: str) -> None:
        self._files = files
        self._documents: Documents = documents
        self._field = field
        self._bytes = self._bytes_before = 0
        self.total_bytes = sum(file.bytes for file in files)
        self.sources: list[FileRecord] = []
        self.empty_documents = 0

    def batches(self) -> Iterator[_Batch]:
        texts: list[str] = []
        chars = 0
        for text in self._texts():
            texts.append(text)
            chars += len(text)
            if chars >= _BATCH_CHARS or len(texts) == _BATCH_DOCUMENTS:
                yield _Batch(texts, self._bytes)
                texts, chars = [], 0
        yield _Batch(texts, self._bytes)

    def _texts(self) -> Iterator[str]:
        for file in self._files:
            digest = _Digest()
            for text in read_documents(
                file, documents=self._documents, field=self._field, on_bytes=digest.update
            ):
                self._bytes = self._bytes_before + digest.bytes
                if text:
                    yield text
                else:
                    self.empty_documents += 1
            self._bytes_before += digest.bytes
            self.sources.append(
                FileRecord(name=file.name, bytes=digest.bytes, sha256=digest.sha256.hexdigest())
            )
        self._bytes = self._bytes_before


class _Digest:
    """Size and sha256 of the bytes that pass by."""

    def __init__(self) -> None:
        self.bytes = 0
        self.sha256 = hashlib.sha256()

    def update(self, data: bytes) -> None:
        self.bytes += len(data)
        self.sha256.update(data)


_Encoder = Callable[[Iterator[_Batch]], Iterator[tuple[_Batch, _Encoded]]]


@contextmanager
def _encoder(
    tokenizer: Tokenizer, tokenizer_folder: Path | str | None, workers: int
) -> Iterator[_Encoder]:
    """Something that encodes batches and keeps their order."""
    if workers == 1:
        yield lambda batches: ((batch, _encode(tokenizer, batch.texts)) for batch in batches)
        return
    # Spawned, not forked: threads of the caller (torch, tokenizers) make a fork unsafe.
    with ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer_folder,),
    ) as pool:
        try:
            yield lambda batches: _encode_in_pool(pool, batches, in_flight=2 * workers + 1)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _encode_in_pool(
    pool: ProcessPoolExecutor, batches: Iterator[_Batch], *, in_flight: int
) -> Iterator[tuple[_Batch, _Encoded]]:
    waiting: deque[tuple[_Batch, Future[_Encoded]]] = deque()
    try:
        for batch in batches:
            waiting.append((batch, pool.submit(_encode_in_worker, batch.texts)))
            if len(waiting) == in_flight:
                first, future = waiting.popleft()
                yield first, future.result()
        for batch, future in waiting:
            yield batch, future.result()
    except BrokenProcessPool as error:
        raise InputError(
            "workers",
            got="a process that died, perhaps for want of memory",
            wanted="processes that live to the end",
            way_out="Try fewer --workers.",
        ) from error


_worker_tokenizer: Tokenizer | None = None


def _start_worker(tokenizer_folder: Path | str | None) -> None:
    global _worker_tokenizer  # noqa: PLW0603  a pool's worker has no other home for its state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    _worker_tokenizer = load_tokenizer(tokenizer_folder)


def _encode_in_worker(texts: list[str]) -> _Encoded:
    assert _worker_tokenizer
    return _encode(_worker_tokenizer, texts)


def _encode(tokenizer: Tokenizer, texts: list[str]) -> _Encoded:
    ids = [tokenizer.encode(text) for text in texts]
    joined = np.concatenate([*ids, np.zeros(0, np.int32)]).astype(dtype_for(tokenizer.vocab_size))
    return _Encoded(joined, [len(document) for document in ids])


def _finished(
    out: Path, files: Sequence[InputFile], settings: dict[str, str], tokenizer: Tokenizer
) -> Manifest | None:
    """The manifest of an ``out`` that is up to date; None when there is something to do."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / MANIFEST).is_file():
        raise InputError(
            f"out {out}",
            got="something that is no corpus",
            wanted="a new or empty folder",
            way_out="Choose another --out.",
        )
    manifest = Manifest.read(out)
    sources = [
        FileRecord(name=file.name, bytes=file.bytes, sha256=sha256(file.path)) for file in files
    ]
    if manifest.inputs_digest != _inputs_digest(sources, settings, tokenizer):
        raise InputError(
            f"out {out}",
            got="a corpus of other inputs, settings or tokenizer",
            wanted="a new or empty folder",
            way_out="Choose another --out, or remove this folder first.",
        )
    try:
        Corpus.open(out, verify="sha256")
    except InputError:
        return None  # damaged: write it again
    return manifest


def _is_corpus(folder: Path) -> bool:
    """Whether a folder holds a corpus of ours, whole or damaged, and nothing else."""
    try:
        Manifest.read(folder)
    except InputError:
        return False
    names = {path.name for path in folder.iterdir()} - {MANIFEST}
    return all(re.fullmatch(r"tokens-\d{5,}\.(bin|idx)", name) for name in names)


def _inputs_digest(
    sources: Sequence[FileRecord], settings: dict[str, str], tokenizer: Tokenizer
) -> str:
    files = [(source.name, source.bytes, source.sha256) for source in sources]
    text = json.dumps([VERSION, tokenizer.fingerprint, settings, files], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
