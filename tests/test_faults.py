"""A part of `make fault-check`, in a minute: ranks killed, checkpoints damaged, saves refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faults.corruptions import Corruptions
from faults.kills import BEGINS, ENDS, PLAIN, SAVE, Chains, Kill, make_plan
from faults.nursery import Nursery
from faults.starts import Starts
from faults.steps import Steps
from faults.table import Row, markdown
from ranks_helper import ROOT, rank_environment

SEED = "7"


def check(*rows: Row) -> None:
    print(markdown(rows))
    assert all(row.ok for row in rows), markdown([row for row in rows if not row.ok])


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery(rank_environment(), ROOT) as started:
        yield started


def test_killed_runs_go_on_to_the_same_bits(
    small_run: Path, tmp_path: Path, nursery: Nursery
) -> None:
    chains = Chains(tmp_path, small_run / "recipe.yaml", nursery, "ZeRO 3, bf16", steps=10)
    plan = [
        Kill(victim=1, moment=SAVE, nth=1, after_s=0.05, way=PLAIN),
        Kill(victim=0, moment=ENDS, nth=2, after_s=0.0, way=PLAIN),
        Kill(victim=-1, moment=BEGINS, nth=1, after_s=0.01, way=PLAIN),
    ]
    chains.chain("chain", plan)
    check(chains.finish())


def test_damaged_checkpoints_are_found(small_run: Path, tmp_path: Path, nursery: Nursery) -> None:
    found = Corruptions(tmp_path, small_run / "recipe.yaml", nursery)
    check(*found.in_process(SEED, 45), found.end_to_end(SEED, 1))


def test_a_save_that_dies_or_is_refused_midway(
    small_run: Path, tmp_path: Path, nursery: Nursery
) -> None:
    steps = Steps(tmp_path, small_run / "recipe.yaml", nursery, steps=8)
    check(steps.kills(at=[12], ranks=(0,)), steps.refusals(at=[22], ranks=(0,)))


def test_a_rank_lost_while_they_start_is_named(
    small_run: Path, tmp_path: Path, nursery: Nursery
) -> None:
    starts = Starts(tmp_path, small_run / "recipe.yaml", nursery)
    check(starts.killed(["its number is known", "its watchdog starts", "they have met"]))


def test_a_seed_makes_one_plan() -> None:
    assert make_plan("7/a", 20) == make_plan("7/a", 20) != make_plan("8/a", 20)
    assert {kill.victim for kill in make_plan("7/a", 60)} == {0, 1, -1}


def test_the_table_can_fail() -> None:
    """Nothing tried, something lost, or one try of many that came out otherwise: not met."""
    row = Row(section="s", fault="f", wanted="w")
    assert not row.ok
    row.count([])
    assert row.ok
    row.lost = 1
    assert not row.ok
    row.lost = 0
    row.count(["it did not end"])
    assert not row.ok
    assert "**NOT MET**" in markdown([row])
    assert "it did not end" in markdown([row])
