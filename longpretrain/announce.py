"""What a run says of itself when it starts or goes on: events of its journal, for people and for
the report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longpretrain import run_facts
from longpretrain.config import Config, flat, to_tree
from longpretrain.engine import checkpoint
from longpretrain.engine.adam import kernels_in_use
from longpretrain.engine.loop import accumulation_steps
from longpretrain.errors import InputError
from longpretrain.files import read_json_object
from longpretrain.ranks import Ranks
from longpretrain.report.metrics import MetricsLog
from longpretrain.tasks.masked_lm import MaskedLMTask


def announce(
    log: MetricsLog,
    config: Config,
    ranks: Ranks,
    device: torch.device,
    task: MaskedLMTask,
    *,
    model: nn.Module,
    folder: Path,
    resume_from: Path | None,
    notes: Sequence[str],
    before: str | None,
) -> None:
    """What runs, on what, on which data, and what a resume finds changed.

    Args:
        log: the journal.
        config: the recipe.
        ranks: this process's place.
        device: where the model runs.
        task: the objective, with its data.
        model: whole, as it was read.
        folder: where the weights are from.
        resume_from: the same, if it is a checkpoint of this run.
        notes: how that checkpoint was found.
        before: how the attempt before this one ended.
    """
    state = checkpoint.read_state(resume_from) if resume_from else {}
    step = state.get("step", 0)

    def event(text: str, **fields: object) -> None:
        log.report({"kind": "event", "step": step, "event": text, **fields})

    sequences, length = config.batch.global_sequences, config.data.max_tokens
    event(
        f"{'resumed' if resume_from else 'started'}: {folder}, step {step} of "
        f"{config.schedule.total_steps}; {ranks.summary}, "
        f"{config.precision}, {config.zero.config}; {sequences} x {length} = "
        f"{sequences * length:,} tokens per update; {task.sources.summary}",
        world_size=ranks.world_size,
        accumulation=accumulation_steps(config, ranks.world_size),
        launcher=ranks.launcher,
        precision=config.precision,
        zero=config.zero.config,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        versions=checkpoint.versions(),
        kernels=kernels_in_use(config, device.type),
        after=before,
    )
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    event(
        f"training {trained:,} of {count:,} parameters{task.frozen_summary}",
        trained_parameters=trained,
        parameters=count,
    )
    if task.global_summary:
        event(task.global_summary)
    if warning := head_warning(config, folder):
        event(warning)
    if before:
        log.say(f"the attempt before this one: {before}")
    for note in notes:
        event(note)
    if changes := changed_settings(state, config, ranks.world_size):
        event(f"other than before: {changes}", changed=changes)
    if changes := run_facts.changed_since(state):
        event(f"other code or packages than the checkpoint's: {changes}")
    for line in task.sources.table(config.schedule.total_steps * sequences):
        event(line)


def head_warning(config: Config, folder: Path) -> str:
    """What to say of a masked-LM head that convert drew and the recipe never trains; "" of others.

    Args:
        config: the recipe.
        folder: where the weights are from; a checkpoint has no record of a conversion, so that a
            run is told once.
    """
    record = folder / "conversion.json"
    if config.model.train_only != "new_positions" or not record.is_file():
        return ""
    try:
        is_new = bool(read_json_object(record).get("new_head"))
    except InputError:  # a note beside the model, and no part of it
        return ""
    told = (
        "warning: the masked-LM head is new (convert --new-head) and does not train"
        " (model.train_only=new_positions): its random numbers decide what the positions learn."
        " Train with model.train_only=all first."
    )
    return told if is_new else ""


def changed_settings(state: Mapping[str, Any], config: Config, world_size: int) -> str:
    """How ranks and recipe differ from those that wrote a checkpoint, in words; "" if not at all.

    Args:
        state: of the checkpoint, or empty.
        config: the recipe.
        world_size: how many ranks there are now.
    """
    if not state:
        return ""
    # As JSON gives them back: a tuple is a list there.
    then, now = (dict(flat(json.loads(json.dumps(x)))) for x in (state["recipe"], to_tree(config)))
    old = {
        "world size": state["world_size"],
        "accumulation": then["batch.global_sequences"]
        // (state["world_size"] * then["batch.micro_sequences"]),
        **then,
    }
    new = {"world size": world_size, "accumulation": accumulation_steps(config, world_size), **now}
    return ", ".join(
        f"{key} {old[key]} -> {new[key]}" for key in old if key in new and old[key] != new[key]
    )
