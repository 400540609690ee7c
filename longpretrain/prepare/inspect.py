"""What a corpus holds: counts, sources, what filters did, lengths of documents, and some of them.

Offsets are read a bounded number at a time, and of the tokens only those that are shown.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longpretrain.data.hashing import hash64
from longpretrain.data.manifest import PROBLEMS, Manifest
from longpretrain.data.shards import Corpus
from longpretrain.data.tokenizer import Tokenizer, load_tokenizer
from longpretrain.prepare.verify import check_filters, corpus_folders

SAMPLES = 3
SAMPLE_TOKENS = 120
LIMITS = (512, 1200, 4096)
"""Lengths that are asked for: RoBERTa's, what Longformer's corpus takes for long, Longformer's."""

_EXACT = 1 << 20
"""Lengths below it are counted one by one, which is 8 MiB and makes the median exact."""
_SHOWN_SOURCES = 8
_SHOWN_PROBLEMS = 5
_SALT = 0x696E7370656374  # "inspect": other uses of the same hash draw other numbers


@dataclass(frozen=True)
class Lengths:
    """How long documents are, in tokens."""

    edges: tuple[int, ...]
    """Powers of two: bin i holds lengths from edges[i] to edges[i + 1] - 1."""
    documents: tuple[int, ...]
    """In each bin."""
    tokens: tuple[int, ...]
    """Of the documents in each bin."""
    shortest: int
    median: int
    """The lower one of two; _EXACT stands for all that is longer."""
    longest: int
    longer: tuple[tuple[int, int, int], ...]
    """For each of LIMITS: (limit, documents of more tokens, tokens of these)."""


@dataclass(frozen=True)
class Sample:
    """The beginning of a document."""

    number: int
    tokens: int
    """Of the whole document."""
    text: str


@dataclass(frozen=True)
class Contents:
    """One corpus."""

    folder: Path
    manifest: Manifest
    lengths: Lengths
    samples: tuple[Sample, ...]
    why_no_samples: str


def inspect(folder: Path | str, *, tokenizer: Path | None = None) -> list[Contents]:
    """Looks into a corpus, or the pair of them that ``--valid`` makes.

    Args:
        folder: with a manifest.json, or with train/ and valid/.
        tokenizer: decodes the samples. None: RoBERTa's BPE, if it wrote the corpus.

    Raises:
        InputError: no corpus, a damaged one, or one that another tokenizer wrote.
    """
    found = []
    for path in corpus_folders(Path(folder)):
        corpus = Corpus.open(path)
        check_filters(path, corpus.manifest)
        decoder = load_tokenizer(tokenizer)
        why = ""
        if tokenizer is not None:
            corpus.require_tokenizer(decoder.fingerprint, owner=f"--tokenizer {tokenizer}")
        elif decoder.fingerprint != corpus.tokenizer_fingerprint:
            why = "another tokenizer than RoBERTa's wrote it: name it with --tokenizer"
        samples = () if why else tuple(_samples(corpus, decoder))
        found.append(Contents(path, corpus.manifest, measure_lengths(corpus), samples, why))
    return found


