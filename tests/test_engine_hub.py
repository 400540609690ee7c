"""The hub: whom it listens to, and when it may write status.json."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from longpretrain.engine.hub import Hub, write_failed
from longpretrain.engine.lines import Lines
from longpretrain.engine.names import read_status, write_status
from longpretrain.engine.verdict import Judge

REASON = "rank 1 (process 4711 on n2) died of SIGKILL after step 12: batch"


@pytest.fixture
def run(tmp_path: Path) -> dict[str, Any]:
    """A run that goes on, as its hub knows it."""
    write_status(tmp_path, "running", reason="torchrun", step=3)
    return {"dir": str(tmp_path), "time": read_status(tmp_path)["time"]}


def test_a_run_that_goes_on_has_failed(run: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("step-000012\n")
    write_failed(run, REASON)
    told = read_status(tmp_path)
    assert (told["state"], told["reason"], told["step"]) == ("failed", REASON, 12)


def test_without_a_checkpoint_the_step_stays(run: dict[str, Any], tmp_path: Path) -> None:
    write_failed(run, REASON)
    assert read_status(tmp_path)["step"] == 3


@pytest.mark.parametrize("state", ["done", "preempted", "failed"])
def test_what_the_run_said_itself_stays(run: dict[str, Any], tmp_path: Path, state: Any) -> None:
    write_status(tmp_path, state, reason="its own", step=5)
    write_failed(run, REASON)
    assert read_status(tmp_path)["reason"] == "its own"


def test_a_newer_attempt_is_not_touched(run: dict[str, Any], tmp_path: Path) -> None:
    run["time"] -= 1.0
    write_failed(run, REASON)
    assert read_status(tmp_path)["state"] == "running"


@pytest.mark.parametrize("text", ["", "[]", '{"state": "runn'])
def test_a_damaged_status_ends_nothing(run: dict[str, Any], tmp_path: Path, text: str) -> None:
    (tmp_path / "status.json").write_text(text)
    write_failed(run, REASON)
    assert (tmp_path / "status.json").read_text() == text


def test_before_there_is_a_run_nothing_is_written(tmp_path: Path) -> None:
    write_failed({}, REASON)
    assert not [*tmp_path.iterdir()]


def test_strangers_are_not_heard() -> None:
    """The port is open to the network: whoever does not know the token says nothing here."""
    judge = Judge(1, 10.0, 0.0)
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    hub = Hub(listener, "the token", judge)
    serving = threading.Thread(target=hub.run)
    serving.start()
    stranger, liar, ours = (Lines.over(socket.create_connection(address)) for _ in range(3))
    mine = {"host": "n1", "pid": 4711, "place": "here"}
    stranger.send({"bye": 0})
    with socket.create_connection(address) as browser:
        browser.sendall(b"GET / HTTP/1.0\r\n\r\n\xff\xfe\n" + b"[" * 200_000 + b"\n")
    with socket.create_connection(address, 30) as flood, contextlib.suppress(ConnectionError):
        flood.sendall(b"x" * (32 << 20))
        assert flood.recv(1) == b""
    ours.send({"hello": 0, "token": "the token", **mine})
    assert json.dumps(wait_for(ours, "roster")["roster"]) == json.dumps([{"hello": 0, **mine}])
    liar.send({"hello": 0, "token": "a guess", **mine})
    liar.send({"died": 0, "detail": "died of SIGKILL"})
    liar.send({"bye": 0})
    ours.send({"beat": 0, "count": 1, "age_s": 0.0, "mark": "its start", "stopped_s": 0.0})
    assert wait_for(ours, "beat")["run"] == {}
    assert judge.watched[0].trouble is None
    assert not judge.watched[0].has_left
    ours.send({"bye": 0})
    assert wait_for(ours, "over") == {"over": True}
    for line in (stranger, liar, ours):
        line.close()
    serving.join(30)
    assert not serving.is_alive()


def test_ranks_that_all_end_while_stacks_are_waited_for(
    run: dict[str, Any], tmp_path: Path
) -> None:
    """A launcher or a user ends a run that hangs at the very moment that the watchdog does."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    hub = Hub(listener, "token", Judge(2, 60.0, 5.0))
    serving = threading.Thread(target=hub.run, daemon=True)
    serving.start()
    lines = [Lines.over(socket.create_connection(address, 30)) for _ in range(2)]
    for rank, line in enumerate(lines):
        line.send({"hello": rank, "token": "token", "host": f"n{rank}", "pid": 7, "place": "a"})
        wait_for(line, "roster")
    lines[0].send({"run": run})
    wait_for(lines[1], "beat")
    for line, mark in zip(lines, ("step 2: forward", "step 2: batch"), strict=True):
        count = 4 if "forward" in mark else 3
        line.send({"beat": 0, "count": count, "age_s": 9.0, "mark": mark, "stopped_s": 0.0})
    for line in lines:
        wait_for(line, "dump")
    for rank, line in enumerate(lines):
        line.send({"died": rank, "detail": "died of SIGTERM"})
        line.send({"dumped": 0})
    told = wait_for(lines[0], "verdict")
    assert told["blamed"] == 1
    who = "rank 1 (process 7 on n1) stands at step 2: batch, the others at step 2: forward"
    stacks = f"stacks of all ranks in {tmp_path / 'stacks'}"
    assert told["verdict"] == f"no progress for 5 s: {who}; {stacks}"
    assert read_status(tmp_path)["reason"] == told["verdict"]
    for line in lines:
        line.close()
    serving.join(30)
    assert not serving.is_alive()


def wait_for(line: Lines, key: str) -> dict[str, Any]:
    """The first message with a key."""
    while select.select([line.reader], [], [], 30)[0]:
        messages = line.receive()
        if messages is None:
            break
        for message in messages:
            if key in message:
                return message
    raise AssertionError(f"no {key}")
