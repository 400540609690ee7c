"""The journal of a run: metrics.jsonl, the console with log.txt, and TensorBoard.

metrics.jsonl holds one JSON object per line, of three kinds: ``train`` (one per update),
``evaluation`` (a score on held-out data) and ``event`` (what happened to the run: started,
resumed, preempted). A number is either in ``DETERMINISTIC``, and then the same in every repetition
of the run on one device kind, or in ``MEASURED``. A resumed run cuts the file back to its
checkpoint and goes on, so that ``deterministic(read_metrics(path))`` equals that of a run that
never stopped. Events stay, also those of steps that are done again: they are the run's history.

"Bits" are bits per masked token, log2 cross-entropy per masked wordpiece: what the Longformer paper
calls BPC (section 5). Speed is of the whole run (all ranks), memory of the rank that writes.
"""

from __future__ import annotations

import itertools
import json
import math
import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from longpretrain.errors import InputError
from longpretrain.files import write_atomically
from longpretrain.report.console import Console, duration_text
from longpretrain.report.line_file import LineFile
from longpretrain.report.tensorboard import TensorBoard

DETERMINISTIC = (
    "kind", "name", "step", "epoch", "samples", "loss", "bits", "lr", "grad_norm",
    "masked_tokens", "tokens", "skipped", "loss_scale", "sample_ids",
)  # fmt: skip
"""Fields that repeat exactly: loss in nats per masked token, tokens, masked_tokens and (if
``log.sample_ids``) the sequences of that update, samples and skipped (updates without effect) since
the run began."""
MEASURED = (
    "time", "step_s", "tokens_per_s", "data_wait_s", "memory_peak_mb", "mfu", "evaluation_s",
    "slowest_rank", "slowest_rank_s", "median_rank_s",
)  # fmt: skip
"""Fields that a clock or a device gave: time in seconds since 1970, memory in 10^6 bytes."""

# Dense bf16 and fp16 tensor-core peaks in FLOP/s, from NVIDIA's data sheets; first match counts.
_PEAK_FLOPS = (("A100", 312e12), ("H100 PCIe", 756e12), ("H100 NVL", 835e12), ("H100", 989e12),
               ("H200", 989e12))  # fmt: skip


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, in order; a half-written last line is left out.

    Raises:
        InputError: there is no such file, or a line before the last is not a JSON object.
    """
    if not path.is_file():
        raise InputError(
            f"metrics {path}", got="no such file", wanted="the metrics.jsonl of a run",
            way_out="Give the folder of a run that has begun.",
        )  # fmt: skip
    rows = path.read_bytes().split(b"\n")
    # Whatever follows the last newline is a line that a crash cut short.
    return [_parse(path, number, row) for number, row in enumerate(rows[:-1], 1) if row.strip()]


def deterministic(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What must be equal in two repetitions of a run: no events, no measured fields."""
    return [
        {key: line[key] for key in DETERMINISTIC if key in line}
        for line in lines
        if line["kind"] != "event"
    ]


def train_flops_per_token(
    *,
    hidden_size: int,
    intermediate_size: int,
    vocab_size: int,
    attention_window: Sequence[int | None],
    max_tokens: int,
    masked_share: float = 0.15,
    weights_train: bool = True,
) -> float:
    """Model FLOPs of one update per token: the forward pass and twice as much for the backward.

    Products with weights that stand still have no second part in the backward.

    Counts multiply-adds of matrix products as 2, as PaLM does (Chowdhery et al. 2022, appendix B).
    Recomputation (activation checkpointing, attention's backward) is not counted, and the
    vocabulary projection runs on the masked share only.

    Args:
        hidden_size: width of the model.
        intermediate_size: width of the feed-forward layer.
        vocab_size: rows of the tied embedding.
        attention_window: total window, one per layer; None for a layer with full attention.
        max_tokens: tokens of a sequence, which bound the keys of a query.
        masked_share: share of the tokens that the head sees.
        weights_train: whether the weight matrices train, and not the embeddings alone.
    """
    linear = 4 * hidden_size**2 + 2 * hidden_size * intermediate_size
    head = masked_share * (hidden_size**2 + hidden_size * vocab_size)
    with_weights = head + linear * len(attention_window)
    keys = sum(_keys_per_query(window, max_tokens) for window in attention_window)
    return 2 * ((3 if weights_train else 2) * with_weights + 3 * 2 * hidden_size * keys)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak of one device in FLOP/s for dense bf16 or fp16; None for fp32 and unknown devices."""
    if precision not in ("bf16", "fp16"):
        return None
    return next((peak for part, peak in _PEAK_FLOPS if part in device_name), None)


def memory_peak_mb() -> float:
    """Peak memory of this process in 10^6 bytes: of CUDA's allocator if in use, else resident."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated()) / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


