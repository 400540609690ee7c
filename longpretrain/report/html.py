"""One page about a run: ``report.html``, complete in itself, to read without a network.

Works at any moment of a run: before the first update, unfinished, stopped, done.
"""

from __future__ import annotations

import html
import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from longpretrain.errors import InputError
from longpretrain.files import write_atomically
from longpretrain.report import history
from longpretrain.report.console import count_text, duration_text
from longpretrain.report.history import clock
from longpretrain.report.metrics import read_metrics
from longpretrain.report.page import folded, page_html, table_html
from longpretrain.report.plots import Curve, describe, plot_svg

Line = dict[str, Any]
_WIDE = (10.6, 3.4)


@dataclass(frozen=True)
class _Run:
    folder: Path
    train: list[Line]
    evaluations: list[Line]
    events: list[Line]
    status: Line
    config_text: str
    config: Line
    setup: Line
    """Of the last start: versions, world_size, device; what is not known is left out."""
    scores: Line
    """evaluation.json of the run folder, as ``longpretrain evaluate`` writes it; empty if none."""


def write_report(run_dir: Path) -> Path:
    """Writes ``report.html`` into a run folder and returns its path.

    Raises:
        InputError: the folder is no run (neither config.yaml nor metrics.jsonl), or a line of its
            metrics is broken.
    """
    run = _read(Path(run_dir))
    path = run.folder / "report.html"
    write_atomically(path, _page(run))
    return path


def _read(folder: Path) -> _Run:
    metrics, config = folder / "metrics.jsonl", folder / "config.yaml"
    if not metrics.is_file() and not config.is_file():
        nothing = "a file" if folder.is_file() else "no such folder"
        raise InputError(
            f"run folder {folder}",
            got="no config.yaml and no metrics.jsonl" if folder.is_dir() else nothing,
            wanted="the folder of a run, such as runs/demo", way_out="Check the path.",
        )  # fmt: skip
    lines = read_metrics(metrics) if metrics.is_file() else []
    kinds = {
        kind: [line for line in lines if line["kind"] == kind]
        for kind in ("train", "evaluation", "event")
    }
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:
        tree = None
    return _Run(
        folder, kinds["train"], kinds["evaluation"], kinds["event"],
        status=_json(folder / "status.json"), config_text=text,
        config=tree if isinstance(tree, dict) else {}, setup=_setup(folder, kinds["event"]),
        scores=_json(folder / "evaluation.json"),
    )  # fmt: skip


