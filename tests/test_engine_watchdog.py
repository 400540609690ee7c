"""A rank that dies, stops, fails or hangs is named, and all others end in time: real processes.

Two processes fork the ranks of all scenes (watchdog_ranks.py); the tests read what each scene left.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks_helper import ROOT, rank_environment
from watched import sentinels, until

from longpretrain.config import WatchdogConfig
from longpretrain.engine import zero
from longpretrain.engine.watchdog import patience
from longpretrain.ranks import Ranks

DEAD_AFTER_S = 3.0
HUNG_AFTER_S = 3.0
PAUSED_HUNG_AFTER_S = 4.0
IN_TIME_S = 15.0
STEP = "step 8: batch"
GONE = "is gone, and its node or its watchdog with it,"

# name -> (ranks, the one with the accident, accident, whether it is watched for standing still)
SCENES = {
    "killed": (2, 1, "SIGKILL", False),
    "killed, rank 0": (3, 0, "SIGKILL", False),
    "segmentation fault": (2, 1, "SIGSEGV", False),
    "stopped": (2, 1, "SIGSTOP", False),
    "stopped, rank 0": (3, 0, "SIGSTOP", False),
    "left with 0": (2, 1, "leave", False),
    "failed": (3, 1, "error", False),
    "all failed": (2, -1, "all fail", False),
    "node gone": (2, 1, "node", False),
    "node of rank 0 gone": (3, 0, "node", False),
    "sentinel killed": (2, 1, "sentinel", False),
    "busy": (2, 1, "busy in C", False),
    "no accident": (3, -1, "", True),
    "paused": (2, 0, "pause of all", True),
    "paused, not the sentinels": (2, 0, "pause by Ctrl-Z", True),
    "signals": (2, -1, "signals", False),
    "hung": (3, 1, "hang", True),
    "hung in C": (2, 1, "hang in C", True),
    "alone, killed": (1, 0, "SIGKILL", False),
    "alone, hung": (1, 0, "hang", True),
    "alone, failed": (1, 0, "error", False),
}


@dataclass(frozen=True)
class Played:
    """What a scene left."""

    folder: Path
    codes: list[int]
    seconds: list[float]
    pids: list[int]

    @property
    def reason(self) -> str:
        """Of status.json, once it is there."""
        deadline = time.monotonic() + 20
        while (status := self.status())["state"] == "running" and time.monotonic() < deadline:
            time.sleep(0.05)
        assert status["state"] == "failed"
        return str(status["reason"])

    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = json.loads((self.folder / "status.json").read_text())
        return status

    def output(self, rank: int) -> list[str]:
        return (self.folder / f"out-{rank}.txt").read_text().splitlines()


class _Stage:
    """A process that plays one scene after another."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "watchdog_ranks.py")],
            cwd=ROOT,
            env=rank_environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._turn = ThreadPoolExecutor(1)

    def play(self, scene: dict[str, Any]) -> Future[Played]:
        return self._turn.submit(self._play, scene)

    def _play(self, scene: dict[str, Any]) -> Played:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(scene) + "\n")
        self._process.stdin.flush()
        return Played(Path(scene["folder"]), **json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._turn.shutdown(cancel_futures=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Future[Played]]]:
    """All of them, on two stages."""
    folder = tmp_path_factory.mktemp("watchdog")
    stages = [_Stage(), _Stage()]
    played = {}
    try:
        for number, (name, (ranks, at, accident, watched)) in enumerate(SCENES.items()):
            place = folder / str(number)
            place.mkdir()
            scene = {"folder": str(place), "ranks": ranks, "at": at, "accident": accident}
            scene |= {"step": 8, "dead_after_s": DEAD_AFTER_S}
            patience_s = HUNG_AFTER_S if accident else 20.0  # a busy machine may stand still
            patience_s = PAUSED_HUNG_AFTER_S if "pause" in accident else patience_s
            scene |= {"hung_after_s": patience_s if watched else 0}
            played[name] = stages[number % 2].play(scene)
        yield played
    finally:
        for stage in stages:
            stage.close()


