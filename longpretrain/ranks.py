"""Who am I among the processes of this run? Works under every launcher we support.

The launchers speak through environment variables: deepspeed and torchrun set RANK, WORLD_SIZE and
LOCAL_RANK; srun sets SLURM_PROCID and its kin inside a job step (SLURM_STEP_ID tells a step from
the batch script); MPI is asked (mpi.py), and only when MPI is what started us. A process that
nothing started is a run of one. Where two speak and contradict each other, the inner one of a known
nesting counts, or the one that LONGPRETRAIN_LAUNCHER names; anything else is refused.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import random
import socket
import subprocess
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from longpretrain import mpi
from longpretrain.errors import InputError

EXPECTED_WORLD_SIZE = "LONGPRETRAIN_WORLD_SIZE"
"""launch.sh says here how many ranks it starts; a rank that finds another number refuses to
train."""

LAUNCHER = "LONGPRETRAIN_LAUNCHER"
"""Whose variables count: launch.sh says it to the ranks it starts, and a user may say it too."""

_TORCH, _SLURM, _MPI = "RANK and WORLD_SIZE", "Slurm's SLURM_PROCID and SLURM_NTASKS", "MPI's"
_SPEAKER = {"deepspeed": _TORCH, "torchrun": _TORCH, "srun": _SLURM, "mpirun": _MPI}
_MPI_VARIABLES = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("PMIX_RANK", None),
)


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

    @property
    def summary(self) -> str:
        """How many there are and who started them, for people."""
        return f"{self.world_size} rank{'s' * (self.world_size > 1)} by {self.launcher}"


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
    """A TCP port that nobody has now. Nor does a connection get it before it is used, as one that
    the system chose: it is below the range that Linux hands out, and below those of Slurm's jobs.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 20_000)  # never from the run's own seed
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


@dataclass(frozen=True, kw_only=True)
class _Claim:
    """What one speaker's variables say about this process."""

    speaker: str
    rank: int
    world_size: int | None
    """None where they do not tell it (PMIX_RANK comes alone)."""

    def __str__(self) -> str:
        of = "" if self.world_size is None else f" of {self.world_size}"
        return f"rank {self.rank}{of} from {self.speaker}"

    def agrees(self, other: _Claim) -> bool:
        sizes = {self.world_size, other.world_size} - {None}
        return self.rank == other.rank and len(sizes) < 2


def _discover(env: Mapping[str, str]) -> Ranks:
    speaker = _speaker(env)
    if speaker == _TORCH:
        return _from_torch_variables(env)
    if speaker == _SLURM:
        return _from_slurm(env)
    if speaker == _MPI:
        return _from_mpi(env)
    _refuse_alone_in_a_job_of_many(env)
    return Ranks()


