"""What the pages of reports have in common: one look, light or dark, complete without a network."""

from __future__ import annotations

import html
from collections.abc import Sequence

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --quiet: #5b6472; --paper: #fdfdfb;
  --card: #ffffff; --grid: #dcdfe4; --accent-0: #1f5fbf; --accent-1: #c2500a;
  --accent-2: #16794c; --accent-3: #8a3ba8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7eb; --quiet: #9aa4b2; --paper: #14171c;
  --card: #1b1f26; --grid: #363c46; --accent-0: #7db2ff; --accent-1: #ffa36b;
  --accent-2: #6fd3a1; --accent-3: #d79bf0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 68rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue",
  Arial, sans-serif; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .35rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p { margin: .25rem 0; } .quiet, figcaption, th, dt { color: var(--quiet); }
.status { display: inline-block; padding: .1rem .6rem; border-radius: 1rem; font-weight: 600;
  font-size: .875rem; border: 1px solid currentColor; margin-right: .4rem; }
.done { color: var(--accent-2); } .failed { color: var(--accent-1); }
.open { color: var(--accent-0); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 1.5rem 0 0; padding: 0; list-style: none; }
.tiles li, figure { background: var(--card); border: 1px solid var(--grid); border-radius: .5rem; }
.tiles li { padding: .7rem .9rem; } .tiles b { display: block; font-size: 1.35rem; font-weight: 600;
  font-variant-numeric: tabular-nums; } .tiles span { font-size: .8125rem; color: var(--quiet); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(27rem, 100%), 1fr));
  gap: 1rem; } .wide { grid-column: 1 / -1; }
.below { margin-top: 1rem; }
.wide, .below { overflow-x: auto; } .wide svg, .below svg { min-width: 32rem; }
figure { margin: 0; padding: .8rem 1rem .6rem; } figcaption { font-size: .875rem; }
figcaption b { color: var(--ink); } svg { display: block; width: 100%; height: auto; }
svg text { font-family: inherit !important; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums;
  font-size: .9375rem; } th, td { text-align: right; padding: .3rem .9rem .3rem 0;
  border-bottom: 1px solid var(--grid); white-space: nowrap; } th { font-weight: 500; }
th:first-child, td:first-child { text-align: left; }
th.text, td.text { text-align: left; white-space: normal; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.5rem; margin: 0; }
dd { margin: 0; overflow-wrap: anywhere; } summary { cursor: pointer; }
pre { overflow-x: auto; padding: 1rem; background: var(--card); border: 1px solid var(--grid);
  border-radius: .5rem; font: .8125rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
"""


def page_html(title: str, name: str, header: str, main: str) -> str:
    """A whole page.

    Args:
        title: of the window, as plain text.
        name: the heading, as plain text.
        header: HTML below the heading.
        main: HTML of the rest.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{html.escape(name)}</h1>\n{header}\n</header>\n<main>\n"
        f"{main}\n</main>\n</body>\n</html>\n"
    )


def table_html(
    heads: Sequence[str], rows: Sequence[Sequence[str]], text_columns: Sequence[int] = ()
) -> str:
    """A table of plain text; all columns but the first and ``text_columns`` are numbers."""
    looks = [' class="text"' if column in text_columns else "" for column in range(len(heads))]
    head = "".join(
        f'<th scope="col"{look}>{html.escape(name)}</th>'
        for look, name in zip(looks, heads, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{look}>{html.escape(cell)}</td>" for look, cell in zip(looks, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def folded(summary: str, table: str, rows: int) -> str:
    """A long table opens on demand."""
    return f"<details><summary>{summary}</summary>{table}</details>" if rows > 12 else table
