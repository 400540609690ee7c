"""The attention operator against what people use today: time and memory on the CPU.

    python benchmarks/attention.py                 # headline, growth in length, memory: ~5 minutes
    python benchmarks/attention.py --check         # and says which targets are met
    python benchmarks/attention.py --quick         # tiny shapes, every part: does it run at all?
    python benchmarks/attention.py --full          # growth at every window and number of heads
    python benchmarks/attention.py --redraw benchmarks/results/attention-2026-01-31.json

Prints tables and writes attention-DATE.json and .png into the results folder. Parts (--only):

* equality: peers and ours on the same inputs; a ratio compares equals.
* headline: all peers at 12 heads of 64, 4,096 tokens, attention window 512, one global token.
* variants: dropout, dilation, documents, ten global tokens, beside the headline.
* growth: times from 512 to 65,536 tokens; peers up to where they are quick.
* avx2: headline of ours and Hugging Face's in a child process with ours lowered to AVX2.
* memory: peak of forward+backward, each in a fresh process.

The peak of the processor is measured before and after the timings (``peak.cpp``). A benchmark does
not fail: the exit code says whether it ran, never how fast.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import attention_memory
import timing
import torch
from attention_equality import compare_outputs
from attention_ours import DTYPES, Shape, our_backend
from attention_peers import NET_OF, PEERS
from attention_plots import draw
from attention_report import report
from attention_results import Results
from attention_runs import Row, growth, headline, say
from attention_targets import LONGEST_TOKENS
from machine import HERE, cpu_flags, describe_machine, measure_peak, num_cores, peak_of, versions

from longpretrain.errors import InputError
from longpretrain.files import need_writable, write_atomically

PARTS = ("equality", "headline", "variants", "growth", "avx2", "memory")
ALL_PEERS = ("portable", *PEERS)
LEVEL = "LONGPRETRAIN_CPU_LEVEL"
METHOD = (
    f"{timing.METHOD} Peers that are modules: their linear projections are timed apart and "
    "subtracted. Ours, our portable backend and HF Longformer have one global token with "
    "projections of its own; SDPA with n^2 scores and FlexAttention share q, k and v with it; "
    "blocked SDPA has none. SDPA and FlexAttention get contiguous [B, H, N, D]. BigBird: blocks of "
    "64, 3 random ones (512 keys for each query), evaluation mode for forward, training mode for "
    "forward+backward. Useful operations: 4 * D for each reached pair forward, 10 * D backward. "
    f"{attention_memory.METHOD}"
)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    args = _parsed(arguments)
    warnings.filterwarnings("ignore", module="torch|transformers")
    if args.redraw:
        results = Results(json.loads(args.redraw.read_text(encoding="utf-8")))
        print(report(results, with_verdicts=args.check))
        draw(results, args.redraw.with_suffix(".png"))
        return
    need_writable(args.out, what="results folder", way_out="Choose another with --out.")
    results = Results(_measure(args))
    print(report(results, with_verdicts=args.check), flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    path = _fresh_path(args.out, results.data["date"][:10])
    write_atomically(path, json.dumps(results.data, indent=1) + "\n")
    written = [path]
    if draw(results, path.with_suffix(".png")):
        written.append(path.with_suffix(".png"))
    print("\nWrote " + " and ".join(str(one) for one in written))


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--full", action="store_true", help="every window and number of heads")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few samples: a test")
    parser.add_argument("--check", action="store_true", help="say which targets are met")
    parser.add_argument("--only", type=_names(PARTS), default=PARTS, help=", ".join(PARTS))
    parser.add_argument(
        "--peers", type=_names(ALL_PEERS), default=ALL_PEERS, help=", ".join(ALL_PEERS)
    )
    parser.add_argument("--dtypes", type=_names(DTYPES), default=tuple(DTYPES), help="fp32, bf16")
    parser.add_argument("--lengths", type=_numbers, help="tokens, of growth and memory")
    parser.add_argument("--windows", type=_numbers, help="attention windows (both sides) of growth")
    parser.add_argument("--heads", type=_numbers, help="numbers of heads of growth")
    parser.add_argument("--seconds", type=float, help="time for the headline's samples")
    parser.add_argument("--threads", type=int, help="default: all cores; one with --quick")
    parser.add_argument("--backend", help="of ours; default: fused, else portable as a stand-in")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--redraw", type=Path, help="no measuring: tables and plot of this JSON")
    args = parser.parse_args(arguments)
    args.backend = our_backend(args.backend)
    args.seconds = args.seconds or (0.5 if args.quick else 120.0)
    args.threads = args.threads or (1 if args.quick else num_cores())
    args.headline = Shape(512, 2, 512, "") if args.quick else Shape(4096, 12, 512, "")
    default_lengths = [512, 2048] if args.quick else [2**power for power in range(9, 17)]
    args.lengths = sorted(args.lengths or default_lengths)
    args.windows = args.windows or ([64, 128, 256, 512, 1024] if args.full else [512])
    args.heads = args.heads or ([12, 16] if args.full else [args.headline.heads])
    return args


def _names(known: Sequence[str] | dict[str, Any]) -> Any:
    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


def _numbers(text: str) -> list[int]:
    return [int(number.replace("_", "")) for number in text.split(",")]


def _measure(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the parts, one after another."""
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    data: dict[str, Any] = {
        "benchmark": "attention",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": versions(),
        "method": METHOD,
        "settings": _settings(args),
        "headline_shape": asdict(args.headline),
        "equality": [], "timings": [], "memory": [], "peak": {}, "peak_probes": {},
        "not_measured": [],
    }  # fmt: skip
    if "equality" in args.only:
        for dtype in args.dtypes:
            say(f"equality {dtype}")
            data["equality"] += compare_outputs(
                args.peers, dtype=dtype, attention_window=512, backend=args.backend
            )
    before, reason = measure_peak(args.threads)
    _time_headline(args, data)
    after, _ = measure_peak(args.threads)
    data["peak_probes"] = {"before": before, "after": after, "why_not": reason}
    best = {name: max(rate, after.get(name, 0.0)) for name, rate in before.items()}
    data["peak"] = {f"headline {dtype}": peak_of(dtype, best) for dtype in args.dtypes}
    if "avx2" in args.only:
        _time_avx2(args, data)
    if "growth" in args.only:
        _time_growth(args, data)
    if "memory" in args.only:
        _measure_memory(args, data)
    return data


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        "backend",
        "threads",
        "seconds",
        "only",
        "peers",
        "dtypes",
        "lengths",
        "windows",
        "heads",
    )
    return {
        **{name: getattr(args, name) for name in names},
        "cpu_level": os.environ.get(LEVEL),
        "mode": "quick" if args.quick else "full" if args.full else "default",
    }


