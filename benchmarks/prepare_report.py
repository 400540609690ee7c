"""The results of the preparation benchmark as text, and which of the issue's numbers are met."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

Data = dict[str, Any]
LABELS = {
    "ours 1": "longpretrain prepare, 1 worker",
    "ours 2": "longpretrain prepare, 2 workers",
    "fairseq": "fairseq: BPE encoder + fairseq-preprocess",
    "datasets": "datasets.map, HF's fast tokenizer",
}


@dataclass(frozen=True)
class Target:
    """A number that was promised."""

    name: str
    measured: float | None
    wanted: float
    unit: str
    at_least: bool

    @property
    def is_met(self) -> bool | None:
        """None: not measured."""
        if self.measured is None:
            return None
        return self.measured >= self.wanted if self.at_least else self.measured <= self.wanted

    @property
    def texts(self) -> tuple[str, str, str, str]:
        """Cells of its row."""
        verdict = {True: "met", False: "NOT MET", None: "not measured"}[self.is_met]
        sign = ">=" if self.at_least else "<="
        measured = "-" if self.measured is None else f"{self.measured:,.4g} {self.unit}".strip()
        return self.name, measured, f"{sign} {self.wanted:,.4g} {self.unit}".strip(), verdict


def targets(data: Data) -> list[Target]:
    """All of them; of several forms the worse one counts."""
    memory, blocks = data.get("memory", []), data.get("blocks")
    trips = data.get("round_trip", [])
    plain, long, wide = (
        max(
            (
                max(row["peaks_mb"])
                for row in memory
                if (bool(row["long_mb"]), row["is_wide"]) == (is_long, is_wide)
            ),
            default=None,
        )
        for is_long, is_wide in ((False, False), (True, False), (True, True))
    )
    random_us = blocks and max(blocks[name]["median_us"] for name in ("full_sentences", "packed"))
    return [
        Target("tokens/s per core against fairseq", worst(data, "fairseq"), 10, "x", True),
        Target("tokens/s per core against datasets.map", worst(data, "datasets"), 6, "x", True),
        Target("2 workers against 1, wall time", worst(data, "workers"), 1.8, "x", True),
        Target("most memory of a process", plain, 400, "MB", False),
        Target("  with a 64 MB document", long, 400, "MB", False),
        Target("  of 4 bytes a character in memory", wide, 400, "MB", False),
        Target("opening a large corpus", blocks and blocks["open"]["open_s"], 2, "s", False),
        Target("  its memory", blocks and blocks["open"]["mb"], 200, "MB", False),
        Target("a random block, median", random_us, 100, "us", False),
        Target(
            "packed blocks filled", min((100 * row["fill"] for row in trips), default=None),
            98, "%", True,
        ),
        Target(
            "documents whose decoded ids are their text",
            min((100 * row["same"] / row["documents"] for row in trips), default=None),
            100, "%", True,
        ),
    ]  # fmt: skip


def ratio(data: Data, form: str, against: str) -> float | None:
    """Ours as a multiple of a peer's rate per core; "workers": 2 workers of 1, by wall time."""
    rows = {row["name"]: row for row in data.get("speed", []) if row["form"] == form}
    if against == "workers":
        pair, key = ("ours 2", "ours 1"), "tokens_per_s"
    else:
        pair, key = ("ours 1", against), "tokens_per_cpu_s"
    rates = [rows[name][key] if name in rows else None for name in pair]
    return None if None in rates else float(rates[0] / rates[1])


def worst(data: Data, against: str) -> float | None:
    """The least of the ratios of all forms."""
    forms = dict.fromkeys(row["form"] for row in data.get("speed", []))
    found = [ratio(data, form, against) for form in forms]
    numbers = [number for number in found if number is not None]
    return min(numbers) if numbers and len(numbers) == len(found) else None


