"""MPI by a real mpirun: who is who, counters that no two ranks see alike, messages."""

from __future__ import annotations

import json
import subprocess

from ranks_helper import BIN, rank_environment

SCRIPT = """
import json, time
from longpretrain import mpi

world = mpi.world()
from_0 = mpi.from_rank_0(f"told by {world.rank}")
idle = 0
for phase in range(2):
    team = mpi.Team(counters=2)
    taken = []
    while (number := team.add(1, 1)) < 200:
        taken.append(number)
        team.tick()
        time.sleep(0.001)
    assert team.add(0, 0) == 0, "the other counter is left alone"
    if team.rank:
        time.sleep(1)  # rank 0 waits first
        team.send([world.rank, world.local_rank, from_0, taken], to=0)
        assert team.receive() == "thanks"
    else:
        def count():
            global idle
            idle += 1
        everyone = [[world.rank, world.local_rank, from_0, taken]]
        everyone += [team.receive(idle=count) for _ in range(team.size - 1)]
        for rank in range(1, team.size):
            team.send("thanks", to=rank)
        print(json.dumps([world.size, world.is_one_host, world.vendor, sorted(everyone), idle]))
    team.close()
"""


def test_counters_and_messages() -> None:
    finished = subprocess.run(
        [BIN / "mpirun", "-n", "3", BIN / "python", "-c", SCRIPT],
        env=rank_environment(), capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    phases = [json.loads(line) for line in finished.stdout.splitlines()]
    assert len(phases) == 2
    for size, is_one_host, vendor, everyone, idle in phases:
        assert (size, is_one_host) == (3, True)
        assert vendor
        assert [entry[:3] for entry in everyone] == [[rank, rank, "told by 0"] for rank in range(3)]
        numbers = [number for *_, taken in everyone for number in taken]
        assert sorted(numbers) == list(range(200))
        assert idle > 0
