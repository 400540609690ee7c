"""The page about a run: complete in itself, right on odd runs, small on long ones."""

from __future__ import annotations

import html.parser
import json
import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longpretrain.errors import InputError
from longpretrain.report.html import write_report
from longpretrain.report.plots import MAX_BINS, binned, describe

CONFIG = """name: tiny-run
model: {path: runs/short}
data: {train: corpus/train, valid: corpus/valid, max_tokens: 4096}
batch: {global_sequences: 8}
schedule: {total_steps: 40}
precision: bf16
"""


def train(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "train", "step": step, "epoch": 0, "samples": 8 * step, "loss": 3 + 4 / step,
        "bits": (3 + 4 / step) / math.log(2), "lr": 1e-5, "grad_norm": 2.0, "masked_tokens": 600,
        "tokens": 4096, "skipped": 0, "step_s": 0.5, "data_wait_s": 0.01, "tokens_per_s": 8192.0,
        "memory_peak_mb": 900.0, "mfu": None, "time": 1.7e9 + step,
    } | changes  # fmt: skip


def evaluation(step: int, bits: float | None = 4.25) -> dict[str, Any]:
    loss = None if bits is None else bits * math.log(2)
    return {"kind": "evaluation", "name": "valid", "step": step, "loss": loss, "bits": bits,
            "masked_tokens": 5000}  # fmt: skip


def event(step: int, text: str, **details: Any) -> dict[str, Any]:
    return {"kind": "event", "step": step, "event": text, "time": 1.7e9, **details}


SCORES = {
    "results": [
        {"max_tokens": 512, "bits": 4.5, "count": 700, "sequences": 9,
         "by_position": [{"first": 0, "last": 511, "bits": 4.5}]},
        {"max_tokens": 1024, "bits": 4.25, "count": 700, "sequences": 5,
         "by_position": [{"first": 0, "last": 511, "bits": 4.5},
                         {"first": 512, "last": 1023, "bits": None}]},
    ]
}  # fmt: skip


