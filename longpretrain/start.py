"""What a rank trains with, checked and agreed on: everything before the run folder is opened.

Inputs are refused here, before anything is written: a rank that fails later costs all others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from longpretrain import run_facts
from longpretrain.agreement import Refused, agree, need_alike
from longpretrain.attention import why_not
from longpretrain.config import Config
from longpretrain.engine import candidates, checkpoint, run_folder
from longpretrain.engine.adam import check_apex
from longpretrain.engine.loop import Evaluate, accumulation_steps
from longpretrain.engine.zero import ZeroEngine
from longpretrain.engine.zero_config import check_precision
from longpretrain.errors import InputError
from longpretrain.evaluate.held_out import HeldOut, score
from longpretrain.model.families import CONFIG_NAME
from longpretrain.model.folder import changed, read_config
from longpretrain.ranks import Ranks
from longpretrain.tasks.masked_lm import MaskedLMTask, model_changes
from longpretrain.tasks.past import check_past
from longpretrain.tasks.sources import open_corpus, open_mix


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a rank trains with, all of it checked."""

    task: MaskedLMTask
    model: torch.nn.Module
    evaluate: Evaluate | None
    folder: Path
    choice: candidates.Choice

    @property
    def resume_from(self) -> Path | None:
        """The checkpoint to go on from."""
        return self.choice.folder


def check(config: Config, world_size: int, *, fresh: bool) -> None:
    """Everything that can be refused before ranks start; writes nothing but block indices beside
    the shards.

    Raises:
        InputError: recipe, model folder, corpora, batch, ds_configs or run folder do not fit.
    """
    device = pick_device(config.run.device, 0)
    _check_settings(config, world_size, device, fresh=fresh)
    resume_from = None if fresh else candidates.look(config.run_dir).folder
    folder = _folder_of_weights(config, resume_from)
    task = MaskedLMTask(config, folder)
    if resume_from:
        _check_same_data(resume_from, task)
    if config.data.valid:
        open_corpus(config, "valid").require_tokenizer(
            task.tokenizer.fingerprint, owner=f"model {folder}"
        )
    task.check_weights(folder)


def pick_device(wanted: str, local_rank: int) -> torch.device:
    """The device of a rank."""
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise InputError(
            "recipe key run.device",
            got="cuda",
            wanted="a device that this machine has",
            way_out="Say run.device=cpu, or mend the driver: torch sees no GPU here.",
        )
    if wanted == "cpu" or not has_gpu:
        return torch.device("cpu")
    index = local_rank % torch.cuda.device_count()  # a launcher may show each rank one GPU only
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def agree_to_start(
    config: Config, ranks: Ranks, device: torch.device, *, fresh: bool
) -> Start | Refused:
    """What this rank trains with, once it is known that all others train with the same."""

    def choose() -> candidates.Choice:
        return candidates.Choice() if fresh else candidates.choose(config.run_dir)

    if odd := need_alike(ranks, lambda: run_facts.of_program(config, device.type, fresh=fresh)):
        return odd

    def check() -> None:
        _check_settings(config, ranks.world_size, device, fresh=fresh)
        if ranks.is_first:
            run_folder.check_is_free(config.run_dir)

    refused = agree(ranks, check)
    if isinstance(refused, Refused):
        return refused
    if odd := need_alike(ranks, lambda: run_facts.of_checkpoints(config)):
        return odd
    choice = agree(ranks, choose)
    if isinstance(choice, Refused):
        return choice
    ready = agree(ranks, lambda: _prepare(config, ranks, device, choice))
    if isinstance(ready, Refused):
        return ready
    task, model, resume_from = ready.task, ready.model, ready.resume_from
    odd = need_alike(ranks, lambda: run_facts.of_inputs(config, task, model, resume_from))
    return odd or ready


def _prepare(
    config: Config, ranks: Ranks, device: torch.device, choice: candidates.Choice
) -> Start:
    """Everything that an input can spoil, before anything is written."""
    folder = _folder_of_weights(config, choice.folder)
    task = MaskedLMTask(config, folder)
    if choice.folder:
        _check_same_data(choice.folder, task)
    elif ranks.is_first:  # once per run: reading every shard takes a while
        open_mix(config, verify="sha256")
        for split in ("train",) * (not config.data.mix) + ("valid",) * bool(config.data.valid):
            open_corpus(config, split, verify="sha256")
    has_evaluation = config.data.valid and config.evaluate.every_steps and config.evaluate.batches
    evaluate = _evaluator(config, ranks, device, task) if has_evaluation else None
    return Start(
        task=task,
        model=task.build_model(folder),
        evaluate=evaluate,
        folder=folder,
        choice=choice,
    )


