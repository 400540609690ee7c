"""What happened to a run is told right: restarts, lost work, skipped updates, slow ranks, saves."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from test_report_html import check_page, event, make_run, train

from longpretrain.report.history import (
    attempts_html,
    checkpoints_html,
    lost_steps,
    ranks_html,
    resumes,
    skipped_html,
)


def cells(html: str) -> list[list[str]]:
    """The rows of the table in a part of the page."""
    body = re.search(r"<tbody>(.*)</tbody>", html)
    assert body
    rows = re.findall(r"<tr>(.*?)</tr>", body[1])
    return [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]


def words(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


STARTED = event(
    0, "started: models/long", world_size=2, accumulation=4, versions={"torch": "2.13", "code": "a"}
)
LOST = event(4, "2 updates after step 4 are done again", lost_steps=2, lost_s=90.0)
RESUMED = event(
    4, "resumed: step-000004", world_size=1, accumulation=8, after="failed: rank 1 died",
    versions={"torch": "2.13", "code": "b" * 40},
)  # fmt: skip
AGAIN = RESUMED | {"step": 6, "after": "preempted: SIGUSR1"}


def test_attempts_tell_why_what_changed_and_what_was_lost() -> None:
    events = [STARTED, LOST, RESUMED, event(5, "checkpoint step-000005 in 1 s"), AGAIN]
    html = attempts_html(events)
    assert "Begun 3 times; 2 updates (1m30s of training) were done again" in words(html)
    rows = cells(html)
    assert [(row[0], row[2], row[3], row[4], row[5]) for row in rows] == [
        ("1", "0", "2", "", ""),
        ("2", "4", "1", "2 (1m30s)", "failed: rank 1 died"),
        ("3", "6", "1", "none", "preempted: SIGUSR1"),
    ]
    assert (
        rows[1][6] == "world size 2 -&gt; 1; accumulation 4 -&gt; 8; code a -&gt; bbbbbbbbbbbb..."
    )
    assert rows[2][6] == ""
    assert lost_steps(events) == 2
    assert resumes(events) == [RESUMED, AGAIN]


def test_what_the_run_itself_says_of_changes_is_not_said_twice() -> None:
    told = event(4, "other than before: ...", changed="world size 2 -> 1, log.every_steps 5 -> 9")
    rows = cells(attempts_html([STARTED, RESUMED, told, AGAIN]))
    assert [row[6] for row in rows] == [
        "",
        "world size 2 -&gt; 1, log.every_steps 5 -&gt; 9; code a -&gt; bbbbbbbbbbbb...",
        "",
    ]


def test_a_start_without_a_checkpoint_is_a_restart_too() -> None:
    lost = event(0, "3 updates after step 0", lost_steps=3, lost_s=1.0)
    events = [STARTED, lost, STARTED | {"after": "failed: rank 0: OSError"}]
    rows = cells(attempts_html(events))
    assert [row[4] for row in rows] == ["", "3 (1s)"]
    assert len(resumes(events)) == 1


@pytest.mark.parametrize("events", [[], [STARTED]], ids=["none", "one"])
def test_an_uninterrupted_run_has_no_table_of_attempts(events: list[dict[str, Any]]) -> None:
    assert attempts_html(events) == ""
    assert resumes(events) == []


def test_an_older_journal_without_fields_has_its_attempts() -> None:
    events = [event(0, "started on 2 ranks"), event(3, "resumed from step-000003")]
    assert cells(attempts_html(events))[1][2:6] == ["3", "", "none", "not known"]


def test_skipped_updates_name_their_files() -> None:
    counts = {1: 0, 2: 1, 3: 1, 4: 3}
    lines = [train(step, skipped=count) for step, count in counts.items()]
    lines[1] |= {"loss": None, "grad_norm": None}
    dumps = [
        event(2, "step 2: not finite: layer 0", forensics="forensics/step-000002.json"),
        event(3, "step 3: finite when repeated", forensics=None),
    ]
    html = skipped_html(lines, dumps)
    assert "2 updates were not applied" in html
    assert cells(html) == [
        ["2", "not finite", "not finite", "forensics/step-000002.json",
         "step 2: not finite: layer 0"],
        ["3", "", "", "", "step 3: finite when repeated"],
        ["4", "4", "2", "", ""],
    ]  # fmt: skip
    assert skipped_html(lines[:1], []) == ""


def test_slow_ranks_are_named_by_how_much_they_cost() -> None:
    lines = [
        train(step, step_s=1.0, slowest_rank=rank, slowest_rank_s=0.5 + late, median_rank_s=0.5)
        for step, rank, late in [(1, 3, 0.1), (2, 0, 0.01), (3, 3, 0.3), (4, 0, 0.01)]
    ]
    html = ranks_html(lines, [2])
    assert cells(html) == [["3", "50%", "200.0", "0.4"], ["0", "50%", "10.0", "0.0"]]
    assert "10.5% of the time in training steps" in html
    assert html.count("<svg") == 1
    assert ranks_html([train(1)], []) == ""


def test_checkpoints_that_failed_stand_out() -> None:
    events = [
        event(2, "checkpoint", checkpoint="step-000002", checkpoint_s=3.25, waited_s=0.125),
        event(4, "no", checkpoint_failed="step-000004", reason="no space left on device"),
        event(5, "checkpoint", checkpoint="step-000005", checkpoint_s=4.75, waited_s=0.375),
    ]
    html = checkpoints_html([train(step) for step in range(1, 11)], events)
    assert "2 written, 4.0 s each (median)" in html
    assert "training waited 0.5 s for them in all (10.0% of the time in training steps)" in html
    assert "1 could NOT be written" in html
    assert [row[2:] for row in cells(html)] == [
        ["3.25", "0.125", ""], ["", "", "NOT written: no space left on device"],
        ["4.75", "0.375", ""],
    ]  # fmt: skip
    assert checkpoints_html([], [STARTED]) == ""


def test_the_page_holds_all_of_it(tmp_path: Path) -> None:
    lines = [STARTED, LOST, RESUMED]
    lines += [
        train(step, skipped=int(step > 6), slowest_rank=1, slowest_rank_s=0.4, median_rank_s=0.3)
        for step in range(1, 9)
    ]
    lines += [event(8, "saved", checkpoint="step-000008", checkpoint_s=1.0, waited_s=0.1)]
    source, text = check_page(make_run(tmp_path, lines))
    for heading in ("Attempts", "Skipped updates", "Slowest rank", "Checkpoints"):
        assert f"<h2>{heading}</h2>" in source
    assert "1 restart 2 updates done again 1 updates skipped" in text
    assert "Waiting for data" in text
