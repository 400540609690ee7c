"""Time and memory against length as a PNG: a row for each quantity, a column for each dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from attention_peers import NET_OF
from attention_report import title_line
from attention_results import Results
from attention_runs import CALLS, case_labels

_INK, _QUIET, _GRID = "#1d2129", "#5b6472", "#e3e6ea"
_COLOURS = {
    "ours": "#0b4fb3",
    "portable": "#6aa0e8",
    "hf": "#c2410c",
    "blocked": "#15803d",
    "sdpa": "#64748b",
    "flex": "#a16207",
    "bigbird": "#86198f",
    "bigbird lean": "#c668cf",
}
_GAP = 0.062  # between labels, as a share of the height of a panel

Points = list[tuple[int, float]]


def draw(results: Results, path: Path) -> bool:
    """Writes the plot; False when there is nothing to draw."""
    dtypes = results.data["settings"]["dtypes"]
    rows: list[tuple[str, str, Mapping[str, Mapping[str, Points]]]] = []
    for call in CALLS:
        curves = {dtype: _times(results, dtype, call) for dtype in dtypes}
        rows.append((f"{call}, time", "ms", curves))
    memory = {dtype: _memory(results, dtype) for dtype in dtypes}
    rows.append((f"{CALLS[1]}, extra memory", "MiB", memory))
    rows = [row for row in rows if any(row[2].values())]
    if not rows:
        return False
    style: Any = {
        "font.size": 9.5, "text.color": _INK, "axes.labelcolor": _QUIET, "axes.edgecolor": _QUIET,
        "xtick.color": _QUIET, "ytick.color": _QUIET, "font.family": "DejaVu Sans",
        "axes.linewidth": 0.7,
    }  # fmt: skip
    with mpl.rc_context(style):
        _figure(results, rows, dtypes).savefig(path, dpi=150, metadata={"Software": None})
    return True


def _figure(
    results: Results,
    rows: Sequence[tuple[str, str, Mapping[str, Mapping[str, Points]]]],
    dtypes: Sequence[str],
) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width, height = 6.9 * len(dtypes), 1.15 + 3.35 * len(rows)
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(rows), len(dtypes), left=0.62 / width, right=1 - 1.75 / width, bottom=0.5 / height,
        top=1 - 1.15 / height, wspace=2.2 / 4.6, hspace=0.28,
    )  # fmt: skip
    shape = _plotted(results)
    backend = results.data["settings"]["backend"]
    ours = "" if backend == "fused" else f"; ours: backend {backend}, a stand-in"
    title = (
        f"Longformer attention against length: {shape['heads']} heads of 64,"
        f" attention window {shape['attention_window']}, one global token"
    )
    below = (
        f"{title_line(results)}. Medians, malloc as it comes."
        f" Projections of modules: not in times, but in memory{ours}."
    )
    left = 0.2 / width
    figure.text(left, 1 - 0.36 / height, title, fontsize=13, weight="bold")
    figure.text(left, 1 - 0.61 / height, below, fontsize=9.5, color=_QUIET)
    labels = case_labels(results.data["settings"]["peers"])
    for i, (name, unit, of_dtype) in enumerate(rows):
        for j, dtype in enumerate(dtypes):
            axes = figure.add_subplot(grid[i, j])
            _panel(axes, of_dtype[dtype], labels, x_label="tokens" if i == len(rows) - 1 else "")
            axes.set_title(f"{name} in {unit}, {dtype}", loc="left", fontsize=10, color=_INK)
    return figure


def _panel(
    axes: Any, curves: Mapping[str, Points], labels: Mapping[str, str], x_label: str
) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=_GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0)
    axes.minorticks_off()
    axes.set_xlabel(x_label)
    tokens = sorted({x for points in curves.values() for x, _ in points})
    if not tokens:
        return
    axes.set_xticks(tokens, [_short(n) for n in tokens])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.10g}")
    for case, points in sorted(curves.items(), key=lambda one: one[0] == "ours"):
        x, y = zip(*points, strict=True)
        line = 2.6 if case == "ours" else 1.4
        axes.plot(
            x, y, color=_COLOURS[case], linewidth=line, marker="o", markersize=1.7 * line**0.5 + 1
        )
    axes.set_xlim(tokens[0] * 0.88, tokens[-1] * 1.12)
    _label(axes, curves, labels)


def _label(axes: Any, curves: Mapping[str, Points], labels: Mapping[str, str]) -> None:
    """The name of each curve at the right edge, in its colour, led there by a thin line."""
    low, high = (math.log10(limit) for limit in axes.get_ylim())
    ends = {case: points[-1] for case, points in curves.items()}
    heights = {case: (math.log10(y) - low) / (high - low) for case, (_, y) in ends.items()}
    spread = _spread(heights)
    right = axes.get_xlim()[1]
    octaves = math.log2(right / axes.get_xlim()[0])
    leader_to, text_at = right * 2 ** (0.01 * octaves), right * 2 ** (0.018 * octaves)
    for case, (x, y) in ends.items():
        at = 10 ** (low + spread[case] * (high - low))
        colour = _COLOURS[case]
        dash: Any = (0, (1, 3))
        axes.plot(
            [x, leader_to], [y, at], color=colour, linewidth=0.7, linestyle=dash, clip_on=False,
            zorder=1,
        )  # fmt: skip
        weight = "bold" if case == "ours" else "normal"
        axes.text(
            text_at, at, labels[case], color=colour, weight=weight, va="center", fontsize=9,
            clip_on=False,
        )  # fmt: skip


def _spread(heights: Mapping[str, float]) -> dict[str, float]:
    """Moves labels apart, as little as needed, and keeps their order."""
    order = sorted(heights, key=lambda case: heights[case])
    at = [heights[case] for case in order]
    for _ in range(200):
        for i in range(len(at) - 1):
            lack = _GAP - (at[i + 1] - at[i])
            if lack > 1e-6:
                at[i] -= lack / 2
                at[i + 1] += lack / 2
    return dict(zip(order, at, strict=True))


def _times(results: Results, dtype: str, call: str) -> dict[str, Points]:
    """Case -> (tokens, net ms), at the headline's heads and window."""
    where = _plotted(results)
    rows = [row for row in results.data["timings"] if row["section"] == "growth"]
    tokens = sorted({row["tokens"] for row in rows})
    curves: dict[str, Points] = {}
    for case in _COLOURS:
        times = [
            (n, results.time_ms("growth", case, dtype, call, {"tokens": n, **where}))
            for n in tokens
        ]
        points = [(n, time_ms) for n, time_ms in times if time_ms is not None and time_ms > 0]
        if points and case not in NET_OF.values():
            curves[case] = points
    return curves


def _plotted(results: Results) -> dict[str, int]:
    """Heads and window of the plot: the headline's, else the first that were timed."""
    rows = [row for row in results.data["timings"] if row["section"] == "growth"]
    of_row = [{name: row[name] for name in ("heads", "attention_window")} for row in rows]
    shape = results.data["headline_shape"]
    wanted = {name: shape[name] for name in ("heads", "attention_window")}
    return wanted if wanted in of_row or not of_row else of_row[0]


def _memory(results: Results, dtype: str) -> dict[str, Points]:
    """Case -> (tokens, MiB)."""
    curves: dict[str, Points] = {}
    tokens = sorted({row["tokens"] for row in results.data["memory"]})
    for case in _COLOURS:
        rows = [(n, results.memory(case, dtype, n)) for n in tokens]
        points = [(n, row["growth_mib"]) for n, row in rows if row and row.get("growth_mib", 0) > 0]
        if points:
            curves[case] = points
    return curves


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 else str(tokens)