def measure_lengths(corpus: Corpus) -> Lengths:
    """Counts the documents of a corpus by length."""
    exact = np.zeros(_EXACT + 1, np.int64)
    bins, tokens = np.zeros(64, np.int64), np.zeros(64, np.int64)
    longer = np.zeros((len(LIMITS), 2), np.int64)
    shortest, longest = np.iinfo(np.int64).max, 0
    for _, _, lengths in corpus.spans():
        exact += np.bincount(np.minimum(lengths, _EXACT), minlength=_EXACT + 1)
        powers = np.frexp(lengths.astype(np.float64))[1] - 1  # exact below 2**53
        bins += np.bincount(powers, minlength=64)
        tokens += np.bincount(powers, weights=lengths, minlength=64).astype(np.int64)
        shortest, longest = min(shortest, int(lengths.min())), max(longest, int(lengths.max()))
        for row, limit in enumerate(LIMITS):
            over = lengths[lengths > limit]
            longer[row] += len(over), int(over.sum())
    median = int(np.searchsorted(np.cumsum(exact), (corpus.num_documents + 1) // 2))
    first, end = shortest.bit_length() - 1, longest.bit_length()
    return Lengths(
        edges=tuple(1 << power for power in range(first, end + 1)),
        documents=tuple(bins[first:end].tolist()),
        tokens=tuple(tokens[first:end].tolist()),
        shortest=shortest,
        median=median,
        longest=longest,
        longer=tuple(
            (limit, documents, over)
            for limit, (documents, over) in zip(LIMITS, longer.tolist(), strict=True)
        ),
    )


def inspect_text(contents: Sequence[Contents]) -> str:
    """All of it for a terminal."""
    return "\n\n".join("\n".join(_lines(one)) for one in contents)


def _lines(contents: Contents) -> Iterator[str]:
    manifest = contents.manifest
    yield f"{contents.folder}: {manifest.documents:,} documents, {manifest.tokens:,} tokens"
    for name, value in facts(contents).items():
        yield f"  {name:11}{value}"
    for report in manifest.filters:
        yield f"  filter {report['name']}: {filter_text(report)}"
        for name, place, text in examples(manifest):
            if name == report["name"]:
                yield f"    {place}: {text}"
    for place, reason in problems(manifest)[:_SHOWN_PROBLEMS]:
        yield f"  problem: {place}: {reason}"
    if manifest.problems > _SHOWN_PROBLEMS:
        yield f"  and {manifest.problems - _SHOWN_PROBLEMS:,} more, in {PROBLEMS}"
    yield ""
    yield from _histogram(contents.lengths)
    yield ""
    if contents.why_no_samples:
        yield f"  no samples: {contents.why_no_samples}"
    for sample in contents.samples:
        yield f"  document {sample.number:,} ({sample.tokens:,} tokens): {sample.text}"


def facts(contents: Contents) -> dict[str, str]:
    """Counts and sources, by name."""
    manifest, lengths = contents.manifest, contents.lengths
    size = sum(shard.bin.bytes for shard in manifest.shards)
    names = [source.name for source in manifest.sources[:_SHOWN_SOURCES]]
    more = len(manifest.sources) - len(names)
    read = sum(source.bytes for source in manifest.sources)
    median = f"{lengths.median:,}" + (" or more" if lengths.median == _EXACT else "")
    found = {
        "shards": f"{len(manifest.shards):,} of {manifest.dtype}, {size:,} bytes",
        "tokenizer": f"{manifest.tokenizer_fingerprint[:12]}, {manifest.vocab_size:,} ids",
        "sources": f"{len(manifest.sources):,} files, {read:,} bytes: {printable(', '.join(names))}"
        + (f" and {more:,} more" if more else ""),
        "settings": printable(
            ", ".join(f"{key} {value or '-'}" for key, value in manifest.settings.items())
        ),
        "left out": f"{manifest.empty_documents:,} empty, {manifest.problems:,} unreadable; "
        f"{manifest.mended_documents:,} mended",
        "lengths": f"shortest {lengths.shortest:,}, median {median}, "
        f"mean {manifest.tokens / manifest.documents:,.0f}, longest {lengths.longest:,} tokens",
    }
    for limit, documents, tokens in lengths.longer:
        found[f"> {limit:,}"] = (
            f"{documents:,} documents ({documents / manifest.documents:.1%}), with "
            f"{tokens / manifest.tokens:.1%} of the tokens"
        )
    if manifest.split:
        found["split"] = f"{manifest.split}; sources, left out and filters are of both together"
    return found


def filter_text(report: dict[str, object]) -> str:
    """What a filter did, in a line."""
    if str(report["name"]).startswith("unicode"):
        return f"of {report['seen']:,} documents {report['changed']:,} changed"
    return (
        f"of {report['seen']:,} documents {report['dropped']:,} dropped, "
        f"with {report['tokens_dropped']:,} tokens"
    )


def examples(manifest: Manifest) -> list[tuple[str, str, str]]:
    """(filter, place, text) of documents that filters dropped or changed."""
    return [
        (str(report["name"]), printable(example["place"]), printable(example["text"]))
        for report in manifest.filters
        for example in report["examples"]
    ]


def problems(manifest: Manifest) -> list[tuple[str, str]]:
    """(place, reason) of the first of them."""
    return [
        (printable(entry.get("place")), printable(entry.get("reason")))
        for entry in manifest.first_problems
    ]


def _histogram(lengths: Lengths) -> Iterator[str]:
    """A row a bin; the bar is its share of the documents."""
    rows = [("tokens", "documents", "their tokens")]
    for (low, high), documents, tokens in zip(
        itertools.pairwise(lengths.edges), lengths.documents, lengths.tokens, strict=True
    ):
        span = f"{low:,}-{high - 1:,}" if high - 1 > low else f"{low:,}"
        rows.append((span, f"{documents:,}", f"{tokens:,}"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    room = max(10, min(100, shutil.get_terminal_size().columns) - sum(widths) - 9)
    most = max(lengths.documents)
    for row, documents in zip(rows, (0, *lengths.documents), strict=True):
        cells = "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        # What is there is seen, however little.
        bar = "#" * max(bool(documents), round(room * documents / most))
        yield f"  {cells}  {bar}".rstrip()


def _samples(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[Sample]:
    """The same documents each time, drawn by the corpus' fingerprint."""
    seed = int(corpus.fingerprint[:16], 16)
    draws = (hash64(_SALT, seed, draw) % len(corpus) for draw in itertools.count())
    chosen: set[int] = set()
    while len(chosen) < min(SAMPLES, len(corpus)):
        chosen.add(next(draws))
    for number in sorted(chosen):
        ids = corpus.document(number)
        text = printable(tokenizer.decode(ids[:SAMPLE_TOKENS].tolist()))
        if len(ids) > SAMPLE_TOKENS:  # the last character may be cut in the middle
            text = text.rstrip("\N{REPLACEMENT CHARACTER}") + " ..."
        yield Sample(number, len(ids), text)


def printable(text: object) -> str:
    """Text in one line; a character that would do something to a terminal is written as a code."""
    line = " ".join(str(text).split())
    return "".join(c if c.isprintable() else f"\\u{{{ord(c):x}}}" for c in line)
