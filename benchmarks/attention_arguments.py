"""The command line of ``attention.py``: what it takes, and one plain line for what it does not."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from attention_ours import DTYPES, Shape, our_backend
from attention_peers import PEERS
from machine import HERE, num_cores

from longpretrain.errors import InputError
from longpretrain.files import need_writable, read_json_object

PARTS = ("equality", "headline", "variants", "growth", "avx2", "memory")
ALL_PEERS = ("portable", *PEERS)
FORMAT = 2
"""Of the results file. 1 had no second condition of memory and no list of finished cells."""
_SETTINGS = (
    "backend", "threads", "seconds", "only", "peers", "dtypes", "lengths", "windows", "heads",
    "mode",
)  # fmt: skip
_LARGEST = 2**24


class _Parser(argparse.ArgumentParser):
    """One line for an error, without the usage: ``--help`` has that."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(arguments: Sequence[str] | None, description: str) -> argparse.Namespace:
    """The arguments, all of them checked; ``--resume`` brings its file's settings.

    Raises:
        SystemExit: code 2 after one line on stderr, or 0 after ``--help``.
    """
    parser = _parser(description)
    args = parser.parse_args(arguments)
    args.data = None
    try:
        if args.redraw:
            args.data = read_results(args.redraw)
            need_writable(args.redraw.parent, what="folder of the plot", way_out="Copy it first.")
        elif args.resume:
            args.data = read_results(args.resume)
            need_writable(args.resume.parent, what="folder of --resume", way_out="Copy it first.")
            _restore(args, args.data)
        else:
            need_writable(args.out, what="results folder", way_out="Choose another with --out.")
            _fill_in(args)
    except InputError as error:
        parser.error(str(error))
    return args


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What ``--resume`` needs to go on with the same run."""
    return {name: getattr(args, name) for name in _SETTINGS}


def read_results(path: Path) -> dict[str, Any]:
    """A results file.

    Raises:
        InputError: it is none, or one of an older form.
    """
    data = read_json_object(path, way_out="Name a file that this program wrote.")
    needed = {
        "settings", "headline_shape", "timings", "memory", "peak", "equality", "machine",
        "versions", "kernels", "levels", "peak_probes", "cells_done", "not_measured", "date",
    }  # fmt: skip
    if data.get("benchmark") != "attention" or data.get("format") != FORMAT:
        got = f"benchmark {data.get('benchmark')!r}, format {data.get('format')!r}"
    elif missing := sorted(needed - set(data)):
        got = f"no {', '.join(missing)}"
    else:
        return data
    wanted = f"results of this benchmark, format {FORMAT}"
    raise InputError(f"file {path}", got=got, wanted=wanted, way_out="Measure it again.")


def _parser(description: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="attention.py",
        description=description,
        epilog="On two cores the default takes about 15 minutes, --quick about one and a half, "
        "--full about two hours: it writes its file after each part, and --resume goes on. No "
        "timing takes more than 8 GiB: what does not fit is named and left out.",
    )
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument(
        "--full", action="store_true", help="every window and number of heads (hours)"
    )
    scope.add_argument("--quick", action="store_true", help="tiny shapes and few samples: a test")
    parser.add_argument("--check", action="store_true", help="say which targets are met")
    parser.add_argument("--only", type=_names(PARTS), default=PARTS, help=", ".join(PARTS))
    parser.add_argument(
        "--peers", type=_names(ALL_PEERS), default=ALL_PEERS, help=", ".join(ALL_PEERS)
    )
    parser.add_argument("--dtypes", type=_names(DTYPES), default=tuple(DTYPES), help="fp32, bf16")
    numbers: dict[str, str] = {
        "--lengths": "tokens, of growth and memory",
        "--windows": "attention windows (both sides) of growth: even numbers",
        "--heads": "numbers of heads of growth",
    }
    for flag, text in numbers.items():
        parser.add_argument(flag, type=_even if flag == "--windows" else _numbers, help=text)
    parser.add_argument("--seconds", type=_seconds, help="of a condition's headline; default 120")
    parser.add_argument("--threads", type=_threads, help="default: all cores; one with --quick")
    parser.add_argument("--backend", choices=("fused", "portable"), help="of ours; default: fused")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    again = parser.add_mutually_exclusive_group()
    again.add_argument("--resume", type=Path, metavar="JSON", help="go on with a run that stopped")
    again.add_argument("--redraw", type=Path, metavar="JSON", help="no measuring: tables and plot")
    return parser


def _fill_in(args: argparse.Namespace) -> None:
    """Defaults that depend on the machine or on other arguments."""
    args.mode = "quick" if args.quick else "full" if args.full else "default"
    args.backend = our_backend(args.backend)
    args.seconds = args.seconds or (0.5 if args.quick else 120.0)
    args.threads = args.threads or (1 if args.quick else num_cores())
    args.headline = Shape(512, 2, 512, "") if args.quick else Shape(4096, 12, 512, "")
    default_lengths = [512, 2048] if args.quick else [2**power for power in range(9, 17)]
    args.lengths = args.lengths or default_lengths
    args.windows = args.windows or ([64, 128, 256, 512, 1024] if args.full else [512])
    args.heads = args.heads or ([12, 16] if args.full else [args.headline.heads])


def _restore(args: argparse.Namespace, data: dict[str, Any]) -> None:
    """The settings that a stopped run was started with."""
    for name in _SETTINGS:
        setattr(args, name, data["settings"][name])
    args.headline = Shape(**data["headline_shape"])
    args.backend = our_backend(args.backend)
    assert asdict(args.headline)["dtype"] == ""


def _names(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    def parse_names(text: str) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"got {name!r}; wanted some of {', '.join(known)}")
        return names

    return parse_names


def _numbers(text: str, *, wanted: str = "a positive whole number") -> list[int]:
    found = set()
    for word in text.split(","):
        digits = word.replace("_", "")
        if not (digits.isascii() and digits.isdigit() and 1 <= int(digits) <= _LARGEST):
            raise argparse.ArgumentTypeError(f"got {word!r}; wanted {wanted}, or several: 512,1024")
        found.add(int(digits))
    return sorted(found)


def _even(text: str) -> list[int]:
    wanted = "a positive even number"
    for number in (found := _numbers(text, wanted=wanted)):
        if number % 2:
            raise argparse.ArgumentTypeError(f"got {number}; wanted {wanted}: it has two sides")
    return found


def _threads(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= num_cores()):
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted 1 to {num_cores()}, the cores")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}; wanted a positive number of seconds")
    return seconds
