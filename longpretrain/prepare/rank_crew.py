"""MPI ranks that prepare together: each takes tasks from one queue, and rank 0 alone knows the job.

The others call ``serve`` and are handed phases of tasks until there are no more.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from longpretrain import mpi
from longpretrain.errors import InputError, from_system
from longpretrain.prepare.workers import Crew, CrewOfOne, Done, PoolCrew, Task, Tick, portable
from longpretrain.ranks import Ranks, discover


@contextlib.contextmanager
def crew(workers: int, place: Ranks) -> Iterator[Crew]:
    """Those who work for this process: rank 0's crew is all ranks."""
    members: Crew
    if place.world_size > 1:
        members = _RankCrew()
    else:
        members = PoolCrew(workers) if workers > 1 else CrewOfOne()
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
    place = _discover()
    if place.world_size > 1:
        with _told_by_the_first(place):
            _need_team(place, workers)
    return place


def need_one_process(what: str) -> None:
    """Refuses ranks for what one process does.

    Raises:
        InputError: there are several; ``what`` names what was asked for.
        ElsewhereError: the same, at a rank other than 0.
    """
    place = _discover()
    if place.world_size > 1:
        with _told_by_the_first(place):
            raise InputError(
                what,
                got=f"{place.world_size} ranks of {place.launcher}",
                wanted="one process",
                way_out="Run it without mpirun or srun.",
            )


def _discover() -> Ranks:
    # MPI finds the others itself: no address has to be known, as for torch.
    return discover({"MASTER_ADDR": "127.0.0.1", **os.environ})


@contextlib.contextmanager
def _told_by_the_first(place: Ranks) -> Iterator[None]:
    try:
        yield
    except InputError:
        if place.is_first:
            raise
        raise ElsewhereError(_BAD_INPUT) from None


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
    failed: Done | None = None


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
            taken.failed = Done(number, error=portable(error))
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
