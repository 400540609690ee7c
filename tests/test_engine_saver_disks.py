"""Runs on real disks that fill up, stay full, or are small: they cost no more than a save."""

from __future__ import annotations

import contextlib
import json
import resource
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import gather_driver
import pytest
import yaml
from checkpoint_files import names
from safetensors.torch import load_file
from small_disk import small_disk
from told import exit_code

from longpretrain.engine import candidates, checkpoint, run_folder, saver
from longpretrain.report.metrics import deterministic, read_metrics

pytestmark = pytest.mark.usefixtures("process_group")
PATIENCE_S = 60


@contextlib.contextmanager
def disk(place: Path, megabytes: int) -> Iterator[Callable[[int], None]]:
    """A small file system of its own; yields a function that changes its size."""

    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}m", str(place)], check=True)

    with small_disk(place, kib=1024 * megabytes):
        yield resize


@pytest.fixture(scope="module")
def recipe(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves every second update; one takes 21 MB."""
    tree = yaml.safe_load((small_run / "recipe.yaml").read_text())
    tree |= {
        "schedule": {"total_steps": 8, "warmup_steps": 2},
        "evaluate": {"every_steps": 0},
        "checkpoint": {"every_steps": 2, "keep": 1},
    }
    path = tmp_path_factory.mktemp("full-disk") / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def whole(recipe: Path) -> Path:
    """The run whose disk was never full."""
    run_dir = recipe.parent / "whole"
    assert exit_code("train", recipe, f"run.dir={run_dir}") == 0
    return run_dir


def same(left: Path, right: Path) -> None:
    """Two runs came to the same."""
    for kind in ("model", "optimizer"):
        folders = checkpoint.latest(left), checkpoint.latest(right)
        assert folders[0] is not None
        assert folders[1] is not None
        found, wanted = (load_file(folder / f"{kind}.safetensors") for folder in folders)
        assert gather_driver.bits(found) == gather_driver.bits(wanted)
    lines = (deterministic(read_metrics(run / "metrics.jsonl")) for run in (left, right))
    assert next(lines) == next(lines)


def test_a_disk_that_fills_up_and_is_made_larger(recipe: Path, whole: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "disk" / "run"
    metrics = run_dir / "metrics.jsonl"
    with disk(tmp_path / "disk", 36) as resize:

        def watch() -> None:
            deadline = time.monotonic() + PATIENCE_S
            while time.monotonic() < deadline:
                if metrics.is_file() and "checkpoint_failed" in metrics.read_text(encoding="utf-8"):
                    resize(100)
                    return
                time.sleep(0.01)

        watcher = threading.Thread(target=watch)
        watcher.start()
        assert exit_code("train", recipe, f"run.dir={run_dir}") == 0
        watcher.join()
        events = [line for line in read_metrics(metrics) if "checkpoint_failed" in line]
        assert events[0]["checkpoint_failed"] == "step-000004"
        assert events[0]["reason"].startswith("no space left on device: ")
        assert run_folder.read_status(run_dir)["state"] == "done"
        assert names(run_dir) == ["latest", "step-000008"]
        same(run_dir, whole)


def test_a_disk_with_room_for_those_that_are_kept(
    recipe: Path, whole: Path, tmp_path: Path
) -> None:
    """Of two that are kept the older one goes before the third can be written."""
    run_dir = tmp_path / "disk" / "run"
    with disk(tmp_path / "disk", 57):
        assert exit_code("train", recipe, f"run.dir={run_dir}", "checkpoint.keep=2") == 0
        (failed, *_) = [
            line for line in read_metrics(run_dir / "metrics.jsonl") if "checkpoint_failed" in line
        ]
        assert failed["checkpoint_failed"] == "step-000006"
        assert "Removed step-000002 to make room" in failed["event"]
        assert names(run_dir)[-1] == "step-000008"
        same(run_dir, whole)


def test_a_disk_that_stays_full_fails_the_run_and_keeps_the_last_whole_one(
    recipe: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saver, "_PAUSE_S", 0.0)
    run_dir = tmp_path / "disk" / "run"
    with disk(tmp_path / "disk", 36) as resize:
        assert exit_code("train", recipe, f"run.dir={run_dir}") == 1
        told = run_folder.read_status(run_dir)
        assert (told["state"], told["step"]) == ("failed", 2)
        assert told["reason"].startswith("checkpoint of step 8: got no space left on device: ")
        assert candidates.look(run_dir).folder == run_dir / "checkpoints" / "step-000002"
        assert names(run_dir) == ["latest", "step-000002"]
        failed = [
            line["checkpoint_failed"]
            for line in read_metrics(run_dir / "metrics.jsonl")
            if "checkpoint_failed" in line
        ]
        assert failed == ["step-000004", "step-000006", "step-000008"], "each once"
        resize(100)
        assert exit_code("train", recipe, f"run.dir={run_dir}") == 0
        same(run_dir, whole)


def test_files_that_may_not_grow_so_large(
    recipe: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The process's own limit, which needs no root; also what some file systems say."""
    monkeypatch.setattr(saver, "_PAUSE_S", 0.0)
    run_dir = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        assert exit_code("train", recipe, f"run.dir={run_dir}") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = run_folder.read_status(run_dir)
    assert (told["state"], told["step"]) == ("failed", 0)
    assert "file too large" in told["reason"]
    out, err = capsys.readouterr()
    assert f"longpretrain train: {told['reason']}\n" in err
    assert f"failed, at step 0; {run_dir / 'status.json'}\n" in out, "said once, and not here"
    assert names(run_dir) == []
    assert exit_code("train", recipe, f"run.dir={run_dir}") == 0
    same(run_dir, whole)


def test_the_cursor_is_in_the_state(whole: Path) -> None:
    folder = checkpoint.latest(whole)
    assert folder is not None
    text = (folder / "state.json").read_text()
    state = json.loads(text)
    assert (state["step"], state["samples_done"]) == (8, 32)
    assert text == checkpoint.sealed({k: v for k, v in state.items() if k != checkpoint.SEAL})
