"""The command line: ``longpretrain VERB``. Parses and wires, nothing else.

Heavy packages are imported by the verb that needs them, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import NoReturn, TypeAlias

from longpretrain import cli_prepare, cli_verify
from longpretrain.terminal import (
    FAILED,
    Parser,
    bar,
    check_encoding,
    exit_code,
    open_streams,
    path_argument,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code: 0 done, 2 bad input, 75 preempted, 1 all else."""
    open_streams()
    parser = _parser()
    words = sys.argv[1:] if arguments is None else arguments
    options, rest = parser.parse_known_args(words)
    # argparse gives up on key=value after a flag (RECIPE --fresh key=value): it is welcome there.
    if rest and (options.verb != "train" or any(word.startswith("-") for word in rest)):
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides = [*getattr(options, "overrides", ()), *rest]

    def run() -> int:
        check_encoding(words)
        return int(options.run(options))

    before = signal.signal(signal.SIGTERM, _end)
    try:
        return exit_code(run, verb=options.verb)
    except KeyboardInterrupt:
        print(f"longpretrain {options.verb}: interrupted", file=sys.stderr)
        return FAILED
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    """Slurm and `timeout` send SIGTERM: leave through the verbs' clean-up, not at once."""
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="longpretrain", description="Long documents for RoBERTa: convert, pretrain, export."
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (
        _add_convert,
        _add_prepare,
        _add_train,
        _add_evaluate,
        _add_export,
        _add_verify,
        _add_report,
    ):
        add(verbs)
    return parser


Verbs: TypeAlias = "argparse._SubParsersAction[Parser]"


def _verb(
    verbs: Verbs, name: str, does: str, example: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name,
        help=does,
        description=does,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run, parser=parser)
    return parser


def _add_convert(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "convert",
        "Make a long model of a RoBERTa or a relative: a Hugging Face folder, or fairseq's file.",
        "longpretrain convert models/roberta-base models/long --positions 4096",
        _convert,
    )
    parser.add_argument(
        "source",
        type=path_argument,
        help="Hugging Face folder (RoBERTa, CamemBERT, XLM-RoBERTa, BERT, Longformer), run, or a "
        "fairseq .pt with dict.txt beside it",
    )
    parser.add_argument("target", type=path_argument, help="folder to write")
    parser.add_argument(
        "--positions", type=int, default=4096, help="longest sequence, in tokens (4096)"
    )
    parser.add_argument(
        "--attention-window",
        type=_integers,
        metavar="W[,W...]",
        help="total window, even: one number, or one per layer (a Longformer's own, else 512)",
    )
    parser.add_argument(
        "--init",
        choices=("copy", "random", "interpolate"),
        default="copy",
        help="where the new positions come from (copy)",
    )
    parser.add_argument(
        "--seed", type=int, default=1, help="of --init random and of --new-head (1)"
    )
    tokenizer = parser.add_mutually_exclusive_group()
    _add_tokenizer(tokenizer)
    tokenizer.add_argument(
        "--no-tokenizer", action="store_true", help="write a folder without a tokenizer"
    )
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="take NaN and infinite weights as they are"
    )
    parser.add_argument(
        "--new-head", action="store_true", help="draw a masked-LM head for a model without one"
    )


def _add_tokenizer(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--tokenizer",
        type=path_argument,
        metavar="DIR",
        help="folder with the tokenizer of the model (the source's own)",
    )


def _convert(options: argparse.Namespace) -> int:
    from longpretrain.convert.lengthen import convert

    report = convert(
        options.source,
        options.target,
        positions=options.positions,
        attention_window=_one_or_list(options.attention_window),
        init=options.init,
        seed=options.seed,
        tokenizer=options.tokenizer,
        need_tokenizer=not options.no_tokenizer,
        allow_nonfinite=options.allow_nonfinite,
        new_head=options.new_head,
    )
    print(report)
    return 0


def _add_prepare(verbs: Verbs) -> None:
    parser = _verb(verbs, "prepare", cli_prepare.DOES, cli_prepare.EXAMPLE, cli_prepare.run)
    cli_prepare.add_arguments(parser)


def _add_train(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "train",
        "Run one rank of a run, or go on with it. ./launch.sh starts all ranks.",
        "longpretrain train recipe.yaml run.dir=runs/mine optim.lr=1e-5\n"
        "  longpretrain train roberta-base-4096 model.path=models/long --dry-run",
        _train,
    )
    parser.add_argument("recipe", help="a packaged recipe's name, or a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="recipe keys to set otherwise"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="move an old run of this folder aside and start anew"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--check", action="store_true", help="check the inputs and stop")
    only.add_argument("--dry-run", action="store_true", help="print the resolved recipe and stop")
    only.add_argument("--print-run-dir", action="store_true", help="print the run folder and stop")
    # For slurm/pretrain.sbatch: requeue.py says what they do.
    only.add_argument("--attempt-begins", action="store_true", help=argparse.SUPPRESS)
    only.add_argument("--attempt-ended", type=int, metavar="CODE", help=argparse.SUPPRESS)
    parser.add_argument("--was-warned", action="store_true", help=argparse.SUPPRESS)


