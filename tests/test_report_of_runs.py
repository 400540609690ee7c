"""What a real run of two ranks, stopped and resumed, leaves to read: rank logs, journal, page."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks_helper import Finished, drive
from test_report_html import check_page

from longpretrain.report.metrics import read_metrics


@pytest.fixture(scope="module")
def stopped(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """A run folder: a run of 6 updates that a signal stopped after the second, and its resume."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    arguments = [str(small_run / "recipe.yaml"), f"run.dir={run_dir}", "log.tensorboard=true"]
    commands = [{"arguments": arguments, "stop_after": 2}, {"arguments": arguments}]
    return run_dir, drive(run_dir.parent, 2, commands)


def test_every_rank_has_a_log_with_a_part_for_each_attempt(stopped: tuple[Path, Finished]) -> None:
    run_dir, ran = stopped
    assert ran.exit_codes == [75, 0]
    for rank in (0, 1):
        lines = (run_dir / "logs" / f"rank-{rank:05d}.txt").read_text().splitlines()
        heads = [line for line in lines if f"rank {rank}: 2 ranks by torchrun; host " in line]
        assert len(heads) == 2
        assert sum("--- ends" in line for line in lines) == 2
    first = (run_dir / "logs" / "rank-00000.txt").read_text()
    for line in (run_dir / "log.txt").read_text().splitlines():
        assert line in first
    assert "preempted: SIGUSR1" in first


def test_the_journal_tells_how_the_attempt_before_ended(stopped: tuple[Path, Finished]) -> None:
    run_dir, _ = stopped
    events = [line for line in read_metrics(run_dir / "metrics.jsonl") if line["kind"] == "event"]
    begun = [line for line in events if "world_size" in line]
    assert [line["after"] for line in begun] == [None, "preempted: SIGUSR1"]
    assert "the attempt before this one: preempted: SIGUSR1" in (run_dir / "log.txt").read_text()


def test_the_page_has_its_parts(stopped: tuple[Path, Finished]) -> None:
    source, text = check_page(stopped[0])
    for heading in ("Attempts", "Slowest rank", "Checkpoints"):
        assert f"<h2>{heading}</h2>" in source
    assert "1 restart 0 updates done again" in text
    assert "preempted: SIGUSR1" in text
