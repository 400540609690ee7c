"""Bits per masked token on held-out text: the number that the Longformer paper calls BPC.

It is the log2 cross-entropy per masked wordpiece (Beltagy et al. 2020, section 5, table 5), without
dropout: overall, by position in the sequence, and by length of the document.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from longpretrain.convert.read import run_state
from longpretrain.data.blocks import Policy
from longpretrain.data.shards import Corpus
from longpretrain.data.tokenizer import Tokenizer, load_tokenizer
from longpretrain.errors import InputError
from longpretrain.evaluate.held_out import HeldOut, TokenLosses, token_losses
from longpretrain.files import need_writable, read_json_object, write_atomically
from longpretrain.model import LongformerForMaskedLM, load_model

POSITION_BUCKET = 512
"""Tokens of a bucket of positions: RoBERTa's whole reach."""
DOCUMENT_LIMITS = (512, 1024, 2048, 4096, 8192)
"""Greatest lengths, in tokens, of the buckets of documents; the last bucket has no limit."""


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Masked tokens whose position (or whose document's length) is first..last; None: no limit."""

    first: int
    last: int | None
    nats: float
    count: int

    @property
    def bits(self) -> float:
        """Bits per masked token; NaN where there is none."""
        return self.nats / self.count / math.log(2) if self.count else math.nan


@dataclass(frozen=True, kw_only=True)
class LengthScore:
    """The score at one sequence length."""

    max_tokens: int
    sequences: int
    nats: float
    count: int
    by_position: tuple[Bucket, ...]
    by_document_tokens: tuple[Bucket, ...]
    """With policy ``document`` only."""

    @property
    def bits(self) -> float:
        """Bits per masked token."""
        return self.nats / self.count / math.log(2) if self.count else math.nan


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What was scored, how, and the results by length."""

    model: str
    data: str
    data_fingerprint: str
    tokenizer_fingerprint: str
    blocks: str
    seed: int
    probability: float
    global_tokens: str
    precision: str
    results: tuple[LengthScore, ...]

    @property
    def bits(self) -> dict[int, float]:
        """Bits per masked token by sequence length."""
        return {result.max_tokens: result.bits for result in self.results}

    def table(self) -> str:
        """The results as text: a row per length, then a row per bucket."""
        heads = ("tokens", "positions", "bits per masked token", "masked tokens")
        rows = []
        for result in self.results:
            rows.append(
                (f"{result.max_tokens:,}", "all", f"{result.bits:.4f}", f"{result.count:,}")
            )
            buckets = [("", bucket) for bucket in result.by_position if len(result.by_position) > 1]
            buckets += [("documents of", bucket) for bucket in result.by_document_tokens]
            for label, bucket in buckets:
                span = f"{bucket.first:,}-" + ("" if bucket.last is None else f"{bucket.last:,}")
                rows.append((label, span, f"{bucket.bits:.4f}", f"{bucket.count:,}"))
        widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
        return "\n".join(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in (heads, *rows)
        )

    def write(self, path: Path) -> None:
        """Writes the results as JSON: whole or not at all. A number that is not finite is null."""
        path.parent.mkdir(parents=True, exist_ok=True)
        tree = asdict(self)
        for result, written in zip(self.results, tree["results"], strict=True):
            written["bits"] = result.bits
            for name in ("by_position", "by_document_tokens"):
                for bucket, entry in zip(getattr(result, name), written[name], strict=True):
                    entry["bits"] = bucket.bits
        write_atomically(path, json.dumps(_finite(tree), indent=1, allow_nan=False) + "\n")


def evaluate(
    model: Path | str | LongformerForMaskedLM,
    corpus: Path | str,
    *,
    max_tokens: Sequence[int] | None = None,
    sequences: int | None = None,
    batch: int = 1,
    seed: int = 1,
    probability: float = 0.15,
    blocks: Policy = "full_sentences",
    global_tokens: str | None = None,
    device: torch.device | str = "cpu",
    precision: Literal["fp32", "bf16"] = "fp32",
    tokenizer: Tokenizer | None = None,
    json_path: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Scores a model on held-out text, at one or more sequence lengths.

    Args:
        model: a model folder, a run folder (its latest checkpoint), or a model on ``device``.
        corpus: folder that ``longpretrain prepare`` wrote.
        max_tokens: lengths. None: 512 and 4,096, as far as the model has positions.
        sequences: evenly spaced stretches of 4,096 tokens to score at every length; None: all text.
        batch: sequences at a time.
        seed: seeds the masks.
        probability: share of the tokens to guess.
        blocks: full_sentences (a stream across documents) or document.
        global_tokens: policy as in recipes. None: as the checkpoint was trained, else none.
        device: where to compute.
        precision: fp32, or bf16 under autocast.
        tokenizer: the model's; needed with a model object, else that of the folder.
        json_path: also write the results there.
        progress: called with (sequences done, sequences in all).

    Raises:
        InputError: no such model or corpus, altered files, another tokenizer, or an argument out
            of range, such as a length beyond the positions.
    """
    if json_path is not None:
        _check_json_path(json_path)  # before the work, not after it
    _check_device(torch.device(device))
    folder = None if isinstance(model, LongformerForMaskedLM) else find_model_folder(Path(model))
    # Every byte is looked at: a score of altered files would be a number like any other.
    state = run_state(folder) if folder is not None else {}
    tokenizer, opened = _open_corpus(corpus, folder, tokenizer)
    if global_tokens is None:
        global_tokens = str(state.get("global_tokens", "none"))
    network = model if isinstance(model, LongformerForMaskedLM) else load_model(folder or "")
    lengths = _lengths(network, tokenizer, max_tokens)
    sets = [
        HeldOut(opened, tokenizer, max_tokens=length, blocks=blocks, seed=seed,
                probability=probability, global_tokens=global_tokens)
        for length in lengths
    ]  # fmt: skip
    results = _score_lengths(
        network.to(device), sets, sequences, batch=batch, device=device, precision=precision,
        progress=progress,
    )  # fmt: skip
    evaluation = Evaluation(
        model="in memory" if folder is None else str(model), data=str(corpus),
        data_fingerprint=opened.fingerprint, tokenizer_fingerprint=tokenizer.fingerprint,
        blocks=blocks, seed=seed, probability=probability, global_tokens=global_tokens,
        precision=precision, results=results,
    )  # fmt: skip
    if json_path is not None:
        evaluation.write(json_path)
    return evaluation


def _open_corpus(
    corpus: Path | str, folder: Path | None, tokenizer: Tokenizer | None
) -> tuple[Tokenizer, Corpus]:
    """The corpus and the model's tokenizer, which are of one kind."""
    if tokenizer is None:
        assert folder is not None, "a model object needs its tokenizer beside it"
        tokenizer = load_tokenizer(folder)
    opened = Corpus.open(corpus, verify="sha256")
    opened.require_tokenizer(tokenizer.fingerprint, owner=f"model {folder or 'in memory'}")
    return tokenizer, opened


def _check_json_path(path: Path) -> None:
    way_out = "Name a file with --json, in a folder that you may write to."
    if path.is_dir():
        raise InputError(f"json {path}", got="a folder", wanted="a file's name", way_out=way_out)
    if path.exists() and not _is_ours(path):
        raise InputError(
            f"json {path}", got="a file that is no evaluation",
            wanted="no such file yet, or an earlier evaluation to replace",
            way_out="Choose another name, or move the file away.",
        )  # fmt: skip
    need_writable(path.parent, what="json in", way_out=way_out)


def _is_ours(path: Path) -> bool:
    """Whether an existing file may be replaced: what ``Evaluation.write`` wrote, or nothing."""
    if path.is_file() and path.stat().st_size == 0:
        return True
    try:
        return {"data_fingerprint", "results"} <= read_json_object(path).keys()
    except InputError:
        return False


def _check_device(device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "device", got="cuda", wanted="a device that this machine has",
            way_out="Say --device cpu, or mend the driver: torch sees no GPU here.",
        )  # fmt: skip


def find_model_folder(path: Path) -> Path:
    """The folder itself if it is a model's, else the latest checkpoint of the run that it is.

    Raises:
        InputError: neither, or the run has no checkpoint yet.
    """
    if (path / "config.json").is_file():
        return path
    pointer = path / "checkpoints" / "latest"
    folder = pointer.parent
    if pointer.is_file():
        folder = pointer.parent / pointer.read_text(encoding="utf-8", errors="replace").strip()
        if (folder / "config.json").is_file():
            return folder
    got = "a file" if path.is_file() else "no such folder"
    if path.is_dir():
        got = f"a latest checkpoint {folder.name} that is not there" if pointer.is_file() else (
            "neither config.json nor checkpoints/latest"
        )  # fmt: skip
    raise InputError(
        f"model {path}", got=got, wanted="a model folder, or a run folder with a checkpoint",
        way_out="Check the path; a run writes its first checkpoint after checkpoint.every_steps.",
    )  # fmt: skip


def comparison_table(rows: Sequence[tuple[str, Mapping[int, float]]]) -> str:
    """A Markdown table of (model, bits by sequence length); a dash where there is no score."""
    lengths = sorted({length for _, bits in rows for length in bits})
    cells = [["model", *(f"bits at {length:,}" for length in lengths)]]
    for name, bits in rows:
        numbers = (f"{bits[length]:.4f}" if length in bits else "-" for length in lengths)
        cells.append([name.replace("|", "/"), *numbers])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    return "\n".join(
        f"| {row[0].ljust(widths[0])} | "
        + " | ".join(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        + " |"
        for row in cells
    )


def _lengths(
    model: LongformerForMaskedLM, tokenizer: Tokenizer, max_tokens: Sequence[int] | None
) -> list[int]:
    positions = model.config.max_tokens
    if tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            "the model's vocabulary", got=f"{model.config.vocab_size} ids",
            wanted=f"at least the tokenizer's {tokenizer.vocab_size}",
            way_out="The model folder holds another model's tokenizer: put the right one there.",
        )  # fmt: skip
    if max_tokens is None:
        return [length for length in (512, 4096) if length <= positions] or [positions]
    for length in max_tokens:
        if length > positions:
            raise InputError(
                "max_tokens", got=length, wanted=f"at most {positions}, the positions of the model",
                way_out="Score it at fewer, or lengthen it: longpretrain convert --positions.",
            )  # fmt: skip
    if not max_tokens:
        raise InputError(
            "max_tokens", got="no length", wanted="at least one", way_out="For example 512,4096."
        )
    return sorted(set(max_tokens))


def _score_lengths(
    network: LongformerForMaskedLM,
    sets: Sequence[HeldOut],
    sequences: int | None,
    *,
    batch: int,
    device: torch.device | str,
    precision: Literal["fp32", "bf16"],
    progress: Callable[[int, int], None] | None,
) -> tuple[LengthScore, ...]:
    chosen = [held_out.numbers(sequences) for held_out in sets]
    total, done, results = sum(map(len, chosen)), 0, []
    for held_out, numbers in zip(sets, chosen, strict=True):
        parts = []
        for part in token_losses(
            network, held_out, numbers, batch=batch, device=device, precision=precision
        ):
            parts.append(part)
            done += len(np.unique(part.block_M))
            if progress is not None:
                progress(done, total)
        results.append(_length_score(held_out, numbers, parts))
    return tuple(results)


def _length_score(
    held_out: HeldOut, numbers: Sequence[int], parts: Sequence[TokenLosses]
) -> LengthScore:
    nats_M = np.concatenate([part.nats_M for part in parts])
    position_M = np.concatenate([part.position_M for part in parts])
    limits = [*range(POSITION_BUCKET, held_out.max_tokens, POSITION_BUCKET), held_out.max_tokens]
    by_document: tuple[Bucket, ...] = ()
    if held_out.policy == "document":
        block_M = np.concatenate([part.block_M for part in parts])
        length_M = held_out.document_tokens()[block_M]
        # Lengths count from 1 and their limits are included; positions count from 0.
        by_document = _buckets(length_M - 1, nats_M, [*DOCUMENT_LIMITS, None], first=1)
    return LengthScore(
        max_tokens=held_out.max_tokens, sequences=len(numbers), nats=float(nats_M.sum()),
        count=len(nats_M), by_position=_buckets(position_M, nats_M, limits, first=0),
        by_document_tokens=by_document,
    )  # fmt: skip


def _buckets(
    value_M: NDArray[np.int64],
    nats_M: NDArray[np.float64],
    ends: Sequence[int | None],
    *,
    first: int,
) -> tuple[Bucket, ...]:
    """Sums by value: a bucket holds the values from the end before it up to its own, excluded."""
    found, start = [], 0
    for end in ends:
        is_in = (value_M >= start) & (value_M < (np.inf if end is None else end))
        last = None if end is None else end - 1 + first
        found.append(
            Bucket(
                first=start + first,
                last=last,
                nats=float(nats_M[is_in].sum()),
                count=int(is_in.sum()),
            )
        )
        start = end or 0
    return tuple(found)


def _finite(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _finite(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