def _refuse_alone_in_a_job_of_many(env: Mapping[str, str]) -> None:
    """Slurm gave several tasks or nodes, and this is none of them: it was started without srun.

    It would train as a world of one and leave the rest of the allocation idle.
    """
    sizes = {name: _number(env, name, 1) for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES")}
    wanted = max(sizes.values())
    if "SLURM_JOB_ID" in env and EXPECTED_WORLD_SIZE not in env and wanted > 1:
        raise InputError(
            "world size",
            got=f"1, in a Slurm job of {sizes['SLURM_NTASKS']} tasks on "
            f"{sizes['SLURM_JOB_NUM_NODES']} nodes",
            wanted="a rank for each task",
            way_out="Start ranks with ./launch.sh or srun; to train alone there on purpose, set "
            f"{EXPECTED_WORLD_SIZE}=1.",
        )


def _speaker(env: Mapping[str, str]) -> str | None:
    """Whose variables tell this process's rank; None when nothing started it."""
    named = env.get(LAUNCHER)
    if named:
        return _named_speaker(env, named)
    # torchrun and deepspeed may themselves be started by srun or mpirun: theirs are the inner ones.
    if _is_from_torchrun(env) or _is_from_deepspeed(env):
        return _TORCH
    claims = [claim for claim in (_torch_claim(env), _slurm_claim(env), *_mpi_claims(env)) if claim]
    if not claims:
        return None
    for other in claims[1:]:
        if not claims[0].agrees(other):
            both = (claims[0].speaker, other.speaker)
            launchers = " or ".join(name for name, speaker in _SPEAKER.items() if speaker in both)
            raise InputError(
                "launchers' variables",
                got=f"{claims[0]}, but {other}",
                wanted="one launcher, or several that agree",
                way_out="Unset those that are left over, or name the launcher that counts: "
                f"{LAUNCHER}={launchers}.",
            )
    if claims[0].speaker == _TORCH and "MASTER_PORT" not in env and len(claims) > 1:
        return claims[1].speaker  # it knows where ranks meet
    return claims[0].speaker


def _named_speaker(env: Mapping[str, str], launcher: str) -> str:
    if launcher not in _SPEAKER:
        raise InputError(
            f"environment variable {LAUNCHER}",
            got=launcher,
            wanted=" or ".join(_SPEAKER),
            way_out="Set it to the launcher that started the ranks, or unset it.",
        )
    speaker = _SPEAKER[launcher]
    has_spoken = {
        _TORCH: "RANK" in env and "WORLD_SIZE" in env,
        _SLURM: "SLURM_STEP_ID" in env and "SLURM_PROCID" in env,
        _MPI: any(rank in env for rank, _ in _MPI_VARIABLES),
    }
    if not has_spoken[speaker]:
        raise InputError(
            f"environment variable {LAUNCHER}",
            got=f"{launcher}, which did not start this process",
            wanted=f"{speaker} variables with it" if speaker != _TORCH else f"{speaker} with it",
            way_out=f"Start ranks with LAUNCHER={launcher} ./launch.sh, or unset {LAUNCHER}.",
        )
    return speaker


def _is_from_torchrun(env: Mapping[str, str]) -> bool:
    return "TORCHELASTIC_RUN_ID" in env and "RANK" in env


def _is_from_deepspeed(env: Mapping[str, str]) -> bool:
    return "CROSS_RANK" in env and "CROSS_SIZE" in env and "RANK" in env


def _torch_claim(env: Mapping[str, str]) -> _Claim | None:
    if "RANK" not in env or "WORLD_SIZE" not in env:
        return None
    world_size = _number(env, "WORLD_SIZE")
    return _Claim(speaker=_TORCH, rank=_number(env, "RANK"), world_size=world_size)


def _slurm_claim(env: Mapping[str, str]) -> _Claim | None:
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env or _is_interactive_step(env):
        return None
    return _Claim(
        speaker=_SLURM, rank=_number(env, "SLURM_PROCID"), world_size=_number(env, "SLURM_NTASKS")
    )


def _mpi_claims(env: Mapping[str, str]) -> list[_Claim]:
    claims = []
    for rank, size in _MPI_VARIABLES:
        if rank in env:
            world_size = _number(env, size) if size else None
            if world_size in (None, 1) and _is_interactive_step(env):
                continue  # srun speaks PMI to the shell, too
            claims.append(_Claim(speaker=_MPI, rank=_number(env, rank), world_size=world_size))
    return claims


def _is_interactive_step(env: Mapping[str, str]) -> bool:
    """Whether Slurm's variables are those of a shell that salloc or ``srun --pty`` opened: such a
    step has a terminal and one task. launch.sh decides by the same rule.
    """
    return "SLURM_PTY_PORT" in env and env.get("SLURM_STEP_NUM_TASKS", "1") == "1"


def _from_torch_variables(env: Mapping[str, str]) -> Ranks:
    world_size = _number(env, "WORLD_SIZE")
    if world_size > 1 and "MASTER_PORT" not in env:
        raise InputError(
            "launcher's variables",
            got="RANK and WORLD_SIZE without MASTER_PORT",
            wanted="all three",
            way_out="Start ranks with ./launch.sh, or unset RANK and WORLD_SIZE.",
        )
    by_deepspeed = _is_from_deepspeed(env) or env.get(LAUNCHER) == "deepspeed"
    other = "deepspeed" if by_deepspeed else "RANK and WORLD_SIZE"
    return Ranks(
        rank=_rank(env, "RANK", world_size),
        world_size=world_size,
        local_rank=_number(env, "LOCAL_RANK", 0),
        launcher="torchrun" if _is_from_torchrun(env) else other,
        master_addr=env.get("MASTER_ADDR", "127.0.0.1"),
        master_port=_number(env, "MASTER_PORT", 0),
    )


def _from_slurm(env: Mapping[str, str]) -> Ranks:
    world_size = _number(env, "SLURM_NTASKS")
    job = _number(env, "SLURM_JOB_ID", 0)
    step = env["SLURM_STEP_ID"]
    # Every task derives the same port from the job and step: two jobs on one node do not collide.
    # Below those that Linux lends to outgoing connections, from 32,768 on.
    port = 20_000 + (job * 97 + (int(step) if step.isdigit() else 0)) % 12_000
    return Ranks(
        rank=_rank(env, "SLURM_PROCID", world_size),
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


def _from_mpi(env: Mapping[str, str]) -> Ranks:
    world = mpi.world()
    announced = {claim.world_size for claim in _mpi_claims(env)} - {None}
    if announced - {world.size}:
        raise InputError(
            "mpirun",
            got=f"{max(size or 0 for size in announced)} ranks by the environment and "
            f"{world.size} by mpi4py",
            wanted=f"the mpirun of {world.vendor}, which mpi4py has loaded",
            way_out="Use .venv/bin/mpirun, or name the libmpi.so of your mpirun in MPI4PY_LIBMPI.",
        )
    address = "127.0.0.1" if world.is_one_host else address_for_others()
    meeting = (env.get("MASTER_ADDR") or address, _number(env, "MASTER_PORT", free_port()))
    meeting = mpi.from_rank_0(meeting)
    return Ranks(
        rank=world.rank,
        world_size=world.size,
        local_rank=world.local_rank,
        launcher="mpirun",
        master_addr=meeting[0],
        master_port=meeting[1],
    )


def address_for_others() -> str:
    """What other hosts may call this one. By many a hosts file it resolves its own name to itself
    (127.0.1.1); there the others are given the name, for which they have their own answer.
    """
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return name
    return name if ipaddress.ip_address(address).is_loopback else address


def _rank(env: Mapping[str, str], name: str, world_size: int) -> int:
    rank = _number(env, name)
    if rank >= world_size:
        raise InputError(
            f"environment variable {name}",
            got=f"rank {rank} of {world_size}",
            wanted="a rank below the world size, counted from 0",
            way_out="Start ranks with ./launch.sh, or set both to fit.",
        )
    return rank


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
