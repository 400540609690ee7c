"""The attention operator against what people use today: time and memory on the CPU.

    python benchmarks/attention.py                 # headline, growth in length, memory
    python benchmarks/attention.py --check         # and says which targets are met
    python benchmarks/attention.py --quick         # tiny shapes, every part: does it run at all?
    python benchmarks/attention.py --full          # growth at every window and number of heads
    python benchmarks/attention.py --resume benchmarks/results/attention-2026-01-31.json
    python benchmarks/attention.py --redraw benchmarks/results/attention-2026-01-31.json

Prints tables and writes attention-DATE.json and .png into the results folder; the JSON after each
part, so that --resume can go on with a run that stopped. --help says how long each takes. Parts
(--only):

* equality: peers and ours on the same inputs; a ratio compares equals.
* headline: all peers at 12 heads of 64, 4,096 tokens, attention window 512, one global token; once
  with malloc as it comes, once with freed memory kept (``attention_cells.CONDITIONS``).
* variants: dropout, dilation, documents, ten global tokens, beside the headline.
* growth: times from 512 to 65,536 tokens; peers up to where they are quick.
* avx2: headline of ours and Hugging Face's in a child process with ours lowered to AVX2.
* memory: peak of forward+backward, each in a fresh process.

The peak of the processor is measured before and after the timings (``peak.cpp``). A benchmark does
not fail: the exit code says whether it ran (1: the process of a part ended early, 2: it could not,
in one line), never how fast.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import attention_cells
import attention_memory
import timing
from attention_arguments import FORMAT, parse, settings
from attention_cells import ENDED_EARLY, LEVEL, measure_cells, plan
from attention_peers import NET_OF, PEERS
from attention_plots import draw
from attention_report import report
from attention_results import OPERATIONS, Results
from attention_runs import say
from attention_targets import LONGEST_TOKENS, summary
from machine import describe_machine, versions

from longpretrain.attention import why_not
from longpretrain.attention.fused import kernel_facts
from longpretrain.errors import InputError, from_system
from longpretrain.files import write_atomically

METHOD = (
    f"{timing.METHOD} {attention_cells.METHOD} Peers that are modules: their linear projections "
    "are timed apart and subtracted. Ours, our portable backend and HF Longformer have one global "
    "token with projections of its own; SDPA with n^2 scores and FlexAttention share q, k and v "
    "with it; blocked SDPA has none, and runs torch's fused CPU kernel on [blocks, H, queries, D] "
    "without a copy of the overlapping keys. SDPA and FlexAttention get contiguous [B, H, N, D]. "
    "BigBird: blocks of 64, 3 random ones (512 keys for each query), evaluation mode for forward, "
    f"training mode for forward+backward. {OPERATIONS} {attention_memory.METHOD}"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    args = parse(arguments, (__doc__ or "").split("\n")[0])
    if args.redraw:
        results = Results(args.data)
        print(report(results, with_verdicts=args.check))
        draw(results, args.redraw.with_suffix(".png"))
        return
    path = args.resume
    if path is None:
        args.data = _begun(args)
        args.out.mkdir(parents=True, exist_ok=True)
        path = _fresh_path(args.out, args.data["date"][:10])
    else:
        _resumed(args.data, path)
    _measure(args, path)
    results = Results(args.data)
    print(report(results, with_verdicts=args.check), flush=True)
    written = [path]
    if draw(results, path.with_suffix(".png")):
        written.append(path.with_suffix(".png"))
    print("\nWrote " + " and ".join(str(one) for one in written))
    if any(ENDED_EARLY in line for line in args.data["not_measured"]):
        print(f"A part did not end: --resume {path} tries it again.", file=sys.stderr)
        sys.exit(1)


def _begun(args: argparse.Namespace) -> dict[str, Any]:
    """The results of a run that has measured nothing yet."""
    return {
        "benchmark": "attention",
        "format": FORMAT,
        "date": _now(),
        "machine": describe_machine(),
        "versions": versions(),
        "kernels": dict(kernel_facts()),
        "why_no_kernels": why_not("fused"),
        "method": METHOD,
        "conditions": attention_cells.CONDITIONS,
        "settings": {**settings(args), "cpu_level": os.environ.get(LEVEL)},
        "headline_shape": asdict(args.headline),
        "equality": [], "timings": [], "memory": [], "peak": {}, "peak_probes": {}, "levels": {},
        "not_measured": [], "cells_done": [], "resumed": [],
    }  # fmt: skip


def _resumed(data: dict[str, Any], path: Path) -> None:
    """Notes the second start.

    Raises:
        InputError: the machine or what is compared is not what it was: times would not compare.
    """
    now = {"cpu": describe_machine()["cpu"], **versions()}
    then = {"cpu": data["machine"]["cpu"], **data["versions"]}
    differing = [name for name in then if then[name] != now.get(name)]
    if differing:
        name = differing[0]
        raise InputError(
            f"--resume {path}",
            got=f"{name} {now.get(name)}",
            wanted=f"{name} {then[name]}, as when it started",
            way_out="Start a new run.",
        )
    data["resumed"].append(_now())


def _measure(args: argparse.Namespace, path: Path) -> None:
    """Runs the cells that are not done; writes the results after each."""
    data = args.data
    data["not_measured"] = [line for line in data["not_measured"] if ENDED_EARLY not in line]
    _write(data, path)
    left = [cell for cell in plan(args) if cell["name"] not in data["cells_done"]]
    where = {cell["name"]: f"{cell['part']} {cell['condition']} {cell['dtype']}" for cell in left}
    for found in measure_cells(args, left):
        name = found["cell"]
        if "failed" in found:  # not done: --resume tries it again
            data["not_measured"].append(f"{name}: {found['failed']}")
        else:
            for kind in ("equality", "timings", "not_measured"):
                data[kind] += found.get(kind, [])
            data["levels"][name] = found.get("level", "")
            if "probes" in found:
                data["peak_probes"][where[name]] = found["probes"]
                data["peak"][where[name]] = found["peak"]
            data["cells_done"].append(name)
        _write(data, path)
    for dtype in args.dtypes if "memory" in args.only else ():
        if f"memory {dtype}" not in data["cells_done"]:
            data["memory"] += _memory(args, dtype)
            data["cells_done"].append(f"memory {dtype}")
            _write(data, path)


def _write(data: dict[str, Any], path: Path) -> None:
    """The results so far, with the ratios and targets that follow from them."""
    data["summary"] = summary(Results(data))
    write_atomically(path, json.dumps(data, indent=1) + "\n")


def _memory(args: argparse.Namespace, dtype: str) -> list[dict[str, Any]]:
    """Every other length, doubled twice each time, and always the headline's and the longest."""
    chosen = {args.headline.tokens, *args.lengths[1::2]}
    if args.mode != "quick":
        chosen.add(LONGEST_TOKENS)
    jobs = []
    for tokens in sorted(chosen):
        shape = replace(args.headline, tokens=tokens, dtype=dtype)
        cases = ["ours"]
        if "portable" in args.peers and args.backend != "portable":
            cases.append("portable")
        cases += [
            case
            for peer in args.peers
            if peer in PEERS and peer != "flex" and not PEERS[peer].why_not(shape)
            for case in PEERS[peer].cases
            if case not in NET_OF.values() and tokens <= _most_tokens_for_memory(case)
        ]
        jobs += [attention_memory.job(case, shape) for case in cases]
    say(f"memory {dtype}: {len(jobs)} processes")
    measured = attention_memory.measure_memory(jobs, threads=args.threads, backend=args.backend)
    return list(measured)


def _most_tokens_for_memory(case: str) -> int:
    """Peers grow past the limit, or take minutes, long before ours do."""
    return {"portable": 2**30, "sdpa": 4096, "bigbird": 4096}.get(case, 16_384)


def _fresh_path(folder: Path, date: str) -> Path:
    """A name of that date that is not taken: results are kept."""
    path, number = folder / f"attention-{date}.json", 1
    while path.exists():
        number += 1
        path = folder / f"attention-{date}-{number}.json"
    return path


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def run() -> int:
    """``main`` with what a user can mend told in one line."""
    try:
        main()
    except InputError as error:
        print(f"attention.py: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        told = from_system(error)
        if told is None:
            raise
        print(f"attention.py: error: {told[0]}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("attention.py: stopped; --resume goes on with the file it wrote", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(run())
