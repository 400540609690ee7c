"""One rank of a run, wired: recipe, ranks, task, engine, metrics, status.

``longpretrain train`` calls it in every rank.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch

from longpretrain.agreement import Refused, agree, need_shared
from longpretrain.announce import announce
from longpretrain.config import Config
from longpretrain.engine import candidates, checkpoint, names, retention, run_folder, zero
from longpretrain.engine.loop import train
from longpretrain.engine.signals import StopRequest
from longpretrain.engine.watchdog import Watchdog, patience
from longpretrain.errors import InputError, tell
from longpretrain.model.encoder import ModelConfig
from longpretrain.ranks import Ranks, discover
from longpretrain.report import metrics as journal
from longpretrain.report.rank_log import RankLog
from longpretrain.start import agree_to_start, pick_device

DONE, PREEMPTED = 0, 75
"""Exit codes of the train verb, beside those of every verb (terminal.py)."""
_EXIT_CODES = {"done": DONE, "preempted": PREEMPTED, "failed": 1}


def run_rank(config: Config, *, fresh: bool) -> int:
    """Runs one rank to the end and returns its exit code; rank 0 leaves status.json.

    From the first moment a signal only asks to stop: the run ends with a checkpoint.
    """
    ranks = discover()
    device = pick_device(config.run.device, ranks.local_rank)
    with RankLog(ranks.rank, ranks.summary) as printed, StopRequest() as stop:
        # A person's Ctrl-C ends the wait for other ranks; a scheduler's signal is kept until there
        # is a checkpoint to leave, or the job would not be requeued.
        asked = lambda: stop.signal_name == "SIGINT"  # noqa: E731
        with Watchdog(ranks, config.watchdog) as watchdog:
            timeout = patience(config.watchdog)
            zero.start_ranks(ranks, device, asked, timeout=timeout, watch=watchdog)
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
    ready = agree_to_start(config, ranks, device, fresh=fresh)
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
            model=ready.model,
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
        if outcome.state == "failed" and ranks.is_first:
            tell(f"longpretrain train: {outcome.reason}")
    return _EXIT_CODES[outcome.state]


def _is_done(config: Config, ranks: Ranks, checkpoint_folder: Path) -> bool:
    """Whether the last update is in a checkpoint already; then status.json says so too."""
    step, total = checkpoint.read_state(checkpoint_folder)["step"], config.schedule.total_steps
    if step < total:
        return False
    if ranks.is_first:
        if not (run_folder.how_it_ended(config.run_dir) or "").startswith("done: "):
            reason = f"all {total} updates"
            names.write_status(config.run_dir, "done", reason=reason, step=step)
        _mend_pointer(config, checkpoint_folder)
        retention.remove_left_overs(config.run_dir)
        tell(f"{config.run_dir} is done, all {total} updates", sys.stdout)
    return True


def _open(
    config: Config, held: contextlib.ExitStack, choice: candidates.Choice, *, fresh: bool
) -> None:
    moved = held.enter_context(run_folder.opened(config, fresh=fresh))
    if moved:
        tell(f"--fresh: the old run was moved to {moved}", sys.stdout)
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
            weights_train=config.model.train_only == "all",
        ),
        peak_flops=peak,
    )