def check_survivors(scene: Played, culprit: int, line: str) -> None:
    """Each ended in time with 1 and one line, which status.json says, too."""
    assert re.fullmatch(line, scene.reason), scene.reason
    for rank, code in enumerate(scene.codes):
        if rank != culprit:
            place = f" (rank {rank})" if rank else ""
            assert scene.output(rank) == [f"longpretrain train{place}: {scene.reason}"]
            assert code == 1
            assert scene.seconds[rank] < IN_TIME_S


def named(scene: Played, rank: int) -> str:
    return rf"rank {rank} \(process {scene.pids[rank]} on \S+\)"


@pytest.mark.parametrize(
    ("name", "culprit", "told"),
    [
        ("killed", 1, f"died of SIGKILL after {STEP}"),
        ("killed, rank 0", 0, f"died of SIGKILL after {STEP}"),
        ("segmentation fault", 1, f"died of SIGSEGV after {STEP}"),
        ("left with 0", 1, f"ended with exit code 0 after {STEP}"),
        ("stopped", 1, rf"does not answer \(stopped for \d+ s\) after {STEP}"),
        ("stopped, rank 0", 0, rf"does not answer \(stopped for \d+ s\) after {STEP}"),
        ("failed", 1, rf"failed after {STEP}: OSError: \[Errno 5\] Input/output error"),
        # Or the sentinel of another rank, which lives on the same node here, saw the rank's end.
        ("node gone", 1, rf"(died of SIGKILL|{GONE}) after .+"),
    ],
)
def test_a_lost_rank_is_named(
    scenes: dict[str, Future[Played]], name: str, culprit: int, told: str
) -> None:
    scene = scenes[name].result()
    # Who started the rank may take the answer away before the sentinel can look.
    told = re.sub(r"died of \w+|ended with exit code 0", r"(\g<0>|died)", told)
    check_survivors(scene, culprit, rf"{named(scene, culprit)} {told}")


def test_a_stopped_rank_does_not_keep_its_launcher_waiting(
    scenes: dict[str, Future[Played]],
) -> None:
    for name, rank in (("stopped", 1), ("stopped, rank 0", 0)):
        scene = scenes[name].result()
        assert scene.codes[rank] == -signal.SIGKILL
        assert scene.seconds[rank] < IN_TIME_S
        # Where all ranks are stopped, rank 0's sentinel is the only one that can tell.
        assert scene.output(rank) == ([] if rank else [f"longpretrain train: {scene.reason}"])


def test_a_rank_with_an_error_of_its_own_tells_it_itself(
    scenes: dict[str, Future[Played]],
) -> None:
    assert scenes["failed"].result().output(1) == ["raised OSError: [Errno 5] Input/output error"]


def test_an_error_of_all_ranks_is_told_by_each(scenes: dict[str, Future[Played]]) -> None:
    scene = scenes["all failed"].result()
    for rank in (0, 1):
        assert scene.output(rank) == ["raised FloatingPointError: too many updates without effect"]
    assert scene.status()["state"] == "running", "the run's own code says how it ended"


def test_the_node_of_rank_0(scenes: dict[str, Future[Played]]) -> None:
    """With it the hub is gone: each of the others says so."""
    scene = scenes["node of rank 0 gone"].result()
    told = rf"{GONE} when this rank was at step 8: .+"
    assert re.fullmatch(rf"{named(scene, 0)} {told}", scene.reason)
    for rank in (1, 2):
        assert scene.codes[rank] == 1
        assert scene.seconds[rank] < IN_TIME_S
        (line,) = scene.output(rank)
        assert re.fullmatch(rf"longpretrain train \(rank {rank}\): {named(scene, 0)} {told}", line)