def _train(options: argparse.Namespace) -> int:
    from longpretrain.config import to_tree
    from longpretrain.recipe import load_recipe

    config = load_recipe(options.recipe, options.overrides)
    if options.print_run_dir:
        print(config.run_dir)
        return 0
    if options.dry_run:
        import yaml

        print(yaml.safe_dump(to_tree(config), sort_keys=False), end="")
        return 0
    if options.attempt_begins or options.attempt_ended is not None:
        from longpretrain import requeue

        if options.attempt_begins:
            return requeue.begin(config, fresh=options.fresh, environment=os.environ)
        code, warned = options.attempt_ended, options.was_warned
        return requeue.end(config, code, warned=warned, environment=os.environ)
    if options.check:
        from longpretrain.ranks import expected_world_size
        from longpretrain.start import check

        check(config, expected_world_size(os.environ) or 1, fresh=options.fresh)
        return 0
    from longpretrain.training import run_rank

    return run_rank(config, fresh=options.fresh)


def _add_evaluate(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "evaluate",
        "Bits per masked token on held-out documents.",
        "longpretrain evaluate runs/demo --data data/valid --max-tokens 512,4096",
        _evaluate,
    )
    parser.add_argument("model", type=path_argument, help="model folder, checkpoint or run folder")
    parser.add_argument(
        "--data", type=path_argument, required=True, help="folder of held-out shards"
    )
    parser.add_argument(
        "--max-tokens",
        type=_integers,
        metavar="N[,N...]",
        help="lengths to score at (512,4096 as far as the model has positions)",
    )
    parser.add_argument(
        "--sequences",
        type=int,
        help="score this many evenly spaced stretches of 4,096 tokens (all text)",
    )
    parser.add_argument(
        "--blocks",
        choices=("full_sentences", "document"),
        default="full_sentences",
        help="how documents become sequences (full_sentences)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="(cuda where there is one)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="(fp32)")
    parser.add_argument(
        "--json",
        type=path_argument,
        help="also write the numbers here (RUN/evaluation.json for a run folder)",
    )


def _evaluate(options: argparse.Namespace) -> int:
    import torch

    from longpretrain.evaluate.masked_bits import evaluate

    is_run = (options.model / "checkpoints").is_dir()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    with bar("evaluate") as progress:
        result = evaluate(
            options.model,
            options.data,
            max_tokens=options.max_tokens,
            sequences=options.sequences,
            blocks=options.blocks,
            device=device,
            precision=options.precision,
            json_path=options.json or (options.model / "evaluation.json" if is_run else None),
            progress=progress,
        )
    print(result.table())
    return 0


def _add_export(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "export",
        "Write a run's newest weights as a folder that transformers, fairseq or onnxruntime loads.",
        "longpretrain export runs/demo exported",
        _export,
    )
    parser.add_argument(
        "source", type=path_argument, help="run folder, checkpoint, model folder, or a fairseq .pt"
    )
    parser.add_argument("target", type=path_argument, help="folder to write")
    parser.add_argument(
        "--format",
        choices=("hf", "fairseq", "onnx"),
        default="hf",
        help="hf: Hugging Face folder; fairseq: model.pt and dict.txt; onnx: model.onnx (hf)",
    )
    parser.add_argument(
        "--model",
        choices=("masked-lm", "bare"),
        default="masked-lm",
        help="bare: the encoder alone, transformers' LongformerModel (masked-lm)",
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16", "fp16"), help="round the numbers to it (the source's)"
    )
    parser.add_argument(
        "--no-check",
        action="store_true",
        help="leave out the comparison with transformers, which holds the model twice in memory",
    )
    _add_tokenizer(parser)


def _export(options: argparse.Namespace) -> int:
    from longpretrain.convert.write import export

    report = export(
        options.source,
        options.target,
        format=options.format,
        tokenizer=options.tokenizer,
        model=options.model,
        dtype=options.dtype,
        check=not options.no_check,
    )
    for note in report.notes if report else ():
        print(f"note: {note}")
    print(f"wrote {options.target}")
    return 0


def _add_verify(verbs: Verbs) -> None:
    parser = _verb(verbs, "verify", cli_verify.DOES, cli_verify.EXAMPLE, cli_verify.run)
    cli_verify.add_arguments(parser)


def _add_report(verbs: Verbs) -> None:
    parser = _verb(
        verbs,
        "report",
        "Write one HTML page with a run's curves.",
        "longpretrain report runs/demo",
        _report,
    )
    parser.add_argument("run_dir", type=path_argument, metavar="RUN", help="run folder")


def _report(options: argparse.Namespace) -> int:
    from longpretrain.report.html import write_report

    print(f"wrote {write_report(options.run_dir)}")
    return 0


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}; wanted whole numbers with commas, such as 512 or 512,4096"
        ) from None


def _one_or_list(numbers: list[int] | None) -> int | list[int] | None:
    return numbers[0] if numbers is not None and len(numbers) == 1 else numbers
