"""MPI: this process's place among the ranks, and what ranks that share work out need of it.

The only file that imports mpi4py, and late: its import starts MPI, which is right only where MPI
started this process.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longpretrain.errors import InputError

_LIBRARY = "MPI4PY_LIBMPI"
"""mpi4py's own variable: the MPI library to load."""
_OPEN_MPI = "libmpi.so.40"
"""Open MPI's name for its library, versions 3 to 5; MPICH's is another."""
_POLL_S = 0.005
"""Between two looks for a message: MPI's own waiting would keep a core busy."""


@dataclass(frozen=True, kw_only=True)
class World:
    """This process's place among those that one mpirun or srun started."""

    rank: int
    size: int
    local_rank: int
    is_one_host: bool
    vendor: str
    """Whose MPI mpi4py was built with, such as MPICH."""


def world() -> World:
    """Joins the other ranks. A collective: every rank must call it.

    Raises:
        InputError: mpi4py, or the MPI library that it needs, is not here.
    """
    MPI = _start()
    everyone = MPI.COMM_WORLD
    local = everyone.Split_type(MPI.COMM_TYPE_SHARED)
    found = World(
        rank=everyone.Get_rank(),
        size=everyone.Get_size(),
        local_rank=local.Get_rank(),
        is_one_host=local.Get_size() == everyone.Get_size(),
        vendor=MPI.get_vendor()[0],
    )
    local.Free()
    return found


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank. A collective."""
    return _start().COMM_WORLD.bcast(value, root=0)


def _start() -> Any:
    """mpi4py's MPI; the first import of it starts MPI."""
    found = library_of_open_mpi(os.environ)
    if found:
        os.environ[_LIBRARY] = found
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # the latter: no library that it could load
        raise InputError(
            "MPI of the launcher",
            got=" ".join(str(error).split()),
            wanted="mpi4py and the library of that MPI",
            way_out="Install mpi4py, and name the MPI's libmpi.so in "
            f"{_LIBRARY}; or start ranks another way, such as LAUNCHER=torchrun ./launch.sh.",
        ) from error
    return MPI


def library_of_open_mpi(environment: Mapping[str, str]) -> str:
    """Where to load Open MPI from if its mpirun started us and nobody has said where, else "".

    mpi4py takes the first MPI that it finds, such as the MPICH of our own environment, and another
    MPI's library ends the process. Several paths, with ``:`` between, are tried in turn.
    """
    if "OMPI_COMM_WORLD_RANK" not in environment or environment.get(_LIBRARY):
        return ""
    prefixes = [environment.get(name, "") for name in ("OPAL_PREFIX", "PMIX_PREFIX")]
    for folder in environment.get("PATH", "").split(os.pathsep):
        program = shutil.which("ompi_info", path=folder)
        prefixes += [str(Path(program).resolve().parents[1])] if program else []
    files = [Path(p) / lib / _OPEN_MPI for p in prefixes if p for lib in ("lib", "lib64")]
    found = dict.fromkeys(str(path) for path in files if path.is_file())
    return os.pathsep.join([*found, _OPEN_MPI])  # the last: wherever the system's loader looks


class Team:
    """All ranks of the world, with messages between them and counters that rank 0 keeps.

    Making one, and closing it, are collectives. The counters are changed from afar by one-sided
    operations, so ranks take work from a queue without a rank that hands it out; rank 0 should call
    ``tick`` now and then, as an MPI without hardware for this serves the others only inside a call.
    """

    def __init__(self, *, counters: int) -> None:
        MPI = self._mpi = _start()
        self._comm = MPI.COMM_WORLD.Dup()
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        word = np.dtype(np.int64).itemsize
        self._window = MPI.Win.Allocate(word * counters * (self.rank == 0), word, comm=self._comm)
        for slot in range(counters if self.rank == 0 else 0):
            self.reset(slot)
        self._comm.Barrier()

    def add(self, slot: int, amount: int) -> int:
        """Adds to a counter, in one step for all ranks; returns what it was before."""
        return self._change(slot, amount, self._mpi.SUM)

    def reset(self, slot: int) -> None:
        """Sets a counter to 0: only while no other rank uses it."""
        self._change(slot, 0, self._mpi.REPLACE)

    def _change(self, slot: int, amount: int, operation: Any) -> int:
        given, before = np.array([amount], np.int64), np.zeros(1, np.int64)
        self._window.Lock(0, self._mpi.LOCK_SHARED)
        self._window.Fetch_and_op(given, before, 0, slot, operation)
        self._window.Unlock(0)
        return int(before[0])

    def send(self, value: Any, *, to: int) -> None:
        """Sends anything that pickles."""
        self._comm.send(value, dest=to)

    def receive(self, idle: Callable[[], None] = lambda: None) -> Any:
        """The next message of any rank; calls ``idle`` while there is none."""
        while (message := self._comm.improbe()) is None:
            idle()
            time.sleep(_POLL_S)
        return message.recv()

    def tick(self) -> None:
        """Lets MPI serve what other ranks have asked for."""
        self._comm.iprobe()

    def close(self) -> None:
        """Takes leave of the others."""
        self._window.Free()
        self._comm.Free()
