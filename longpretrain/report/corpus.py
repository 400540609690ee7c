"""What a corpus holds as a picture of lengths or as a page; knows plain numbers and texts alone."""

from __future__ import annotations

import html
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from longpretrain.errors import InputError
from longpretrain.files import write_atomically
from longpretrain.report.console import count_text
from longpretrain.report.page import folded, page_html, table_html
from longpretrain.report.plots import ACCENTS, figure_svg, prepare_axes

_INCHES = (5.2, 3.0)
_PNG_COLOURS = ("#1f5fbf", "#c2500a", "#16794c", "#8a3ba8")
_PNG_GRID = "#dcdfe4"
_PARTS = (("documents", "Documents"), ("tokens", "Their tokens"))


@dataclass(frozen=True, kw_only=True)
class CorpusSection:
    """One corpus of a page."""

    name: str
    edges: Sequence[int]
    """Ascending; bin i holds documents of edges[i] to edges[i + 1] - 1 tokens."""
    documents: Sequence[int]
    """In each bin."""
    tokens: Sequence[int]
    """Of the documents in each bin."""
    facts: Mapping[str, str]
    filters: Sequence[tuple[str, str]] = ()
    """Name, and what it did."""
    examples: Sequence[tuple[str, str, str]] = ()
    """Filter, place, and beginning of a document that it dropped or changed."""
    problems: Sequence[tuple[str, str]] = ()
    """Place and reason."""
    samples: Sequence[tuple[str, str]] = ()
    """Which document, and its beginning."""


def check_target(out: Path) -> None:
    """Refuses a file that is neither of the two kinds, before there is anything to write.

    Raises:
        InputError: see above.
    """
    if out.suffix.lower() not in (".png", ".html"):
        raise InputError(
            f"out {out}",
            got=f"the suffix '{out.suffix}'",
            wanted=".png for the histogram, or .html for a page",
            way_out="Choose another name for --out.",
        )


def draw_corpora(out: Path, title: str, sections: Sequence[CorpusSection]) -> None:
    """Writes a .png with the histogram, or an .html with everything.

    Raises:
        InputError: another suffix.
    """
    check_target(out)
    write_atomically(
        out, _png(sections) if out.suffix.lower() == ".png" else _page(title, sections)
    )


def _png(sections: Sequence[CorpusSection]) -> bytes:
    style: Any = {"font.size": 9.0}
    with mpl.rc_context(style):
        figure = Figure(figsize=(2 * _INCHES[0], _INCHES[1]), layout="constrained")
        for axes, (part, label) in zip(figure.subplots(1, 2), _PARTS, strict=True):
            prepare_axes(axes, _PNG_GRID)
            _paint(axes, sections, part, _PNG_COLOURS)
            axes.set_title(label, fontsize=10, loc="left")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=144, metadata={"Software": None})
    return file.getvalue()


def _page(title: str, sections: Sequence[CorpusSection]) -> str:
    documents = sum(sum(section.documents) for section in sections)
    tokens = sum(sum(section.tokens) for section in sections)
    tiles = [(f"{documents:,}", "documents"), (count_text(tokens), "tokens")]
    shown = "".join(f"<li><b>{value}</b><span>{label}</span></li>" for value, label in tiles)
    figures = "".join(_figure(sections, part, label) for part, label in _PARTS)
    main = [
        '<h2>Lengths</h2>\n<p class="quiet">Shares of documents, and of all tokens, by the'
        f' length of the document; bins double.</p>\n<div class="plots">{figures}</div>',
        *(_section(section) for section in sections),
    ]
    return page_html(f"{title}: corpus", title, f'<ul class="tiles">{shown}</ul>', "\n".join(main))


def _figure(sections: Sequence[CorpusSection], part: str, label: str) -> str:
    def paint(axes: Any) -> None:
        _paint(axes, sections, part, ACCENTS)

    said = " ".join(_description(section, part, label) for section in sections)
    svg = figure_svg(f"lengths-{part}", said, paint, _INCHES)
    return f"<figure><figcaption><b>{label}</b> by length</figcaption>{svg}</figure>"


def _description(section: CorpusSection, part: str, label: str) -> str:
    counts = getattr(section, part)
    fullest = int(np.argmax(counts))
    low, high = section.edges[fullest], section.edges[fullest + 1] - 1
    share = counts[fullest] / sum(counts)
    return f"{section.name}, {label.lower()}: most, {share:.0%}, at {low:,} to {high:,} tokens."


def _paint(axes: Any, sections: Sequence[CorpusSection], part: str, colours: Sequence[str]) -> None:
    """Bars side by side, one colour a corpus; bins that only some of them have are empty."""
    edges = sorted({edge for section in sections for edge in section.edges})
    width = 0.8 / len(sections)
    for number, (section, colour) in enumerate(zip(sections, colours, strict=False)):
        counts = np.asarray(getattr(section, part), np.float64)
        places = [edges.index(edge) for edge in section.edges[:-1]]
        left = np.asarray(places) + 0.1 + number * width
        heights = 100 * counts / counts.sum()
        axes.bar(left, heights, width, align="edge", color=colour, label=section.name)
    axes.set_xticks(range(len(edges)), [f"{edge:,}" for edge in edges])
    axes.tick_params(axis="x", labelrotation=45 if len(edges) > 8 else 0)
    axes.grid(visible=False, axis="x")
    axes.set_xlabel("tokens of a document")
    axes.set_ylabel(f"% of {part}")
    if len(sections) > 1:
        axes.legend(frameon=False, loc="best")


def _section(section: CorpusSection) -> str:
    facts = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        for name, value in section.facts.items()
    )
    parts = [f"<h2>{html.escape(section.name)}</h2>", f"<dl>{facts}</dl>"]
    rows = [
        [f"{low:,}-{high - 1:,}" if high - 1 > low else f"{low:,}", f"{documents:,}", f"{tokens:,}"]
        for (low, high), documents, tokens in zip(
            itertools.pairwise(section.edges), section.documents, section.tokens, strict=True
        )
    ]
    table = table_html(["tokens", "documents", "their tokens"], rows)
    parts.append(f"<details><summary>Lengths as numbers</summary>{table}</details>")
    for title, heads, texts in (
        ("Filters", ["filter", "what it did"], section.filters),
        ("What they dropped or changed", ["filter", "where", "text"], section.examples),
        ("Problems", ["where", "what is wrong"], section.problems),
        ("Documents", ["number", "beginning"], section.samples),
    ):
        if texts:
            table = table_html(heads, texts, range(1, len(heads)))
            parts.append(f"<h3>{title}</h3>\n" + folded(f"{len(texts)} rows", table, len(texts)))
    return "\n".join(parts)
