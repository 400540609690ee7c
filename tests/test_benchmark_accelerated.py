"""benchmarks/accelerated.py compares models that compute the same, and tells times and memory."""

from __future__ import annotations

import re

import pytest
from benchmark_scripts import scripts_importable

with scripts_importable():
    import accelerated as benchmark

    # Here and not when it runs: the folder is on Python's path no longer then.
    from accelerated import Row, make_models, table

pytestmark = pytest.mark.usefixtures("library")


def test_a_line_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "ROWS", [Row("training", 100, 1)])
    head, _, line = table(layers=1, seconds=0)
    assert line.startswith("| training, 100 tokens, 1 global | ")
    assert line.count("|") == head.count("|")
    found = re.findall(r"\d+\.\d+(?:e-\d+)?", line)
    plain_s, ours_s, ratio, plain_gb, ours_gb, difference = map(float, found)
    assert plain_s > 0 < ours_s
    assert ratio > 0
    assert 0 < ours_gb < plain_gb
    assert 0 < difference < 1e-5


def test_the_two_models_differ_in_their_attention_alone() -> None:
    plain, ours = make_models(1).values()
    changed = {
        name
        for (name, theirs), module in zip(plain.named_modules(), ours.modules(), strict=True)
        if type(theirs) is not type(module)
    }
    assert changed == {"encoder", "encoder.layer.0.attention.self"}
    weights = zip(plain.parameters(), ours.parameters(), strict=True)
    assert all(bool((x == y).all()) for x, y in weights)