def _check_settings(config: Config, world_size: int, device: torch.device, *, fresh: bool) -> None:
    """What needs no model."""
    if not config.model.path:
        raise InputError(
            "recipe key model.path",
            got="nothing",
            wanted="a model folder",
            way_out="Say model.path=FOLDER (Hugging Face RoBERTa or Longformer).",
        )
    accumulation_steps(config, world_size)
    check_precision(config, device)
    check_apex(config, device.type)
    reason = why_not(config.model.attention_backend)
    if reason:
        raise InputError(
            "recipe key model.attention_backend",
            got=f"{config.model.attention_backend}, but {reason}",
            wanted="a backend that can run here",
            way_out="Leave it at auto.",
        )
    run_folder.check_run_dir(config, fresh=fresh)


def _folder_of_weights(config: Config, resume_from: Path | None) -> Path:
    """Where the weights to start from are: a checkpoint of this run, or the model."""
    if resume_from:
        _check_same_model(config, resume_from)
    elif not Path(config.model.path).is_dir():
        raise InputError(
            "recipe key model.path",
            got=f"{config.model.path}, no such folder",
            wanted="a model folder",
            way_out="Check the path; longpretrain convert makes a long model.",
        )
    return resume_from or Path(config.model.path)


def _check_same_model(config: Config, resume_from: Path) -> None:
    """Refuses to go on under the name of another model: weights and shape come from the checkpoint.

    ``model.path`` may have moved, or be gone; its weights are not looked at again.
    """
    given = Path(config.model.path)
    if not (given / CONFIG_NAME).is_file():
        return
    trained, other = (
        dataclasses.asdict(changed(read_config(folder), model_changes(config)))
        for folder in (resume_from, given)
    )
    if config.model.train_only == "all":  # older versions did not write it
        other["learnt_positions"] = trained["learnt_positions"]
    found = [name for name, value in trained.items() if other[name] != value]
    if found:
        raise InputError(
            f"recipe key model.path, {given}",
            got=", ".join(f"{name} {other[name]}" for name in found),
            wanted=", ".join(f"{name} {trained[name]}" for name in found)
            + f", as in {resume_from}",
            way_out="Give the model that the run began with, or start anew with --fresh.",
        )


def _check_same_data(resume_from: Path, task: MaskedLMTask) -> None:
    """Refuses to go on with other data: the cursor counts samples of what the run began on."""
    state = checkpoint.read_state(resume_from)  # another tokenizer is another corpus, too
    check_past(state["task"], task.identity(), state["samples_done"], resume_from)


def _evaluator(config: Config, ranks: Ranks, device: torch.device, task: MaskedLMTask) -> Evaluate:
    """Scores held-out stretches dealt over the ranks, with the masks of ``longpretrain
    evaluate``.
    """
    held_out = HeldOut(
        open_corpus(config, "valid"),
        task.tokenizer,
        max_tokens=config.data.max_tokens,
        # Packing would pad nothing away here, and each document is scored on its own either way.
        blocks="document" if config.data.blocks == "packed" else config.data.blocks,
        probability=config.masking.probability,
        global_tokens=config.model.global_tokens,
    )
    numbers = held_out.numbers(config.evaluate.batches)
    mine = numbers[ranks.rank :: ranks.world_size]
    rounds = -(-len(numbers) // ranks.world_size)

    def evaluate(engine: ZeroEngine, goes_on: Callable[[], None]) -> tuple[float, int]:
        def model(**arguments: torch.Tensor) -> torch.Tensor:
            goes_on()
            logits: torch.Tensor = engine(**arguments)
            return logits

        nats, count = score(model, held_out, mine, device=device)
        if len(mine) < rounds:  # ZeRO 3 gathers weights in every forward pass: all run equally many
            score(model, held_out, numbers[:1], device=device)
        sums = torch.tensor([nats, count], dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        return float(sums[0]), int(sums[1])

    return evaluate