def make_run(folder: Path, lines: Sequence[dict[str, Any]] | None, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if lines is not None:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


class _Checker(html.parser.HTMLParser):
    """Balanced tags, every reference inside the page, every id once."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if not name.startswith("xmlns"):
                assert "//" not in (value or ""), (tag, name, value)
            assert name not in ("src", "onload", "onclick"), (tag, name)
            if name.endswith("href"):
                assert (value or "").startswith("#"), (tag, name, value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check_page(folder: Path) -> tuple[str, str]:
    """(source, text) of the report of a run, after checking what every page must be."""
    path = write_report(folder)
    assert path == folder / "report.html"
    assert not list(folder.glob(".*.part"))
    source = path.read_text(encoding="utf-8")
    checker = _Checker()
    checker.feed(source)
    checker.close()
    assert checker.open == []
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(checker.tags)
    assert len(checker.ids) == len(set(checker.ids))
    assert not re.search(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", source))
    assert not re.search(r"url\((?!#)|@import", source)
    for target in re.findall(r'(?:url\(#|href="#)([^")]+)', source):
        assert target in checker.ids
    for svg in re.findall(r"<svg.*?</svg>", source, flags=re.DOTALL):
        root = ET.fromstring(svg)
        assert root.get("role") == "img"
        assert len(root.get("aria-label", "")) > 10
        assert "var(--accent-0)" in svg or "no values" in root.get("aria-label", "")
        assert re.search(r"#0[0-9]0[0-9]0[0-9]", svg) is None  # no stand-in colour is left
    return source, " ".join(" ".join(checker.text).split())


def test_whole_run_has_everything(tmp_path: Path) -> None:
    versions = {"longpretrain": "0.1.0", "torch": "2.13.0"}
    lines = [event(0, "started on 2 ranks", world_size=2, device="cpu", versions=versions)]
    lines += [train(step) for step in range(1, 41)]
    lines += [evaluation(20, 5.125), evaluation(40, 4.25), event(20, "resumed from step-000020")]
    run = make_run(
        tmp_path, lines, config__yaml=CONFIG, evaluation__json=json.dumps(SCORES),
        status__json='{"state": "done", "reason": "all 40 updates", "step": 40}',
    )  # fmt: skip
    source, text = check_page(run)
    assert source.count("<svg") == 6
    for wanted in [
        "tiny-run", "done", "step 40 of 40", "all 40 updates", "5.1250", "4.2500", "corpus/train",
        "corpus/valid", "torch 2.13.0", "started on 2 ranks", "bf16", "900MB", "8.2k", "164k",
        "Dotted lines", "global_sequences: 8",
    ]:  # fmt: skip
        assert wanted in text, wanted
    assert "held-out (valid) bits: 5.125 at step 20, 4.25 at step 40" in source
    assert "<details>" in source


@pytest.mark.parametrize(
    ("lines", "files", "wanted"),
    [
        ([], {}, "No update is logged yet"),
        (None, {"config__yaml": CONFIG}, "step 0 of 40"),
        ([train(1)], {}, "unfinished"),
        ([train(step) for step in range(1, 6)], {"config__yaml": CONFIG}, "step 5 of 40"),
        ([evaluation(0)], {}, "4.2500"),
        ([train(1, loss=None, bits=None, grad_norm=None), evaluation(1, None)], {}, "not finite"),
        ([train(1)], {"status__json": '{"state": "preempted", "reason": "SIGUSR1"}'}, "SIGUSR1"),
        ([], {"status__json": "{", "config__yaml": "a: [", "evaluation__json": "[]"}, "a: ["),
        ([train(1, grad_norm=0.0), train(2, grad_norm=1), train(3, grad_norm=1e3)], {}, "step 3"),
    ],
    ids=["empty", "config-only", "one-line", "unfinished", "evaluation-only", "not-finite",
         "preempted", "broken-small-files", "steep-gradient"],
)  # fmt: skip
def test_odd_runs_have_a_page(
    tmp_path: Path, lines: list[dict[str, Any]] | None, files: dict[str, str], wanted: str
) -> None:
    _, text = check_page(make_run(tmp_path, lines, **files))
    assert wanted in text


def test_a_half_written_last_line_is_no_obstacle(tmp_path: Path) -> None:
    make_run(tmp_path, [train(1), train(2)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')
    _, text = check_page(tmp_path)
    assert "step 2" in text


def test_text_of_the_user_is_text(tmp_path: Path) -> None:
    nasty = '<script>alert("1 & 2")</script>'
    config = json.dumps({"name": nasty, "data": {"train": nasty}})
    lines = [train(1), event(1, nasty), evaluation(1) | {"name": nasty}]
    source, text = check_page(make_run(tmp_path, lines, config__yaml=config))
    assert "<script" not in source
    assert nasty in text


def test_setup_comes_from_the_checkpoint_when_no_event_has_it(tmp_path: Path) -> None:
    step = tmp_path / "checkpoints" / "step-000002"
    step.mkdir(parents=True)
    (step / "state.json").write_text('{"versions": {"deepspeed": "0.19.8"}, "world_size": 16}')
    (step.parent / "latest").write_text("step-000002\n")
    _, text = check_page(make_run(tmp_path, [train(1)]))
    assert "deepspeed 0.19.8" in text
    assert "Ranks 16" in text


@pytest.mark.parametrize("is_folder", [True, False], ids=["no-run", "no-folder"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, is_folder: bool) -> None:
    folder = tmp_path / "x"
    if is_folder:
        folder.mkdir()
    with pytest.raises(InputError, match="run folder"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_a_long_run_makes_a_small_page_that_keeps_its_outliers(tmp_path: Path) -> None:
    lines = [train(step, bits=2 + math.sin(step) / 10) for step in range(1, 20_001)]
    lines[12_345]["bits"] = 77.0
    source, text = check_page(make_run(tmp_path, lines))
    assert len(source) < 500_000
    assert "Band" in text
    assert "highest 77" in source


@settings(derandomize=True, deadline=None, max_examples=100)
@given(
    y=st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=0, max_size=300),
    bins=st.integers(1, 50),
)
def test_bins_hold_every_value_between_their_limits(y: list[float], bins: int) -> None:
    x_B, median_B, low_B, high_B = binned(range(len(y)), y, bins)
    numbers = np.array([value for value in y if math.isfinite(value)])
    assert len(x_B) == min(bins, len(numbers))
    if len(numbers):
        assert (low_B.min(), high_B.max()) == (numbers.min(), numbers.max())
        assert (low_B <= median_B).all()
        assert (median_B <= high_B).all()
        assert (np.diff(x_B) > 0).all()


def test_short_curves_are_drawn_as_they_are() -> None:
    y = list(np.linspace(0, 1, MAX_BINS))
    x, median, low, high = binned(range(MAX_BINS), y)
    assert (median == y).all()
    assert (low == high).all()
    assert len(x) == MAX_BINS


def test_descriptions_leave_gaps_out() -> None:
    assert describe("Loss", [1, 2, 3], [math.nan, 4, 2]) == (
        "Loss: 4 at step 2, 2 at step 3; lowest 2, highest 4."
    )
    assert describe("Loss", [1], [math.nan]) == "Loss: no values."
