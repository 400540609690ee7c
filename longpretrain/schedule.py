"""What each update of a run is made of, whoever drives it: samples, rate, seed, decayed parameters.

Our engine and fairseq's trainer both take it from here, so that they do the same arithmetic.
Published recipe (Longformer, section 5): linear warm-up over 500 updates to 3e-5, then a polynomial
of power 3 to zero at 65,000.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from torch import nn

from longpretrain.config import OptimConfig, ScheduleConfig


def learning_rate(update: int, peak: float, schedule: ScheduleConfig) -> float:
    """The rate of one update; the first update is number 1.

    Args:
        update: 1 to ``schedule.total_steps``.
        peak: the largest rate, reached at the end of the warm-up.
        schedule: lengths in updates, form and power of the decay.
    """
    assert update >= 1, f"updates are counted from 1, not {update}"
    if update <= schedule.warmup_steps:
        return peak * update / schedule.warmup_steps
    if schedule.decay == "constant":
        return peak
    left = max(schedule.total_steps - schedule.warmup_steps, 1)
    progress = min((update - schedule.warmup_steps) / left, 1.0)
    return peak * float((1.0 - progress) ** schedule.power)


def update_numbers(
    update: int,
    *,
    global_sequences: int,
    micro_sequences: int,
    accumulation: int,
    world_size: int,
    rank: int,
) -> list[range]:
    """Numbers of the samples of one rank's micro-batches in one update; the first update is 1.

    Update u takes the samples (u - 1) S to u S - 1, S being ``global_sequences``; its micro-batch
    a of rank r is number a W + r of them, W being the number of ranks. So the place of a run in its
    data is one integer, whatever the ranks, micro-batches and workers.
    """
    assert global_sequences == world_size * accumulation * micro_sequences
    first = (update - 1) * global_sequences
    starts = [
        first + (number * world_size + rank) * micro_sequences for number in range(accumulation)
    ]
    return [range(start, start + micro_sequences) for start in starts]


def hidden_dropout_seed(seed: int, update: int, rank: int) -> int:
    """Seed of torch's generator for one update of one rank: 63 bits.

    Hidden dropout draws from that generator, so a run that was resumed drops what a run that never
    stopped drops, under either trainer.
    """
    digest = hashlib.sha256(f"dropout {seed} {update} {rank}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], optim: OptimConfig
) -> list[dict[str, object]]:
    """Parameters that train, split by whether they decay. Frozen ones are left out: no moments,
    no decay.
    """
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            (kept if _matches(name, optim.decay_excludes) else decayed).append(parameter)
    groups: list[dict[str, object]] = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _matches(name: str, parts: Sequence[str]) -> bool:
    return any(part in name for part in parts)
