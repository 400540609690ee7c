"""The benchmark of checkpoints: it really trains and saves, and its figures fit together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmark_scripts import BENCHMARKS
from ranks_helper import ROOT, rank_environment


def test_a_row_of_two_ranks(tmp_path: Path) -> None:
    words = ["--sizes", "tiny", "--ranks", "2", "--stages", "1", "--tokens", "64", "--updates", "1"]
    words += ["--quiet", "--place", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    ended = subprocess.run(
        [sys.executable, str(BENCHMARKS / "checkpoint_stall.py"), *words],
        cwd=ROOT,
        env=rank_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    header, _, line = ended.stdout.splitlines()
    assert header.count("|") == line.count("|")
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert (row["ranks"], row["stage"], row["parameters"]) == (2, 1, "2 M")
    assert 0 < row["pause_s"] < row["written_s"]
    assert row["updates"] >= 1, "training went on"
    assert row["megabytes"] > 3 * 4 * 1.6, "weights and both moments"
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"]
