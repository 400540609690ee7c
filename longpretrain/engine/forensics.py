"""What is done about an update whose loss or gradient is not finite: it is repeated once, under
watch, and what was seen is left in RUN/forensics/step-000123.json.

The weights have not moved, and the batch and the seeds are the same: so are the bits. Where the
repetition is finite all the same, the first time was not the arithmetic's fault: the repeated
update is applied, and the run is the one that never had the fault. What is left on the disk, or
cannot be, has no say in any of this.
"""

from __future__ import annotations

import contextlib
import json
import math
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import torch
import torch.distributed as dist

from longpretrain.config import Config
from longpretrain.engine.nonfinite import MicroBatch, Trace
from longpretrain.engine.task import Batch, Task
from longpretrain.engine.zero import StepResult, ZeroEngine
from longpretrain.files import write_atomically
from longpretrain.ranks import Ranks
from longpretrain.report.metrics import MetricsLog
from longpretrain.schedule import update_numbers

FOLDER = "forensics"
MOST_DUMPS = 8
"""Files that stay: the first ones of a run and the newest."""
FP16_PATIENCE = 8
"""Updates in a row that fp16 may lose to its loss scale before they are looked into: the scale
begins too high on purpose."""
_SHOWN = 8
"""Rows of a table that could be as long as the model's list of parameters."""

Report = dict[str, Any]


class Attempted(Protocol):
    """What the loop knows of an update that it tried."""

    @property
    def loss(self) -> float:
        """The mean over all ranks."""
        ...

    @property
    def result(self) -> StepResult:
        """What the step did."""
        ...

    @property
    def losses(self) -> Sequence[torch.Tensor]:
        """This rank's, by micro-batch: summed nats."""
        ...


T = TypeVar("T", bound=Attempted)


