"""The run folder and its checkpoints: what is kept, refused, moved aside, and said at the end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longpretrain.config import Config
from longpretrain.engine import checkpoint, run_folder
from longpretrain.engine.loop import _seed_dropout
from longpretrain.engine.signals import StopRequest
from longpretrain.errors import InputError
from longpretrain.ranks import Ranks
from longpretrain.recipe import from_tree


def config(run_dir: Path, **sections: dict[str, object]) -> Config:
    return from_tree({"run": {"dir": str(run_dir)}, **sections})


def make_checkpoint(run_dir: Path, step: int, *, latest: bool = True) -> None:
    folder = run_dir / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"format": 1, "step": step, "files": {}}))
    if latest:
        (folder.parent / "latest").write_text(folder.name + "\n")


def steps(run_dir: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run_dir / "checkpoints").glob("step-*"))


def test_old_checkpoints_go_by_number_and_left_time_lines_too(tmp_path: Path) -> None:
    for step in (999_000, 999_500, 1_000_000, 1_000_500):
        make_checkpoint(tmp_path, step)
    part = tmp_path / "checkpoints" / ".step-000007.part"
    part.mkdir()
    checkpoint._remove_old(tmp_path / "checkpoints", 1_000_000, 2)
    assert steps(tmp_path) == [999_500, 1_000_000]
    assert not part.exists()
    checkpoint._remove_old(tmp_path / "checkpoints", 1_000_000, 0)
    assert steps(tmp_path) == [999_500, 1_000_000]


@pytest.mark.parametrize("state", ["{", "[]", '{"format": 99}'])
def test_damaged_state_is_refused(tmp_path: Path, state: str) -> None:
    make_checkpoint(tmp_path, 3)
    folder = checkpoint.latest(tmp_path)
    assert folder is not None
    (folder / "state.json").write_text(state)
    with pytest.raises(InputError, match=r"state\.json: got "):
        checkpoint.read_state(folder)


def test_latest_that_names_nothing_is_refused(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 3)
    (tmp_path / "checkpoints" / "latest").write_text("step-000009\n")
    with pytest.raises(InputError, match="step-000009, which is no checkpoint"):
        checkpoint.latest(tmp_path)


def test_foreign_folders_are_neither_written_nor_moved(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for fresh in (False, True):
        for place in (tmp_path, tmp_path / "file"):
            with pytest.raises(InputError, match="something that is no run"):
                run_folder.check_run_dir(config(place), fresh=fresh)
    run_folder.check_run_dir(config(tmp_path / "new"), fresh=True)


def test_fresh_does_not_move_its_own_inputs(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    inside = config(run_dir, data={"train": str(run_dir / "data")})
    run_folder.open_run(inside, fresh=False)
    with pytest.raises(InputError, match="inside the run folder that --fresh would move"):
        run_folder.check_run_dir(inside, fresh=True)


def test_another_recipe_is_refused_once_there_is_work_to_lose(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_folder.open_run(config(run_dir), fresh=False)
    other = config(run_dir, optim={"lr": 1.0})
    run_folder.check_run_dir(other, fresh=False)  # no checkpoint yet: a mended start
    make_checkpoint(run_dir, 3)
    with pytest.raises(InputError, match=r"optim\.lr was 3e-05 and is now 1\.0"):
        run_folder.check_run_dir(other, fresh=False)
    run_folder.check_run_dir(other, fresh=True)
    assert run_folder.open_run(other, fresh=True) == tmp_path / "run.old-1"
    assert steps(tmp_path / "run.old-1") == [3]
    assert checkpoint.latest(run_dir) is None
    (tmp_path / "run.old-1" / "config.yaml").write_text("a: [")
    with pytest.raises(InputError, match="wanted the recipe of the run"):
        run_folder.check_run_dir(config(tmp_path / "run.old-1"), fresh=False)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    refused = pytest.raises(InputError, match="a run that is going on")
    with run_folder.only_writer(tmp_path), refused, run_folder.only_writer(tmp_path):
        pass
    with run_folder.only_writer(tmp_path):
        pass


@pytest.mark.usefixtures("process_group")
class TestStatus:
    def test_the_first_failure_is_kept(self, tmp_path: Path) -> None:
        settings = config(tmp_path)
        with pytest.raises(OSError, match="on fire"), run_folder.status(settings, Ranks()):
            raise OSError("the disk is on fire")
        told = run_folder.read_status(tmp_path)
        assert (told["state"], told["step"]) == ("failed", 0)
        assert told["reason"] == "rank 0: OSError: the disk is on fire"
        second = Ranks(rank=1, world_size=2)
        with pytest.raises(RuntimeError), run_folder.status(settings, second):
            run_folder.write_status(tmp_path, "failed", reason="rank 0: the cause", step=0)
            raise RuntimeError("connection closed by peer")
        assert run_folder.read_status(tmp_path)["reason"] == "rank 0: the cause"

    def test_an_end_is_not_overwritten(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit), run_folder.status(config(tmp_path), Ranks()) as end:
            end("preempted", "SIGTERM", 5)
            raise SystemExit(143)
        assert run_folder.read_status(tmp_path)["state"] == "preempted"


@pytest.mark.parametrize("seed", [0, 20_250_101, 2**62])
def test_any_seed_seeds_dropout(seed: int) -> None:
    import torch

    draws = set()
    for step, rank in ((1, 0), (1, 1), (2, 0)):
        _seed_dropout(seed, step, rank)
        draws.add(float(torch.rand(())))
    assert len(draws) == 3


def test_second_interrupt_stops_at_once() -> None:
    import os
    import signal

    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.asked, stop.signal_name) == (True, "SIGTERM")
        os.kill(os.getpid(), signal.SIGINT)
