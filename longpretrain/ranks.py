"""Who am I among the processes of this run? Works under every launcher we support.

The launchers speak through environment variables: deepspeed and torchrun set RANK, WORLD_SIZE and
LOCAL_RANK; srun sets SLURM_PROCID and its kin inside a job step (SLURM_STEP_ID tells a step from
the
batch script); MPI is asked through mpi4py, and only when MPI is what started us. A process that
nothing started is a run of one. This is the only file that imports mpi4py.
"""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from longpretrain.errors import InputError

EXPECTED_WORLD_SIZE = "LONGPRETRAIN_WORLD_SIZE"
"""launch.sh says here how many ranks it starts; a rank that finds another number refuses to
train."""

_MPI_MARKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """One process's place in the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    launcher: str = "alone"
    master_addr: str = "127.0.0.1"
    master_port: int = 0

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size, f"rank {self.rank} of {self.world_size}"

    @property
    def is_first(self) -> bool:
        """Rank 0 writes what exists once: logs, metrics, status."""
        return self.rank == 0


def discover(environment: Mapping[str, str] | None = None) -> Ranks:
    """Finds this process's rank.

    Raises:
        InputError: a launcher's variables are incomplete, or it started another number of ranks
            than launch.sh announced (a rank that trains alone by mistake burns an allocation).
    """
    env = os.environ if environment is None else environment
    ranks = _discover(env)
    expected = expected_world_size(env)
    if expected not in (None, ranks.world_size):
        raise InputError(
            "world size",
            got=f"{ranks.world_size} from {ranks.launcher}",
            wanted=expected,
            way_out=f"Start {expected} ranks, or unset {EXPECTED_WORLD_SIZE}.",
        )
    return ranks


def expected_world_size(environment: Mapping[str, str]) -> int | None:
    """How many ranks launch.sh announced; None when it did not start us."""
    if EXPECTED_WORLD_SIZE not in environment:
        return None
    expected = _number(environment, EXPECTED_WORLD_SIZE)
    if expected < 1:
        raise InputError(
            "RANKS", got=expected, wanted="1 or more", way_out="Set RANKS, or leave it out."
        )
    return expected


def publish(ranks: Ranks, environment: MutableMapping[str, str]) -> None:
    """Sets the variables that torch.distributed and DeepSpeed read, for every launcher alike."""
    environment["RANK"] = str(ranks.rank)
    environment["WORLD_SIZE"] = str(ranks.world_size)
    environment["LOCAL_RANK"] = str(ranks.local_rank)
    environment["MASTER_ADDR"] = ranks.master_addr
    environment["MASTER_PORT"] = str(ranks.master_port or free_port())


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _discover(env: Mapping[str, str]) -> Ranks:
    if "RANK" in env and "WORLD_SIZE" in env:
        return _from_torch_variables(env)
    if "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:
        return _from_slurm(env)
    if any(mark in env for mark in _MPI_MARKS):
        return _from_mpi()
    return Ranks()


def _from_torch_variables(env: Mapping[str, str]) -> Ranks:
    world_size = _number(env, "WORLD_SIZE")
    if world_size > 1 and "MASTER_PORT" not in env:
        raise InputError(
            "launcher's variables",
            got="RANK and WORLD_SIZE without MASTER_PORT",
            wanted="all three",
            way_out="Start ranks with ./launch.sh, or unset RANK and WORLD_SIZE.",
        )
    return Ranks(
        rank=_number(env, "RANK"),
        world_size=world_size,
        local_rank=_number(env, "LOCAL_RANK", 0),
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed",
        master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number(env, "MASTER_PORT", 0),
    )


def _from_slurm(env: Mapping[str, str]) -> Ranks:
    world_size = _number(env, "SLURM_NTASKS")
    job = _number(env, "SLURM_JOB_ID", 0)
    step = env["SLURM_STEP_ID"]
    # Every task derives the same port from the job and step: two jobs on one node do not collide.
    port = 20_000 + (job * 97 + (int(step) if step.isdigit() else 0)) % 20_000
    return Ranks(
        rank=_number(env, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(env, "SLURM_LOCALID", 0),
        launcher="srun",
        master_addr=env.get("MASTER_ADDR") or _first_host(env.get("SLURM_STEP_NODELIST", "")),
        master_port=_number(env, "MASTER_PORT", port),
    )


def _first_host(nodes: str) -> str:
    """The address of the first node of a Slurm list such as ``n[1-4]``; the loopback if unknown."""
    if not nodes:
        return "127.0.0.1"
    try:
        listing = subprocess.run(  # noqa: S603
            ["scontrol", "show", "hostnames", nodes],  # noqa: S607
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        )
        host = listing.stdout.split()[0]
        return socket.gethostbyname(host)
    except (OSError, subprocess.SubprocessError, IndexError) as error:
        if "," in nodes or "[" in nodes:
            raise InputError(
                "address of rank 0",
                got=f"no answer for the nodes {nodes} ({error})",
                wanted="the address of the first one",
                way_out="Set MASTER_ADDR in slurm/env.sh.",
            ) from error
        # Node names of a cluster on one host do not resolve, and then loopback is right.
        return "127.0.0.1"


def _from_mpi() -> Ranks:
    from mpi4py import MPI  # its import starts MPI: only when MPI is what started us

    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    one_host = local.Get_size() == world.Get_size()
    address = "127.0.0.1" if one_host else socket.gethostbyname(socket.gethostname())
    meeting = world.bcast((address, free_port()) if world.Get_rank() == 0 else None, root=0)
    return Ranks(
        rank=world.Get_rank(),
        world_size=world.Get_size(),
        local_rank=local.Get_rank(),
        launcher="mpirun",
        master_addr=meeting[0],
        master_port=meeting[1],
    )


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise InputError(
            f"environment variable {name}",
            got=repr(text),
            wanted="a whole number",
            way_out="Start ranks with ./launch.sh, deepspeed, torchrun, srun or mpirun.",
        )
    return int(text)
