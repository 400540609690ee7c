"""Our optimizer and schedule for fairseq's trainer: torch's AdamW, and the rate of schedule.py.

fairseq's own Adam adds eps before the bias correction, and its schedule gives the first two updates
one rate; with these two registered, both trainers do the same arithmetic. The defaults are those of
the recipes.
"""
# No `from __future__ import annotations` here: fairseq reads the types of option fields, in
# typing's own forms.
# ruff: noqa: UP006, UP035, RUF009

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, List

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.optim import FairseqOptimizer, register_optimizer
from fairseq.optim.lr_scheduler import FairseqLRScheduler, register_lr_scheduler
from omegaconf import II
from torch import nn

from longpretrain.config import OptimConfig, ScheduleConfig
from longpretrain.errors import InputError
from longpretrain.schedule import learning_rate

_OPTIM, _SCHEDULE = OptimConfig(), ScheduleConfig()


@dataclass
class AdamWConfig(FairseqDataclass):  # type: ignore[misc]
    """Options of ``--optimizer longpretrain_adamw``."""

    adam_betas: List[float] = field(
        default_factory=lambda: list(_OPTIM.betas),
        metadata={"help": "decay rates of the two moments, such as 0.9,0.98"},
    )
    adam_eps: float = field(
        default=_OPTIM.eps, metadata={"help": "added to the root of the second moment"}
    )
    weight_decay: float = field(
        default=_OPTIM.weight_decay, metadata={"help": "decoupled decay, on all parameters"}
    )
    lr: List[float] = II("optimization.lr")


@register_optimizer("longpretrain_adamw", dataclass=AdamWConfig)
class LongpretrainAdamW(FairseqOptimizer):  # type: ignore[misc]
    """torch's AdamW. Decays every parameter that trains, as fairseq's RoBERTa does.

    fairseq hands over parameters without their names, and in fp16 as one flat tensor, so there is
    no ``decay_excludes`` here.
    """

    def __init__(self, cfg: Any, params: Iterable[nn.Parameter]) -> None:
        super().__init__(cfg)
        params = list(params)
        # Fused on a GPU, as in our own engine.
        self._optimizer = torch.optim.AdamW(
            params, **self.optimizer_config, fused=params[0].is_cuda or None
        )

    @property
    def optimizer_config(self) -> dict[str, Any]:
        """AdamW's arguments."""
        first, second = self.cfg.adam_betas
        return {
            "lr": self.cfg.lr[0],
            "betas": (first, second),
            "eps": self.cfg.adam_eps,
            "weight_decay": self.cfg.weight_decay,
        }

    @property
    def supports_flat_params(self) -> bool:
        """AdamW is elementwise, so fairseq may flatten all parameters into one."""
        return True


@dataclass
class PolynomialConfig(FairseqDataclass):  # type: ignore[misc]
    """Options of ``--lr-scheduler longpretrain_polynomial``."""

    warmup_updates: int = field(
        default=_SCHEDULE.warmup_steps, metadata={"help": "updates until the peak"}
    )
    total_num_update: int = field(
        default=0, metadata={"help": "update at which the rate reaches 0 (default: --max-update)"}
    )
    power: float = field(default=_SCHEDULE.power, metadata={"help": "power of the polynomial"})
    max_update: int = II("optimization.max_update")
    lr: List[float] = II("optimization.lr")


@register_lr_scheduler("longpretrain_polynomial", dataclass=PolynomialConfig)
class LongpretrainPolynomial(FairseqLRScheduler):  # type: ignore[misc]
    """Update n = 1, 2, ... runs with ``learning_rate(n)``: linear warm-up, then a polynomial to 0.

    Raises:
        InputError: the length of the run or its one peak rate is not said.
    """

    def __init__(self, cfg: Any, optimizer: FairseqOptimizer) -> None:
        super().__init__(cfg, optimizer)
        total = cfg.total_num_update or cfg.max_update
        if total <= 0:
            raise InputError(
                "--total-num-update", got="nothing", wanted="the update at which the rate is 0",
                way_out="Say --total-num-update N or --max-update N.",
            )  # fmt: skip
        if len(cfg.lr) != 1:
            raise InputError(
                "--lr", got=list(cfg.lr), wanted="one number, the peak", way_out="Say --lr RATE."
            )
        self._peak = cfg.lr[0]
        self._schedule = ScheduleConfig(
            total_steps=total, warmup_steps=cfg.warmup_updates, power=cfg.power
        )
        self.step_update(0)

    def step_update(self, num_updates: int) -> float:
        """Sets the rate of the next update.

        fairseq calls this after every update, with the number of updates done, and logs what it
        returns beside that update's loss.

        Args:
            num_updates: updates done so far.

        Returns:
            The rate that update ``num_updates`` ran with (before the first: that it will run with).
        """
        self.optimizer.set_lr(learning_rate(num_updates + 1, self._peak, self._schedule))
        return learning_rate(max(num_updates, 1), self._peak, self._schedule)
