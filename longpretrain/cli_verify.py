"""The verb ``verify``: its options, and what it prints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longpretrain.terminal import FAILED, bar, path_argument

DOES = (
    "Check a run's checkpoints; a model, by itself and against transformers; or two models: that"
    " they are one, or one was made from the other."
)
EXAMPLE = (
    "longpretrain verify runs/demo\n  longpretrain verify exported\n"
    "  longpretrain verify models/roberta-base models/long --json report.json"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument(
        "folder",
        type=path_argument,
        metavar="A",
        help="run folder, model folder of any family, checkpoint, or a fairseq .pt",
    )
    parser.add_argument(
        "other",
        type=path_argument,
        nargs="?",
        metavar="B",
        help="another model, to compare tensor by tensor: its source, or what was made of it",
    )
    parser.add_argument(
        "--json",
        type=path_argument,
        metavar="FILE",
        help="also write all checks and every tensor here; -: on the screen, and nothing else",
    )


def run(options: argparse.Namespace) -> int:
    """Prints what was found; 0 where all checks hold."""
    from longpretrain.verify_run import is_run, verify_run

    if options.other is None and is_run(options.folder):
        with bar("verify") as progress:
            of_run = verify_run(options.folder, progress)
        _tell(of_run, of_run.tree(options.folder), options.json)
        return 0 if of_run.ok else FAILED
    from longpretrain.convert.verify import verify

    report = verify(options.folder, options.other)
    _tell(report, report.tree(options.folder, options.other), options.json)
    return 0 if report.ok else FAILED


def _tell(report: object, tree: Mapping[str, Any], path: Path | None) -> None:
    """Prints a report, and writes it as JSON; that alone is printed where the path is "-"."""
    text = json.dumps(tree, indent=2, allow_nan=False) + "\n" if path else ""
    if str(path) == "-":
        print(text, end="")
        return
    print(report)
    if path:
        from longpretrain.files import write_atomically

        write_atomically(path, text)
