"""TensorBoard events never end a run: no package, no room."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_disk import fill, small_disk

from longpretrain.report.tensorboard import TensorBoard


@pytest.fixture
def told() -> list[str]:
    return []


def steps(folder: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return [event.step for event in events.Scalars("train/loss")]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_costs_events_and_nothing_else(tmp_path: Path, told: list[str]) -> None:
    pytest.importorskip("tensorboard")
    with small_disk(tmp_path / "disk", kib=64) as disk:
        board = TensorBoard(disk / "tensorboard", 0, told.append)
        for step in (1, 2):
            board.scalars("train", {"step": step, "loss": 1.0, "mfu": None}, ["loss", "mfu"])
        board.flush()
        ballast = fill(disk)
        for step in range(3, 2000):
            board.scalars("train", {"step": step, "loss": 1.0}, ["loss"])
            if step % 100 == 0:
                board.flush()
        assert len(told) == 1
        assert "no space left on device" in told[0]
        ballast.unlink()
        board.flush()
        assert told[1:] == ["TensorBoard events are written again"]
        for step in (2000, 2001):
            board.scalars("train", {"step": step, "loss": 1.0}, ["loss"])
        board.close()
        board.close()
        found = steps(disk / "tensorboard")
    assert found[:2] == [1, 2]
    assert found[-2:] == [2000, 2001]
    assert found == sorted(set(found))
