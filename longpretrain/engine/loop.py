"""The training loop: reads top to bottom. It knows a task only through its Protocol.

One update: collate every micro-batch of the step, count its predictions over all ranks, then run
forward and backward with the loss scaled by that one count, then step. The result does not depend
on how the batch was cut into ranks and micro-batches.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from longpretrain.config import Config, to_tree
from longpretrain.engine import checkpoint
from longpretrain.engine.forensics import Forensics
from longpretrain.engine.gather import standing_share
from longpretrain.engine.loader import Loader
from longpretrain.engine.saver import Saver
from longpretrain.engine.signals import StopRequest
from longpretrain.engine.task import Task
from longpretrain.engine.update import (
    Update,
    anyone_asked,
    gather_sample_ids,
    slowest_rank,
    update_all,
)
from longpretrain.engine.zero import ZeroEngine
from longpretrain.errors import InputError
from longpretrain.ranks import Ranks
from longpretrain.report.metrics import MetricsLog
from longpretrain.schedule import hidden_dropout_seed, learning_rate

Evaluate = Callable[[ZeroEngine, Callable[[], None]], tuple[float, int]]
"""Scores held-out data with all ranks: (summed nats, masked tokens), the same on each; calls the
function before each forward pass, on every rank as often."""

Mark = Callable[[str], None]
"""Takes what a rank does next, such as "step 12: batch"."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended: ``state`` is failed where its last checkpoint could not be written."""

    state: Literal["done", "preempted", "failed"]
    reason: str
    step: int


@dataclass
class _Progress:
    """What a checkpoint must hold beside tensors: plain data."""

    step: int = 0
    samples_done: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    """Just before this point; a run that goes on goes on counting."""

    def advance(self, config: Config, *, applied: bool) -> None:
        self.step += 1
        self.samples_done += config.batch.global_sequences
        self.skipped += not applied
        self.skipped_in_a_row = 0 if applied else self.skipped_in_a_row + 1


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """What every update works with."""

    config: Config
    task: Task
    engine: ZeroEngine
    ranks: Ranks
    device: torch.device
    batches: Loader
    saver: Saver
    forensics: Forensics
    metrics: MetricsLog
    stop: StopRequest
    mark: Mark