def _json(path: Path) -> Line:
    """A small JSON object; one that is missing or broken costs its part of the page only."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _setup(folder: Path, events: Sequence[Line]) -> Line:
    """versions, world_size and device, as the newest checkpoint says and, over it, the events."""
    pointer = folder / "checkpoints" / "latest"
    found = {}
    if pointer.is_file():
        name = pointer.read_text(encoding="utf-8", errors="replace").strip()
        found = _json(pointer.parent / name / "state.json")
    for line in events:
        found |= line
    return {key: found[key] for key in ("versions", "world_size", "device") if key in found}


def _page(run: _Run) -> str:
    name = str(run.config.get("name") or run.folder.resolve().name)
    header = f"{_status(run)}\n{_tiles(run)}"
    main = "\n".join([
        _plots(run), _evaluations(run), _scores(run), history.attempts_html(run.events),
        history.skipped_html(run.train, run.events),
        history.ranks_html(run.train, _marks(run)),
        history.checkpoints_html(run.train, run.events),
        _facts(run), _events(run), _config(run),
    ])  # fmt: skip
    return page_html(f"{name}: pretraining report", name, header, main)


def _status(run: _Run) -> str:
    state = str(run.status.get("state") or "unfinished")
    look = state if state in ("done", "failed") else "open"
    reason = str(run.status.get("reason") or "")
    last = run.train[-1]["step"] if run.train else 0
    total = _get(run.config, "schedule", "total_steps")
    steps = f"step {last:,}" + (f" of {total:,}" if isinstance(total, int) else "")
    logged = f"; last update logged {clock(run.train[-1].get('time'))}" if run.train else ""
    said = f": {html.escape(reason)}" if reason else ""
    return (
        f'<p><span class="status {look}">{html.escape(state)}</span>{steps}{said}</p>'
        # No time of writing: the same run gives the same page.
        f'<p class="quiet">Run folder {html.escape(run.folder.resolve().name)}{logged}.</p>'
    )


def _tiles(run: _Run) -> str:
    tiles = []
    if run.train:
        last = run.train[-20:]
        tiles.append((_mean_bits(last), f"training bits per masked token, last {len(last)} steps"))
    scored = [line for line in run.evaluations if line["bits"] is not None]
    if scored:
        best = min(scored, key=lambda line: line["bits"])
        tiles.append((f"{scored[-1]['bits']:.4f}", "held-out bits per masked token, latest"))
        tiles.append((f"{best['bits']:.4f}", f"held-out, best (step {best['step']:,})"))
    if run.train:
        speed = statistics.median(line["tokens_per_s"] for line in run.train)
        tiles.append((count_text(speed), "tokens per second, median"))
        tiles.append((count_text(sum(line["tokens"] for line in run.train)), "tokens trained on"))
        tiles.append(
            (duration_text(sum(line["step_s"] for line in run.train)), "in training steps")
        )
    restarts = len(history.resumes(run.events))
    if restarts:
        tiles.append((f"{restarts:,}", "restart" if restarts == 1 else "restarts"))
        tiles.append((f"{history.lost_steps(run.events):,}", "updates done again"))
    if run.train and run.train[-1].get("skipped"):
        tiles.append((f"{run.train[-1]['skipped']:,}", "updates skipped"))
    shown = "".join(f"<li><b>{value}</b><span>{label}</span></li>" for value, label in tiles)
    return f'<ul class="tiles">{shown}</ul>' if tiles else ""


def _mean_bits(lines: Sequence[Line]) -> str:
    scored = [line for line in lines if line["bits"] is not None]
    weight = sum(line["masked_tokens"] for line in scored)
    if not weight:
        return "-"
    return f"{sum(line['bits'] * line['masked_tokens'] for line in scored) / weight:.4f}"


def _plots(run: _Run) -> str:
    if not run.train and not run.evaluations:
        return "<h2>Curves</h2>\n<p>No update is logged yet.</p>"
    marks = _marks(run)
    figures = [_loss_figure(run, marks)]
    if run.train:
        norms = [value for value in _column(run.train, "grad_norm") if value > 0]
        spread = max(norms) / min(norms) if norms else 1.0
        figures += [
            _figure(run, "lr", "Learning rate", "", "lr", from_zero=True),
            _figure(run, "grad_norm", "Gradient norm", "", "norm", is_log=spread > 50, marks=marks),
            _figure(run, "tokens_per_s", "Throughput", "of all ranks together", "tokens/s",
                    from_zero=True, marks=marks, y_text=count_text),
            _figure(run, "data_wait_s", "Waiting for data", "in each step", "ms",
                    from_zero=True, marks=marks, y_text=lambda wait_s: f"{wait_s * 1e3:,.3g}"),
        ]  # fmt: skip
    note = " Dotted lines: the run was resumed." if marks else ""
    band = " Band: least to greatest in each bin of steps." if len(run.train) > 400 else ""
    return (
        f'<h2>Curves</h2>\n<p class="quiet">By update.{band}{note}</p>\n'
        f'<div class="plots">{"".join(figures)}</div>'
    )


def _marks(run: _Run) -> list[float]:
    return [line["step"] for line in history.resumes(run.events)]


def _loss_figure(run: _Run, marks: Sequence[float]) -> str:
    curves = []
    if run.train:
        curves.append(Curve("training", _column(run.train, "step"), _column(run.train, "bits")))
    for name in dict.fromkeys(line.get("name", "valid") for line in run.evaluations):
        lines = [line for line in run.evaluations if line.get("name", "valid") == name]
        curves.append(
            Curve(f"held-out ({name})", _column(lines, "step"), _column(lines, "bits"), True)
        )
    said = " ".join(describe(f"{curve.label} bits", curve.x, curve.y) for curve in curves)
    svg = plot_svg("bits", said, curves, x_label="step", y_label="bits", marks=marks, inches=_WIDE)
    return (
        f'<figure class="wide"><figcaption><b>Loss</b> in bits per masked token'
        f" (log2 cross-entropy)</figcaption>{svg}</figure>"
    )


def _figure(run: _Run, field: str, title: str, note: str, y_label: str, **options: Any) -> str:
    x, y = _column(run.train, "step"), _column(run.train, field)
    svg = plot_svg(
        field.replace("_", "-"), describe(title, x, y), [Curve(title, x, y)], x_label="step",
        y_label=y_label, **options,
    )  # fmt: skip
    return f"<figure><figcaption><b>{title}</b> {note}</figcaption>{svg}</figure>"


def _evaluations(run: _Run) -> str:
    if not run.evaluations:
        return "<h2>Evaluation during training</h2>\n<p>None yet.</p>"
    rows = [
        [str(line.get("name", "valid")), f"{line['step']:,}", _number(line["bits"]),
         _number(line["loss"]), f"{line['masked_tokens']:,}"]
        for line in run.evaluations
    ]  # fmt: skip
    table = table_html(
        ["data", "step", "bits per masked token", "loss (nats)", "masked tokens"], rows
    )
    table = folded(f"{len(rows)} evaluations", table, len(rows))
    return f"<h2>Evaluation during training</h2>\n{table}"


def _scores(run: _Run) -> str:
    """What ``longpretrain evaluate`` measured: overall and by position in the sequence."""
    results = run.scores.get("results")
    if not isinstance(results, list) or not results:
        return ""
    rows, curves = [], []
    for result in results:
        rows.append([f"{result['max_tokens']:,}", _number(result["bits"]), f"{result['count']:,}",
                     f"{result['sequences']:,}"])  # fmt: skip
        places = [bucket for bucket in result["by_position"] if bucket["bits"] is not None]
        x = [(bucket["first"] + bucket["last"]) / 2 for bucket in places]
        y = [bucket["bits"] for bucket in places]
        curves.append(Curve(f"{result['max_tokens']:,} tokens", x, y, True))
    said = " ".join(
        describe(f"Bits at {curve.label}", curve.x, curve.y, "position") for curve in curves
    )
    svg = plot_svg(
        "positions", said, curves, x_label="position in the sequence", y_label="bits", inches=_WIDE
    )
    table = table_html(
        ["sequence length", "bits per masked token", "masked tokens", "sequences"], rows
    )
    return (
        f"<h2>Held-out score by length and position</h2>\n{table}\n"
        f'<figure class="below"><figcaption><b>By position</b> in buckets of 512</figcaption>'
        f"{svg}</figure>"
    )


def _facts(run: _Run) -> str:
    versions = run.setup.get("versions")
    if isinstance(versions, dict):
        versions = ", ".join(f"{name} {number}" for name, number in versions.items())
    skipped = run.train[-1]["skipped"] if run.train else None
    memory = max((line["memory_peak_mb"] for line in run.train), default=None)
    facts = {
        "Recipe": run.config.get("name"),
        "Started from": _get(run.config, "model", "path"),
        "Training data": _get(run.config, "data", "train") or _mix_text(run),
        "Held-out data": _get(run.config, "data", "valid"),
        "Tokens per sequence": _get(run.config, "data", "max_tokens"),
        "Sequences per update": _get(run.config, "batch", "global_sequences"),
        "Precision": run.config.get("precision"),
        "Ranks": run.setup.get("world_size"),
        "Device": run.setup.get("device"),
        "Peak memory": f"{count_text(memory * 1e6)}B" if memory is not None else None,
        "Updates skipped": skipped,
        "Versions": versions,
    }
    shown = "".join(
        f"<dt>{name}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in facts.items()
        if value not in (None, "")
    )
    return f"<h2>Facts</h2>\n<dl>{shown}</dl>" if shown else ""


def _mix_text(run: _Run) -> str:
    """The folders of a mix by the names of the sources."""
    mix = _get(run.config, "data", "mix")
    sources = mix if isinstance(mix, dict) else {}
    return ", ".join(f"{name}: {_get(sources, name, 'path')}" for name in sources)


def _events(run: _Run) -> str:
    if not run.events:
        return ""
    rows = [
        [f"{line['step']:,}", clock(line.get("time")), str(line.get("event", ""))]
        for line in run.events
    ]
    table = folded(
        f"{len(rows)} events", table_html(["step", "time", "event"], rows, (2,)), len(rows)
    )
    return f"<h2>Events</h2>\n{table}"


def _config(run: _Run) -> str:
    if not run.config_text:
        return ""
    return (
        "<h2>Configuration</h2>\n<details><summary>config.yaml, every key of the run</summary>"
        f"<pre>{html.escape(run.config_text)}</pre></details>"
    )


def _column(lines: Sequence[Line], field: str) -> list[float]:
    """One field of every line; NaN where it was no number."""
    return [math.nan if line.get(field) is None else float(line[field]) for line in lines]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _get(tree: Line, section: str, key: str) -> Any:
    part = tree.get(section)
    return part.get(key) if isinstance(part, dict) else None
