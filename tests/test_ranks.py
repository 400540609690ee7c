"""Rank discovery from each launcher's variables; the launchers themselves run in test_launch.py."""

from __future__ import annotations

import pytest

from longpretrain.errors import InputError
from longpretrain.ranks import Ranks, discover, publish


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
    assert (found.master_addr, found.master_port, found.launcher) == ("n1", 5, "deepspeed")
    assert discover(env | {"TORCHELASTIC_RUN_ID": "x"}).launcher == "torchrun"


def test_srun_counts_only_inside_a_step() -> None:
    step = {"SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "7"}
    assert discover(step) == Ranks()  # the batch script: SLURM_PROCID is set there too
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
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, "SLURM_NTASKS: got ''"),
        ({"LONGPRETRAIN_WORLD_SIZE": "2"}, "world size: got 1 from alone; wanted 2"),
    ],
)
def test_incomplete_variables_are_refused(env: dict[str, str], message: str) -> None:
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
