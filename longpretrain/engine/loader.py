"""Micro-batches of the updates to come, made while the present one runs: by a thread, or by worker
processes.

Sample ``number`` is the same whoever makes it, so the order never changes: neither do the bits of a
batch. Workers take whole updates in turn and hand each over as one block of memory.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from longpretrain.config import Config
from longpretrain.engine.signals import STOP_SIGNALS
from longpretrain.engine.task import Batch, Task
from longpretrain.errors import InputError
from longpretrain.ranks import Ranks
from longpretrain.schedule import update_numbers

_AHEAD = 2
"""Updates that each worker has ready or in the making."""
_ALIGNMENT = 64
_PATIENCE_S = 5.0
"""How long a worker may take to end before it is killed."""


class _Updates(Dataset[Any]):
    """This rank's micro-batches by number of the update, from 1."""

    def __init__(self, config: Config, task: Task, ranks: Ranks, accumulation: int) -> None:
        self._config = config
        self._task = task
        self._ranks = ranks
        self._accumulation = accumulation

    @property
    def last(self) -> int:
        """Number of the last update."""
        return self._config.schedule.total_steps

    @property
    def task_module(self) -> str:
        """Where the task is defined."""
        return type(self._task).__module__

    def __getitem__(self, step: int) -> list[Batch]:
        numbers = update_numbers(
            step,
            global_sequences=self._config.batch.global_sequences,
            micro_sequences=self._config.batch.micro_sequences,
            accumulation=self._accumulation,
            world_size=self._ranks.world_size,
            rank=self._ranks.rank,
        )
        return [self._task.collate([self._task.sample(n) for n in group]) for group in numbers]


class _Source(Protocol):
    def start(self, step: int) -> None: ...

    def get(self, step: int) -> list[Batch]: ...

    def close(self) -> None: ...


class Loader:
    """Gives the micro-batches of an update; use as a context manager around the loop.

    Args:
        config: the run; ``data.loader_workers`` processes work, or with 0 a thread of this one.
        task: makes the samples. Workers get a copy, so it must pickle.
        ranks: this process's place.
        accumulation: micro-batches per rank and update.
        first: the update that will be asked for first; its batches are in the making from the
            start. Others may be asked for all the same.
        pin: keep the batches in pinned memory, from which a GPU copies while it computes.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        ranks: Ranks,
        accumulation: int,
        *,
        first: int = 1,
        pin: bool = False,
    ) -> None:
        updates = _Updates(config, task, ranks, accumulation)
        workers = config.data.loader_workers
        self._source: _Source = (
            _Workers(updates, workers, pin=pin) if workers else _Thread(updates, pin=pin)
        )
        self._first = first

    def __enter__(self) -> Loader:
        self._source.start(self._first)
        return self

    def __exit__(self, *exception: object) -> None:
        self._source.close()

    def get(self, step: int) -> list[Batch]:
        """This rank's micro-batches of update ``step``; those of the next are in the making.

        An error of a worker is raised here as it was raised there.
        """
        return self._source.get(step)


class _Thread:
    """One update ahead, in a thread of this process."""

    def __init__(self, updates: _Updates, *, pin: bool) -> None:
        self._updates = updates
        self._pin = pin
        self._next: tuple[int, Future[list[Batch]]] | None = None
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="collate")

    def start(self, step: int) -> None:
        self._next = None
        if step <= self._updates.last:
            self._next = (step, self._pool.submit(self._make, step))

    def get(self, step: int) -> list[Batch]:
        ready = self._next if self._next and self._next[0] == step else None
        batches = ready[1].result() if ready else self._make(step)
        self.start(step + 1)
        return batches

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, step: int) -> list[Batch]:
        batches = self._updates[step]
        if self._pin:
            return [{name: x.pin_memory() for name, x in batch.items()} for batch in batches]
        return batches


class _Workers:
    """Some updates ahead, in processes of their own."""

    def __init__(self, updates: _Updates, workers: int, *, pin: bool) -> None:
        self._updates = updates
        self._workers = workers
        self._pin = pin
        self._step = 0
        self._answers: Iterator[_Flat | _Failed] | None = None
        self._processes: list[multiprocessing.process.BaseProcess] = []

    def get(self, step: int) -> list[Batch]:
        if step != self._step:
            self.start(step)
        answer = self._next()
        self._step = step + 1
        if isinstance(answer, _Failed):
            error = answer.error()
            raise error
        return answer.batches()

    def start(self, step: int) -> None:
        self.close()
        self._step = step
        loader: DataLoader[Any] = DataLoader(
            _Answers(self._updates),
            batch_size=None,
            sampler=range(step, self._updates.last + 1),
            num_workers=self._workers,
            collate_fn=_as_it_is,
            worker_init_fn=_end_with_the_rank,
            pin_memory=self._pin,
            prefetch_factor=_AHEAD,
            multiprocessing_context=self._context(),
            generator=torch.Generator(),  # the default one's numbers are the run's
        )
        before = set(multiprocessing.active_children())
        with _blocked_signals():
            self._answers = iter(loader)
        self._processes = [p for p in multiprocessing.active_children() if p not in before]

    def _context(self) -> multiprocessing.context.BaseContext:
        # A fork of this process would copy the locks of its threads as they happen to stand: they
        # fork from a process of one thread that has imported what they need.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, self._updates.task_module])
        return context

    def close(self) -> None:
        def kill() -> None:
            for process in self._processes:
                process.kill()

        # Dropping the iterator tells the workers to end, and waits; one may be in a read that does
        # not return.
        patience = threading.Timer(_PATIENCE_S, kill)
        patience.start()
        self._answers = None
        for process in self._processes:
            process.join()
        patience.cancel()
        self._processes = []

    def _next(self) -> _Flat | _Failed:
        assert self._answers is not None
        try:
            return next(self._answers)
        except (OSError, EOFError, RuntimeError) as error:
            connection.wait([process.sentinel for process in self._processes], timeout=1)
            codes = [process.exitcode for process in self._processes if process.exitcode]
            if not codes:
                raise
            ends = ", ".join(f"signal {-code}" if code < 0 else f"code {code}" for code in codes)
            raise InputError(
                "loader worker",
                got=f"an end by {ends}",
                wanted="a batch",
                way_out="Signal 9 or 7 often means that memory ran out, or room in /dev/shm: lower "
                "data.loader_workers, which changes no sample.",
            ) from error


@contextlib.contextmanager
def _blocked_signals() -> Iterator[None]:
    """Processes that start meanwhile never see what asks the rank to stop: it ends them itself,
    after the update that they serve.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    try:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        # It would start with the first worker, and unblocks two of them when it does.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