def accumulation_steps(config: Config, world_size: int) -> int:
    """Micro-batches per rank and update.

    Raises:
        InputError: the global batch cannot be made of ranks x micro-batches; names sizes that can.
    """
    each = world_size * config.batch.micro_sequences
    wanted = config.batch.global_sequences
    if wanted % each:
        sizes = [each * n for n in range(max(1, wanted // each - 1), wanted // each + 3)]
        micro = [m for m in range(1, min(wanted, 1024) + 1) if wanted % (world_size * m) == 0]
        way_out = f"batch.global_sequences could be {', '.join(map(str, sizes))}"
        if micro:
            way_out += f"; or batch.micro_sequences {', '.join(map(str, micro))}"
        raise InputError(
            "recipe key batch.global_sequences",
            got=wanted,
            wanted=f"a multiple of {world_size} ranks x {config.batch.micro_sequences} = {each}",
            way_out=way_out + ".",
        )
    return wanted // each


def train(
    config: Config,
    task: Task,
    model: nn.Module,
    ranks: Ranks,
    device: torch.device,
    *,
    metrics: MetricsLog,
    stop: StopRequest,
    resume_from: Path | None = None,
    evaluate: Evaluate | None = None,
    mark: Mark = lambda what: None,
) -> Outcome:
    """Runs updates until the schedule ends or a signal asks to stop, then leaves a checkpoint.

    The process group must be up (``zero.start_ranks``). All ranks call it and all return the same.

    Args:
        config: the run.
        task: the objective and its samples.
        model: fp32 on the CPU, with the weights of ``resume_from`` or of the folder to start from.
        ranks: this process's place.
        device: where the model runs.
        metrics: the journal; writes on rank 0 only.
        stop: the signals so far; the ranks agree on it at the end of every update.
        resume_from: the checkpoint that the weights are of; None starts at step 0.
        evaluate: scores held-out data every ``evaluate.every_steps`` updates.
        mark: told what this rank is about to do; who watches over the ranks sees that they go on.

    Raises:
        InputError: the batch does not divide, or a checkpoint lacks a moment.
        FloatingPointError: too many updates in a row had a non-finite gradient.
    """
    accumulation = accumulation_steps(config, ranks.world_size)
    total = config.schedule.total_steps
    first = 1 + (checkpoint.read_state(resume_from)["step"] if resume_from else 0)
    pin = device.type == "cuda"
    with (
        Loader(config, task, ranks, accumulation, first=first, pin=pin) as batches,
        ExitStack() as held,
    ):
        standing = standing_share(model, task)
        engine, progress = _start(config, model, device, accumulation, resume_from)
        saver = held.enter_context(
            Saver(config, engine, task, metrics, step=progress.step, standing=standing, mark=mark)
        )
        forensics = Forensics(config, task, engine, ranks, metrics=metrics, mark=mark)
        parts = _Parts(
            config=config,
            task=task,
            engine=engine,
            ranks=ranks,
            device=device,
            batches=batches,
            saver=saver,
            forensics=forensics,
            metrics=metrics,
            stop=stop,
            mark=mark,
        )
        _run_updates(parts, progress, evaluate)
        mark(f"step {progress.step}: checkpoint")
        problem = saver.save_last(_state(config, engine, task, progress))
    if problem:
        return Outcome(state="failed", reason=problem, step=saver.saved_step)
    if progress.step < total:
        reason = stop.signal_name or "a signal at another rank"
        return Outcome(state="preempted", reason=reason, step=progress.step)
    return Outcome(state="done", reason=f"all {total} updates", step=progress.step)


def _run_updates(parts: _Parts, progress: _Progress, evaluate: Evaluate | None) -> None:
    """Updates, and what follows each, until the schedule ends or a signal asks to stop."""
    config, saver = parts.config, parts.saver
    total = config.schedule.total_steps
    if evaluate and _is_owed(parts, progress) and not _evaluate(parts, progress, evaluate):
        return
    while progress.step < total:
        update = _update(parts, progress)
        step = progress.step
        saver.advance(update.saver_flags)
        if progress.skipped_in_a_row >= config.optim.max_skipped:
            saver.finish()
            parts.forensics.give_up(progress.skipped_in_a_row, step, saver.saved_step)
        is_due = _is_due(step, config.evaluate.every_steps, total)
        if evaluate and is_due and not _evaluate(parts, progress, evaluate):
            break
        if update.stop_asked:
            break
        # Weights that stand still need no new checkpoint; after a stretch of skipped updates the
        # one before it is where to go on from.
        if saver.is_due(step) and update.result.applied:
            parts.mark(f"step {step}: checkpoint")
            saver.begin(_state(config, parts.engine, parts.task, progress))


def _update(parts: _Parts, progress: _Progress) -> Update:
    """The next update: its batch, forward and backward, the step, its line in the journal."""
    config, step = parts.config, progress.step + 1
    started = time.monotonic()
    parts.mark(f"step {step}: batch")
    micro_batches = parts.batches.get(step)
    waited_s = time.monotonic() - started
    rate = learning_rate(step, config.optim.lr, config.schedule)
    parts.engine.set_learning_rate(rate)
    parts.mark(f"step {step}: forward and backward")
    attempt = partial(
        update_all,
        parts.engine,
        parts.task,
        micro_batches,
        parts.device,
        parts.stop,
        saver=parts.saver,
        seed=hidden_dropout_seed(config.run.seed, step, parts.ranks.rank),
        waited_s=waited_s,
    )
    update = parts.forensics.settle(
        attempt,
        step=step,
        micro_batches=micro_batches,
        rate=rate,
        skipped_before=progress.skipped_in_a_row,
    )
    progress.advance(config, applied=update.result.applied)
    more: dict[str, object] = {"lr": rate, "data_wait_s": waited_s}
    more |= slowest_rank(update.rank_seconds)
    if config.log.sample_ids:
        more["sample_ids"] = gather_sample_ids(parts.task, micro_batches)
    more["step_s"] = time.monotonic() - started
    _log_update(parts.metrics, parts.task, progress, update, more)
    return update


def _start(
    config: Config,
    model: nn.Module,
    device: torch.device,
    accumulation: int,
    resume_from: Path | None,
) -> tuple[ZeroEngine, _Progress]:
    exact: dict[str, torch.Tensor] = {}
    if config.precision != "fp32":
        # DeepSpeed makes its fp32 masters from the rounded copies: keep the exact ones to set after
        exact = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    engine = ZeroEngine(model.to(device), config, accumulation=accumulation)
    if exact:
        engine.set_weights(exact.__getitem__)
        exact.clear()
    engine.train()
    if resume_from is None:
        return engine, _Progress()
    checkpoint.restore_moments(engine, resume_from)
    state = checkpoint.read_state(resume_from)
    engine.loss_scaling = state.get("loss_scaling", {})
    return engine, _Progress(
        step=state["step"],
        samples_done=state["samples_done"],
        skipped=state["skipped"],
        skipped_in_a_row=state.get("skipped_in_a_row", 0),  # checkpoints of 0.2 lack it
    )


def _is_due(step: int, every: int, total: int) -> bool:
    return bool(every) and (step % every == 0 or step == total)


def _log_update(
    metrics: MetricsLog, task: Task, progress: _Progress, update: Update, more: dict[str, object]
) -> None:
    scale = update.result.loss_scale
    metrics.report(
        {
            "kind": "train",
            "step": progress.step,
            "epoch": task.epoch(progress.samples_done - 1),
            "samples": progress.samples_done,
            "loss": update.loss,
            "grad_norm": update.result.grad_norm,
            "masked_tokens": update.masked_tokens,
            "tokens": update.tokens,
            "skipped": progress.skipped,
            **({} if scale is None else {"loss_scale": scale}),
            **more,
        }
    )


class _StopAskedError(Exception):
    """Breaks an evaluation off, on all ranks alike."""


def _is_owed(parts: _Parts, progress: _Progress) -> bool:
    """Whether the run was stopped before an evaluation was through, after the checkpoint's step."""
    step, config = progress.step, parts.config
    if not step or not _is_due(step, config.evaluate.every_steps, config.schedule.total_steps):
        return False
    answer = [not parts.metrics.has_evaluation(step)]
    dist.broadcast_object_list(answer)  # rank 0 knows
    return answer[0]


def _evaluate(parts: _Parts, progress: _Progress, evaluate: Evaluate) -> bool:
    """Scores held-out data, and whether it came to an end. A signal that asks to stop may leave no
    time for it: it is put off until the run goes on. After the last update it never would; there a
    run that is killed goes on from the checkpoint before.
    """
    step, engine = progress.step, parts.engine
    is_last = step == parts.config.schedule.total_steps
    started = time.monotonic()

    def goes_on() -> None:
        parts.mark(f"step {step}: evaluation")
        if not is_last and anyone_asked(parts.stop, parts.device):
            raise _StopAskedError

    engine.train(False)
    try:
        nats, count = evaluate(engine, goes_on)
    except _StopAskedError:
        parts.metrics.say(f"step {step}: asked to stop; it is evaluated when the run goes on")
        return False
    finally:
        engine.train()
    parts.metrics.report(
        {
            "kind": "evaluation",
            "step": step,
            "loss": nats / max(count, 1),
            "masked_tokens": count,
            "evaluation_s": time.monotonic() - started,
        }
    )
    return True


def _state(config: Config, engine: ZeroEngine, task: Task, progress: _Progress) -> dict[str, Any]:
    """What a checkpoint's state.json holds of the run."""
    return {
        **dataclasses.asdict(progress),
        "updates_applied": engine.updates_applied,
        "loss_scaling": engine.loss_scaling,
        "global_tokens": config.model.global_tokens,
        "train_only": config.model.train_only,
        "world_size": dist.get_world_size(),
        "mix_version": task.version(progress.samples_done - 1),
        "task": task.identity(),
        "recipe": to_tree(config),
    }
