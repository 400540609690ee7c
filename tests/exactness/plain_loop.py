"""The twin of both trainers: one process, plain torch, nothing clever. Reads in a minute.

No ranks, no micro-batches, no ZeRO, no fairseq: the whole batch of an update at once. It shares
with the trainers only the task (which sample is number n, how it is masked) and the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from longpretrain.config import Config
from longpretrain.tasks.masked_lm import MaskedLMTask


@dataclass
class Curve:
    """What one run did, update by update."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    sample_ids: list[list[int]] = field(default_factory=list)


def plain_loop(
    config: Config, updates: int, *, precision: str = "fp32", model: nn.Module | None = None
) -> Curve:
    """Trains for ``updates`` updates; bf16 keeps fp32 masters and runs a rounded copy."""
    assert not config.model.dropout, "hidden dropout is keyed by rank: the twin has none"
    task = MaskedLMTask(config, Path(config.model.path))
    model = (model or task.build_model(Path(config.model.path))).train()
    masters = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    if precision == "bf16":
        model.bfloat16()
    working = [p for p in model.parameters() if p.requires_grad]
    optim, schedule, size = config.optim, config.schedule, config.batch.global_sequences
    adam = torch.optim.AdamW(
        masters, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay
    )
    curve = Curve()
    for update in range(1, updates + 1):
        samples = [task.sample(n) for n in range((update - 1) * size, update * size)]
        batch = task.collate(samples)
        logits_MV = model(
            batch["tokens_BN"],
            padding_BN=batch.get("padding_BN"),
            global_index_BG=batch.get("global_index_BG"),
            predict_index_M=batch["predict_index_M"],
            dropout_seed_B=batch["dropout_seed_B"],
        )
        loss = F.cross_entropy(logits_MV.float(), batch["targets_M"])
        gradients = [g.float() for g in torch.autograd.grad(loss, working)]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        shrink = min(1.0, optim.clip_norm / (float(norm) + 1e-6)) if optim.clip_norm else 1.0
        if update <= schedule.warmup_steps:
            rate = optim.lr * update / schedule.warmup_steps
        else:
            left = schedule.total_steps - schedule.warmup_steps
            rate = optim.lr * (1 - (update - schedule.warmup_steps) / left) ** schedule.power
        adam.param_groups[0]["lr"] = rate
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient * shrink
        adam.step()
        with torch.no_grad():
            for parameter, master in zip(working, masters, strict=True):
                parameter.copy_(master)
        curve.losses.append(loss.item())
        curve.grad_norms.append(float(norm))
        curve.sample_ids.append([sample.sample_id for sample in samples])
    return curve
