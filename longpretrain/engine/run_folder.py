"""The run folder: which run it belongs to, who writes it, and how the run stands."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from longpretrain.config import Config, differences, to_tree
from longpretrain.engine import checkpoint
from longpretrain.engine.names import (
    ATTEMPTS,
    CONFIG,
    LOCK,
    STATUS,
    State,
    pointed_at,
    read_status,
    write_status,
)
from longpretrain.errors import InputError, tell
from longpretrain.files import PROBE, need_writable, remove_parts, write_atomically
from longpretrain.ranks import Ranks
from longpretrain.recipe import from_tree
from longpretrain.report.metrics import read_metrics

_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)


def how_it_ended(run_dir: Path) -> str | None:
    """How the attempt before this one ended, by status.json; None for the first one."""
    last: dict[str, Any] = {}
    with contextlib.suppress(InputError, OSError):
        last = read_status(run_dir)
    if last.get("state") == "running":
        return "ended without a word: killed, or its machine was lost"
    return f"{last['state']}: {last.get('reason')}" if "state" in last else None


def check_run_dir(config: Config, *, fresh: bool) -> None:
    """Refuses a run folder that is not this run's to write to, or to move aside.

    Raises:
        InputError: a file, a folder of something else, or a run of another recipe (names the keys
            that differ) that has a checkpoint; a place where nothing can be written; with
            ``fresh``, a folder that holds this run's own inputs.
    """
    run_dir = config.run_dir
    is_run = (run_dir / CONFIG).is_file()
    if not is_run and run_dir.exists() and (not run_dir.is_dir() or _holds_files(run_dir)):
        raise InputError(
            f"run folder {run_dir}",
            got="something that is no run",
            wanted="a run folder or a new one",
            way_out="Give another run.dir.",
        )
    if fresh:
        _check_movable(config)
    elif is_run and (checkpoint.folders(run_dir) or pointed_at(run_dir)):
        _check_same_recipe(config)
    elif is_run:
        _check_nothing_lost(run_dir)
    place = run_dir.absolute().parent if fresh and run_dir.exists() else run_dir
    need_writable(place, what="run folder", way_out="Give another run.dir, or make it writable.")


def _holds_files(folder: Path) -> bool:
    """Whether there is more than what a run, or a job before it, writes first of all, also one that
    was killed as it did.
    """
    first, parts = (LOCK, ATTEMPTS), (PROBE, f".{CONFIG}.", f".{ATTEMPTS}.")
    return any(
        path.name not in first and not path.name.startswith(parts) for path in folder.iterdir()
    )


def _check_movable(config: Config) -> None:
    run_dir = config.run_dir.resolve()
    for key, value in (
        ("model.path", config.model.path),
        ("data.train", config.data.train),
        *((f"data.mix.{source.name}.path", source.path) for source in config.data.mix),
        ("data.valid", config.data.valid),
    ):
        if value and run_dir.exists() and Path(value).resolve().is_relative_to(run_dir):
            raise InputError(
                f"recipe key {key}",
                got=f"{value}, inside the run folder that --fresh would move",
                wanted="inputs outside of the run folder",
                way_out="Move them, or give another run.dir.",
            )


def _check_nothing_lost(run_dir: Path) -> None:
    """Refuses a run without checkpoints that had some: someone removed them, or a disk is not there
    today.
    """
    steps = [0]
    with contextlib.suppress(InputError, OSError):
        step = read_status(run_dir).get("step")
        steps += [step] if isinstance(step, int) else []
    with contextlib.suppress(InputError, OSError):
        lines = read_metrics(run_dir / "metrics.jsonl")
        steps += [line["step"] for line in lines if "checkpoint" in line]
    if max(steps) > 0:
        raise InputError(
            f"run folder {run_dir}",
            got=f"no checkpoint, though that of step {max(steps)} was written",
            wanted="one to go on from",
            way_out="Take one back from a copy, or start anew with --fresh, which moves this run "
            "aside.",
        )


def _check_same_recipe(config: Config) -> None:
    path = config.run_dir / CONFIG
    try:
        stored = from_tree(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, InputError) as error:
        raise InputError(
            str(path), got=error, wanted="the recipe of the run", way_out="Mend it, or use --fresh."
        ) from error
    found = differences(stored, config)
    if found:
        listed = "; ".join(f"{key} was {old!r} and is now {new!r}" for key, old, new in found[:5])
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise InputError(
            f"run folder {config.run_dir}",
            got=f"a run of another recipe ({listed}{more})",
            wanted="the recipe it was started with",
            way_out="Give another run.dir (with model.path at a checkpoint of this one, to go on "
            "from its weights), or --fresh to move the old run aside and start anew.",
        )


@contextlib.contextmanager
def opened(config: Config, *, fresh: bool) -> Iterator[Path | None]:
    """Makes the run folder and holds its lock; for rank 0. Nothing is written before the lock.

    With ``fresh`` an old run is renamed, not deleted: it may be weeks of work.

    Yields where an old run was moved to, if it was.

    Raises:
        InputError: another process writes this run.
    """
    run_dir = config.run_dir
    moved = None
    with contextlib.ExitStack() as held:
        held.enter_context(only_writer(run_dir))
        if fresh and _holds_files(run_dir):
            moved = _free_name(run_dir)
            run_dir.rename(moved)  # its lock goes along, and stays held
            held.enter_context(only_writer(run_dir, announce=False))
        for name in (CONFIG, STATUS):
            remove_parts(run_dir / name)
        write_atomically(run_dir / CONFIG, yaml.safe_dump(to_tree(config), sort_keys=False))
        yield moved


def check_is_free(run_dir: Path) -> None:
    """Looks at the lock without taking it, before the ranks look at checkpoints, which a run that
    goes on adds to and removes.

    Raises:
        InputError: another process writes this run.
    """
    try:
        with (run_dir / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _in_use(run_dir) from error
    except OSError:  # no run yet, or no locks there: only_writer tells
        return


def _in_use(run_dir: Path) -> InputError:
    return InputError(
        f"run folder {run_dir}",
        got="a run that is going on",
        wanted="one writer at a time",
        way_out="Wait for it or stop it, or give another run.dir.",
    )


@contextlib.contextmanager
def only_writer(run_dir: Path, *, announce: bool = True) -> Iterator[None]:
    """Holds the run folder's lock while the block runs; the system frees it if the process dies.

    A file system without locks does not stop a run; one line says so, if ``announce``.

    Raises:
        InputError: another process writes this run.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / LOCK).open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise _in_use(run_dir) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            if announce:
                how = "no locks on this file system; start one run at a time"
                tell(f"run folder {run_dir}: {how}", sys.stdout)
        yield


