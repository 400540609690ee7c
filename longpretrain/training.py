"""One rank of a run, wired: recipe, ranks, task, engine, metrics, status.

``longpretrain train`` calls it in every rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from longpretrain import run_facts
from longpretrain.agreement import Refused, agree, need_alike, need_shared
from longpretrain.announce import announce
from longpretrain.attention import why_not
from longpretrain.config import Config
from longpretrain.engine import candidates, checkpoint, names, run_folder, zero
from longpretrain.engine.adam import check_apex
from longpretrain.engine.loop import Evaluate, accumulation_steps, train
from longpretrain.engine.signals import StopRequest
from longpretrain.engine.watchdog import Watchdog, patience
from longpretrain.engine.zero import ZeroEngine
from longpretrain.engine.zero_config import check_precision
from longpretrain.errors import InputError
from longpretrain.evaluate.held_out import HeldOut, score
from longpretrain.model.encoder import ModelConfig
from longpretrain.model.folder import CONFIG_NAME, changed, read_config
from longpretrain.ranks import Ranks, discover
from longpretrain.report import metrics as journal
from longpretrain.report.rank_log import RankLog
from longpretrain.tasks.masked_lm import MaskedLMTask, model_changes
from longpretrain.tasks.past import check_past
from longpretrain.tasks.sources import open_corpus, open_mix

DONE, PREEMPTED = 0, 75
"""Exit codes of the train verb, beside those of every verb (terminal.py)."""
_EXIT_CODES = {"done": DONE, "preempted": PREEMPTED, "failed": 1}


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


def run_rank(config: Config, *, fresh: bool) -> int:
    """Runs one rank to the end and returns its exit code; rank 0 leaves status.json.

    From the first moment a signal only asks to stop: the run ends with a checkpoint.
    """
    ranks = discover()
    device = pick_device(config.run.device, ranks.local_rank)
    about = f"{ranks.world_size} ranks by {ranks.launcher}"
    with RankLog(ranks.rank, about) as printed, StopRequest() as stop:
        # A person's Ctrl-C ends the wait for other ranks; a scheduler's signal is kept until there
        # is a checkpoint to leave, or the job would not be requeued.
        asked = lambda: stop.signal_name == "SIGINT"  # noqa: E731
        zero.start_ranks(ranks, device, asked, timeout=patience(config.watchdog))
        with Watchdog(ranks, config.watchdog) as watchdog:
            code = _run_joined(
                config, ranks, device, stop, printed=printed, watchdog=watchdog, fresh=fresh
            )
        # After an error the group is left to the launcher: leaving it could wait for lost peers.
        zero.stop_ranks()
    return code


def _run_joined(
    config: Config,
    ranks: Ranks,
    device: torch.device,
    stop: StopRequest,
    *,
    printed: RankLog,
    watchdog: Watchdog,
    fresh: bool,
) -> int:
    watchdog.mark("the check of recipe, data and model")
    ready = _agree_to_start(config, ranks, device, fresh=fresh)
    if isinstance(ready, Refused):
        return ready.code
    if ready.resume_from and _is_done(config, ranks, ready.resume_from):
        return DONE
    with contextlib.ExitStack() as held:

        def open_folder() -> journal.MetricsLog:
            if ranks.is_first:
                _open(config, held, ready.choice, fresh=fresh)
            return _metrics(config, ranks, device, ready.task.model_config, ready.resume_from)

        log = agree(ranks, open_folder)
        if isinstance(log, Refused):
            return log.code
        seen = agree(ranks, lambda: need_shared(ranks, config.run_dir / names.CONFIG))
        if isinstance(seen, Refused):
            return seen.code
        printed.begin(config.run_dir)
        before = run_folder.how_it_ended(config.run_dir)
        end = held.enter_context(run_folder.status(config, ranks))
        held.enter_context(log)
        watchdog.opened(config.run_dir)
        held.enter_context(watchdog.telling())
        watchdog.mark("the start of training")
        announce(
            log,
            config,
            ranks,
            device,
            ready.task,
            folder=ready.folder,
            resume_from=ready.resume_from,
            notes=ready.choice.notes,
            before=before,
        )
        outcome = train(
            config,
            ready.task,
            ready.model,
            ranks,
            device,
            metrics=log,
            stop=stop,
            resume_from=ready.resume_from,
            evaluate=ready.evaluate,
            mark=watchdog.mark,
        )
        watchdog.mark("the end of training")
        end(outcome.state, outcome.reason, outcome.step)
    return _EXIT_CODES[outcome.state]


def _agree_to_start(
    config: Config, ranks: Ranks, device: torch.device, *, fresh: bool
) -> _Ready | Refused:
    """What this rank trains with, once it is known that all others train with the same."""

    def choose() -> candidates.Choice:
        return candidates.Choice() if fresh else candidates.choose(config.run_dir)

    if odd := need_alike(ranks, lambda: run_facts.of_program(config, device.type, fresh=fresh)):
        return odd
    refused = agree(ranks, lambda: _check_settings(config, ranks.world_size, device, fresh=fresh))
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


def _is_done(config: Config, ranks: Ranks, checkpoint_folder: Path) -> bool:
    """Whether the last update is in a checkpoint already; then status.json says so too."""
    step, total = checkpoint.read_state(checkpoint_folder)["step"], config.schedule.total_steps
    if step < total:
        return False
    if ranks.is_first:
        if names.read_status(config.run_dir).get("state") != "done":
            reason = f"all {total} updates"
            names.write_status(config.run_dir, "done", reason=reason, step=step)
        _mend_pointer(config, checkpoint_folder)
        print(f"{config.run_dir} is done, all {total} updates", flush=True)
    return True


def _open(
    config: Config, held: contextlib.ExitStack, choice: candidates.Choice, *, fresh: bool
) -> None:
    moved = held.enter_context(run_folder.opened(config, fresh=fresh))
    if moved:
        print(f"--fresh: the old run was moved to {moved}", flush=True)
    if not fresh and candidates.seen(config.run_dir) != choice.seen:  # before it was locked
        raise InputError(
            f"run folder {config.run_dir}",
            got="a checkpoint that another process has just written",
            wanted="one writer at a time",
            way_out="Run the command again.",
        )
    if choice.folder:
        _mend_pointer(config, choice.folder)


def _mend_pointer(config: Config, folder: Path) -> None:
    """Makes ``latest`` name the checkpoint that was found, for export and evaluation too."""
    if names.pointed_at(config.run_dir) != folder.name:
        with contextlib.suppress(OSError):  # a full disk: the next start finds the same one
            checkpoint.point_at(config.run_dir, folder)


@dataclass(frozen=True, kw_only=True)
class _Ready:
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


def _prepare(
    config: Config, ranks: Ranks, device: torch.device, choice: candidates.Choice
) -> _Ready:
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
    return _Ready(
        task=task,
        model=task.build_model(folder),
        evaluate=evaluate,
        folder=folder,
        choice=choice,
    )


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


def _metrics(
    config: Config, ranks: Ranks, device: torch.device, model: ModelConfig, resume_from: Path | None
) -> journal.MetricsLog:
    peak = None
    if device.type == "cuda":
        one = journal.peak_flops(torch.cuda.get_device_name(device), config.precision)
        peak = one * ranks.world_size if one else None
    windows = model.attention_window or (None,) * model.num_layers
    return journal.MetricsLog(
        config.run_dir,
        total_steps=config.schedule.total_steps,
        resume_from_step=checkpoint.read_state(resume_from)["step"] if resume_from else None,
        every_steps=config.log.every_steps,
        pause_every_steps=max(config.evaluate.every_steps, config.checkpoint.every_steps),
        tensorboard=config.log.tensorboard,
        is_writer=ranks.is_first,
        flops_per_token=journal.train_flops_per_token(
            hidden_size=model.hidden_size,
            intermediate_size=model.intermediate_size,
            vocab_size=model.vocab_size,
            attention_window=windows,
            max_tokens=config.data.max_tokens,
            masked_share=config.masking.probability,
        ),
        peak_flops=peak,
    )
