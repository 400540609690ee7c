"""``longpretrain verify RUN``: whole is said of what is whole, and of nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from checkpoint_files import flip, make_checkpoint
from told import disk, exit_code

from longpretrain.config import to_tree
from longpretrain.engine.names import write_status
from longpretrain.recipe import from_tree
from longpretrain.verify_run import is_run, verify_run

METRICS = (
    '{"kind": "event", "step": 0, "event": "started"}\n'
    '{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n'
)


def add(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps 3 and 6, 6 the latest."""
    run_dir = tmp_path / "run"
    for step in (3, 6):
        make_checkpoint(run_dir, f"step-{step:06d}", latest=True)
    tree = to_tree(from_tree({"run": {"dir": str(run_dir)}}))
    (run_dir / "config.yaml").write_text(yaml.safe_dump(tree))
    (run_dir / "metrics.jsonl").write_text(METRICS)
    write_status(run_dir, "preempted", reason="SIGUSR1", step=6)
    return run_dir


def test_a_whole_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = disk(run)
    assert exit_code("verify", run) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"run {run}",
        "status.json: preempted at step 6, SIGUSR1",
        "step-000003: whole, 3 files, 0.0 MB",
        "step-000006: whole, 3 files, 0.0 MB",
        "latest: step-000006",
        "metrics.jsonl: 2 of train, 0 of evaluation, 1 of event; to step 2",
        "whole",
    ]
    assert disk(run) == before, "it only reads"


def test_as_json(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(run / "checkpoints" / "step-000003" / "model.safetensors", 0)
    assert exit_code("verify", run, "--json", "-") == 1
    tree = json.loads(capsys.readouterr().out)
    assert (tree["ok"], tree["a"], tree["b"], tree["tensors"]) == (False, str(run), None, [])
    found = {row["check"]: (row["got"][:7], row["ok"]) for row in tree["checks"]}
    assert found["step-000003"] == ("DAMAGED", False)
    assert found["step-000006"] == ("whole, ", True)
    assert len(found) == 5


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda run: flip(run / "checkpoints/step-000003/config.json", 1), "step-000003: DAMAGED"),
        (lambda run: flip(run / "checkpoints/step-000006/state.json", 9), "step-000006: DAMAGED"),
        (lambda run: (run / "checkpoints/step-000003/state.json").unlink(), "state.json: got no"),
        (lambda run: shutil.rmtree(run / "checkpoints/step-000006"), "latest: DAMAGED: names 'st"),
        (lambda run: (run / "checkpoints/latest").unlink(), "latest: DAMAGED: is missing or empty"),
        (lambda run: (run / "checkpoints/latest").write_text("x"), "latest: DAMAGED: names 'x'"),
        (lambda run: (run / "status.json").write_text("{"), "status.json: DAMAGED"),
        (lambda run: (run / "config.yaml").write_text("a: ["), "config.yaml: DAMAGED"),
        (lambda run: (run / "config.yaml").write_text("lr: 1"), "config.yaml: DAMAGED"),
        (lambda run: (run / "metrics.jsonl").write_text("x\n"), "metrics.jsonl: DAMAGED"),
        (lambda run: add(run / "metrics.jsonl", bytes(4096)), "metrics.jsonl: DAMAGED: 4096 zero"),
    ],
)
def test_any_damage_is_told(
    run: Path,
    spoil: Callable[[Path], object],
    told: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    spoil(run)
    assert exit_code("verify", run) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(told in line for line in lines), lines
    assert lines[-1] == "NOT whole: see above"


def test_each_file_of_a_checkpoint_is_read(run: Path) -> None:
    folder = run / "checkpoints/step-000003"
    for path in sorted(folder.iterdir()):
        flip(path, 5)
        assert not verify_run(run).ok, path.name
        flip(path, 5)
        assert verify_run(run).ok, path.name


def test_copies_too_and_left_overs_are_no_damage(run: Path) -> None:
    shutil.copytree(run / "checkpoints/step-000003", run / "checkpoints/best")
    (run / "checkpoints/.step-000009.0123abcd.part").mkdir()
    (run / "checkpoints/notes").mkdir()
    report = verify_run(run)
    assert report.ok
    assert "best: whole, 3 files, 0.0 MB" in report.lines
    assert any(line.startswith(".step-000009.0123abcd.part: of a save") for line in report.lines)
    flip(run / "checkpoints/best/config.json", 1)
    assert not verify_run(run).ok


def test_a_line_that_a_kill_cut_short_is_no_damage(run: Path) -> None:
    add(run / "metrics.jsonl", b'{"kind": "tra')
    report = verify_run(run)
    assert report.ok
    assert "metrics.jsonl: 2 of train, 0 of evaluation, 1 of event; to step 2" in report.lines


def test_a_run_before_its_first_checkpoint(run: Path) -> None:
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    (run / "status.json").unlink()
    report = verify_run(run)
    assert report.ok
    assert "no checkpoint yet" in report.lines


def test_a_checkpoint_that_the_run_removes_meanwhile(run: Path) -> None:
    def remove(done: int, total: int) -> None:
        if (done, total) == (0, 2):
            shutil.rmtree(run / "checkpoints/step-000003")

    report = verify_run(run, remove)
    assert report.ok
    assert not any("step-000003" in line for line in report.lines)


def test_what_is_a_run(run: Path, tmp_path: Path) -> None:
    assert is_run(run)
    assert not is_run(run / "checkpoints/step-000003"), "a model folder"
    assert not is_run(tmp_path)
