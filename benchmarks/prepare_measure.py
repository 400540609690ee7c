"""What the preparation benchmark measures of ours, and beside it of the peers."""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import blocks
from prepare_peers import Datasets, DifferentError, Fairseq
from prepare_runs import FailedError, Ran, run_measured
from prepare_texts import FORMS, in_form, share, write_jsonl

from longpretrain.data import Blocks, Corpus, load_tokenizer
from longpretrain.data.manifest import Manifest
from longpretrain.prepare import prepare

MB = 1_000_000
LIMIT = 64 << 20
"""Bytes that a document may have unless more are allowed."""
WIDE = "\N{ROCKET}"
BLOCK_TOKENS = 4096
INPUT, SMALL = "in.jsonl", "one.jsonl"
SHORTEST_S = 0.5
"""Of work that a rate is computed from."""
Row = dict[str, Any]
Peer = Fairseq | Datasets


@dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Args:
        speed_mb: JSONL of each form that we prepare.
        peer_mb: what the peers get of it: their rates do not depend on it.
        rounds: of the interleaved runs.
        memory_mb: inputs of the memory measurement.
        documents: of the synthetic corpus.
    """

    speed_mb: int
    peer_mb: int
    rounds: int
    memory_mb: tuple[int, ...]
    documents: int


FULL = Sizes(500, 12, 3, (100, 2000), 10_000_000)
QUICK = Sizes(25, 3, 1, (10, 50), 200_000)


def ours(source: Path, out: Path, folder: Path, workers: int) -> tuple[Ran, Manifest]:
    """Runs ``longpretrain prepare`` as a user does; the output is removed before."""
    shutil.rmtree(out, ignore_errors=True)
    words = [sys.executable, "-m", "longpretrain", "prepare", source, "--out", out]
    ran = run_measured([*words, "--workers", workers], folder=folder)
    return ran, Manifest.read(out)


def measure_speed(
    folder: Path, speeches: Sequence[str], sizes: Sizes, packages: Path, say: Callable[[str], None]
) -> tuple[list[Row], list[str]]:
    """Every round runs each program once, one after another.

    Returns:
        A row for each form and program, and what was not measured.
    """
    missing = [why for why in (Fairseq.why_not(), Datasets.why_not(packages)) if why]
    peers: list[Peer] = []
    if not Fairseq.why_not():
        peers.append(Fairseq(folder / "fairseq"))
    if not Datasets.why_not(packages):
        peers.append(Datasets(folder / "datasets", packages))
    rows = []
    for form in FORMS:
        documents = in_form(speeches, form)
        samples: dict[str, list[Row]] = {}
        write_jsonl(folder / INPUT, documents, sizes.speed_mb * MB)
        write_jsonl(folder / SMALL, documents[:1], 0)
        for number in range(sizes.rounds):
            say(f"speed: {form}, round {number + 1} of {sizes.rounds}")
            for name, row in _runs_of_ours(folder):
                samples.setdefault(name, []).append(row)
            for peer in list(peers):
                try:
                    for name, row in _runs_of_peer(peer, documents, sizes.peer_mb * MB):
                        samples.setdefault(name, []).append(row)
                except (FailedError, DifferentError) as error:
                    missing.append(f"{peer.name}: {error}")
                    peers.remove(peer)
        rows += [
            {"form": form, "input_mb": sizes.speed_mb if "ours" in name else sizes.peer_mb}
            | speed_row(name, samples[name], samples[f"{name} start"])
            for name in samples
            if f"{name} start" in samples
        ]
    return rows, missing


def _runs_of_ours(folder: Path) -> Iterator[tuple[str, Row]]:
    """With 1 and 2 workers, of all the input and of one document."""
    for workers in (1, 2):
        for name, source in ((f"ours {workers}", INPUT), (f"ours {workers} start", SMALL)):
            ran, manifest = ours(folder / source, folder / "out", folder, workers)
            yield name, {"tokens": manifest.tokens, "wall_s": ran.wall_s, "cpu_s": ran.cpu_s}


def _runs_of_peer(peer: Peer, documents: Sequence[str], size: int) -> Iterator[tuple[str, Row]]:
    """Of a share of the documents, and of one."""
    for name, given in (
        (peer.name, share(documents, size)),
        (f"{peer.name} start", documents[:1]),
    ):
        yield name, asdict(peer.run(given))


def speed_row(name: str, runs: Sequence[Row], starts: Sequence[Row]) -> Row:
    """Medians, and rates without what a start takes: that of a run on one document.

    There is no rate (None) where that leaves less than SHORTEST_S: on small inputs, noise.
    """
    wall_s, cpu_s = (statistics.median(run[key] for run in runs) for key in ("wall_s", "cpu_s"))
    start_wall_s, start_cpu_s = (
        statistics.median(run[key] for run in starts) for key in ("wall_s", "cpu_s")
    )
    tokens = runs[0]["tokens"] - starts[0]["tokens"]
    return {
        "name": name, "tokens": runs[0]["tokens"], "wall_s": wall_s, "cpu_s": cpu_s,
        "start_wall_s": start_wall_s, "start_cpu_s": start_cpu_s,
        "tokens_per_cpu_s": _rate(tokens, cpu_s - start_cpu_s),
        "tokens_per_s": _rate(tokens, wall_s - start_wall_s),
        "runs": list(runs), "starts": list(starts),
    }  # fmt: skip


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if seconds >= SHORTEST_S else None


def measure_memory(
    folder: Path, speeches: Sequence[str], sizes: Sizes, say: Callable[[str], None]
) -> list[Row]:
    """The most that any process of ``prepare --workers 2`` held, at some sizes of input."""
    documents = in_form(speeches, "passages") + list(speeches)
    rows = []
    source, out = folder / "memory.jsonl", folder / "memory"
    # A line of the largest size that is read: once as it is, once with a character for which
    # Python gives every other one in the text four bytes.
    cases = [(size, 0, "") for size in sizes.memory_mb]
    cases += [(sizes.memory_mb[0], LIMIT - 1, start) for start in ("", WIDE)]
    for size, long_line, start in cases:
        say(f"memory: {size} MB{f', with a document of 64 MB {start}' if long_line else ''}")
        total = size * MB + long_line
        write_jsonl(source, documents, total, long_line=long_line, start=start)
        ran, manifest = ours(source, out, folder, 2)
        rows.append(
            {
                "input_mb": source.stat().st_size / MB,
                "long_mb": long_line / MB,
                "is_wide": bool(start),
                "documents": manifest.documents,
                "tokens": manifest.tokens,
                "peaks_mb": ran.peaks_mb[:4],
                "wall_s": ran.wall_s,
            }
        )
        source.unlink()
        shutil.rmtree(out)
    return rows


def measure_round_trip(folder: Path, speeches: Sequence[str]) -> list[Row]:
    """Every document, from text to the shard and back; and how full packed blocks are."""
    tokenizer = load_tokenizer()
    rows = []
    for form in FORMS:
        documents = in_form(speeches, form)
        source, out = folder / f"{form}.jsonl", folder / f"{form}-corpus"
        write_jsonl(source, documents, 0)
        prepare([source], out)
        corpus = Corpus.open(out, verify="sha256")
        assert len(corpus) == len(documents)
        same = sum(
            tokenizer.decode(corpus.document(number)) == text
            for number, text in enumerate(documents)
        )
        packed = Blocks(
            corpus, policy="packed", max_tokens=BLOCK_TOKENS, bos_id=tokenizer.bos_id,
            eos_id=tokenizer.eos_id,
        )  # fmt: skip
        rows.append(
            {
                "form": form,
                "documents": len(documents),
                "same": same,
                "tokens": corpus.num_tokens,
                "blocks": len(packed),
                "fill": packed.fill_rate,
            }
        )
    return rows


def measure_blocks(folder: Path, sizes: Sizes, say: Callable[[str], None]) -> Row:
    """Opening a large corpus, and any block of it: ``blocks.py``, which has more rows."""
    corpus = folder / "corpus"
    say(f"blocks: a corpus of {sizes.documents:,} documents")
    blocks.make_corpus(corpus, sizes.documents)
    found = {"open": blocks.in_a_process("--folder", folder, "--row", "open")}
    for policy in ("full_sentences", "packed"):
        say(f"blocks: {policy}")
        found[policy] = blocks.in_a_process("--folder", folder, "--row", policy, "all")
    shutil.rmtree(corpus)
    return found