def test_a_rank_without_its_sentinel_ends(scenes: dict[str, Future[Played]]) -> None:
    scene = scenes["sentinel killed"].result()
    check_survivors(scene, 1, rf"{named(scene, 1)} {GONE} after .+")
    assert scene.codes[1] == 1
    told = r"longpretrain train \(rank 1\): the watchdog of rank 1 .* ended \(exit code -9\)"
    assert re.fullmatch(told, scene.output(1)[0])


@pytest.mark.parametrize(
    "name", ["busy", "no accident", "signals", "paused", "paused, not the sentinels"]
)
def test_ranks_that_work_are_left_alone(scenes: dict[str, Future[Played]], name: str) -> None:
    """Also one that holds the interpreter for longer than a dead rank's silence, and a run that is
    paused for longer than ranks may stand still.
    """
    scene = scenes[name].result()
    assert set(scene.codes) == {0}
    for rank in range(len(scene.codes)):
        assert scene.output(rank) == ["through"]
    assert scene.status()["state"] == "running"
    assert not (scene.folder / "stacks").exists()


@pytest.mark.parametrize(("name", "culprit"), [("hung", 1), ("hung in C", 1), ("alone, hung", 0)])
def test_a_hung_rank_is_named_with_stacks_of_all(
    scenes: dict[str, Future[Played]], name: str, culprit: int
) -> None:
    scene = scenes[name].result()
    others = ", the others at step 8: forward and backward" if len(scene.codes) > 1 else ""
    stacks = re.escape(f"; stacks of all ranks in {scene.folder / 'stacks'}")
    who = rf"{named(scene, culprit)} stands at {STEP}{others}"
    check_survivors(scene, culprit, rf"no progress for {HUNG_AFTER_S:g} s: {who}{stacks}")
    for rank in range(len(scene.codes)):
        text = (scene.folder / "stacks" / f"rank-{rank:05d}.txt").read_text()
        assert f"rank {rank}, process {scene.pids[rank]}, at step 8" in text
        inside = "accident" if rank == culprit else "all_reduce"
        assert f" in {inside}\n" in text
    # One that holds its interpreter cannot end itself: its sentinel kills it.
    assert scene.codes[culprit] == (-signal.SIGKILL if name == "hung in C" else 1)
    assert scene.seconds[culprit] < IN_TIME_S


def test_a_run_of_one_that_was_killed_leaves_a_word(scenes: dict[str, Future[Played]]) -> None:
    scene = scenes["alone, killed"].result()
    assert re.fullmatch(rf"{named(scene, 0)} died( of SIGKILL)? after {STEP}", scene.reason)


def test_a_run_of_one_that_failed_is_not_watched_any_more(
    scenes: dict[str, Future[Played]],
) -> None:
    scene = scenes["alone, failed"].result()
    assert scene.codes == [1]
    assert scene.output(0) == ["raised OSError: [Errno 5] Input/output error"]


def test_no_sentinel_outlives_its_rank_for_long(scenes: dict[str, Future[Played]]) -> None:
    ranks = {pid for scene in scenes.values() for pid in scene.result().pids}
    until(lambda: not ranks & {facts["pid"] for _, facts in sentinels()}, "sentinels are left")


def test_the_collectives_own_timeout_is_the_longer_one() -> None:
    for hung_after_s in (1.0, 1800.0, 1e5):
        waits = patience(WatchdogConfig(hung_after_s=hung_after_s)).total_seconds()
        assert waits > hung_after_s + DEAD_AFTER_S
    assert patience(WatchdogConfig(hung_after_s=0)).days >= 30


@pytest.mark.usefixtures("process_group")
def test_all_groups_have_that_timeout() -> None:
    """DeepSpeed's own, which it makes without one, too."""
    device = torch.device("cpu")
    zero.start_ranks(Ranks(), device, timeout=timedelta(seconds=777))
    groups = [dist.group.WORLD, dist.new_group([0])]
    timeouts = [group._get_backend(device).options._timeout for group in groups]
    zero.start_ranks(Ranks(), device)
    dist.destroy_process_group(groups[1])
    assert timeouts == [timedelta(seconds=777)] * 2