class Forensics:
    """Looks into updates that are not finite; all ranks call its methods alike.

    Args:
        config: the run.
        task: says which samples a batch holds, and where they are from.
        engine: the model.
        ranks: this process's place.
        metrics: is told, in one line for each update.
        mark: is told that an update is repeated, for who watches over progress.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        engine: ZeroEngine,
        ranks: Ranks,
        *,
        metrics: MetricsLog,
        mark: Callable[[str], None],
    ) -> None:
        self._config = config
        self._task = task
        self._engine = engine
        self._ranks = ranks
        self._metrics = metrics
        self._mark = mark
        self._folder = config.run_dir / FOLDER
        self._last = self._folder  # of the newest dump in this process, else of all

    def settle(
        self,
        attempt: Callable[..., T],
        *,
        step: int,
        micro_batches: list[Batch],
        rate: float,
        skipped_before: int,
    ) -> T:
        """Runs an update, and again if it was not finite; returns what counts.

        Args:
            attempt: runs the update, the same one each time; takes ``trace``, to be served.
            step: its number.
            micro_batches: this rank's.
            rate: the learning rate.
            skipped_before: updates in a row just before this one that were skipped.
        """
        scaling = self._engine.loss_scaling
        first = attempt()
        if first.result.applied or self._is_ordinary(first, skipped_before + 1):
            return first
        self._mark(f"step {step}: repeating the update, which was not finite")
        self._engine.loss_scaling = scaling
        with Trace(self._engine) as trace:
            again = attempt(trace=trace)
        everyone: list[Report] = [{}] * self._ranks.world_size
        dist.all_gather_object(everyone, self._of_rank(step, micro_batches, trace, first))
        path = self._folder / f"step-{step:06d}.json"
        if self._ranks.is_first:
            moment = {
                "step": step,
                "samples_done": (step - 1) * self._config.batch.global_sequences,
                "learning_rate": rate,
                "precision": self._config.precision,
                "zero": self._config.zero.config,
                "loss_scale": first.result.loss_scale or 1.0,
            }
            dump = _dump(moment, first, again, trace, everyone)
            self._tell(path, step, dump, is_applied=again.result.applied)
        self._last = path
        return again

    def give_up(self, in_a_row: int, step: int, saved_step: int) -> NoReturn:
        """Ends a run that has skipped so many updates; it can go on from its last checkpoint, that
        of ``saved_step``. 0: it has none.

        Raises:
            FloatingPointError: always.
        """
        kept, older = "there is no checkpoint yet", ""
        if saved_step:
            kept = f"the checkpoint of step {saved_step} holds those of before"
            older = " from an older checkpoint"
        raise FloatingPointError(
            f"loss or gradient: got {in_a_row} updates in a row that are not finite, to step "
            f"{step}; wanted finite ones. None reached the weights, and {kept}. See {self._last}: "
            f"mend the cause, or lower optim.lr or set optim.clip_norm and begin a new run{older}."
        )

    def _is_ordinary(self, attempted: Attempted, in_a_row: int) -> bool:
        """Whether only the loss scale of fp16 was too high, as it often is."""
        patience = min(FP16_PATIENCE, self._config.optim.max_skipped)
        is_fp16 = self._config.precision == "fp16"
        return is_fp16 and math.isfinite(attempted.loss) and in_a_row < patience

    def _of_rank(
        self, step: int, micro_batches: list[Batch], trace: Trace, first: Attempted
    ) -> Report:
        batch = self._config.batch
        numbers = update_numbers(
            step,
            global_sequences=batch.global_sequences,
            micro_sequences=batch.micro_sequences,
            accumulation=len(micro_batches),
            world_size=self._ranks.world_size,
            rank=self._ranks.rank,
        )
        rows = zip(micro_batches, numbers, trace.micro_batches, first.losses, strict=True)
        return {
            "rank": self._ranks.rank,
            "host": socket.gethostname(),
            "micro_batches": [
                self._of_micro_batch(self._task.sample_ids(held), taken, seen, float(before))
                for held, taken, seen, before in rows
            ],
        }

    def _of_micro_batch(
        self, ids: list[int], numbers: Sequence[int], seen: MicroBatch, loss_before: float
    ) -> Report:
        suspects = range(seen.sequences)
        if seen.output and seen.output["sequences"]:
            suspects = seen.output["sequences"]
        samples = [
            {
                "sample": number,
                "id": identity,
                **self._task.describe(number),
                "finite": seen.is_finite or row not in suspects,
            }
            for row, (number, identity) in enumerate(zip(numbers, ids, strict=True))
        ]
        return {
            "finite": seen.is_finite,
            "loss": seen.loss,
            "loss_first_time": loss_before,
            "samples": samples,
            "first_output": seen.output,
            "first_gradient": seen.gradient,
            "gradients_not_finite": len(seen.parameters),
            "first_gradients_not_finite": seen.parameters[:_SHOWN],
        }

    def _tell(self, path: Path, step: int, dump: Report, *, is_applied: bool) -> None:
        """Writes the dump and says so. A disk that does not take it is no reason to stop."""
        place: str | None = f"{FOLDER}/{path.name}"
        told = place
        try:
            self._folder.mkdir(exist_ok=True)
            write_atomically(path, json.dumps(_plain(dump), indent=1, allow_nan=False) + "\n")
            _make_room(self._folder, path)
        except OSError as error:
            place, told = None, f"no dump: {error}"
        self._metrics.report(
            {
                "kind": "event",
                "step": step,
                "event": f"{dump['summary']}; {told}",
                "forensics": place,
                "skipped": not is_applied,
            }
        )


def _dump(
    moment: Report, first: Attempted, again: Attempted, trace: Trace, everyone: list[Report]
) -> Report:
    """What a person wants to know, in the order in which it is asked for."""
    is_applied = again.result.applied
    dump: Report = {
        "summary": "",
        **moment,
        "first_time": {"loss": first.loss, "grad_norm": first.result.grad_norm},
        "repeated": {
            "loss": again.loss,
            "grad_norm": again.result.grad_norm,
            "outcome": "finite, and applied" if is_applied else "not finite, and skipped",
        },
        "ranks": everyone,
        "weights_not_finite": _bad(trace.weights),
        "gradients_not_finite": _bad(trace.gradients),
        "largest_weights": _largest(trace.weights),
        "largest_gradients": _largest(trace.gradients, scale=moment["loss_scale"]),
    }
    dump["summary"] = _what_repeated(dump) if is_applied else f"update skipped: {_what(dump)}"
    return dump


def _bad(rows: list[Report]) -> list[Report]:
    return [row for row in rows if row["nan"] or row["inf"]]


def _largest(rows: list[Report], *, scale: float = 1.0) -> list[Report]:
    known = [row for row in rows if row["largest"] is not None]
    found = sorted(known, key=lambda row: -float(row["largest"]))[:_SHOWN]
    return [{"name": row["name"], "largest": row["largest"] / scale} for row in found]


def _what(dump: Report) -> str:
    """One line: what is not finite, where it was first, for which samples."""
    pairs = [(of, n, m) for of in dump["ranks"] for n, m in enumerate(of["micro_batches"], 1)]
    bad = [(of["rank"], number, found) for of, number, found in pairs if not found["finite"]]
    if not bad:
        return _what_of_sums(dump)
    rank, number, found = bad[0]
    kind = "gradient" if math.isfinite(found["loss"]) else "loss"
    samples = [str(row["sample"]) for row in found["samples"] if not row["finite"]]
    shown = ", ".join(samples[:4]) + ", ..." * (len(samples) > 4)
    where = f"sample {shown} (rank {rank}, micro-batch {number})"
    if len(bad) > 1:
        where += f" and in {len(bad) - 1} of {len(pairs) - 1} other micro-batches"
    text = f"{kind} not finite, {_place(found)}, at {where}"
    if dump["weights_not_finite"]:
        text += f"; weights not finite: {dump['weights_not_finite'][0]['name']}"
        more = len(dump["weights_not_finite"]) - 1
        text += f" and {more} more" * bool(more)
    return text


def _what_of_sums(dump: Report) -> str:
    """Every micro-batch was finite; their sum or its norm is not."""
    names = [row["name"] for row in dump["gradients_not_finite"]]
    if names:
        more = f" and {len(names) - 1} more" * (len(names) > 1)
        return f"gradient not finite once summed over micro-batches and ranks: {names[0]}{more}"
    largest = "".join(
        f"; the largest, {row['largest']:.3g}, is in {row['name']}"
        for row in dump["largest_gradients"][:1]
    )
    return f"norm of the gradient not finite, though each of its numbers is{largest}"


def _place(found: Report) -> str:
    output, gradient = found["first_output"], found["first_gradient"]
    if output:
        return f"first in the output of {output['module']}"
    if not math.isfinite(found["loss"]):
        return "first in the loss itself"
    if gradient:
        return f"first in the gradient at the output of {gradient['output_of']}"
    return f"in that of {found['first_gradients_not_finite'][0]['name']}"


def _what_repeated(dump: Report) -> str:
    """One line for a fault that did not come back; losses that changed tell whose it was."""
    odd = [
        of["rank"]
        for of in dump["ranks"]
        if any(found["loss"] != found["loss_first_time"] for found in of["micro_batches"])
    ]
    hosts = {of["rank"]: of["host"] for of in dump["ranks"]}
    named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in odd)
    who = f"the loss was another one at {named}" if odd else "the losses were the same"
    return (
        "update repeated: loss or gradient was not finite, and is on the same batch, so it was "
        f"applied; a fault of the hardware? ({who})"
    )


def _make_room(folder: Path, newest: Path) -> None:
    """Of too many dumps the first ones stay, and the newest."""
    others = sorted(path for path in folder.glob("step-*.json") if path != newest)
    for path in others[MOST_DUMPS - 1 :]:
        with contextlib.suppress(OSError):
            path.unlink()


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become words."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