def _time_headline(args: argparse.Namespace, data: dict[str, Any]) -> None:
    if not {"headline", "variants"} & set(args.only):
        return
    for dtype in args.dtypes:
        rows, skipped = headline(
            replace(args.headline, dtype=dtype),
            args.peers if "headline" in args.only else (),
            variants="variants" in args.only,
            backend=args.backend,
            pace=_pace(args, args.seconds / len(args.dtypes)),
        )
        data["timings"] += rows
        data["not_measured"] += _told(skipped)


def _pace(args: argparse.Namespace, seconds: float, batch_s: float = 0.25) -> timing.Pace:
    if args.quick:
        return timing.Pace(seconds, min_rounds=1, batch_s=0.01, one_thread=args.threads == 1)
    return timing.Pace(seconds, batch_s=batch_s, one_thread=args.threads == 1)


def _time_growth(args: argparse.Namespace, data: dict[str, Any]) -> None:
    limit_s = 2.0 if args.full else 0.5
    for heads in args.heads:
        for window in args.windows:
            for dtype in args.dtypes:
                rows, skipped = growth(
                    [Shape(tokens, heads, window, dtype) for tokens in args.lengths],
                    args.peers,
                    backend=args.backend,
                    pace=_pace(args, args.seconds / 2 / len(args.dtypes), batch_s=0.1),
                    limit_s=limit_s,
                )
                data["timings"] += rows
                data["not_measured"] += _told(skipped)


