"""The verb ``prepare``: its options, and what it prints."""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from longpretrain.terminal import bar, path_argument

if TYPE_CHECKING:
    from longpretrain.prepare.inspect import Contents

DOES = "Turn text into token shards; check or show such shards; train a tokenizer."
EXAMPLE = (
    "longpretrain prepare books/ news.jsonl --out data/train --workers 8\n"
    "  longpretrain prepare books news.jsonl --out data/split --valid 0.1 --filter deduplicate"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the verb."""
    parser.add_argument(
        "inputs",
        nargs="*",
        type=path_argument,
        metavar="INPUT",
        help=".txt, .jsonl or .parquet, plain or .gz, .zst, .bz2; folders of them, patterns, or - "
        "for standard input",
    )
    parser.add_argument(
        "--out", type=path_argument, help="folder to write; with --inspect a .png or .html"
    )
    parser.add_argument(
        "--tokenizer",
        type=path_argument,
        help="a tokenizer's folder or file (RoBERTa's BPE, which is built in)",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (1)")
    _add_reading(parser)
    parser.add_argument(
        "--filter",
        dest="filters",
        action="append",
        default=[],
        metavar="NAME",
        help="unicode=nfc, unicode=nfkc, min_tokens=N, max_tokens=N, deduplicate; may be repeated",
    )
    parser.add_argument(
        "--valid",
        metavar="SHARE",
        help="put this share of the documents in OUT/valid and the others in OUT/train",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="throw away what an interrupted run with other options left",
    )
    modes = parser.add_mutually_exclusive_group()
    modes.add_argument(
        "--verify", type=path_argument, metavar="DIR", help="check every byte of a corpus"
    )
    modes.add_argument(
        "--inspect", type=path_argument, metavar="DIR", help="show what a corpus holds"
    )
    modes.add_argument(
        "--train-tokenizer",
        choices=("bpe", "sentencepiece"),
        help="make a tokenizer of the inputs, in --out",
    )
    parser.add_argument("--vocab-size", type=int, metavar="N", help="of --train-tokenizer")


def _add_reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--documents",
        choices=("auto", "file", "blank-line"),
        default="auto",
        help="what a document is in .txt: a file, or what stands between blank lines",
    )
    parser.add_argument(
        "--field",
        default="text",
        help="the field of .jsonl, or the column of .parquet, that holds the text (text)",
    )
    parser.add_argument(
        "--on-error",
        choices=("stop", "skip", "replace"),
        default="stop",
        help="text that cannot be read: stop, leave it out and list it, or put U+FFFD where it is "
        "wrong (stop)",
    )
    parser.add_argument(
        "--max-document-mb",
        type=int,
        default=64,
        metavar="N",
        help="a longer document or line is an error (64)",
    )
    parser.add_argument(
        "--stdin-format",
        choices=("txt", "jsonl"),
        default="txt",
        help="what - holds (txt)",
    )


def run(options: argparse.Namespace) -> int:
    """Does what the options say."""
    modes = ("verify", "inspect", "train_tokenizer")
    mode = next((name for name in modes if getattr(options, name)), "prepare")
    reads_text = mode in ("prepare", "train_tokenizer")
    if options.max_document_mb < 1:
        options.parser.error(
            f"argument --max-document-mb: got {options.max_document_mb}; wanted 1 or more"
        )
    flag = f"--{mode.replace('_', '-')}"
    if mode != "prepare":
        from longpretrain.prepare.rank_crew import need_one_process

        need_one_process(flag)
    _refuse_unused(options, mode, flag)
    missing = [
        name
        for name, given in (("INPUT", options.inputs), ("--out", options.out))
        if reads_text and not given
    ]
    if mode == "train_tokenizer" and options.vocab_size is None:
        missing.append("--vocab-size")
    if missing:
        options.parser.error(f"the following arguments are required: {', '.join(missing)}")
    return {
        "prepare": _prepare,
        "verify": _verify,
        "inspect": _inspect,
        "train_tokenizer": _train_tokenizer,
    }[mode](options)


_READING = {"documents", "field", "on_error", "max_document_mb", "stdin_format", "filters"}
_USED = {
    "prepare": _READING | {"inputs", "out", "tokenizer", "workers", "valid", "restart"},
    "verify": set(),
    "inspect": {"tokenizer", "out"},
    "train_tokenizer": _READING | {"inputs", "out", "vocab_size"},
}
"""Options that count where something is done; all others are refused there."""


def _refuse_unused(options: argparse.Namespace, mode: str, flag: str) -> None:
    every = {name for used in _USED.values() for name in used}
    for name in sorted(every - _USED[mode]):
        value = getattr(options, name)
        if value and value != options.parser.get_default(name):
            given = " ".join(map(str, value)) if name == "inputs" else "--" + name.replace("_", "-")
            given = "--filter" if name == "filters" else given
            if mode == "prepare":
                options.parser.error(f"argument {given}: got {value}; wanted --train-tokenizer too")
            options.parser.error(f"argument {flag}: not allowed with argument {given}")


def _prepare(options: argparse.Namespace) -> int:
    from longpretrain.prepare import prepare
    from longpretrain.prepare.rank_crew import find_place

    place = find_place(options.workers)
    with bar("prepare") if place.is_first else contextlib.nullcontext() as progress:
        manifest = prepare(
            options.inputs,
            options.out,
            tokenizer_folder=options.tokenizer,
            workers=options.workers,
            documents=options.documents,
            field=options.field,
            filters=options.filters,
            valid=options.valid,
            on_error=options.on_error,
            max_document_bytes=options.max_document_mb << 20,
            stdin_format=options.stdin_format,
            restart=options.restart,
            progress=progress,
            say=_say,
            place=place,
        )
    if place.is_first:
        for line in _summary(options.out, manifest.split):
            print(line)
    return 0


def _say(text: str) -> None:
    print(f"longpretrain prepare: {text}", file=sys.stderr)


def _summary(out: Path, split: str) -> Iterable[str]:
    """What was made, what was left out, and what each filter did."""
    from longpretrain.data.manifest import PROBLEMS, Manifest
    from longpretrain.prepare.inspect import filter_text, printable

    folders = [out / "train", out / "valid"] if split else [out]
    manifests = [Manifest.read(folder) for folder in folders]
    for folder, manifest in zip(folders, manifests, strict=True):
        empty = "" if split else f" ({manifest.empty_documents:,} empty documents left out)"
        yield f"{folder}: {manifest.documents:,} documents, {manifest.tokens:,} tokens{empty}"
    first = manifests[0]
    if split:
        yield f"{first.empty_documents:,} empty documents left out"
    if first.problems:
        yield f"{first.problems:,} could not be read and were left out: {folders[0] / PROBLEMS}"
    if first.mended_documents:
        yield f"{first.mended_documents:,} documents were mended with U+FFFD"
    for report in first.filters:
        yield f"{report['name']}: {filter_text(report)}"
        for example in report["examples"]:
            yield f"  {example['place']}: {printable(example['text'])}"


def _verify(options: argparse.Namespace) -> int:
    from longpretrain.prepare.verify import verify

    with bar("verify") as progress:
        text = verify(options.verify, progress)
    print(text)
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from longpretrain.prepare.inspect import inspect, inspect_text

    if options.out:
        from longpretrain.report.corpus import check_target

        check_target(options.out)
    found = inspect(options.inspect, tokenizer=options.tokenizer)
    print(inspect_text(found))
    if options.out:
        _draw(options.out, options.inspect, found)
        print(f"\nWrote {options.out}")
    return 0


def _draw(out: Path, folder: Path, found: Iterable[Contents]) -> None:
    """A corpus' contents for the report, which knows plain numbers and texts alone."""
    from longpretrain.prepare.inspect import examples, facts, filter_text, problems
    from longpretrain.report.corpus import CorpusSection, draw_corpora

    sections = [
        CorpusSection(
            name=one.manifest.split or one.folder.resolve().name,
            edges=one.lengths.edges,
            documents=one.lengths.documents,
            tokens=one.lengths.tokens,
            facts=facts(one),
            filters=[(report["name"], filter_text(report)) for report in one.manifest.filters],
            examples=examples(one.manifest),
            problems=problems(one.manifest),
            samples=[
                (f"{sample.number:,} ({sample.tokens:,} tokens)", sample.text)
                for sample in one.samples
            ],
        )
        for one in found
    ]
    draw_corpora(out, folder.resolve().name, sections)


def _train_tokenizer(options: argparse.Namespace) -> int:
    from longpretrain.prepare.documents import ReadOptions
    from longpretrain.prepare.filters import Filters
    from longpretrain.prepare.texts import read_texts
    from longpretrain.prepare.train_tokenizer import train_tokenizer

    read = ReadOptions(
        options.documents, options.field, options.max_document_mb << 20, options.on_error
    )
    filters = Filters.parse(options.filters)
    if filters.deduplicate or filters.tokens:
        options.parser.error("argument --filter: got one of tokens or duplicates; wanted unicode=F")
    with bar("read") as progress, tempfile.TemporaryDirectory() as scratch:
        texts = read_texts(
            options.inputs,
            read,
            filters,
            Path(scratch),
            stdin_format=options.stdin_format,
            progress=progress,
            warn=_say,
        )
        trained = train_tokenizer(texts, options.train_tokenizer, options.vocab_size, options.out)
    print(
        f"{trained.folder}: {trained.vocab_size:,} ids, from {trained.sample_bytes:,} bytes of "
        f"{trained.sample_documents:,} documents"
    )
    return 0