class MetricsLog:
    """Writes the journal of a run; on ranks that do not write, every method does nothing.

    Lines reach the file at once; ``sync()`` before a checkpoint becomes the latest makes sure that
    the lines up to it survive a crash of the machine. Evaluate before the checkpoint of the same
    step: a resumed run keeps the lines up to and including its checkpoint's step. A disk that takes
    no more lines is told once, and does not end the run (line_file.py).

    Args:
        run_dir: the run folder, made if missing; gets metrics.jsonl, log.txt and tensorboard/.
        total_steps: updates of the whole run, for progress and ETA.
        resume_from_step: k keeps the lines of steps <= k, None keeps none; events stay.
        every_steps: updates between lines on the console; metrics.jsonl has every update.
        tensorboard: also write TensorBoard events.
        is_writer: True on rank 0 only.
        flops_per_token: of one update, see ``train_flops_per_token``; for MFU.
        peak_flops: of all devices together, see ``peak_flops``; None: MFU is not known.
        pause_every_steps: updates between evaluations, or checkpoints; for the ETA.
        console: where the lines go; None is stdout. A bar goes to stderr when that is a terminal.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        total_steps: int,
        resume_from_step: int | None = None,
        every_steps: int = 10,
        tensorboard: bool = True,
        is_writer: bool = True,
        flops_per_token: float | None = None,
        peak_flops: float | None = None,
        pause_every_steps: int = 0,
        console: TextIO | None = None,
    ) -> None:
        self.path = run_dir / "metrics.jsonl"
        self._is_writer = is_writer
        if not is_writer:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        cut = _cut(self.path, resume_from_step)
        self._flops_per_token, self._peak_flops = flops_per_token, peak_flops
        self._every_steps, self._total_steps = every_steps, total_steps
        self._is_first = True
        self._console = Console(
            run_dir / "log.txt", total_steps=total_steps, first_step=resume_from_step,
            pause_every_steps=pause_every_steps, out=console,
        )  # fmt: skip
        self._file = LineFile(self.path, self._console.say)
        for line in cut:  # in the file already
            self._console.say(f"step {line['step']}: {line['event']}")
        self._tensorboard = None
        if tensorboard:
            first_step = 0 if resume_from_step is None else resume_from_step + 1
            folder = run_dir / "tensorboard"
            self._tensorboard = TensorBoard(folder, first_step, self._console.say)

    def report(self, line: Mapping[str, Any]) -> None:
        """Takes one line in; fields beyond these are written as they are.

        ``kind`` and ``step`` (the first update is 1) are in every line. ``train``: epoch, samples,
        loss (mean nats over the masked tokens of all ranks), lr, grad_norm, masked_tokens, tokens,
        skipped, step_s, data_wait_s. ``evaluation``: loss (nats), masked_tokens; optional name
        (default: valid) and evaluation_s. ``event``: event (what happened, in words).
        """
        if not self._is_writer:
            return
        known = {"train": self._train, "evaluation": self._evaluation, "event": self._event}
        known[line["kind"]](dict(line))

    def has_evaluation(self, step: int) -> bool:
        """Whether a line tells of an evaluation after this step; False on ranks that do not
        write.
        """
        return self._is_writer and any(
            (line["kind"], line["step"]) == ("evaluation", step) for line in read_metrics(self.path)
        )

    def say(self, text: str) -> None:
        """A line for people: console and log.txt, not the metrics."""
        if self._is_writer:
            self._console.say(text)

    def sync(self) -> None:
        """Makes the lines so far survive a crash of the machine; from any thread."""
        if self._is_writer:
            self._file.sync()

    def close(self) -> None:
        """Closes the files and takes the progress bar away; safe to call twice."""
        if self._is_writer and not self._file.is_closed:
            self.sync()
            self._file.close()  # it may have something to say
            if self._tensorboard is not None:
                self._tensorboard.close()
            self._console.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _train(self, line: dict[str, Any]) -> None:
        line["bits"] = line["loss"] / math.log(2)
        line["tokens_per_s"] = line["tokens"] / line["step_s"] if line["step_s"] > 0 else 0.0
        line["memory_peak_mb"] = memory_peak_mb()
        line["mfu"] = None
        if self._flops_per_token is not None and self._peak_flops is not None:
            line["mfu"] = line["tokens_per_s"] * self._flops_per_token / self._peak_flops
        line = self._write(line)
        step = line["step"]
        is_shown = self._is_first or step % self._every_steps == 0 or step == self._total_steps
        self._is_first = False
        self._console.update(line, is_shown=is_shown)
        self._scalars("train", line, ("loss", "bits", "lr", "grad_norm", *MEASURED))

    def _evaluation(self, line: dict[str, Any]) -> None:
        line = self._write({"name": "valid", **line, "bits": line["loss"] / math.log(2)})
        bits = "no" if line["bits"] is None else f"{line['bits']:.4f}"
        took = f", {duration_text(line['evaluation_s'])}" if "evaluation_s" in line else ""
        self._console.say(
            f"step {line['step']}: {line['name']} {bits} bits per masked token"
            f" ({line['masked_tokens']:,} masked tokens{took})"
        )
        self._scalars(line["name"], line, ("loss", "bits"))
        self._settle()

    def _event(self, line: dict[str, Any]) -> None:
        self._write(line)
        self._console.say(f"step {line['step']}: {line['event']}")
        self._settle()

    def _settle(self) -> None:
        self.sync()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def _write(self, line: Mapping[str, Any]) -> dict[str, Any]:
        written = {key: _plain(key, value) for key, value in line.items()}
        written["time"] = round(time.time(), 3)
        self._file.write(json.dumps(written, allow_nan=False))
        return written

    def _scalars(self, group: str, line: Mapping[str, Any], names: Sequence[str]) -> None:
        if self._tensorboard is not None:
            self._tensorboard.scalars(group, line, [name for name in names if name != "time"])


def _parse(path: Path, number: int, row: bytes) -> dict[str, Any]:
    line = _as_line(row)
    if line is None:
        raise InputError(
            f"metrics {path} line {number}", got="no metrics line",
            wanted="an object with kind and step",
            way_out="Remove that line, or take the file back from a copy.",
        )  # fmt: skip
    return line


def _as_line(row: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(row)
    except (ValueError, RecursionError):
        return None
    is_line = isinstance(line, dict) and "kind" in line and type(line.get("step")) is int
    return line if is_line else None


def _cut(path: Path, resume_from_step: int | None) -> list[dict[str, Any]]:
    """Leaves the lines of steps <= resume_from_step, and every event; None leaves events alone.

    Returns the events that it adds, in the same write: updates that no checkpoint holds are lost,
    and a crash of the machine may leave rows that are no lines (a run that can go on is not
    stopped by its journal).
    """
    first_step = resume_from_step or 0
    rows = path.read_bytes().split(b"\n") if path.exists() else [b""]
    found = [_as_line(row) for row in rows[:-1]]
    lines = [line for line in found if line is not None]
    lost = [line for line in lines if line["kind"] == "train" and line["step"] > first_step]
    kept = [
        line
        for line in lines
        if line["kind"] == "event"
        or (resume_from_step is not None and line["step"] <= resume_from_step)
    ]
    added: list[dict[str, Any]] = []
    head = {"kind": "event", "step": first_step, "time": round(time.time(), 3)}
    broken = [str(number) for number, line in enumerate(found, 1) if line is None]
    if broken:
        listed = ", ".join(broken[:5]) + (", ..." if len(broken) > 5 else "")
        event = f"metrics.jsonl: no metrics line on line {listed}: left out"
        added.append(head | {"event": event, "broken_lines": len(broken)})
    if lost:
        seconds = sum(float(line.get("step_s") or 0) for line in lost)
        event = (
            f"{len(lost)} updates after step {first_step} are not in a checkpoint and are done "
            f"again ({duration_text(seconds)} of training)"
        )
        added.append(head | {"event": event, "lost_steps": len(lost), "lost_s": round(seconds, 3)})
    texts = [json.dumps(line, allow_nan=False) + "\n" for line in itertools.chain(kept, added)]
    write_atomically(path, "".join(texts))
    return added


def _plain(key: str, value: Any) -> Any:
    """JSON has no NaN and no infinity: a number that is not finite becomes null."""
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        if key in MEASURED:
            return float(f"{value:.6g}")
    return value


def _keys_per_query(window: int | None, max_tokens: int) -> float:
    """Mean number of keys that a query of a whole sequence reaches, sequence ends included."""
    if window is None:
        return max_tokens
    side = min(window // 2, max_tokens - 1)
    # Each side loses 1 + 2 + ... + side keys at the end of the sequence.
    return 2 * side + 1 - side * (side + 1) / max_tokens