def report(data: Data) -> str:
    """All tables, in Markdown."""
    machine = data["machine"]
    parts = [
        f"# Preparation of a corpus, {data['date'][:10]}",
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB; "
        + ", ".join(f"{name} {version}" for name, version in data["versions"].items()),
    ]
    if data["settings"]["quick"]:
        parts.append("A quick run: it shows that all parts run; the targets are for larger inputs.")
    parts += ["\n".join(lines) for lines in (_speed(data), _memory(data), _blocks(data)) if lines]
    parts += ["\n".join(_round_trip(data))] if data.get("round_trip") else []
    parts.append(
        "\n".join(_table(["target", "measured", "wanted", ""], [t.texts for t in targets(data)]))
    )
    parts += [f"Not measured: {reason}" for reason in data["not_measured"]]
    parts.append(data["method"])
    return "\n\n".join(parts) + "\n"


def _speed(data: Data) -> list[str]:
    rows = []
    for row in data.get("speed", []):
        rates = [row["tokens_per_cpu_s"], row["tokens_per_s"]]
        rows.append(
            [
                row["form"],
                LABELS[row["name"]],
                f"{row['input_mb']:,}",
                f"{row['tokens']:,}",
                f"{row['wall_s']:.2f} ({row['start_wall_s']:.2f})",
                f"{row['cpu_s']:.2f} ({row['start_cpu_s']:.2f})",
                *("-" if rate is None else f"{rate:,.0f}" for rate in rates),
                _ratio_text(data, row),
            ]
        )
    head = ["documents", "program", "MB", "tokens", "wall s (start)", "CPU s (start)"]
    return _table([*head, "tokens/CPU s", "tokens/s", "ratio"], rows) if rows else []


def _ratio_text(data: Data, row: Data) -> str:
    if row["name"] == "ours 1":
        return ""
    is_ours = row["name"] == "ours 2"
    found = ratio(data, row["form"], "workers" if is_ours else row["name"])
    if found is None:
        return "-"
    return f"{found:.2f}x of 1 worker" if is_ours else f"ours {found:.1f}x"


def _memory(data: Data) -> list[str]:
    rows = [
        [
            f"{row['input_mb']:,.0f}", _longest(row),
            f"{row['documents']:,}", f"{row['wall_s']:.1f}",
            ", ".join(f"{peak:,.0f}" for peak in row["peaks_mb"]),
        ]
        for row in data.get("memory", [])
    ]  # fmt: skip
    head = ["input MB", "longest MB", "documents", "wall s", "peak MB of each process"]
    return _table(head, rows) if rows else []


def _longest(row: Data) -> str:
    if not row["long_mb"]:
        return "-"
    return f"{row['long_mb']:,.0f}{', 4 bytes a character' * row['is_wide']}"


def _blocks(data: Data) -> list[str]:
    found = data.get("blocks")
    if not found:
        return []
    opened = found["open"]
    rows = [
        [
            policy, f"{row['blocks']:,}", f"{row['build_s']:.1f}", f"{row['open_s']:.2f}",
            f"{row['median_us']:.0f} ({row['p99_us']:.0f})", f"{row['mb']:.0f}",
        ]
        for policy, row in found.items()
        if policy != "open"
    ]  # fmt: skip
    head = ["blocks", "number", "index built s", "opened s", "a block us (p99)", "MB"]
    return [
        f"{opened['documents']:,} documents, {opened['tokens']:,} tokens: opened in "
        f"{opened['open_s']:.2f} s, {opened['mb']:.0f} MB.",
        "",
        *_table(head, rows),
    ]


def _round_trip(data: Data) -> list[str]:
    rows = [
        [
            row["form"], f"{row['documents']:,}", f"{row['same']:,}", f"{row['tokens']:,}",
            f"{row['blocks']:,}", f"{row['fill']:.2%}",
        ]
        for row in data["round_trip"]
    ]  # fmt: skip
    head = [
        "documents",
        "number",
        "equal after the round trip",
        "tokens",
        "packed blocks",
        "filled",
    ]
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return list(_lines([head, *rows]))


def _lines(table: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns of Markdown side by side, so that it reads on a terminal as well."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for number, row in enumerate(table):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        yield f"| {' | '.join(cells)} |"
        if not number:
            yield f"| {' | '.join('-' * width for width in widths)} |"
