"""What DeepSpeed is told: files of ds_configs/, kept to what it alone owns, and the recipe's part.

What cannot run is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from longpretrain.config import Config
from longpretrain.errors import InputError

# Numbers that a recipe owns, and where. One home per number: in a ds_configs file they are refused.
OWNED_BY_RECIPE = {
    "train_batch_size": "batch.global_sequences",
    "train_micro_batch_size_per_gpu": "batch.micro_sequences",
    "gradient_accumulation_steps": "batch.global_sequences",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim.lr and its neighbours",
    "scheduler": "schedule.total_steps and its neighbours",
    "fp16": "precision",
    "bf16": "precision",
    "bfloat16": "precision",
    "amp": "precision",
    "torch_autocast": "precision",
    "data_types": "precision",
    "steps_per_print": "log.every_steps",
    "tensorboard": "log.tensorboard",
    "activation_checkpointing": "activation_checkpointing",
}


def find_zero_config(name: str) -> Path:
    """A file of ds_configs/, as given from here or from the folder that holds the package."""
    for candidate in (Path(name), Path(__file__).resolve().parents[2] / name):
        if candidate.is_file():
            return candidate
    raise InputError(
        "recipe key zero.config",
        got=name,
        wanted="a JSON file that exists",
        way_out="Give a path, such as ds_configs/zero1.json.",
    )


def read_zero_config(name: str) -> dict[str, Any]:
    """Reads a file of ds_configs/ and refuses what a recipe owns.

    Raises:
        InputError: no such file, not JSON, or it sets a number that lives in the recipe.
    """
    path = find_zero_config(name)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{path}", got=error, wanted="JSON", way_out="Mend the file at that place."
        ) from error
    section = settings.get("zero_optimization") if isinstance(settings, dict) else None
    stage = section.get("stage") if isinstance(section, dict) else None
    if stage not in (0, 1, 2, 3):
        raise InputError(
            f"{path}: zero_optimization.stage",
            got=stage,
            wanted="0, 1, 2 or 3",
            way_out="See ds_configs/zero1.json for the form.",
        )
    for key in settings:
        if key in OWNED_BY_RECIPE:
            raise InputError(
                f"{path}: {key}",
                got="a number that the recipe owns",
                wanted="only DeepSpeed's own keys",
                way_out=f"Remove it there and set {OWNED_BY_RECIPE[key]} in the recipe.",
            )
    return dict(settings)


def settings_of_recipe(config: Config, accumulation: int) -> dict[str, Any]:
    """The recipe's numbers under DeepSpeed's names."""
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch.micro_sequences,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": config.optim.clip_norm,
        "steps_per_print": 2**31,
        # A client optimizer of torch's: its bits are the same after a resume, DeepSpeed's own are
        # not.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if config.precision == "bf16":
        settings["bf16"] = {"enabled": True}
    elif config.precision == "fp16":
        settings["fp16"] = {"enabled": True}
    if config.precision != "fp32":
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
    return settings


def check_precision(config: Config, device: torch.device) -> None:
    """Refuses pairs of precision and stage that DeepSpeed cannot run, or runs wrongly."""
    stage = read_zero_config(config.zero.config)["zero_optimization"]["stage"]
    if stage == 0 and config.precision != "fp32":
        raise InputError(
            "recipe keys precision and zero.config",
            got=f"{config.precision} at ZeRO stage 0",
            wanted="a stage from 1 to 3",
            way_out="Stage 1 on one rank does the same job: zero.config=ds_configs/zero1.json.",
        )
    if config.precision == "fp16" and device.type != "cuda":
        raise InputError(
            "recipe key precision",
            got="fp16 on a CPU",
            wanted="fp32 or bf16",
            way_out="DeepSpeed runs fp16 on GPUs only: precision=bf16.",
        )
