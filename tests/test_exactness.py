"""A part of the exactness matrix, in minutes; `make exactness` runs all of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from exactness.golden import golden_rows
from exactness.resume import move_rows, resume_rows
from exactness.table import Row, attention_in_use, markdown, relative_difference, within
from exactness.trainers import bf16_rows, dropout_rows, trainer_rows


def check(rows: list[Row]) -> None:
    print(markdown(rows))
    assert rows
    assert all(row.ok for row in rows), markdown([row for row in rows if not row.ok])


def test_trainers_agree(small_run: Path, tmp_path: Path) -> None:
    check(trainer_rows(tmp_path, small_run / "recipe.yaml", quick=True))


def test_bf16_stays_in_its_band(small_run: Path, tmp_path: Path) -> None:
    check(bf16_rows(tmp_path, small_run / "recipe.yaml", quick=True))


def test_trainers_drop_the_same(small_run: Path, tmp_path: Path) -> None:
    check(dropout_rows(tmp_path, small_run / "recipe.yaml", quick=True))


def test_resumed_runs_are_the_same_bits(small_run: Path, tmp_path: Path) -> None:
    check(resume_rows(tmp_path, small_run / "recipe.yaml", quick=True))


def test_runs_go_on_elsewhere(small_run: Path, tmp_path: Path) -> None:
    check(move_rows(tmp_path, small_run / "recipe.yaml", quick=True))


def test_golden_losses(small_run: Path, tmp_path: Path) -> None:
    check(golden_rows(tmp_path, small_run / "recipe.yaml"))


def test_comparisons_can_fail() -> None:
    """The yardstick itself: what differs, is cut short or is no number never passes."""
    assert relative_difference([1.0, 2.0], [1.0, 2.0]) == 0
    assert relative_difference([1.0, 2.1], [1.0, 2.0]) == pytest.approx(0.05)
    assert not within("s", "c", "a", [1.0, 2.0001], [1.0, 2.0], 1e-5).ok
    assert not within("s", "c", "a", [1.0], [1.0, 2.0], 1e-5).ok
    assert not within("s", "c", "a", [], [], 1e-5).ok
    assert not within("s", "c", "a", [float("nan")], [1.0], 1e-5).ok
    assert not within("s", "c", "a", [1.0], [float("nan")], 1e-5).ok


def test_the_page_names_the_attention_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exactness.table.why_not", lambda _backend: "there is no library")
    assert attention_in_use() == "the portable backend, PyTorch operations (there is no library)"
    facts = {"used": "avx2", "compiler": "g++ 12.2.0"}
    monkeypatch.setattr("exactness.table.why_not", lambda _backend: None)
    monkeypatch.setattr("exactness.table.kernel_facts", lambda: facts)
    assert attention_in_use() == "the compiled CPU kernels, avx2, g++ 12.2.0"
