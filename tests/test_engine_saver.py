"""Saves while training goes on, one rank and a small model: what is saved is what there was when
the save began; a save that fails costs no more than the save.

On real disks that fill up: test_engine_saver_disks.py. Killed at random moments: tests/faults; at
each step on the disk: test_engine_complete.py.
"""

from __future__ import annotations

import errno
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gather_driver
import pytest
import torch
from checkpoint_files import names
from safetensors.torch import load_file

from longpretrain.engine import checkpoint, saver
from longpretrain.engine.gather import GatherError, Share
from longpretrain.engine.saver import Saver
from longpretrain.engine.zero import ZeroEngine
from longpretrain.recipe import from_tree
from longpretrain.report.metrics import MetricsLog, read_metrics

pytestmark = pytest.mark.usefixtures("process_group")
PATIENCE_S = 60


class Gate:
    """A task whose small files take as long as a test wants: a slow disk."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.open.set()
        self.error: Exception | None = None

    stored_names = staticmethod(gather_driver.Names.stored_names)
    stored = staticmethod(gather_driver.Names.stored)

    def write_model_files(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}", encoding="utf-8")
        self.entered.set()
        assert self.open.wait(PATIENCE_S)
        if self.error is not None:
            raise self.error


class Run:
    """An engine, a saver, and steps as the loop makes them."""

    def __init__(self, run_dir: Path, **settings: Any) -> None:
        tree = {"run": {"dir": str(run_dir)}, "precision": "fp32", "checkpoint": settings}
        self.run_dir, self.config = run_dir, from_tree(tree)
        torch.manual_seed(0)
        self.engine = ZeroEngine(gather_driver.Odd(), self.config, accumulation=1)
        self.engine.set_learning_rate(0.1)
        self.task, self.step = Gate(), 0
        self.metrics = MetricsLog(run_dir, total_steps=100, tensorboard=False)
        self.marks: list[str] = []
        self.saver = self.new_saver()

    def new_saver(self) -> Saver:
        return Saver(
            self.config, self.engine, self.task, self.metrics,  # type: ignore[arg-type]
            step=0, mark=self.marks.append,
        )  # fmt: skip

    def update(self) -> None:
        self.engine.backward(self.engine(torch.full((2, 7), float(self.step))))
        assert self.engine.step().applied
        self.step += 1
        self.saver.advance(self.saver.flags())

    def state(self) -> dict[str, Any]:
        counts = {"step": self.step, "samples_done": self.step, "skipped": 0}
        return {**counts, "updates_applied": self.engine.updates_applied, "task": {}}

    def weights(self) -> dict[str, list[int]]:
        return gather_driver.bits({n: self.engine.full_state(n) for n in self.engine.trained_names})

    def saved(self, step: int) -> dict[str, list[int]]:
        folder = self.run_dir / "checkpoints" / f"step-{step:06d}"
        checkpoint.verify_files(folder)
        found = load_file(folder / "model.safetensors")
        return gather_driver.bits({n: found[n] for n in self.engine.trained_names})

    def events(self) -> list[dict[str, Any]]:
        return [line for line in read_metrics(self.metrics.path) if line["kind"] == "event"]

    def until(self, is_so: Callable[[], object]) -> int:
        """Updates until something is so; how many that took."""
        deadline = time.monotonic() + PATIENCE_S
        for number in itertools.count():
            if is_so():
                return number
            assert time.monotonic() < deadline
            self.update()
            time.sleep(0.01)
        raise AssertionError


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def started(**settings: Any) -> Run:
        runs.append(Run(tmp_path / str(len(runs)), **settings))
        return runs[-1]

    yield started
    for run in runs:
        run.task.open.set()
        run.saver.__exit__(None, None, None)
        run.metrics.close()
        run.engine._engine.destroy()


def test_training_goes_on_and_the_save_is_of_its_beginning(start: Callable[..., Run]) -> None:
    run = start()
    run.update()
    run.task.open.clear()
    before = run.weights()
    run.saver.begin(run.state())
    assert run.until(run.task.entered.is_set) >= 1
    for _ in range(5):
        run.update()
        assert run.saver.flags() == [1.0, 0.0, 0.0]
        assert run.saver.saved_step == 0
        assert checkpoint.latest(run.run_dir) is None
    assert run.weights() != before
    run.task.open.set()
    run.until(lambda: run.saver.saved_step)
    assert run.saver.saved_step == 1
    assert run.saved(1) == before
    assert names(run.run_dir) == ["latest", "step-000001"]
    (event,) = run.events()
    assert (event["step"], event["checkpoint"]) == (1, "step-000001")
    assert 0 < event["waited_s"] < event["checkpoint_s"]
    assert event["event"].startswith("checkpoint step-000001 in ")


def test_one_at_a_time_and_a_line_says_who_waited(
    start: Callable[..., Run], capsys: pytest.CaptureFixture[str]
) -> None:
    run = start()
    run.update()
    run.task.open.clear()
    run.saver.begin(run.state())
    run.until(run.task.entered.is_set)
    at = run.step
    wanted = run.weights()
    threading.Timer(0.5, run.task.open.set).start()
    run.saver.begin(run.state())
    assert run.saver.saved_step == 1, "the first is there before the second begins"
    places = ["writing", "writing: the other ranks", "completing", "completing: the other ranks"]
    marks = [mark for mark, _ in itertools.groupby(run.marks)]
    assert marks == [f"step 1: checkpoint, {place}" for place in places[-len(marks) :]]
    assert len(marks) in (2, 4), "as far as it had come"
    run.saver.finish()
    assert run.saver.saved_step == at
    assert run.saved(at) == wanted
    told = capsys.readouterr().out
    assert f"step {at}: waited " in told
    assert "until step-000001 was written, before the next" in told
    assert run.events()[0]["waited_s"] > 0.3


def test_synchronous_is_the_same_but_waited_for(start: Callable[..., Run]) -> None:
    run = start(asynchronous=False)
    run.update()
    run.saver.begin(run.state())
    assert run.saver.saved_step == 1
    assert run.saved(1) == run.weights()
    (event,) = run.events()
    assert event["waited_s"] == pytest.approx(event["checkpoint_s"], rel=0.2)


class TestDue:
    def test_by_step(self, start: Callable[..., Run]) -> None:
        run = start(every_steps=3)
        due = []
        for _ in range(8):
            run.update()
            if run.saver.is_due(run.step):
                due.append(run.step)
                run.saver.begin(run.state())
        assert due == [3, 6]

    def test_one_that_was_put_off_comes_later(self, start: Callable[..., Run]) -> None:
        """As after skipped updates: at step 4 instead of 3, and again at 6."""
        run = start(every_steps=3)
        for _ in range(4):
            run.update()
        assert run.saver.is_due(4)
        run.saver.begin(run.state())
        assert [step for step in range(5, 10) if run.saver.is_due(step)] == [6, 7, 8, 9]

    def test_by_the_clock(self, start: Callable[..., Run]) -> None:
        run = start(every_steps=0, every_minutes=60)
        run.update()
        assert not run.saver.is_due(1)
        run.saver._tried_at -= 3601
        run.update()
        assert run.saver.is_due(2)
        run.saver.begin(run.state())
        assert not run.saver.is_due(3)

    def test_by_the_clock_though_one_is_under_way(self, start: Callable[..., Run]) -> None:
        """Else a disk that never answers would go unnoticed for ever: who waits is watched."""
        run = start(every_steps=0, every_minutes=60)
        run.task.open.clear()
        run.update()
        run.saver.begin(run.state())
        run.until(run.task.entered.is_set)
        run.update()
        assert not run.saver.is_due(run.step)
        run.saver._tried_at -= 3601
        run.update()
        assert run.saver.is_due(run.step)

    def test_never(self, start: Callable[..., Run]) -> None:
        run = start(every_steps=0)
        for _ in range(4):
            run.update()
            assert not run.saver.is_due(run.step)


class TestFailures:
    def test_a_full_disk_costs_the_save_and_not_the_run(
        self, start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In the last part of a save; in the first part, by a real disk, see below."""
        monkeypatch.setattr(saver, "RETRY_S", 0.3)
        run = start()
        run.update()
        run.saver.begin(run.state())
        run.saver.finish()
        run.update()
        run.task.error = OSError(errno.ENOSPC, "No space left on device", "config.json")
        run.saver.begin(run.state())
        run.until(lambda: len(run.events()) > 1)
        failed = run.events()[1]
        assert failed["checkpoint_failed"] == "step-000002"
        assert failed["reason"] == "no space left on device: config.json"
        assert "could NOT be written" in failed["event"]
        assert "That of step 1 is still the newest; training goes on" in failed["event"]
        assert names(run.run_dir) == ["latest", "step-000001"], "the room is given back"
        run.task.error = None
        run.until(lambda: run.saver.is_due(run.step))  # long before the next interval
        run.saver.begin(run.state())
        run.saver.finish()
        assert run.saver.saved_step == run.step
        assert run.saved(run.step) == run.weights()

    def test_a_bug_of_ours_is_no_full_disk(self, start: Callable[..., Run]) -> None:
        run = start()
        run.update()
        run.task.error = KeyError("no such thing")
        run.saver.begin(run.state())
        with pytest.raises(RuntimeError, match="KeyError: 'no such thing'"):
            run.saver.finish()
        assert checkpoint.latest(run.run_dir) is None

    def test_a_gathering_that_breaks_ends_the_run(
        self, start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(share: Share, moved: Callable[[int], None]) -> None:
            raise GatherError("connection closed by peer")

        monkeypatch.setattr(Share, "gathered", broken)
        run = start()
        run.update()
        run.saver.begin(run.state())
        with pytest.raises(GatherError, match="closed by peer"):
            run.until(lambda: False)  # at the next update
        with pytest.raises(GatherError, match="closed by peer"):
            run.saver.advance([1.0, 1.0, 0.0])  # other ranks still wait in it
        with pytest.raises(GatherError, match="closed by peer"):
            run.saver.finish()
        assert checkpoint.latest(run.run_dir) is None

    def test_weights_that_overflow_are_no_checkpoint(self, start: Callable[..., Run]) -> None:
        """A finite gradient, and a learning rate that takes the weights out of their range."""
        run = start()
        run.update()
        run.saver.begin(run.state())
        run.saver.finish()
        run.engine.set_weights(lambda name: torch.full(run.engine.whole_shape(name), 1e4))
        run.engine.set_learning_rate(5e37)
        run.update()
        run.saver.begin(run.state())
        told = r"step-000002 is refused, that of step 1 stays: .* is not finite: weights have overf"
        with pytest.raises(FloatingPointError, match=told):
            run.saver.finish()
        assert names(run.run_dir) == ["latest", "step-000001"]
        run.saver = run.new_saver()  # a run that begins so, as with a NaN in a row never used
        run.saver.begin(run.state())
        run.saver.finish()
        assert run.saved(2) == run.weights()

    def test_the_last_one_is_tried_again_and_then_told(
        self, start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(saver, "_PAUSE_S", 0.2)
        run = start()
        run.update()
        assert run.saver.save_last(run.state()) == ""
        assert run.saver.save_last(run.state()) == "", "nothing to do"
        assert len(run.events()) == 1
        run.update()
        run.task.error = OSError(errno.EIO, "Input/output error", "config.json")
        told = run.saver.save_last(run.state())
        assert told.startswith("checkpoint of step 2: got input/output error: ")
        assert told.endswith("start the run again: it goes on from step 1.")
        assert len(run.events()) == 2, "each attempt says the same"
        assert "training goes on" not in run.events()[-1]["event"]
        threading.Timer(0.1, lambda: setattr(run.task, "error", None)).start()
        assert run.saver.save_last(run.state()) == ""
        assert run.saved(2) == run.weights()

    def test_the_last_one_may_be_under_way(self, start: Callable[..., Run]) -> None:
        run = start()
        run.update()
        run.saver.begin(run.state())
        assert run.saver.save_last(run.state()) == ""
        assert len(run.events()) == 1

    def test_an_error_elsewhere_leaves_no_thread_and_no_checkpoint(
        self, start: Callable[..., Run]
    ) -> None:
        run = start()
        run.update()
        run.saver.begin(run.state())
        run.saver.__exit__(None, None, None)
        assert not [thread for thread in threading.enumerate() if "saver" in thread.name]
        assert checkpoint.latest(run.run_dir) is None
        run.saver = run.new_saver()
        assert names(run.run_dir) == [], "what was left goes at the next start"

    def test_an_error_elsewhere_is_told_though_the_thread_hangs(
        self, start: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """On a disk that does not answer, or ranks that are gone; it ends with the process."""
        monkeypatch.setattr(saver, "_FAREWELL_S", 0.1)
        run = start()
        run.update()
        run.task.open.clear()
        run.saver.begin(run.state())
        run.until(run.task.entered.is_set)
        run.saver.__exit__(None, None, None)
        hung = [thread for thread in threading.enumerate() if "saver" in thread.name]
        assert [thread.daemon for thread in hung] == [True]
        run.task.open.set()
        hung[0].join(PATIENCE_S)
        assert not hung[0].is_alive()

    def test_what_an_earlier_save_could_not_remove_goes_with_the_next(
        self, start: Callable[..., Run]
    ) -> None:
        run = start()
        folder = run.run_dir / "checkpoints"
        (folder / ".step-000000.old.part").mkdir(parents=True)
        (folder / ".step-000000.latest.part").touch()
        run.update()
        assert run.saver.save_last(run.state()) == ""
        assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-000001"]
