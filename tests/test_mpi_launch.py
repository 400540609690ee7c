"""Ranks that an mpirun starts, of MPICH and of Open MPI; MPI stays out of all other ranks."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from exactness.launchers import Cells, Way
from exactness.table import Row
from ranks_helper import BIN, ROOT, rank_environment
from slurm_testbed import testbed, why_no_slurm

from longpretrain.mpi import library_of_open_mpi
from longpretrain.ranks import free_port

OPEN_MPI = ROOT / "build" / "openmpi" / "bin" / "mpirun"
WHY_NO_OPEN_MPI = "" if OPEN_MPI.is_file() else "Open MPI is not here: `make openmpi` gets it"
# Open MPI starts no ranks for root, nor more than there are cores, unless it is told to.
ALLOW = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}
MPIRUN = {"MPICH": (str(BIN / "mpirun"), {}), "Open MPI": (str(OPEN_MPI), ALLOW)}
WAYS = {
    name: Way(
        name=f"mpirun -n 2 ./launch.sh of {name}",
        command=(program, "-n", "2", "./launch.sh"),
        environment=more,
        ranks=2,
        stopped_by=signal.SIGUSR1,
    )
    for name, (program, more) in MPIRUN.items()
}
EACH_MPI = [
    "MPICH",
    pytest.param(
        "Open MPI", marks=pytest.mark.skipif(WHY_NO_OPEN_MPI != "", reason=WHY_NO_OPEN_MPI)
    ),
]


@pytest.fixture(scope="module")
def rows(
    small_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Row]]]:
    """A run of each MPI, side by side; MPICH's other scenarios are in test_launch.py."""
    cells = Cells(tmp_path_factory.mktemp("runs"), small_run / "recipe.yaml")
    scenarios = {"MPICH": "success"} | ({} if WHY_NO_OPEN_MPI else {"Open MPI": "preemption"})
    with ThreadPoolExecutor(2) as pool:
        yield {
            name: pool.submit(cells.row, WAYS[name], scenario)
            for name, scenario in scenarios.items()
        }


@pytest.mark.parametrize("mpi", EACH_MPI)
def test_mpirun_trains_stops_and_goes_on(rows: dict[str, Future[Row]], mpi: str) -> None:
    row = rows[mpi].result()
    assert row.ok, row


# A rank up to the question who it is, which comes before all else that it does.
WHO = """
import sys
from longpretrain.errors import InputError
from longpretrain.ranks import discover
try:
    discover()
except InputError as error:
    # One write, so that the lines of two ranks do not mix.
    sys.stderr.write(f"refused: {error} mpi4py: {'mpi4py' in sys.modules}\\n")
    sys.exit(2)
"""


@pytest.fixture(scope="module")
def who(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("who") / "who.py"
    path.write_text(WHO, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def slurm() -> Iterator[dict[str, str]]:
    """The environment of a Slurm's user."""
    if why_no_slurm():
        pytest.skip(why_no_slurm())
    with testbed() as cluster:
        yield cluster.environment


def starters(script: Path) -> dict[str, tuple[list[str], dict[str, str]]]:
    """How each launcher starts two ranks of a script: command, environment."""
    python = [sys.executable, str(script)]
    quietly = ("--quiet", "--num_accelerators", "2", "--master_port", str(free_port()))
    return {
        "deepspeed": (["deepspeed", *quietly, str(script)], {}),
        "torchrun": (["torchrun", "--nproc-per-node", "2", "--standalone", str(script)], {}),
        "MPICH": ([MPIRUN["MPICH"][0], "-n", "2", *python], {}),
        "Open MPI": ([MPIRUN["Open MPI"][0], "-n", "2", *python], ALLOW),
        "srun": (["srun", "-N2", "-n2", *python], {}),
    }


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", *EACH_MPI, "srun"])
def test_another_world_than_announced_is_refused(
    who: Path, launcher: str, request: pytest.FixtureRequest
) -> None:
    """Each launcher by itself, without launch.sh; only mpirun's ranks ask MPI."""
    command, more = starters(who)[launcher]
    if launcher == "srun":
        more = request.getfixturevalue("slurm")
    environment = rank_environment() | more | {"LONGPRETRAIN_WORLD_SIZE": "3"}
    environment["PATH"] = f"{BIN}:{environment['PATH']}"
    finished = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=240
    )
    assert finished.returncode != 0
    speaker = "mpirun" if "MPI" in launcher else launcher
    refused = re.findall(r"refused: (.*) mpi4py: (.*)", finished.stderr)
    assert len(refused) >= 1, finished  # a launcher may end the other rank first
    for told, asked_mpi in refused:
        assert told.startswith(f"world size: got 2 from {speaker}; wanted 3. Start 3 ranks")
        assert asked_mpi == str(speaker == "mpirun")


def test_an_mpi_that_cannot_be_loaded_is_told(who: Path, tmp_path: Path) -> None:
    """That ranks of other launchers never import it: above, and test_benchmark_startup.py."""
    (tmp_path / "mpi4py.py").write_text("raise ImportError('no mpi4py here')\n", encoding="utf-8")
    environment = rank_environment()
    environment["PYTHONPATH"] = f"{tmp_path}:{environment['PYTHONPATH']}"
    finished = subprocess.run(
        [MPIRUN["MPICH"][0], "-n", "2", sys.executable, str(who)],
        env=environment, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert finished.returncode == 2
    wanted = "refused: MPI of the launcher: got no mpi4py here; wanted mpi4py and the library of "
    assert finished.stderr.count(wanted) == 2


def test_where_open_mpi_is_looked_for(tmp_path: Path) -> None:
    library = tmp_path / "lib64" / "libmpi.so.40"
    library.parent.mkdir()
    library.touch()
    started = {"OMPI_COMM_WORLD_RANK": "0", "PATH": ""}
    by_loader = "libmpi.so.40"
    assert library_of_open_mpi({"PMI_RANK": "0", "OPAL_PREFIX": str(tmp_path)}) == "", "MPICH's"
    assert library_of_open_mpi(started | {"MPI4PY_LIBMPI": "/own"}) == "", "a user has said it"
    assert library_of_open_mpi(started) == by_loader
    found = f"{library}:{by_loader}"
    assert library_of_open_mpi(started | {"OPAL_PREFIX": str(tmp_path)}) == found
    program = tmp_path / "bin" / "ompi_info"
    program.parent.mkdir()
    program.touch(0o755)
    (tmp_path / "link").symlink_to(program.parent)
    path = f"/nowhere:{tmp_path / 'link'}"
    assert library_of_open_mpi(started | {"PATH": path}) == found, "beside its programs"