class _Answers(Dataset[Any]):
    """What a worker sends: an update, or the error that it ran into."""

    def __init__(self, updates: _Updates) -> None:
        self._updates = updates

    def __getitem__(self, step: int) -> _Flat | _Failed:
        try:
            return _Flat.of(self._updates[step])
        except Exception as error:
            return _Failed.of(error)


def _end_with_the_rank(number: int) -> None:
    """In a worker: DataLoader looks at the process that it was forked from, which would wait for
    the worker in turn.
    """
    rank = multiprocessing.parent_process()
    assert rank is not None

    def wait() -> None:
        rank.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _as_it_is(answer: Any) -> Any:
    return answer


@dataclass(frozen=True)
class _Flat:
    """Micro-batches in one tensor of bytes: one piece of shared memory, one descriptor."""

    layout: list[dict[str, tuple[torch.dtype, torch.Size, int]]]
    """Of each micro-batch and tensor: type, shape and first byte."""
    bytes_: torch.Tensor

    @classmethod
    def of(cls, batches: list[Batch]) -> _Flat:
        size, layout = 0, []
        for batch in batches:
            places = {}
            for name, tensor in batch.items():
                places[name] = tensor.dtype, tensor.shape, size
                size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
            layout.append(places)
        flat = cls(layout, torch.zeros(size, dtype=torch.uint8))
        for batch, views in zip(batches, flat.batches(), strict=True):
            for name, view in views.items():
                view.copy_(batch[name])
        return flat

    def batches(self) -> list[Batch]:
        """The micro-batches, as views."""
        return [
            {
                name: self.bytes_[start : start + shape.numel() * dtype.itemsize]
                .view(dtype)
                .view(shape)
                for name, (dtype, shape, start) in places.items()
            }
            for places in self.layout
        ]

    def pin_memory(self) -> _Flat:
        """DataLoader calls it, in a thread of the rank."""
        return _Flat(self.layout, self.bytes_.pin_memory())


@dataclass(frozen=True)
class _Failed:
    """An error on its way out of a worker."""

    pickled: bytes
    trace: str

    @classmethod
    def of(cls, error: Exception) -> _Failed:
        trace = "".join(traceback.format_exception(error))
        try:
            pickled = pickle.dumps(error)
            pickle.loads(pickled)  # noqa: S301  # our own bytes
        except Exception:  # of a kind that does not travel
            pickled = pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
        return cls(pickled, trace)

    def error(self) -> Exception:
        """The error, with a note of where it was raised."""
        error: Exception = pickle.loads(self.pickled)  # noqa: S301  # a worker of ours wrote it
        error.add_note(f"In a loader worker:\n{self.trace}")
        return error