def _time_avx2(args: argparse.Namespace, data: dict[str, Any]) -> None:
    """The headline against HF in a child whose compiled kernels are lowered to AVX2."""
    if "avx2" not in cpu_flags():
        data["not_measured"].append("avx2: the processor has none")
        return
    say("avx2: a child process")
    with tempfile.TemporaryDirectory(prefix="longpretrain-avx2-") as folder:
        command = [sys.executable, str(Path(__file__).resolve()), "--only", "headline"]
        command += ["--peers", "hf", "--dtypes", ",".join(args.dtypes), "--out", folder]
        command += ["--seconds", str(args.seconds / 4), "--threads", str(args.threads)]
        command += ["--backend", args.backend, *(["--quick"] if args.quick else [])]
        environment = {**os.environ, LEVEL: "avx2"}
        ran = subprocess.run(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            check=False,
        )  # fmt: skip
        found = list(Path(folder).glob("*.json"))
        if ran.returncode or not found:
            last = (ran.stderr.strip().splitlines() or ["no message"])[-1]
            data["not_measured"].append(f"avx2: the child ended with code {ran.returncode}: {last}")
            return
        child = json.loads(found[0].read_text(encoding="utf-8"))
    data["timings"] += [{**row, "section": "avx2"} for row in child["timings"]]
    data["peak"] |= {
        f"avx2 {dtype}": data["peak_probes"]["before"].get("avx2") for dtype in args.dtypes
    }


def _measure_memory(args: argparse.Namespace, data: dict[str, Any]) -> None:
    """Every other length, doubled twice each time, and always the headline's and the longest."""
    chosen = {args.headline.tokens, *args.lengths[1::2]}
    if not args.quick:
        chosen.add(LONGEST_TOKENS)
    jobs = []
    for dtype in args.dtypes:
        for tokens in sorted(chosen):
            shape = replace(args.headline, tokens=tokens, dtype=dtype)
            cases = ["ours", *(["portable"] if args.backend != "portable" else [])]
            cases += [
                case
                for peer in args.peers
                if peer in PEERS and peer != "flex" and not PEERS[peer].why_not(shape)
                for case in PEERS[peer].cases
                if case not in NET_OF.values() and tokens <= _most_tokens_for_memory(case)
            ]
            jobs += [attention_memory.job(case, shape) for case in cases]
    say(f"memory: {len(jobs)} processes")
    measured = attention_memory.measure_memory(jobs, threads=args.threads, backend=args.backend)
    data["memory"] = list(measured)


def _most_tokens_for_memory(case: str) -> int:
    """Peers grow past the limit, or take minutes, long before ours do."""
    return {"portable": 2**30, "sdpa": 4096, "bigbird": 4096}.get(case, 16_384)


def _told(skipped: Sequence[Row]) -> list[str]:
    """One line for each case, with the shortest length and the reason that it gave there."""
    first: dict[str, Row] = {}
    more: dict[str, int] = {}
    for row in skipped:
        where = f"{row['heads']} heads, window {row['attention_window']}"
        name = f"{row['case']}, {row['dtype']}, {where}"
        more[name] = more.get(name, -1) + 1
        first.setdefault(name, row)
    return [
        f"{name}: {row['tokens']:,} tokens"
        + (f" and {more[name]} other lengths" if more[name] else "")
        + f" ({row['why']})"
        for name, row in first.items()
    ]


def _fresh_path(folder: Path, date: str) -> Path:
    """A name of that date that is not taken: results are kept."""
    path, number = folder / f"attention-{date}.json", 1
    while path.exists():
        number += 1
        path = folder / f"attention-{date}-{number}.json"
    return path


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"attention.py: {error}")
