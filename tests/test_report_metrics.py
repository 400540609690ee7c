"""The journal of a run: what is written, what a resume leaves of it, and how it reads."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_disk import fill, small_disk
from torch.utils.flop_counter import FlopCounterMode

from longpretrain.errors import InputError
from longpretrain.report import line_file
from longpretrain.report.console import Console, Eta, count_text, duration_text
from longpretrain.report.metrics import (
    DETERMINISTIC,
    MEASURED,
    MetricsLog,
    deterministic,
    peak_flops,
    read_metrics,
    train_flops_per_token,
)


def train_line(step: int, **changes: Any) -> dict[str, Any]:
    line = {
        "kind": "train", "step": step, "epoch": step / 50, "samples": 8 * step,
        "lr": 1e-5 * step, "grad_norm": 1 + 1 / step, "masked_tokens": 600 + step, "tokens": 4096,
        "loss": 8 / step, "skipped": 0, "step_s": 0.5, "data_wait_s": 0.001,
    }  # fmt: skip
    return line | changes


def run_steps(log: MetricsLog, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.report(train_line(step))
        if step % 4 == 0:
            log.report({"kind": "evaluation", "step": step, "loss": 3 / step, "masked_tokens": 99})


def open_log(run_dir: Path, **options: Any) -> MetricsLog:
    options = {"total_steps": 12, "tensorboard": False, "console": io.StringIO()} | options
    return MetricsLog(run_dir, **options)


def without_clock(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: line[key] for key in line if key not in MEASURED} for line in lines]


def test_resumed_file_equals_that_of_the_run_that_never_stopped(tmp_path: Path) -> None:
    with open_log(tmp_path / "whole") as log:
        run_steps(log, 1, 12)
    with open_log(tmp_path / "stopped") as log:
        run_steps(log, 1, 9)
    path = tmp_path / "stopped" / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 10, "lo')  # killed in the middle of a line
    with open_log(tmp_path / "stopped", resume_from_step=8) as log:
        assert [line["step"] for line in read_metrics(path)][-3:] == [8, 8, 8]
        run_steps(log, 9, 12)
    whole = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    assert len(whole) == 15
    no_events = [line for line in read_metrics(path) if line["kind"] != "event"]
    assert without_clock(no_events) == without_clock(whole)
    assert deterministic(read_metrics(path)) == deterministic(whole)
    assert sorted(p.name for p in path.parent.iterdir()) == ["log.txt", "metrics.jsonl"]


@pytest.mark.parametrize(
    ("resume_from_step", "kept"),
    [(None, [0, 3, 0]), (0, [0, 3, 0]), (2, [0, 1, 2, 3, 2]), (99, [0, 1, 2, 3, 3])],
    ids=["anew", "step-0", "step-2", "beyond"],
)
def test_resume_keeps_the_steps_up_to_the_checkpoint(
    tmp_path: Path, resume_from_step: int | None, kept: list[int]
) -> None:
    with open_log(tmp_path) as log:
        log.report({"kind": "event", "step": 0, "event": "started"})
        run_steps(log, 1, 3)
        log.report({"kind": "event", "step": 3, "event": "an event of a stretch that was lost"})
    console = io.StringIO()
    open_log(tmp_path, resume_from_step=resume_from_step, console=console).close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == kept
    assert next(line["event"] for line in lines if "event" in line) == "started"
    lost = 3 - min(resume_from_step or 0, 3)
    told = [line for line in lines if "lost_steps" in line]
    assert [(line["lost_steps"], line["lost_s"]) for line in told] == [(lost, lost * 0.5)][:lost]
    assert console.getvalue().count("are done again") == len(told)
    # A second resume of the same step has nothing to lose: the history is not told twice.
    open_log(tmp_path, resume_from_step=resume_from_step).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == lines


def test_lines_are_readable_while_the_run_goes_on(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        for step in (1, 2):
            log.report(train_line(step))
            assert len(read_metrics(tmp_path / "metrics.jsonl")) == step


def test_numbers_survive_bit_for_bit_and_fields_are_declared(tmp_path: Path) -> None:
    with open_log(tmp_path, flops_per_token=1e9, peak_flops=1e14) as log:
        run_steps(log, 1, 4)
    first, *_, evaluation = read_metrics(tmp_path / "metrics.jsonl")
    assert first["loss"] == train_line(1)["loss"]
    assert first["bits"] == first["loss"] / math.log(2)
    assert first["tokens_per_s"] == 8192.0
    assert first["mfu"] == pytest.approx(8192 * 1e9 / 1e14)
    assert 1 < first["memory_peak_mb"] < 1e6
    assert set(first) | set(evaluation) <= set(DETERMINISTIC) | set(MEASURED)
    assert evaluation["name"] == "valid"
    assert evaluation["bits"] == 0.75 / math.log(2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "minus-inf"])
def test_a_number_that_is_not_finite_is_null_and_does_not_stop_the_log(
    tmp_path: Path, bad: float
) -> None:
    console = io.StringIO()
    with open_log(tmp_path, console=console, every_steps=2) as log:
        log.report(train_line(1, loss=bad, grad_norm=bad, skipped=1))
        log.report(train_line(2))
        log.report({"kind": "evaluation", "step": 2, "loss": bad, "masked_tokens": 0})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["loss"], line["bits"]) for line in lines][::2] == [(None, None)] * 2
    assert " nan " in console.getvalue()


def test_a_rank_that_does_not_write_leaves_nothing(tmp_path: Path) -> None:
    with open_log(tmp_path / "run", is_writer=False) as log:
        run_steps(log, 1, 4)
        log.say("hello")
        log.sync()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "line",
    ["{", "[1, 2]", '{"step": 3}', "\0\0\0"],
    ids=["half", "list", "no-kind", "zeros"],
)
def test_a_broken_line_before_the_last_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"kind": "train", "step": 1}}\n{line}\n{{"kind": "train", "step": 2}}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl line 2"):
        read_metrics(path)
    # A crash of the machine may leave such a line: it does not stop a run that can go on.
    open_log(tmp_path, resume_from_step=2).close()
    first, last, told = read_metrics(path)
    assert (first["step"], last["step"]) == (1, 2)
    assert told["event"] == "metrics.jsonl: no metrics line on line 2: left out"


@settings(derandomize=True, deadline=None, max_examples=60)
@given(cut=st.integers(min_value=0, max_value=400))
def test_a_file_cut_anywhere_reads_as_its_whole_lines(cut: int, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("cut") / "metrics.jsonl"
    rows = [json.dumps({"kind": "train", "step": step, "loss": 1 / step}) for step in range(1, 9)]
    data = ("\n".join(rows) + "\n").encode()[:cut]
    path.write_bytes(data)
    assert [line["step"] for line in read_metrics(path)] == list(range(1, data.count(b"\n") + 1))


def test_no_metrics_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_console_is_aligned_has_one_header_and_equals_the_log(tmp_path: Path) -> None:
    console = io.StringIO()
    with open_log(tmp_path, console=console, total_steps=65_000, every_steps=4) as log:
        for step in (1, 2, 3, 4, 5, 6, 7, 8):
            log.report(train_line(step))
        log.report(train_line(65_000, epoch=2, grad_norm=123456.0))
    lines = console.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["step", "1", "4", "8", "65000"]
    assert len({len(line) for line in lines}) == 1
    assert {len(line.split()) for line in lines} == {len(Console.COLUMNS)}
    assert lines == (tmp_path / "log.txt").read_text().splitlines()
    row = dict(zip(lines[0].split(), lines[2].split(), strict=True))
    # Steps 2, 3, 4 since the last line, weighted by their masked tokens.
    loss = sum(8 / step * (600 + step) for step in (2, 3, 4)) / sum(600 + s for s in (2, 3, 4))
    assert row["loss"] == f"{loss:.4f}"
    assert row["bits"] == f"{loss / math.log(2):.4f}"
    assert (row["lr"], row["tokens/s"], row["wait"]) == ("4.0e-05", "8.2k", "0.2%")
    assert row["MFU"] == "-"


def etas(
    monkeypatch: pytest.MonkeyPatch, times: list[float], *, first: int, total: int, every: int
) -> list[str]:
    """What Eta says after updates of 0.5 s that end at these times."""
    clock = iter(times)
    monkeypatch.setattr("longpretrain.report.console.time.monotonic", lambda: next(clock))
    eta = Eta(total, every)
    return [duration_text(eta.update(first + n, 0.5)) for n in range(len(times))]


def test_eta_counts_the_time_between_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first update has only its own time: 0.5 s. Then 3 s per step, pauses included.
    found = etas(monkeypatch, [100.0, 103.0, 106.0], first=1, total=1202, every=0)
    assert found == ["10m00s", "1h00m", "59m57s"]


def test_eta_takes_a_pause_after_a_resume_for_one_of_its_period(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Resumed at step 498 of 1,000; an evaluation of 100 s after step 500, the next at 1,000.
    found = etas(monkeypatch, [0.0, 0.5, 101.0, 101.5], first=499, total=1000, every=500)
    assert found == ["4m10s", "4m10s", "5m49s", "5m49s"]  # 0.5 s, later 0.5 + 100 / 500 s a step


def test_eta_forgets_the_slow_first_update(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 2.0])
    monkeypatch.setattr("longpretrain.report.console.time.monotonic", lambda: next(clock))
    eta = Eta(103, 0)
    assert [eta.update(1, 30.0), eta.update(2, 1.0), eta.update(3, 1.0)] == [3060.0, 101.0, 100.0]


def test_the_console_shows_the_eta(tmp_path: Path) -> None:
    console = io.StringIO()
    with open_log(tmp_path, console=console, total_steps=1201) as log:
        log.report(train_line(1))
    assert console.getvalue().splitlines()[1].split()[-1] == "10m00s"


def test_every_attempt_appends_to_the_log(tmp_path: Path) -> None:
    for number, resume_from_step in enumerate((None, 0, None), 1):
        with open_log(tmp_path, resume_from_step=resume_from_step) as log:
            log.say("one")
        assert (tmp_path / "log.txt").read_text().splitlines() == ["one"] * number


def test_a_closed_console_does_not_end_the_run(tmp_path: Path) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    with open_log(tmp_path, console=Closed(), every_steps=1) as log:
        run_steps(log, 1, 3)
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    log_lines = (tmp_path / "log.txt").read_text().splitlines()
    assert sum("Broken pipe" in line for line in log_lines) == 1
    assert len(log_lines) == 5


def test_a_terminal_gets_a_bar_beside_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    bar, console = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stderr", bar)
    monkeypatch.setattr(sys, "stdout", console)
    with open_log(tmp_path, console=None, resume_from_step=4, every_steps=4) as log:
        run_steps(log, 5, 12)
    assert "4/12" in bar.getvalue()
    assert "12/12" in bar.getvalue()
    assert [line.split()[0] for line in console.getvalue().splitlines()] == [
        "step", "5", "8", "step", "12", "step",
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_disk_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_file, "RETRY_S", 0.0)
    console = io.StringIO()
    with small_disk(tmp_path / "disk", kib=1024) as disk:
        log = open_log(disk, console=console, every_steps=1, tensorboard=True, total_steps=400)
        run_steps(log, 1, 4)
        ballast = fill(disk)
        run_steps(log, 5, 300)
        log.sync()
        log.report({"kind": "event", "step": 300, "event": "still there"})
        steps = [line["step"] for line in read_metrics(disk / "metrics.jsonl")]
        assert max(steps) < 300  # it was full indeed
        ballast.unlink()
        run_steps(log, 301, 304)
        log.close()
        lines = read_metrics(disk / "metrics.jsonl")
    text = console.getvalue()
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 305))
    for name in ("metrics.jsonl", "log.txt"):
        assert text.count(f"{name}: no space left on device") == 1
        assert text.count(f"{name}: written again") == 1
    assert text.count("TensorBoard events are left out") == 1


def test_tensorboard_drops_what_a_resume_repeats(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_log(tmp_path, tensorboard=True) as log:
        run_steps(log, 1, 6)
    with open_log(tmp_path, tensorboard=True, resume_from_step=4) as log:
        run_steps(log, 5, 8)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/bits")] == list(range(1, 9))
    assert [event.step for event in events.Scalars("valid/bits")] == [4, 8]
    assert events.Scalars("train/loss")[1].value == pytest.approx(4.0)


def test_without_tensorboard_the_run_goes_on_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    console = io.StringIO()
    with open_log(tmp_path, tensorboard=True, console=console) as log:
        run_steps(log, 1, 4)
    assert console.getvalue().count("no TensorBoard events") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (192, "3m12s"),
        (3720, "1h02m"),
        (273_600, "3d04h"),
    ],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (987, "987"), (999.7, "1.0k"), (12_345, "12.3k"), (140_000, "140k"), (1.2e6, "1.2M"),
     (17.04e9, "17.0G"), (999_960, "1.0M"), (3e15, "3000T")],
)  # fmt: skip
def test_counts_read_well(number: float, text: str) -> None:
    assert count_text(number) == text


@pytest.mark.parametrize("window", [None, 2, 6, 40], ids=["full", "2", "6", "wider-than-text"])
def test_flops_are_those_that_torch_counts(window: int | None) -> None:
    hidden, wide, vocab, tokens, layers = 8, 24, 50, 16, 3
    reach = torch.arange(tokens)[:, None] - torch.arange(tokens)[None, :]
    keys = tokens**2 if window is None else int((reach.abs() <= window // 2).sum())
    x = torch.randn(tokens, hidden)
    counter = FlopCounterMode(display=False)
    with counter:
        for _ in range(layers):
            for shape in [(hidden, hidden)] * 4 + [(hidden, wide), (wide, hidden)]:
                torch.randn(tokens, shape[0]) @ torch.randn(shape)
            for _ in range(2):  # scores, and weighted values: one dot product per key
                torch.randn(keys, hidden) @ torch.randn(hidden, 1)
        (x @ torch.randn(hidden, hidden)) @ torch.randn(hidden, vocab)
    ours = train_flops_per_token(
        hidden_size=hidden, intermediate_size=wide, vocab_size=vocab,
        attention_window=[window] * layers, max_tokens=tokens, masked_share=1.0,
    )  # fmt: skip
    assert ours * tokens / 3 == pytest.approx(counter.get_total_flops(), rel=1e-12)


@pytest.mark.parametrize("weights_train", [True, False])
def test_flops_of_the_backward_are_those_that_torch_counts(weights_train: bool) -> None:
    """A layer and its head by torch's own autograd; attention over all keys."""
    hidden, wide, vocab, tokens = 8, 24, 50, 16
    shapes = [(hidden, hidden)] * 4 + [(hidden, wide), (wide, hidden)]
    shapes += [(hidden, hidden), (hidden, vocab)]  # the head's
    counter = FlopCounterMode(display=False)
    with counter:
        for shape in shapes:
            weight = torch.randn(shape, requires_grad=weights_train)
            (torch.randn(tokens, shape[0], requires_grad=True) @ weight).sum().backward()
        for _ in range(2):
            left = torch.randn(tokens, hidden, requires_grad=True)
            (left @ torch.randn(hidden, tokens, requires_grad=True)).sum().backward()
    ours = train_flops_per_token(
        hidden_size=hidden, intermediate_size=wide, vocab_size=vocab, attention_window=[None],
        max_tokens=tokens, masked_share=1.0, weights_train=weights_train,
    )  # fmt: skip
    assert ours * tokens == pytest.approx(counter.get_total_flops(), rel=1e-12)


def test_flops_of_the_published_base_model_are_near_six_per_parameter() -> None:
    ours = train_flops_per_token(
        hidden_size=768, intermediate_size=3072, vocab_size=50265, attention_window=[512] * 12,
        max_tokens=4096,
    )  # fmt: skip
    assert 6 * 85e6 < ours < 6 * 120e6  # 85 M in the layers, 39 M in the vocabulary


@pytest.mark.parametrize(
    ("device", "precision", "peak"),
    [("NVIDIA A100-SXM4-80GB", "bf16", 312e12), ("NVIDIA H100 80GB HBM3", "fp16", 989e12),
     ("NVIDIA H100 PCIe", "bf16", 756e12), ("NVIDIA A100-SXM4-80GB", "fp32", None),
     ("cpu", "bf16", None)],
)  # fmt: skip
def test_peaks_of_known_devices(device: str, precision: str, peak: float | None) -> None:
    assert peak_flops(device, precision) == peak
