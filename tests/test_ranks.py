"""Rank discovery from each launcher's variables; the launchers themselves run in test_launch.py."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

import pytest

from longpretrain.errors import InputError
from longpretrain.ranks import Ranks, address_for_others, discover, publish


def test_alone() -> None:
    assert discover({}) == Ranks()


def test_torchrun_and_deepspeed() -> None:
    env = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "5",
    }
    found = discover(env)
    assert (found.rank, found.world_size, found.local_rank) == (3, 4, 1)
    assert (found.master_addr, found.master_port) == ("n1", 5)
    assert found.launcher == "RANK and WORLD_SIZE"
    assert discover(env | {"TORCHELASTIC_RUN_ID": "x"}).launcher == "torchrun"
    assert discover(env | {"CROSS_RANK": "0", "CROSS_SIZE": "1"}).launcher == "deepspeed"


def test_srun_counts_only_inside_a_step() -> None:
    step = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7"}
    batch = step | {"SLURM_NTASKS": "1"}
    assert discover(batch) == Ranks()  # the batch script: SLURM_PROCID is set there too
    found = discover(step | {"SLURM_STEP_ID": "0"})
    assert (found.rank, found.world_size, found.local_rank, found.launcher) == (1, 2, 1, "srun")
    other = discover(step | {"SLURM_STEP_ID": "0", "SLURM_JOB_ID": "8"})
    assert found.master_port != other.master_port
    assert discover(step | {"SLURM_STEP_ID": "0", "MASTER_PORT": "99"}).master_port == 99


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "without MASTER_PORT"),
        ({"RANK": "x", "WORLD_SIZE": "1"}, "environment variable RANK: got 'x'"),
        ({"RANK": "5", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "RANK: got rank 5 of 2"),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, "SLURM_NTASKS: got ''"),
        ({"LONGPRETRAIN_WORLD_SIZE": "2"}, "world size: got 1 from alone; wanted 2"),
    ],
)
def test_incomplete_variables_are_refused(env: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        discover(env)


def test_other_hosts_are_not_sent_to_themselves() -> None:
    """Whatever this host's own files say of its name, which is 127.0.1.1 on a plain Debian."""
    address = address_for_others()
    assert address == socket.gethostname() or not ipaddress.ip_address(address).is_loopback


STEP = {
    "SLURM_STEP_ID": "0", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_STEP_NODELIST": "n[1-2]",
}  # fmt: skip


class TestAddressUnderSrun:
    """Rank 0 is on the first node of the step. ``scontrol`` is a stand-in."""

    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scontrol = tmp_path / "scontrol"
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def answers(self, script: str) -> None:
        self.scontrol.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        self.scontrol.chmod(0o755)

    def test_of_the_first_node(self) -> None:
        self.answers('[ "$*" = "show hostnames n[1-2]" ] && echo localhost && echo n2')
        assert discover(STEP).master_addr == "127.0.0.1"
        self.answers("echo 192.0.2.7; echo n2")  # an address is its own name
        assert discover(STEP).master_addr == "192.0.2.7"

    @pytest.mark.parametrize("script", ["exit 1", "true", "echo no-such-host.invalid"])
    def test_without_an_answer_several_nodes_are_refused(self, script: str) -> None:
        self.answers(script)
        with pytest.raises(InputError, match=r"no answer for the nodes n\[1-2\].*Set MASTER_ADDR"):
            discover(STEP)
        assert discover(STEP | {"MASTER_ADDR": "n1"}).master_addr == "n1"
        alone = discover(STEP | {"SLURM_STEP_NODELIST": "n1"})
        assert alone.master_addr == "127.0.0.1", "a step of one node needs no name"


@pytest.mark.parametrize("many", [{"SLURM_NTASKS": "4"}, {"SLURM_JOB_NUM_NODES": "2"}], ids=str)
def test_one_process_beside_the_tasks_of_a_slurm_job_is_refused(many: dict[str, str]) -> None:
    """A batch script that forgot srun: it would train as a world of one."""
    batch = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"} | many
    with pytest.raises(InputError, match=r"got 1, in a Slurm job of \d tasks on \d nodes"):
        discover(batch)
    assert discover(batch | {"LONGPRETRAIN_WORLD_SIZE": "1"}) == Ranks(), "on purpose"
    assert discover(batch | {"RANK": "0", "WORLD_SIZE": "1"}).world_size == 1, "by a launcher"


TORCH = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "5"}
SLURM = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "7"}
OTHER_SLURM = SLURM | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
PMI = {"PMI_RANK": "1", "PMI_SIZE": "2"}
SHELL = OTHER_SLURM | {"SLURM_PTY_PORT": "9", "SLURM_STEP_NUM_TASKS": "1"}


