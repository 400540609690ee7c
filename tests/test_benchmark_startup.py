"""benchmarks/startup.py runs a real start and tells its seconds; and what no start may import."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_scripts import BENCHMARKS, scripts_importable
from ranks_helper import rank_environment

with scripts_importable():
    from startup import Start, table


def test_a_start_is_measured(tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.json"
    words = ["--rounds", "1", "--cold", "--only", "mpirun (MPICH)", "--json", str(numbers)]
    finished = subprocess.run(
        [sys.executable, str(BENCHMARKS / "startup.py"), *words],
        env=rank_environment(), capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    ((name, (start,)),) = json.loads(numbers.read_text(encoding="utf-8"))["starts"].items()
    assert 0.5 < start["there_s"] < start["first_update_s"] < start["end_s"]
    assert start["cpu_s"] > 1, "the ranks' own time is counted"
    row = next(line for line in finished.stdout.splitlines() if line.startswith(name))
    assert f" {start['first_update_s']:.1f} s " in row


def test_the_table_tells_median_and_slowest() -> None:
    starts = [Start(there_s=s - 1, first_update_s=s, end_s=s + 1, cpu_s=2 * s) for s in (3, 20, 4)]
    slow = [Start(there_s=1, first_update_s=15.1, end_s=16, cpu_s=9)]
    _, first, second = table({"one": starts, "another": slow}).splitlines()
    assert first.split() == "one 4.0 s 20.0 s 3.0 s 5.0 s 8.0 s yes".split()  # noqa: SIM905
    assert second.split()[-1] == "no"


# The check of ./launch.sh, and a rank of a run: what their processes have imported at the end.
STARTS = {
    "check": (["--check"], ["torch._dynamo", "torch._inductor", "deepspeed", "mpi4py", "fairseq"]),
    "rank": ([], ["torch._inductor.lowering", "mpi4py", "fairseq"]),
}
SCRIPT = """
import sys
from longpretrain.cli import main
code = main(sys.argv[1:])
print(*sorted(sys.modules), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize("kind", STARTS)
def test_a_start_imports_nothing_that_it_does_not_use(
    small_run: Path, tmp_path: Path, kind: str
) -> None:
    """What takes long, and MPI, whose import starts it and may abort another launcher's rank."""
    more, unwanted = STARTS[kind]
    words = [str(small_run / "recipe.yaml"), f"run.dir={tmp_path / 'run'}", *more]
    words += ["schedule.total_steps=2", "schedule.warmup_steps=1", "evaluate.every_steps=0"]
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, "train", *words],
        env=rank_environment(), capture_output=True, text=True, check=False, timeout=240,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-2000:]
    imported = set(finished.stderr.splitlines()[-1].split())
    assert "torch" in imported
    assert not imported & set(unwanted)
