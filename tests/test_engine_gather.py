"""A rank's share of a checkpoint: every tensor once, whole, with DeepSpeed's own bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import gather_driver
import pytest
import torch
from ranks_helper import ROOT, rank_environment

from longpretrain.engine.gather import Share, _places
from longpretrain.engine.zero import ZeroEngine
from longpretrain.recipe import from_tree


def test_same_bits_at_every_stage() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    process = subprocess.Popen(
        [*launcher, "--nproc-per-node", "3", str(ROOT / "tests" / "gather_driver.py")],
        cwd=ROOT,
        env=rank_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-3000:]
    lost = [line for line in output.splitlines() if line.startswith("lost: ")]
    assert len(lost) == 2, "those that stay are told, and do not wait for ever"
    late = [line for line in output.splitlines() if line.startswith("late: ")]
    assert len(late) == 2, "those that come in time wait no longer than told"
    assert all("gathering a checkpoint failed" in line for line in lost + late)
    found = dict(line.split(": ") for line in output.splitlines() if line[1:4] in ("p32", "f16"))
    assert len(found) == len(gather_driver.PAIRS)
    for pair, line in found.items():
        held = json.loads(line)
        assert len(held) == 3
        if not pair.endswith(("1", "2")):  # there one parameter is nearly all
            assert all(held), f"{pair}: each rank writes something"


class TestPlaces:
    """Who writes what; 8 elements each."""

    class Engine:
        trained_names = ("a", "b", "c")

        @staticmethod
        def whole_shape(name: str) -> torch.Size:
            return torch.Size([2, 4])

    def owners(self, *spans: list[tuple[int, int]]) -> list[tuple[int, bool]]:
        places = _places(self.Engine(), spans)  # type: ignore[arg-type]
        return [(place.owner, place.travels) for place in places]

    def test_whole_everywhere_is_shared_evenly(self) -> None:
        whole = [(0, 8)] * 3
        assert self.owners(whole, whole) == [(0, False), (1, False), (0, False)]

    def test_who_holds_much_of_it_writes_it(self) -> None:
        first, second = [(0, 8), (0, 3), (0, 0)], [(0, 0), (3, 5), (0, 8)]
        assert self.owners(first, second) == [(0, False), (1, True), (1, False)]

    def test_cut_into_equal_parts(self) -> None:
        first, second = [(0, 4)] * 3, [(4, 4)] * 3
        assert self.owners(first, second) == [(0, True), (1, True), (0, True)]


@pytest.mark.usefixtures("process_group")
def test_the_copy_stays_as_it_was_and_its_memory_is_used_again() -> None:
    torch.manual_seed(0)
    engine = ZeroEngine(gather_driver.Odd(), from_tree({"precision": "fp32"}), accumulation=1)
    share = Share(engine, gather_driver.Names())  # type: ignore[arg-type]
    taken = gather_driver.taken(share)["model"]
    before = gather_driver.bits(taken)
    engine.set_learning_rate(0.1)
    engine.backward(engine(torch.ones(2, 7)))
    assert engine.step().applied
    assert gather_driver.bits(taken) == before
    again = gather_driver.taken(share)["model"]
    assert gather_driver.bits(again) != before
    assert again["last.bias"].data_ptr() == taken["last.bias"].data_ptr()
    share.release()
    assert gather_driver.bits(gather_driver.taken(share)["model"]) == gather_driver.bits(again)
    engine._engine.destroy()