@pytest.mark.parametrize(
    ("env", "launcher"),
    [
        pytest.param(SLURM | PMI, "srun", id="srun speaks PMI as well"),
        pytest.param(SLURM | {"PMIX_RANK": "1"}, "srun", id="srun speaks PMIx as well"),
        pytest.param(SLURM | TORCH, "RANK and WORLD_SIZE", id="a wrapper under srun"),
        pytest.param(
            SLURM | {"RANK": "1", "WORLD_SIZE": "2"}, "srun", id="a wrapper that sets no port"
        ),
        pytest.param(
            OTHER_SLURM | TORCH | {"TORCHELASTIC_RUN_ID": "x"}, "torchrun", id="torchrun in srun"
        ),
        pytest.param(
            OTHER_SLURM | TORCH | {"CROSS_RANK": "0", "CROSS_SIZE": "1"},
            "deepspeed",
            id="deepspeed in srun",
        ),
        pytest.param(
            {"PMI_RANK": "0", "PMI_SIZE": "1"} | TORCH | {"TORCHELASTIC_RUN_ID": "x"},
            "torchrun",
            id="torchrun in mpirun",
        ),
        pytest.param(
            OTHER_SLURM | TORCH | {"LONGPRETRAIN_LAUNCHER": "srun"}, "srun", id="srun named"
        ),
        pytest.param(
            OTHER_SLURM | TORCH | {"LONGPRETRAIN_LAUNCHER": "deepspeed"},
            "deepspeed",
            id="deepspeed named",
        ),
        pytest.param(SHELL, "alone", id="a shell of srun --pty"),
        pytest.param(
            SHELL | {"PMI_RANK": "0", "PMI_SIZE": "1"}, "alone", id="such a shell with PMI"
        ),
        pytest.param(SHELL | TORCH, "RANK and WORLD_SIZE", id="ranks started in such a shell"),
        pytest.param(
            SHELL | {"LONGPRETRAIN_LAUNCHER": "srun"}, "srun", id="launch.sh's srun in such a shell"
        ),
        pytest.param(
            SHELL | SLURM | {"SLURM_STEP_NUM_TASKS": "2"}, "srun", id="srun -n2 in such a shell"
        ),
    ],
)
def test_of_several_launchers_the_inner_one_counts(env: dict[str, str], launcher: str) -> None:
    assert discover(env).launcher == launcher


@pytest.mark.parametrize(
    ("env", "first", "second"),
    [
        (
            OTHER_SLURM | PMI,
            "rank 0 of 1 from Slurm's SLURM_PROCID and SLURM_NTASKS",
            "rank 1 of 2 from MPI's",
        ),
        (OTHER_SLURM | {"PMIX_RANK": "1"}, "rank 0 of 1 from Slurm's", "rank 1 from MPI's"),
        (
            OTHER_SLURM | {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            "rank 0 of 1 from Slurm's",
            "rank 1 of 2 from MPI's",
        ),
        (TORCH | OTHER_SLURM, "rank 1 of 2 from RANK and WORLD_SIZE", "rank 0 of 1 from Slurm's"),
        (
            {"RANK": "0", "WORLD_SIZE": "1"} | PMI,
            "rank 0 of 1 from RANK and WORLD_SIZE",
            "rank 1 of 2 from MPI's",
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "4"} | SLURM,
            "rank 1 of 4 from RANK and WORLD_SIZE",
            "rank 1 of 2 from Slurm's",
        ),
    ],
)
def test_launchers_that_contradict_each_other_are_refused(
    env: dict[str, str], first: str, second: str
) -> None:
    with pytest.raises(InputError) as caught:
        discover(env)
    text = str(caught.value)
    assert first in text
    assert second in text
    assert "LONGPRETRAIN_LAUNCHER=" in text
    assert ("srun" in text) == ("SLURM_STEP_ID" in env)
    assert ("mpirun" in text) == ("MPI" in second)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"LONGPRETRAIN_LAUNCHER": "ssh"}, "got ssh; wanted deepspeed or torchrun or srun"),
        ({"LONGPRETRAIN_LAUNCHER": "mpirun"}, "got mpirun, which did not start this process"),
        (TORCH | {"LONGPRETRAIN_LAUNCHER": "srun"}, "got srun, which did not start this process"),
    ],
)
def test_a_named_launcher_must_have_started_us(env: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        discover(env)


def test_publish_sets_what_torch_reads() -> None:
    env: dict[str, str] = {}
    publish(Ranks(rank=1, world_size=2, local_rank=1, master_port=1234), env)
    assert env == {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1234",
    }


@pytest.mark.parametrize(("size", "wanted"), [(1, "1 rank by srun"), (2, "2 ranks by srun")])
def test_summary(size: int, wanted: str) -> None:
    assert Ranks(world_size=size, launcher="srun").summary == wanted
