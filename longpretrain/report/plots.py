"""Curves as SVG text to set into a page: they take the page's font and its light or dark colours.

Long runs are drawn by bins: the median as a line in a band from minimum to maximum, so that no
outlier is lost and a page of 65,000 updates stays small.
"""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

MAX_BINS = 400
"""Points of a curve in a plot; a longer one is drawn by bins."""

# Colours that stand for the page's own: replaced in the SVG, so that they follow light and dark.
_INK, _GRID = "#010101", "#020202"
ACCENTS = ("#030303", "#040404", "#050505", "#060606")
_PAGE_COLOURS = {_INK: "var(--ink)", _GRID: "var(--grid)"} | {
    colour: f"var(--accent-{number})" for number, colour in enumerate(ACCENTS)
}


@dataclass(frozen=True)
class Curve:
    """One curve of a plot; a y of NaN is a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    has_markers: bool = False


def plot_svg(
    slug: str,
    description: str,
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    is_log: bool = False,
    from_zero: bool = False,
    y_text: Callable[[float], str] | None = None,
    marks: Sequence[float] = (),
    inches: tuple[float, float] = (5.2, 2.7),
) -> str:
    """One plot as an ``<svg>`` element.

    Args:
        slug: distinct on the page; prefixes the ids inside.
        description: what a reader who does not see the plot is told.
        curves: drawn in order, each in its own accent colour.
        x_label: name and unit.
        y_label: name and unit.
        is_log: logarithmic y axis, for values that are all positive.
        from_zero: the y axis begins at 0.
        y_text: writes the numbers at the y axis; None: as they are.
        marks: x of thin vertical lines, such as where the run was resumed.
        inches: width and height before the page scales it.
    """

    def paint(axes: Any) -> None:
        _lay_out(axes, y_text)
        for mark in marks:
            axes.axvline(mark, color=_INK, linewidth=0.8, linestyle=":")
        for colour, curve in zip(ACCENTS, curves, strict=False):
            _draw(axes, curve, colour)
        if is_log:
            axes.set_yscale("log")
        elif from_zero:
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if len(curves) > 1:
            axes.legend(frameon=False, loc="best")

    return figure_svg(slug, description, paint, inches)


def figure_svg(
    slug: str, description: str, paint: Callable[[Any], None], inches: tuple[float, float]
) -> str:
    """One plot as an ``<svg>`` element; colours out of ACCENTS become the page's.

    Args:
        slug: distinct on the page; prefixes the ids inside.
        description: what a reader who does not see the plot is told.
        paint: draws into the axes it is given.
        inches: width and height before the page scales it.
    """
    style: Any = {
        "svg.fonttype": "none", "svg.hashsalt": slug, "text.color": _INK, "axes.labelcolor": _INK,
        "xtick.color": _INK, "ytick.color": _INK, "axes.edgecolor": _GRID, "font.size": 9.0,
        "path.simplify": False,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure = Figure(figsize=inches, layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        prepare_axes(axes, _GRID)
        paint(axes)
        file = io.StringIO()
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=no_metadata)
    return _for_page(file.getvalue(), slug, description)


def prepare_axes(axes: Any, grid: str) -> None:
    """The bare look of all plots: two spines, a grid behind."""
    axes.patch.set_alpha(0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=grid, linewidth=0.6)
    axes.set_axisbelow(True)


def binned(
    x: Sequence[float], y: Sequence[float], bins: int = MAX_BINS
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """(x, median, minimum, maximum) of y in at most ``bins`` runs of neighbours, gaps left out."""
    x_all, y_all = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    is_number = np.isfinite(y_all)
    x_all, y_all = x_all[is_number], y_all[is_number]
    if len(x_all) <= bins:
        return x_all, y_all, y_all, y_all
    edges = np.linspace(0, len(x_all), bins + 1).astype(int)
    parts = [slice(begin, end) for begin, end in itertools.pairwise(edges)]
    middle = np.array([x_all[part].mean() for part in parts])
    median = np.array([np.median(y_all[part]) for part in parts])
    low, high = (limit.reduceat(y_all, edges[:-1]) for limit in (np.minimum, np.maximum))
    return middle, median, low, high


def _lay_out(axes: Any, y_text: Callable[[float], str] | None) -> None:
    axes.ticklabel_format(style="sci", scilimits=(-3, 4), useMathText=False)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    steps = [1, 2, 5, 10]
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1, steps=steps))
    if y_text is not None:
        axes.yaxis.set_major_formatter(lambda value, _: y_text(value))


def _draw(axes: Any, curve: Curve, colour: str) -> None:
    x, median, low, high = binned(curve.x, curve.y)
    # A single point has no line to see.
    marker = "o" if curve.has_markers or len(x) == 1 else ""
    line = 1.0 if curve.has_markers else 1.4
    axes.plot(
        x, median, color=colour, linewidth=line, label=curve.label, marker=marker, markersize=3.5
    )
    if len(curve.x) > MAX_BINS:
        axes.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0)


def _for_page(svg: str, slug: str, description: str) -> str:
    """The element alone, with ids of its own, the page's colours and a text alternative."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{slug}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{slug}-", svg)
    svg = re.sub(r"(\d+\.\d{2})\d+", r"\1", svg)
    for stand_in, colour in _PAGE_COLOURS.items():
        svg = svg.replace(stand_in, colour)
    head, _, rest = svg.partition(">")
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{_attribute(description)}">{rest}'


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")


def describe(name: str, x: Sequence[float], y: Sequence[float], x_name: str = "step") -> str:
    """A curve in one sentence, for readers who do not see it."""
    points = [(at, value) for at, value in zip(x, y, strict=True) if math.isfinite(value)]
    if not points:
        return f"{name}: no values."
    (first_x, first), (last_x, last) = points[0], points[-1]
    low, high = min(value for _, value in points), max(value for _, value in points)
    return (
        f"{name}: {first:.4g} at {x_name} {first_x:g}, {last:.4g} at {x_name} {last_x:g};"
        f" lowest {low:.4g}, highest {high:.4g}."
    )
