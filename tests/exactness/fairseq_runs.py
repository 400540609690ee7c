"""Runs of stock ``fairseq-train --user-dir longpretrain`` with the numbers of a recipe."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

from ranks_helper import ROOT, rank_environment

from exactness.plain_loop import Curve
from longpretrain.config import Config


def fairseq_curve(
    work: Path,
    config: Config,
    *,
    ranks: int,
    micro: int,
    updates: int,
    more: tuple[str, ...] = (),
) -> Curve:
    """Losses in nats, as fairseq prints them: six digits of the bits, so rounded by up to 5e-6."""
    flags: dict[str, object] = {
        "--user-dir": "longpretrain",
        "--task": "long_masked_lm",
        "--criterion": "long_masked_lm",
        "--arch": "longformer",
        "--model-path": config.model.path,
        "--optimizer": "longpretrain_adamw",
        "--lr-scheduler": "longpretrain_polynomial",
        "--lr": config.optim.lr,
        "--weight-decay": config.optim.weight_decay,
        "--clip-norm": config.optim.clip_norm,
        "--warmup-updates": config.schedule.warmup_steps,
        "--total-num-update": config.schedule.total_steps,
        "--power": config.schedule.power,
        "--max-update": updates,
        "--dropout": config.model.dropout,
        "--attention-dropout": config.model.attention_dropout,
        "--tokens-per-sample": config.data.max_tokens,
        "--mask-prob": config.masking.probability,
        "--batch-size": micro,
        "--update-freq": config.batch.global_sequences // ranks // micro,
        "--seed": config.run.seed,
        "--num-workers": 0,
        "--log-format": "json",
        "--log-interval": 1,
        "--save-dir": work / "checkpoints",
    }
    argv = [config.data.train, *(str(part) for flag in flags.items() for part in flag)]
    argv += ["--disable-validation", "--cpu", *more]
    texts = start_ranks(argv, work, ranks)
    lines = [line.split(" | ") for line in texts[0].splitlines()]
    logged = [json.loads(line[3]) for line in lines if line[2:3] == ["train_inner"]]
    assert [int(line["num_updates"]) for line in logged] == list(range(1, updates + 1))
    return Curve(
        [float(line["loss"]) * math.log(2) for line in logged],
        [float(line["gnorm"]) for line in logged],
    )


def start_ranks(argv: list[str], work: Path, ranks: int) -> list[str]:
    """Runs fairseq-train on ``ranks`` processes; returns what each printed."""
    work.mkdir(parents=True, exist_ok=True)
    command = [str(Path(sys.executable).with_name("fairseq-train")), *argv]
    if ranks > 1:
        command += ["--distributed-world-size", str(ranks), "--distributed-no-spawn"]
        command += ["--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp"]
        command += ["--distributed-init-method", f"file://{work.absolute()}/rendezvous"]
    processes = [
        subprocess.Popen(
            command + (["--distributed-rank", str(rank)] if ranks > 1 else []),
            cwd=ROOT,
            env=rank_environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]
    try:
        texts = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, texts[0][-4000:]
    return texts
