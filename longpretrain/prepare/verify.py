"""Every byte and every count of a corpus checked again (docs/data_format.md).

Files are read as streams and offsets a bounded number at a time: memory stays flat however large
the corpus is. What is found wrong first ends the work: it is told, and the rest is not looked at.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from longpretrain.data.manifest import MANIFEST, PROBLEMS, Manifest, ShardRecord
from longpretrain.data.shards import SPAN_DOCUMENTS, Corpus
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.errors import InputError
from longpretrain.files import read_json_object
from longpretrain.prepare.deduplicate import HASH_BYTES, find_duplicates
from longpretrain.prepare.filters import FilterReport
from longpretrain.prepare.finished import combined
from longpretrain.prepare.settings import inputs_digest
from longpretrain.prepare.split import TRAIN, VALID

Progress = Callable[[int, int], None]
"""Called with (bytes checked, bytes in all)."""

_READ_BYTES = 1 << 22
_MAX_LINE_BYTES = 1 << 20
_INDEX = re.compile(r"\.index-.+")
_AGAIN = "Run `longpretrain prepare` again: it rewrites damaged shards."
_ANEW = "Remove the folder and run `longpretrain prepare` again."


def verify(folder: Path | str, progress: Progress | None = None) -> str:
    """Checks a corpus, or the pair of them that ``--valid`` makes.

    Args:
        folder: with a manifest.json, or with train/ and valid/.
        progress: is told how far it is.

    Returns:
        What was checked, as text.

    Raises:
        InputError: something is missing, altered, or does not fit the rest; or it is no corpus.
    """
    folders = corpus_folders(Path(folder))
    manifests = [Manifest.read(path) for path in folders]
    total = sum(shard.bin.bytes for manifest in manifests for shard in manifest.shards)
    done = 0

    def tick(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, total)

    lines = []
    for path, manifest in zip(folders, manifests, strict=True):
        lines += _check_corpus(path, manifest, tick)
    if len(folders) == 2:
        lines += _check_pair(Path(folder), folders, manifests)
    return "\n".join(lines)


def corpus_folders(folder: Path) -> list[Path]:
    """The folder itself, or its train/ and valid/.

    Raises:
        InputError: there is no manifest.json where one should be.
    """
    pair = [folder / name for name in (TRAIN, VALID)]
    if (folder / MANIFEST).is_file() or not any(path.is_dir() for path in pair):
        pair = [folder]
    for path in pair:
        if not (path / MANIFEST).is_file():
            Manifest.read(path)  # says what is there instead
    return pair


def _check_corpus(folder: Path, manifest: Manifest, tick: Callable[[int], None]) -> list[str]:
    """Everything that one corpus says of itself; returns what to print."""
    corpus = Corpus.open(folder)  # the manifest, all sizes, the .idx files byte by byte
    _check_layout(corpus)
    largest = max(_check_tokens(folder, manifest, shard, tick) for shard in manifest.shards)
    size = sum(record.bytes for shard in manifest.shards for record in (shard.bin, shard.idx))
    lines = [
        f"{folder}: whole",
        f"  {len(manifest.shards):,} shards, {size:,} bytes: size and sha256 of every file",
        f"  {manifest.documents:,} documents, {manifest.tokens:,} tokens: offsets rise from 0 to "
        "the end, and add up",
        f"  ids: the largest is {largest:,}, below {manifest.vocab_size:,}",
        f"  {len(manifest.sources):,} sources: {_check_sources(folder, manifest)}",
        f"  {manifest.problems:,} problems: {_check_problems(folder, manifest)}",
    ]
    if manifest.filters:
        check_filters(folder, manifest)
        names = ", ".join(str(report["name"]) for report in manifest.filters)
        lines.append(f"  filters: the counts of {names} add up")
    return lines + _others(folder, manifest)


def _check_layout(corpus: Corpus) -> None:
    """The rule when a new shard starts, which makes shards the same wherever they are made."""
    size = str(corpus.manifest.settings.get("shard_bytes", ""))
    if not size.isdecimal():
        return
    most = int(size) // corpus.shards[0].tokens.itemsize
    for number, shard in enumerate(corpus.shards):
        tokens = int(shard.offsets[-1])
        first = int(shard.offsets[1])
        before = int(corpus.shards[number - 1].offsets[-1]) if number else most
        if (tokens > most and shard.num_documents > 1) or before + first <= most:
            _refuse(
                f"shard {corpus.folder / corpus.manifest.shards[number].bin.name}",
                f"{tokens} tokens after a shard of {before}",
                f"shards that are filled to {most} tokens before the next one begins",
                _ANEW,
            )


def _check_tokens(
    folder: Path, manifest: Manifest, shard: ShardRecord, tick: Callable[[int], None]
) -> int:
    """Reads a .bin: its hash, and that every id is in the vocabulary. Returns the largest."""
    path = folder / shard.bin.name
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    sha256 = hashlib.sha256()
    largest = place = 0
    with path.open("rb", buffering=0) as file:
        while data := file.read(_READ_BYTES):
            sha256.update(data)
            ids = np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)
            most = int(ids.max(initial=0))
            if most >= manifest.vocab_size:
                at = place + int((ids >= manifest.vocab_size).argmax())
                _refuse(
                    f"shard {path}",
                    f"id {ids[at - place]} at token {at}",
                    f"ids below {manifest.vocab_size}",
                    _AGAIN,
                )
            largest = max(largest, most)
            place += len(ids)
            tick(len(data))
    if sha256.hexdigest() != shard.bin.sha256:
        found = sha256.hexdigest()[:12]
        _refuse(f"altered shard {path}", f"sha256 {found}", shard.bin.sha256[:12], _AGAIN)
    return largest


def _check_sources(folder: Path, manifest: Manifest) -> str:
    """That what the manifest says of its inputs hangs together; the inputs are not read."""
    for source in manifest.sources:
        if source.pieces and combined([p.sha256 for p in source.pieces]) != source.sha256:
            _refuse(
                f"{folder / MANIFEST}",
                f"another sha256 for {source.name} than its pieces give",
                "the manifest as it was written",
                _ANEW,
            )
    if not manifest.inputs_digest:  # not written by `prepare`
        return "without a digest to hold them against"
    found = inputs_digest(
        read_json_object(folder / MANIFEST)["version"],
        manifest.tokenizer_fingerprint,
        manifest.settings,
        manifest.sources,
    )
    if found != manifest.inputs_digest:
        _refuse(
            f"{folder / MANIFEST}",
            f"sources, settings and tokenizer of digest {found[:12]}",
            f"{manifest.inputs_digest[:12]}, as the manifest says itself",
            _ANEW,
        )
    return "names, sizes, hashes and settings fit the manifest's digest of them"


def _check_problems(folder: Path, manifest: Manifest) -> str:
    """problems.jsonl against the manifest: how many, and which are the first."""
    path = folder / PROBLEMS
    if not manifest.problems:
        if path.exists():
            _refuse(str(path), "a list of problems", f"none: {MANIFEST} counts 0", _ANEW)
        return "and no list of any"
    if not path.is_file():
        _refuse(str(path), "no such file", f"a list of {manifest.problems} problems", _ANEW)
    first: list[dict[str, Any]] = []
    count = 0
    with path.open("rb") as file:
        while line := file.readline(_MAX_LINE_BYTES):
            count += 1
            problem = _problem(path, count, line)
            if len(first) < len(manifest.first_problems):
                first.append(problem)
    if count != manifest.problems:
        _refuse(str(path), f"{count} problems", f"{manifest.problems}, as {MANIFEST} says", _ANEW)
    if not first or tuple(first) != manifest.first_problems:
        _refuse(str(path), "other first problems", f"those of {MANIFEST}", _ANEW)
    return f"{PROBLEMS} lists them all, the first as the manifest has them"


def _problem(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(line)
    except (ValueError, RecursionError):
        tree = None
    keys = tree.keys() if isinstance(tree, dict) else ()
    if set(keys) != {"place", "reason"} or not line.endswith(b"\n"):
        _refuse(f"{path} line {number}", repr(line[:40]), "a place and a reason", _ANEW)
    assert isinstance(tree, dict)
    return tree


def check_filters(folder: Path, manifest: Manifest) -> None:
    """Each filter's counts; what one lets through, the next one sees, and the last is the rest.

    Filters of text drop nothing, but may leave nothing of a text: they are not part of the chain.
    """
    before: FilterReport | None = None
    for tree in manifest.filters:
        try:
            report = FilterReport.from_json(tree)
            counts = (report.seen, report.dropped, report.changed, report.tokens_dropped)
            fits = all(isinstance(n, int) and n >= 0 for n in counts)
            fits = fits and max(report.dropped, report.changed) <= report.seen
        except (KeyError, TypeError):
            fits = False
        if fits and not _is_of_text(report.name):
            fits = before is None or report.seen == before.seen - before.dropped
            before = report
        if not fits:
            _refuse(
                f"{folder / MANIFEST}",
                f"counts of the filter {tree.get('name')} that do not fit",
                "filters of which each sees what the one before it lets through",
                _ANEW,
            )
    if not manifest.split:
        _check_left(folder, manifest, manifest.documents)


def _check_left(folder: Path, manifest: Manifest, documents: int) -> None:
    """What the last filter lets through is what is there."""
    last = [report for report in manifest.filters if not _is_of_text(report["name"])][-1:]
    for report in last:
        left = report["seen"] - report["dropped"]
        if left != documents:
            _refuse(
                str(folder), f"{documents} documents",
                f"{left}, those that the last filter left", _ANEW,
            )  # fmt: skip


def _is_of_text(name: object) -> bool:
    return str(name).startswith("unicode")


def _others(folder: Path, manifest: Manifest) -> list[str]:
    """Files that the manifest does not know; caches of ours need no word."""
    ours = {record.name for shard in manifest.shards for record in (shard.bin, shard.idx)}
    ours |= {MANIFEST, PROBLEMS}
    names = sorted(path.name for path in folder.iterdir())
    others = [name for name in names if name not in ours and not _INDEX.fullmatch(name)]
    if not others:
        return []
    return [f"  besides, not part of it: {', '.join(others[:5])}{' ...' * (len(others) > 5)}"]


def _check_pair(folder: Path, folders: Sequence[Path], manifests: Sequence[Manifest]) -> list[str]:
    """Two corpora side by side: if ``--valid`` made them, they fit together, and share nothing."""
    train, valid = manifests
    shared = _count_shared(folders)
    found = f"{shared:,} distinct documents" if shared else "no document"
    said = f"{folder}: {found} of {VALID}/ with the tokens of one in {TRAIN}/"
    if not train.split and not valid.split:  # prepared one by one
        return [said]
    own = {"split", "documents", "tokens", "shards"}
    same = [field.name for field in fields(Manifest) if field.name not in own]
    differing = [name for name in same if getattr(train, name) != getattr(valid, name)]
    if (train.split, valid.split) != (TRAIN, VALID):
        differing = ["split"]
    if differing:
        _refuse(
            str(folder), f"{TRAIN}/ and {VALID}/ that do not agree about {', '.join(differing)}",
            "the two corpora of one preparation", _ANEW,
        )  # fmt: skip
    _check_left(folder, train, train.documents + valid.documents)
    # Texts were compared, and other tokenizers may make the same tokens of different ones.
    if shared and train.tokenizer_fingerprint == load_tokenizer().fingerprint:
        _refuse(str(folder), said.partition(": ")[2], "no document in both", _ANEW)
    return [said]


def _count_shared(folders: Sequence[Path]) -> int:
    """Documents of the second corpus whose ids the first one has as well."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        hashes = [scratch / "train.hash", scratch / "valid.hash"]
        for folder, path in zip(folders, hashes, strict=True):
            _hash_documents(folder, path)
        both, alone = scratch / "both", scratch / "alone"
        both.mkdir()
        alone.mkdir()
        # The first of some equal documents of valid is marked only if one of train comes before it.
        marked = find_duplicates(hashes, both).of(1)
        return int((marked & ~find_duplicates(hashes[1:], alone).of(0)).sum())


def _hash_documents(folder: Path, out: Path) -> None:
    """Writes a hash of each document's ids, in order."""
    manifest = Manifest.read(folder)
    itemsize = np.dtype(manifest.dtype).itemsize
    with out.open("wb", buffering=1 << 20) as hashes:
        for shard in manifest.shards:
            index = np.memmap(folder / shard.idx.name, "<i8", "r")
            with (folder / shard.bin.name).open("rb", buffering=1 << 20) as file:
                for first in range(0, shard.documents, SPAN_DOCUMENTS):
                    lengths = np.diff(index[first : first + SPAN_DOCUMENTS + 1]) * itemsize
                    for length in lengths.tolist():
                        data = file.read(length)
                        hashes.write(hashlib.blake2b(data, digest_size=HASH_BYTES).digest())


def _refuse(what: str, got: str, wanted: str, way_out: str) -> NoReturn:
    raise InputError(what, got=got, wanted=wanted, way_out=way_out)
