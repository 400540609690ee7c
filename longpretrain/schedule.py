"""The learning rate of each update, and which parameters decay.

Published recipe (Longformer, section 5): linear warm-up over 500 updates to 3e-5, then a polynomial
of power 3 to zero at 65,000.
"""

from __future__ import annotations

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
    left = schedule.total_steps - schedule.warmup_steps
    progress = min((update - schedule.warmup_steps) / left, 1.0)
    return peak * float((1.0 - progress) ** schedule.power)


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