@contextlib.contextmanager
def status(config: Config, ranks: Ranks) -> Iterator[Callable[[State, str, int], None]]:
    """Keeps status.json true: running, then how it ended. A rank that fails says so itself.

    Yields a function (state, reason, step) that ends the run: every rank calls it.
    """
    run_dir = config.run_dir
    started = round(time.time(), 3)  # as status.json rounds it
    if ranks.is_first:
        write_status(run_dir, "running", reason=ranks.launcher, step=checkpoint.kept_step(run_dir))
    has_ended = False

    def ended(state: State, reason: str, step: int) -> None:
        nonlocal has_ended
        dist.barrier()  # every rank is through: nothing can fail after this but the launcher
        has_ended = True
        if ranks.is_first:
            write_status(run_dir, state, reason=reason, step=step)
            # Why it failed is told as an error.
            what = state if state == "failed" else f"{state}: {reason}"
            tell(f"{what}, at step {step}; {run_dir / STATUS}", sys.stdout)
        dist.barrier()

    try:
        yield ended
    except BaseException as error:
        # Where the telling fails too, as on a full disk, the first error is the one to tell.
        with contextlib.suppress(OSError, InputError):
            last = read_status(run_dir)
            # The first to fail knows why; the others only see that it is gone.
            is_told = last.get("state") == "failed" and last.get("time", 0) >= started
            if not has_ended and not is_told:
                reason = f"rank {ranks.rank}: {type(error).__name__}: {error}"
                write_status(run_dir, "failed", reason=reason, step=checkpoint.kept_step(run_dir))
        raise


def _free_name(run_dir: Path) -> Path:
    number = 1
    while (name := run_dir.with_name(f"{run_dir.name}.old-{number}")).exists():
        number += 1
    return name
