"""Numbered tasks, shared out: to this process, to processes beside it, or to ranks (rank_crew.py).

A task is a function of the module level; it reads what it works on itself, by its number, and what
it returns is small: texts and tokens never pass between processes. Who does which task, and when,
must not matter to what it does.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, cast

from longpretrain.errors import InputError

Tick = Callable[[int], None]
"""Called with the bytes of input that were just worked through."""

Task = Callable[[Any, int, Tick], Any]
"""Called with what all tasks of a phase share, and the task's number; what it returns pickles."""


class Crew(ABC):
    """Those who do the tasks. One phase of tasks ends before the next begins."""

    result: Any = None
    """What the other ranks are to return at the end."""

    @abstractmethod
    def run(self, task: Task, common: Any, numbers: Sequence[int], tick: Tick) -> list[Any]:
        """Does tasks; returns their results in the order of the numbers.

        Raises:
            The first error that a task raises: tasks that others have begun may be cut off.
        """

    def close(self, error: BaseException | None) -> None:  # noqa: B027  a crew of one has nothing
        """Sends everyone home; those who are still at work are cut off after an error."""


class CrewOfOne(Crew):
    """This process alone."""

    def run(self, task: Task, common: Any, numbers: Sequence[int], tick: Tick) -> list[Any]:
        return [task(common, number, tick) for number in numbers]


@dataclass(frozen=True)
class Done:
    """A task that came to its end, or failed."""

    number: int
    result: Any = None
    error: BaseException | None = None


class PoolCrew(Crew):
    """Processes beside this one. Spawned: threads (torch, tokenizers) make a fork unsafe."""

    def __init__(self, workers: int) -> None:
        self._most = workers
        self._workers: dict[Connection, Any] = {}

    def run(self, task: Task, common: Any, numbers: Sequence[int], tick: Tick) -> list[Any]:
        self._start(min(self._most, len(numbers)))
        results: dict[int, Any] = {}
        waiting = iter(numbers)
        for pipe in self._workers:
            self._send(pipe, task, common, waiting)
        while len(results) < len(numbers):
            for ready in connection.wait(list(self._workers)):
                pipe = cast("Connection", ready)
                message = self._receive(pipe)
                if isinstance(message, int):
                    tick(message)
                    continue
                if message.error:
                    raise message.error
                results[message.number] = message.result
                self._send(pipe, task, common, waiting)
        return [results[number] for number in numbers]

    def close(self, error: BaseException | None) -> None:
        """Ends the processes; after an error at once."""
        for process in self._workers.values():
            if error:
                process.terminate()
        for pipe, process in self._workers.items():
            pipe.close()  # the end of its messages is the end of a worker
            process.join()
        self._workers = {}

    def _start(self, workers: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self._workers) < workers:
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,))
            process.start()
            theirs.close()
            self._workers[ours] = process

    def _send(self, pipe: Connection, task: Task, common: Any, waiting: Iterator[int]) -> None:
        number = next(waiting, None)
        if number is not None:
            with contextlib.suppress(BrokenPipeError):  # told when its end is read
                pipe.send((task, common, number))

    def _receive(self, pipe: Connection) -> Any:
        try:
            return pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            process = self._workers[pipe]
            process.join()
            code = process.exitcode
            how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise InputError(
                "workers",
                got=f"a process that was {how}, perhaps for want of memory",
                wanted="processes that live to the end",
                way_out="Run it again, perhaps with fewer --workers.",
            ) from error


def _work(pipe: Connection) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # A broken pipe: the parent is gone.
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            task, common, number = pipe.recv()
            try:
                done = Done(number, task(common, number, pipe.send))
            except Exception as error:
                done = Done(number, error=portable(error))
            pipe.send(done)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def portable(error: BaseException) -> BaseException:
    """An error that passes between processes: what is no user's to mend takes its traceback."""
    if isinstance(error, InputError | OSError | KeyboardInterrupt | SystemExit):
        with contextlib.suppress(Exception):
            copy = pickle.loads(pickle.dumps(error))  # noqa: S301  our own
            if str(copy) == str(error):
                return error
    return RuntimeError("in a worker:\n" + "".join(traceback.format_exception(error)))
