"""Numbered tasks, shared out: to this process, to processes beside it, or to MPI ranks.

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
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, cast

from longpretrain import mpi
from longpretrain.errors import InputError, from_system
from longpretrain.ranks import Ranks, discover

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


@contextlib.contextmanager
def crew(workers: int, place: Ranks) -> Iterator[Crew]:
    """Those who work for this process: rank 0's crew is all ranks."""
    members: Crew
    if place.world_size > 1:
        members = _RankCrew()
    else:
        members = _PoolCrew(workers) if workers > 1 else _CrewOfOne()
    error: BaseException | None = None
    try:
        yield members
    except BaseException as caught:
        error = caught
        raise
    finally:
        members.close(error)


def find_place(workers: int) -> Ranks:
    """This process's place among those that mpirun or srun started to prepare together.

    Raises:
        InputError: they cannot work together.
        ElsewhereError: the same, at a rank other than 0.
    """
    if workers < 1:
        raise InputError("workers", got=workers, wanted="1 or more", way_out="Set --workers.")
    # MPI finds the others itself: no address has to be known, as for torch.
    place = discover({"MASTER_ADDR": "127.0.0.1", **os.environ})
    if place.world_size == 1:
        return place
    try:
        _need_team(place, workers)
    except InputError:
        if place.is_first:
            raise
        raise ElsewhereError(_BAD_INPUT) from None
    return place


def _need_team(place: Ranks, workers: int) -> None:
    if place.launcher not in ("srun", "mpirun"):
        raise InputError(
            "launcher",
            got=f"{place.world_size} ranks of {place.launcher}",
            wanted="ranks of mpirun or srun, or one process",
            way_out="Start it by mpirun, or once with --workers.",
        )
    if workers > 1:
        raise InputError(
            "workers",
            got=f"{workers} under {place.launcher} with {place.world_size} ranks",
            wanted="1: each rank is a worker",
            way_out="Leave --workers out, and start as many ranks as there are cores.",
        )
    world = mpi.world()
    if world.size != place.world_size:
        raise InputError(
            place.launcher,
            got=f"{place.world_size} ranks by its variables and {world.size} by MPI",
            wanted="ranks that find each other by MPI",
            way_out="Start them by the mpirun of this environment, or by srun with the --mpi that "
            f"fits {world.vendor} (srun --mpi=list).",
        )


class ElsewhereError(SystemExit):
    """Leaves a rank because of an error that rank 0 tells; carries the exit code."""


def serve() -> Any:
    """The work of a rank that is not the first: tasks until rank 0 has no more.

    Returns:
        What rank 0 was told to hand on.

    Raises:
        ElsewhereError: the preparation failed.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # rank 0 gets them too, and ends all in order
    team = mpi.Team(counters=len(_COUNTERS))
    while isinstance(message := team.receive(), _Phase):
        team.send(_take(team, message, _Later(team)), to=0)
    assert isinstance(message, _End)
    team.close()
    if message.code:
        raise ElsewhereError(message.code)
    return message.result


class _CrewOfOne(Crew):
    def run(self, task: Task, common: Any, numbers: Sequence[int], tick: Tick) -> list[Any]:
        return [task(common, number, tick) for number in numbers]


@dataclass(frozen=True)
class _Done:
    number: int
    result: Any = None
    error: BaseException | None = None


class _PoolCrew(Crew):
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
                done = _Done(number, task(common, number, pipe.send))
            except Exception as error:
                done = _Done(number, error=_portable(error))
            pipe.send(done)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _portable(error: BaseException) -> BaseException:
    """An error that passes between processes: what is no user's to mend takes its traceback."""
    if isinstance(error, InputError | OSError | KeyboardInterrupt | SystemExit):
        with contextlib.suppress(Exception):
            copy = pickle.loads(pickle.dumps(error))  # noqa: S301  our own
            if str(copy) == str(error):
                return error
    return RuntimeError("in a worker:\n" + "".join(traceback.format_exception(error)))


_BAD_INPUT, _FAILED = 2, 1
"""Exit codes, as the command line has them (terminal.py)."""

_NEXT, _BYTES = _COUNTERS = (0, 1)
_STOP = 1 << 40
"""Added to the counter of tasks: far beyond any number of them."""


@dataclass(frozen=True)
class _Phase:
    task: Task
    common: Any
    numbers: Sequence[int]


@dataclass(frozen=True)
class _End:
    code: int
    result: Any = None


@dataclass
class _Taken:
    """What one rank did of a phase."""

    results: dict[int, Any] = field(default_factory=dict)
    failed: _Done | None = None


class _RankCrew(Crew):
    """MPI ranks; this one, the first, works like the others, and it alone knows of phases."""

    def __init__(self) -> None:
        self._team = mpi.Team(counters=len(_COUNTERS))

    def run(self, task: Task, common: Any, numbers: Sequence[int], tick: Tick) -> list[Any]:
        team = self._team
        team.reset(_NEXT)
        team.reset(_BYTES)
        phase = _Phase(task, common, numbers)
        for rank in range(1, team.size):
            team.send(phase, to=rank)
        told = 0

        def report(done: int = 0) -> None:
            """Tells what all ranks did since it was last called."""
            nonlocal told
            team.tick()
            total = team.add(_BYTES, done) + done
            if total > told:
                tick(total - told)
                told = total

        taken = [_take(team, phase, report)]
        taken += [team.receive(idle=report) for _ in range(1, team.size)]
        report()
        failed = [rank.failed for rank in taken if rank.failed]
        if failed:
            first = min(failed, key=lambda done: done.number)
            assert first.error
            raise first.error
        results = {number: result for rank in taken for number, result in rank.results.items()}
        return [results[number] for number in numbers]

    def close(self, error: BaseException | None) -> None:
        end = _End(_exit_code(error)) if error else _End(0, self.result)
        for rank in range(1, self._team.size):
            self._team.send(end, to=rank)
        self._team.close()


class _Later:
    """Counts what a rank has done, and tells it when rank 0 is asked for something anyhow.

    Rank 0 answers when it is between two stretches of its own work: to tell it each time would have
    everybody wait for it most of the time.
    """

    def __init__(self, team: mpi.Team) -> None:
        self._team = team
        self._done = 0

    def __call__(self, done: int) -> None:
        self._done += done

    def tell(self) -> None:
        if self._done:
            self._team.add(_BYTES, self._done)
        self._done = 0


def _take(team: mpi.Team, phase: _Phase, tick: Tick) -> _Taken:
    """Does tasks until none is left, or one fails: then nobody begins another."""
    taken = _Taken()
    while (index := team.add(_NEXT, 1)) < len(phase.numbers):
        number = phase.numbers[index]
        try:
            taken.results[number] = phase.task(phase.common, number, tick)
        except BaseException as error:
            taken.failed = _Done(number, error=_portable(error))
            team.add(_NEXT, _STOP)
            break
        if isinstance(tick, _Later):
            tick.tell()
    return taken


def _exit_code(error: BaseException) -> int:
    """That of rank 0, which tells the error."""
    if isinstance(error, InputError):
        return _BAD_INPUT
    found = from_system(error) if isinstance(error, OSError) else None
    return _BAD_INPUT if found and found[1] else _FAILED
