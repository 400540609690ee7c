"""Ranks that do not fit are named in seconds, by every rank that can know: real processes."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from ranks_helper import ROOT, rank_environment
from torch.distributed import PrefixStore, TCPStore

from longpretrain.engine import meeting
from longpretrain.errors import InputError, RankLostError
from longpretrain.ranks import Ranks, free_port

# A rank up to the process group, without the imports of the rest.
RANK = """
import signal, sys
import torch.distributed as dist
from longpretrain.engine.meeting import meet
from longpretrain.engine.signals import StopRequest
from longpretrain.errors import InputError, RankLostError
from longpretrain.ranks import discover

try:
    with StopRequest() as stop:
        print("waits", flush=True)
        store = meet(discover(), lambda: stop.asked)
except InputError as error:
    sys.exit(f"refused: {error}")
dist.init_process_group("gloo")
dist.barrier()
print("met", flush=True)
dist.destroy_process_group()
"""


def started(
    port: int, rank: int, world_size: int, command: Sequence[str] = (), **more: str
) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *(command or ("-c", RANK))],
        cwd=ROOT,
        env=rank_environment()
        | {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        | {"LONGPRETRAIN_JOIN_TIMEOUT_S": "60", **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(*processes: subprocess.Popen[str]) -> list[str]:
    """What each process said last, once all have ended."""
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(out + err).strip().splitlines()[-1] for out, err in outputs]


def test_ranks_meet_and_form_their_group_at_the_same_port() -> None:
    port = free_port()
    assert ends(*(started(port, rank, 2) for rank in (1, 0))) == ["met", "met"]


@pytest.mark.parametrize("sizes", [(2, 3), (3, 2)], ids=["more at rank 1", "fewer at rank 1"])
def test_world_sizes_that_differ_are_refused_by_both(sizes: tuple[int, int]) -> None:
    port = free_port()
    began = time.monotonic()
    told = ends(*(started(port, rank, size) for rank, size in enumerate(sizes)))
    assert time.monotonic() - began < 50, "within seconds, not at the timeout"
    wanted = rf"refused: world size: got {sizes[1]} at rank 1 \(.*\) and {sizes[0]} at rank 0 \(.*"
    for line in told:
        assert re.fullmatch(wanted, line)


@pytest.mark.parametrize(
    ("numbers", "twice"), [((0, 1, 1), 1), ((0, 0), 0)], ids=["rank 1", "rank 0"]
)
def test_a_rank_number_twice_is_refused_by_all(numbers: tuple[int, ...], twice: int) -> None:
    port = free_port()
    told = ends(*(started(port, number, 3) for number in numbers))
    assert len(set(told)) == 1
    assert re.match(rf"refused: rank {twice}: got it twice: process \d+ on ", told[0])


def test_a_run_of_one_tells_a_rank_of_two_that_it_is_wrong() -> None:
    """Rank 0 cannot know; rank 1 does not wait for the timeout."""
    with socket.socket() as hold:
        hold.bind(("127.0.0.1", 0))
        port = hold.getsockname()[1]
    store = meeting.meet(Ranks(master_port=port), lambda: False)
    told = ends(started(port, 1, 2))
    assert re.match(r"refused: world size: got 2 at rank 1 \(.*\) and 1 at rank 0 ", told[0])
    del store


def test_who_did_not_come_is_named() -> None:
    port = free_port()
    second = started(port, 2, 4)
    assert second.stdout is not None
    assert second.stdout.readline() == "waits\n"
    told = ends(started(port, 0, 4, LONGPRETRAIN_JOIN_TIMEOUT_S="4"), second)
    for line in told:
        assert line.startswith("refused: ranks: got 2 of 4 in 4 s; rank 1, 3 did not come; wanted")


def test_a_rank_that_came_and_ended_is_not_waited_for() -> None:
    """Rank 2 of 3 never comes; the end of rank 1, which is known, is told at once."""
    port = free_port()
    first, second = started(port, 0, 3), started(port, 1, 3)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    store = PrefixStore("longpretrain-meeting-0", store)
    store.wait(["rank 1"], timedelta(seconds=60))
    second.kill()
    told = ends(first)
    second.communicate()
    signed = rf"refused: rank 1: got its end \(process {second.pid} on \S+\) while ranks met; .*"
    assert re.fullmatch(signed, told[0])


def test_no_rank_0_is_named() -> None:
    told = ends(started(free_port(), 1, 2, LONGPRETRAIN_JOIN_TIMEOUT_S="1"))
    assert re.match(r"refused: rank 0: got no answer for rank 1 at 127.0.0.1:\d+; ", told[0])


def test_a_port_of_another_program_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that listens and says nothing, which would hold a TCPStore for ever."""
    monkeypatch.setattr(meeting, "_FAREWELL_S", 0.5)
    monkeypatch.setenv("LONGPRETRAIN_JOIN_TIMEOUT_S", "1")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=rf"got 127.0.0.1:{port}, where rank 0 cannot listen"):
            meeting.meet(Ranks(world_size=2, master_port=port), lambda: False)
        with pytest.raises(RankLostError, match="rank 0: got no answer for rank 1"):
            meeting.meet(Ranks(rank=1, world_size=2, master_port=port), lambda: False)


def test_who_does_not_come_may_do_another_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bad input, after which a job would not be requeued: a node or its network is to blame."""
    monkeypatch.setenv("LONGPRETRAIN_JOIN_TIMEOUT_S", "1")
    with pytest.raises(RankLostError, match=r"ranks: got 1 of 2 in 1 s; rank 1 did not come"):
        meeting.meet(Ranks(world_size=2, master_port=free_port()), lambda: False)


def test_a_signal_ends_the_wait() -> None:
    waiting = started(free_port(), 0, 2)
    assert waiting.stdout is not None
    assert waiting.stdout.readline() == "waits\n"
    waiting.terminate()
    assert ends(waiting) == ["KeyboardInterrupt"]


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_wrong_timeout_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("LONGPRETRAIN_JOIN_TIMEOUT_S", text)
    with pytest.raises(InputError, match=f"JOIN_TIMEOUT_S: got {text}; wanted seconds"):
        meeting.join_timeout_s()


def test_the_train_verb_ends_with_2_and_one_line(small_run: Path, tmp_path: Path) -> None:
    words = ["train", str(small_run / "recipe.yaml"), f"run.dir={tmp_path / 'run'}"]
    port = free_port()
    ranks = [
        started(port, rank, size, ("-m", "longpretrain", *words)) for rank, size in ((0, 2), (1, 4))
    ]
    for process in ranks:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 2, errors
        assert output == ""
        assert re.fullmatch(r"longpretrain train.*: world size: got 4 at rank 1 .*\.\n", errors)
    assert not (tmp_path / "run").exists()
