"""One update: forward and backward over every micro-batch of this rank, then the step, with all
other ranks. What else ranks tell each other at every update rides in its two all-reduces.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from longpretrain.engine.nonfinite import Trace
from longpretrain.engine.saver import FLAGS, Saver
from longpretrain.engine.signals import StopRequest
from longpretrain.engine.task import Batch, Task
from longpretrain.engine.zero import StepResult, ZeroEngine


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one update did, the same on every rank; loss is the mean in nats per masked token."""

    loss: float
    result: StepResult
    masked_tokens: int
    tokens: int
    stop_asked: bool
    saver_flags: list[float]
    losses: list[torch.Tensor]
    """This rank's, by micro-batch: nats, summed over its masked tokens."""
    rank_seconds: list[float]
    """By rank: what it spent waiting for its batches and on its forward passes, in which (but for
    ZeRO 3) it waits for no other rank. On a GPU the passes count as the host sees them."""


def update_all(
    engine: ZeroEngine,
    task: Task,
    micro_batches: list[Batch],
    device: torch.device,
    stop: StopRequest,
    *,
    saver: Saver,
    seed: int,
    waited_s: float,
    trace: Trace | None = None,
) -> Update:
    """One update over all micro-batches of all ranks; the same one again if called again, as long
    as the weights have not moved.
    """
    torch.manual_seed(seed)
    count, tokens = _sum_over_ranks(
        [
            sum(task.count(batch) for batch in micro_batches),
            sum(task.tokens(batch) for batch in micro_batches),
        ],
        device,
    )
    count = max(count, 1.0)
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    losses: list[torch.Tensor] = []
    own_s = waited_s
    for number, batch in enumerate(micro_batches, start=1):
        on_device = {key: x.to(device, non_blocking=True) for key, x in batch.items()}
        if trace:
            trace.start(len(task.sample_ids(batch)))
        began = time.monotonic()
        loss = task.loss(engine, on_device)
        own_s += time.monotonic() - began
        if trace:
            trace.end(loss)
        losses.append(loss.detach())
        loss_sum += losses[-1].double()
        engine.backward(loss / count)
        if number < len(micro_batches):
            engine.micro_step()
    if trace:
        trace.read_tables()
    result = engine.step()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    seconds = [own_s if number == rank else 0.0 for number in range(ranks)]
    nats, stops, applied, *others = _sum_over_ranks(
        [float(loss_sum), float(stop.asked), float(result.applied), *saver.flags(), *seconds],
        device,
    )
    if applied not in (0.0, float(ranks)):
        raise RuntimeError(
            f"{int(applied)} of {ranks} ranks applied an update, the others found its gradient not "
            "finite: their weights differ now; the run stops before a checkpoint holds them"
        )
    return Update(
        loss=nats / count,
        result=result,
        masked_tokens=int(count),
        tokens=int(tokens),
        stop_asked=stops > 0,
        losses=losses,
        saver_flags=others[:FLAGS],
        rank_seconds=others[FLAGS:],
    )


def slowest_rank(rank_seconds: list[float]) -> dict[str, object]:
    """Which rank the others wait for, and for how long; nothing to tell of one rank."""
    if len(rank_seconds) < 2:
        return {}
    slowest = max(range(len(rank_seconds)), key=rank_seconds.__getitem__)
    return {
        "slowest_rank": slowest,
        "slowest_rank_s": rank_seconds[slowest],
        "median_rank_s": statistics.median(rank_seconds),
    }


def gather_sample_ids(task: Task, micro_batches: list[Batch]) -> list[int]:
    """Ids of the samples that every rank really collated for one update, in the order of their
    numbers.
    """
    everyone: list[list[list[int]]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, [task.sample_ids(batch) for batch in micro_batches])
    return [
        found
        for number in range(len(micro_batches))
        for of_rank in everyone
        for found in of_rank[number]
    ]


def anyone_asked(stop: StopRequest, device: torch.device) -> bool:
    """Whether a rank was asked to stop; the same answer on all, which call it together."""
    return _sum_over_ranks([float(stop.asked)], device)[0] > 0


def _sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    vector = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(vector)
    return [float(value) for value in vector.tolist()]
