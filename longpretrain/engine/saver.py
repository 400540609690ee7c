"""Saves while training goes on: the step pays for a copy in memory, threads do the rest.

1. ``begin``: at a step boundary every rank copies what it holds into host memory.
2. A thread per rank gathers its share of whole tensors (gather.py), and writes, hashes and syncs
   its files into a hidden folder.
3. When all have written, at a later step boundary, the ranks exchange the hashes, and a thread of
   rank 0 writes the small files, renames, moves ``latest`` and removes what is too old.

But for that gathering, in a group of its own, threads take part in no collective: their state rides
in the all-reduce that every update has anyway (``flags`` and ``advance``), so that all ranks take
each turn at the same step. One save is under way at a time. A disk that is full costs a line and
the save, not the run; a gathering that fails ends the run, as any collective does.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from longpretrain.config import Config
from longpretrain.engine import retention
from longpretrain.engine.complete import Written, complete, file_name
from longpretrain.engine.gather import Share
from longpretrain.engine.save_job import (
    CALLED_OFF,
    CalledOffError,
    Job,
    Save,
    Told,
    is_finite,
    told,
)
from longpretrain.engine.task import Task
from longpretrain.engine.tensor_file import write_tensors
from longpretrain.engine.zero import ZeroEngine
from longpretrain.errors import InputError
from longpretrain.files import told_as
from longpretrain.report.metrics import MetricsLog

FLAGS = 3
RETRY_S = 60.0
"""After a save that failed the next is tried, if none is due before; twice as long each time."""
_LONGEST_RETRY_S = 1800.0
_SOON_S = 1.0
ATTEMPTS_AT_END = 3
_PAUSE_S = 5.0
_FAREWELL_S = 10.0
_NICE = 10


class Saver:
    """Writes the checkpoints of a run. Every rank has one and calls the same of it at each step.

    Args:
        config: run folder, and what ``checkpoint`` says.
        engine: holds weights and moments, sharded or not.
        task: names the tensors and writes config and tokenizer.
        standing: what does not train and this rank writes (``standing_share``).
        metrics: told of each save.
        step: of the checkpoint that the run goes on from; 0 at its beginning.
        mark: told when a wait for the disk makes progress.
    """

    def __init__(
        self,
        config: Config,
        engine: ZeroEngine,
        task: Task,
        metrics: MetricsLog,
        *,
        step: int,
        standing: Mapping[str, torch.Tensor] = MappingProxyType({}),
        mark: Callable[[str], None] = lambda what: None,
    ) -> None:
        self._config, self._engine, self._task = config, engine, task
        self._standing = standing
        self._metrics, self._mark = metrics, mark
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        self.saved_step = self._tried_step = step
        self._tried_at = time.monotonic()
        self._retry_s = 0.0
        self._why = ""
        self._share: Share | None = None
        self._save: Save | None = None
        self._unremoved: list[Path] = []
        self._called_off = threading.Event()
        self._is_time = self._is_last = False
        if self._rank == 0:
            retention.remove_left_overs(config.run_dir)
        everyone = [("", [""])] * self._ranks
        mine = [name for name in engine.trained_names if not is_finite(engine.own_part(name))]
        # Nobody writes before the left-overs are gone.
        dist.all_gather_object(everyone, (uuid.uuid4().hex[:8], mine))
        self._attempt = everyone[0][0]
        self._unchecked = set(standing) | {
            stored for _, found in everyone for name in found for stored in task.stored_names(name)
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        """Ends a thread that is left: after an error there is nobody to agree with. One that waits
        for other ranks, or a disk that does not answer, must not keep the error from being told.
        """
        self._called_off.set()
        if self._save and self._save.job.thread:
            self._save.job.thread.join(_FAREWELL_S)

    def flags(self) -> list[float]:
        """What this rank adds to the update's all-reduce: ``FLAGS`` numbers."""
        job = self._save.job if self._save else Job()
        busy = job.is_busy
        return [float(busy), float(not busy and job.error is not None), float(self._is_due_here())]

    def advance(self, flags: Sequence[float]) -> None:
        """Takes the sums of all ranks' flags in and goes on with the save under way."""
        busy, failed, due = flags
        self._is_time = due > 0
        if self._save is None:
            return
        self._save.job.need_gathered()
        if failed:
            self._called_off.set()
        if not busy:
            self._turn(self._save)

    def is_due(self, step: int) -> bool:
        """Whether a save should begin after this step; the same on every rank."""
        every = self._config.checkpoint.every_steps
        return self._is_time or bool(every and step // every > self._tried_step // every)

    def begin(self, state: Mapping[str, Any]) -> None:
        """Begins a save, after one that is still under way. ``state`` is what state.json holds
        beside hashes and versions; its ``step`` names the folder.
        """
        step = state["step"]
        if self._save is not None:
            name = self._save.final.name
            waited_s = self.finish()
            self._metrics.say(
                f"step {step}: waited {waited_s:.1f} s until {name} was written, before the next"
            )
        began = time.monotonic()
        self._is_time = False
        self._tried_step, self._tried_at = step, began
        self._called_off.clear()
        hung_after_s = self._config.watchdog.hung_after_s
        self._share = share = self._share or Share(
            self._engine, self._task, self._standing, hung_after_s=hung_after_s
        )
        share.take()
        final = self._config.run_dir / "checkpoints" / f"step-{step:06d}"
        save = Save(
            state=dict(state),
            part=final.with_name(f".{final.name}.{self._attempt}.part"),
            final=final,
            began=began,
        )
        self._run(save, lambda job: self._write(job, save.part, share.gathered(job.add)))
        self._save = save
        save.waited_s = time.monotonic() - began
        if not self._config.checkpoint.asynchronous:
            self.finish()
            share.release()

    def finish(self) -> float:
        """Waits until no save is under way; returns the seconds that it took."""
        began = time.monotonic()
        while self._save is not None:
            self._wait(self._save)
            self._turn(self._save, since=began)
        return time.monotonic() - began

    def save_last(self, state: Mapping[str, Any]) -> str:
        """Makes sure that a state is in a checkpoint before the run ends, with some attempts.

        Returns:
            Why it is not; nothing if all is well.
        """
        self._is_last = True
        for attempt in range(ATTEMPTS_AT_END):
            if attempt:
                time.sleep(_PAUSE_S)
            if attempt or self._tried_step != state["step"]:
                self.begin(state)
            self.finish()
            if self.saved_step == state["step"]:
                if self._rank == 0:  # no later save makes up for a removal that was refused
                    retention.remove_left_overs(self._config.run_dir)
                return ""
        last = f"from step {self.saved_step}" if self.saved_step else "at the beginning"
        return str(
            InputError(
                f"checkpoint of step {state['step']}",
                got=self._why,
                wanted="a disk that takes it",
                way_out=f"Free some room and start the run again: it goes on {last}.",
            )
        )

    def _is_due_here(self) -> bool:
        """By the clock of rank 0: clocks differ."""
        if self._rank:
            return False
        waited_s = time.monotonic() - self._tried_at
        minutes = self._config.checkpoint.every_minutes
        if minutes and waited_s >= 60 * minutes:
            return True  # also with one under way: a disk that never answers is noticed by a wait
        return bool(self._save is None and self._retry_s and waited_s >= self._retry_s)

    def _run(self, save: Save, work: Callable[[Job], None]) -> None:
        """Starts a thread of this phase; what goes wrong in it is kept."""
        save.job = job = Job()

        def run() -> None:
            # Training comes first where they share processors; gloo's own threads stay as they are.
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
            try:
                with told_as(save.final, save.part):
                    work(job)
            except Exception as error:  # the main thread tells it
                job.error = error

        job.thread = threading.Thread(target=run, name=f"saver-{save.phase}", daemon=True)
        job.thread.start()

    def _write(self, job: Job, part: Path, share: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """The thread of every rank: its files. A failure gives their room back at once."""

        def tell(size: int) -> None:
            job.add(size)
            if self._called_off.is_set():
                raise CalledOffError

        hashes: dict[str, str] = {}
        paths = {kind: part / file_name(kind, self._rank, self._ranks) for kind in share}
        for name, tensor in share["model"].items():
            if name not in self._unchecked and not is_finite(tensor):
                raise FloatingPointError(f"{name} is not finite: weights have overflowed")
        for left in self._unremoved:
            if left != part:  # which other ranks write to
                shutil.rmtree(left, ignore_errors=True)
        try:
            part.mkdir(parents=True, exist_ok=True)
            for kind, tensors in share.items():
                hashes[paths[kind].name] = write_tensors(paths[kind], tensors, tell)
            sizes = {path.name: path.stat().st_size for path in paths.values()}
        except BaseException:
            for path in paths.values():
                with contextlib.suppress(OSError):
                    path.unlink()
            raise
        names = {paths[kind].name: sorted(tensors) for kind, tensors in share.items()}
        job.written = Written(hashes=hashes, sizes=sizes, tensors=names)

    def _complete(self, save: Save, job: Job, everyone: Sequence[Written]) -> None:
        """The thread of rank 0: a checkpoint of what all have written."""
        settings = self._config.checkpoint
        self._metrics.sync()  # a resumed run goes on from the lines up to this step
        complete(save.part, save.final, self._task, everyone, save.state)
        job.problems = retention.remove_old(
            self._config.run_dir,
            save.state["step"],
            keep=settings.keep,
            keep_every_steps=settings.keep_every_steps,
        )
        # What an earlier save or removal could not: this save is the only one, and it is whole.
        retention.remove_left_overs(self._config.run_dir)

    def _wait(self, save: Save) -> None:
        """Joins this rank's thread. Only bytes that move count as progress, and the same mark
        again says so; a rank whose disk does not answer is one mark behind the others.
        """
        place = f"step {save.state['step']}: checkpoint"
        marked = -1
        while marked < 0 or (save.job.thread is not None and save.job.is_busy):
            if save.job.done_bytes != marked:
                marked = save.job.done_bytes
                self._mark(f"{place}, {save.phase}")
            if save.job.thread is not None:
                save.job.thread.join(timeout=1.0)
        self._mark(f"{place}, {save.phase}: the other ranks")

    def _turn(self, save: Save, *, since: float | None = None) -> None:
        """From one phase to the next; all ranks, no thread of theirs at work. ``since``: when the
        wait for it began.
        """
        save.job.need_gathered()
        error = save.job.error
        everyone = [Told()] * self._ranks
        dist.all_gather_object(everyone, told(save.job))
        problems = [
            f"rank {rank}: {one.problem}" if self._ranks > 1 else one.problem
            for rank, one in enumerate(everyone)
            if one.problem
        ]
        # Who was called off says so, after who called it off.
        problems = [text for text in problems if not text.endswith(CALLED_OFF)] or problems
        if any(one.has_overflowed for one in everyone):  # and never comes back: no use to go on
            self._save = None
            if self._rank == 0:
                shutil.rmtree(save.part, ignore_errors=True)
            newest = f"that of step {self.saved_step} stays" if self.saved_step else "there is none"
            raise FloatingPointError(
                f"checkpoint {save.final.name} is refused, {newest}: {'; '.join(problems)}. "
                "Start anew with a lower optim.lr"
            )
        if any(one.is_bug for one in everyone):
            self._save = None
            raise RuntimeError("writing a checkpoint failed: " + "; ".join(problems)) from error
        if problems:
            self._failed(save, problems, is_full=any(one.is_full for one in everyone))
        elif save.phase == "writing":
            save.phase = "completing"
            written = [one.written for one in everyone]
            save.job = Job()
            if self._rank == 0:
                self._run(save, lambda job: self._complete(save, job, written))
        else:
            self._succeeded(save, since)

    def _succeeded(self, save: Save, since: float | None) -> None:
        self._save = None
        self.saved_step, self._retry_s, self._why = save.state["step"], 0.0, ""
        now = time.monotonic()
        waited_s = save.waited_s + (now - since if since else 0.0)
        line = {
            "kind": "event",
            "step": self.saved_step,
            "event": f"checkpoint {save.final.name} in {now - save.began:.1f} s, "
            f"of which the ranks waited {waited_s:.2g} s",
            "checkpoint": save.final.name,
            "checkpoint_s": now - save.began,
            "waited_s": waited_s,
        }
        self._metrics.report(line)
        for problem in save.job.problems:
            self._metrics.say(
                f"WARNING: an old checkpoint stays, as it cannot be removed: {problem}"
            )

    def _failed(self, save: Save, problems: Sequence[str], *, is_full: bool) -> None:
        self._save = None
        removed: list[str] = []
        settings = self._config.checkpoint
        if self._rank == 0:
            shutil.rmtree(save.part, ignore_errors=True)
            self._unremoved = [left for left in (*self._unremoved, save.part) if left.exists()]
            if is_full:
                removed = retention.make_room(
                    self._config.run_dir,
                    self.saved_step,
                    keep=settings.keep,
                    keep_every_steps=settings.keep_every_steps,
                )
        # The attempts at the end are seconds apart: the same again is no news.
        is_told = self._is_last and problems[0] == self._why and not removed
        self._why = problems[0]
        self._retry_s = min(max(RETRY_S, 2 * self._retry_s), _LONGEST_RETRY_S)
        if removed:
            self._retry_s = _SOON_S
        self._tried_at = time.monotonic()
        if is_told:
            return
        then = f". Removed {', '.join(removed)} to make room" if removed else ""
        if not self._is_last:
            then += "; training goes on. "
            then += (
                "Free some room: the next attempt is in " if is_full else "The next attempt is in "
            )
            then += f"{self._retry_s:.0f} s, or at the next interval if that is sooner"
        self._metrics.report(
            {
                "kind": "event",
                "step": save.state["step"],
                "event": f"WARNING: checkpoint {save.final.name} could NOT be written: "
                f"{self._why}. That of step {self.saved_step} is still the newest{then}",
                "checkpoint_failed": save.final.name,
                "reason": self._why,
            }
        )
