"""The renames that make a checkpoint: killed between any two of them, and refused by the disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import save_driver
from checkpoint_files import names
from ranks_helper import ROOT, rank_environment
from small_disk import small_disk

from longpretrain.engine import checkpoint
from longpretrain.engine.complete import Written, complete


def test_a_kill_at_any_step_leaves_a_whole_one_as_the_latest(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "save_driver.py"), str(tmp_path)],
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    *found, last = ended.stdout.splitlines()
    assert last == f"steps {len(found) - 1}"
    assert len(found) > 12, "each file, each rename"
    # Up to one moment the old one, told that newer ones are there; from then on the new one.
    moment = next(n for n, line in enumerate(found) if line.startswith("step-000006"))
    assert all(line.startswith("step-000003 - ") for line in found[:moment])
    assert set(found[moment:]) == {"step-000006 new 0"}
    assert 6 < moment < len(found) - 1


class TestFailures:
    def test_files_that_did_not_arrive(self, tmp_path: Path) -> None:
        """Of a rank whose node has the run folder for itself."""
        save_driver.save(tmp_path, 3)
        before = names(tmp_path)
        part = tmp_path / "checkpoints" / ".step-000006.part"
        part.mkdir()
        (part / "model-00001-of-00002.safetensors").write_bytes(b"123")
        for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
            written = Written(hashes={name: "0" * 64}, sizes={name: 4})
            with pytest.raises(OSError, match=name):
                complete(
                    part, tmp_path / "checkpoints/step-000006", save_driver.ModelFiles(),
                    [written], {"step": 6},
                )  # fmt: skip
        assert names(tmp_path) == sorted([*before, part.name])
        assert checkpoint.kept_step(tmp_path) == 3

    def test_a_rename_that_fails_puts_the_old_one_back(self, tmp_path: Path) -> None:
        """Here the folder under way is a mount point, which cannot be renamed."""
        save_driver.save(tmp_path, 6, time_line="left")
        part = tmp_path / "checkpoints" / ".step-000006.part"
        with small_disk(part, kib=1024), pytest.raises(OSError, match="busy"):
            complete(
                part, tmp_path / "checkpoints/step-000006", save_driver.ModelFiles(), [],
                {"step": 6},
            )  # fmt: skip
        folder = checkpoint.latest(tmp_path)
        assert folder is not None
        checkpoint.verify_files(folder)
        assert checkpoint.read_state(folder)["task"] == {"time line": "left"}
