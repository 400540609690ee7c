"""One row per kind of fault, and the table they make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Row:
    """A kind of fault: how often it was tried, and what came of it."""

    section: str
    fault: str
    wanted: str
    """What must come of each try, in words."""
    tried: int = 0
    met: int = 0
    """Tries that came out as wanted."""
    lost: int = 0
    """Work that was lost: samples, updates, or checkpoints that were whole and not used."""
    worst_s: float | None = None
    """The longest that it took; what is timed stands in ``wanted``."""
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Of each try that was not met, with what reproduces it."""

    is_skipped: bool = False
    """It could not be tried here; a note says why."""

    @property
    def ok(self) -> bool:
        """Nothing lost and all met, of at least one try."""
        is_met = self.met == self.tried > 0 and not self.lost and not self.problems
        return is_met or self.is_skipped

    def count(self, problems: Sequence[str], *, took_s: float | None = None) -> None:
        """Takes one try in."""
        self.tried += 1
        self.met += not problems
        self.problems += problems
        if took_s is not None:
            self.worst_s = max(self.worst_s or 0.0, took_s)


def markdown(rows: Iterable[Row]) -> str:
    """The rows as Markdown tables, a section each, in the order of their first rows."""
    by_section: dict[str, list[Row]] = {}
    for row in rows:
        by_section.setdefault(row.section, []).append(row)
    parts = []
    for section, members in by_section.items():
        lines = [f"## {section}", ""]
        lines += ["| fault | wanted each time | tried | as wanted | lost | worst | |"]
        lines += ["| --- | --- | ---: | ---: | ---: | ---: | --- |"]
        for row in members:
            worst = "" if row.worst_s is None else f"{row.worst_s:.1f} s"
            verdict = "ok" if row.ok else "**NOT MET**"
            verdict = "not tried" if row.is_skipped else verdict
            lines.append(
                f"| {row.fault} | {row.wanted} | {row.tried} | {row.met} | {row.lost} | {worst} "
                f"| {verdict} |"
            )
        notes = [f"* {row.fault}: {note}" for row in members for note in row.notes]
        problems = [f"* **{row.fault}**: {text}" for row in members for text in row.problems[:10]]
        parts.append("\n".join([*lines, *([""] * bool(notes or problems)), *notes, *problems]))
    return "\n\n".join(parts) + "\n"
