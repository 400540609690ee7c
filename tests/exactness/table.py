"""One row per comparison, and the table they make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from longpretrain.attention import why_not
from longpretrain.attention.fused import kernel_facts


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell of the matrix: what ran, against what, and how far apart they are."""

    section: str
    cell: str
    """What ran, such as ``ZeRO 2, 2 ranks x 1 x 2``."""
    against: str
    """What it is compared with."""
    wanted: str
    """The limit in words, such as ``equal bits`` or ``<= 1e-5``."""
    measured: str
    """What was found, such as ``equal`` or ``3.1e-07``."""
    ok: bool


def relative_difference(left: Sequence[float], right: Sequence[float]) -> float:
    """The largest relative difference of two curves; infinity if their lengths differ."""
    if len(left) != len(right) or not left:
        return float("inf")
    pairs = zip(left, right, strict=True)
    # A NaN on either side is a difference, whatever max() thinks of it.
    found = [abs(a - b) / abs(b) if b else abs(a) for a, b in pairs]
    return float("inf") if any(value != value for value in found) else max(found)


def within(
    section: str, cell: str, against: str, left: Sequence[float], right: Sequence[float], at: float
) -> Row:
    """Two curves that agree within ``at``, relative, update by update."""
    difference = relative_difference(left, right)
    return Row(
        section=section,
        cell=cell,
        against=against,
        wanted=f"<= {at:.2g} relative".replace("e-0", "e-"),
        measured="equal" if difference == 0 else f"{difference:.1e}",
        ok=difference <= at,
    )


def equal(section: str, cell: str, against: str, different: Sequence[str]) -> Row:
    """What must be the same bits; ``different`` names what is not."""
    return Row(
        section=section,
        cell=cell,
        against=against,
        wanted="equal bits",
        measured="equal" if not different else f"differ: {', '.join(different[:3])}",
        ok=not different,
    )


def attention_in_use() -> str:
    """The backend that every run of the matrix has, as none of them names one."""
    if reason := why_not("fused"):
        return f"the portable backend, PyTorch operations ({reason})"
    facts = kernel_facts()
    return f"the compiled CPU kernels, {facts['used']}, {facts['compiler']}"


def markdown(rows: Iterable[Row]) -> str:
    """The rows as Markdown tables, a section each, in the order of their first rows."""
    by_section: dict[str, list[Row]] = {}
    for row in rows:
        by_section.setdefault(row.section, []).append(row)
    parts = []
    for section, members in by_section.items():
        lines = [f"## {section}", ""]
        lines += ["| what ran | against | wanted | found | |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {row.cell} | {row.against} | {row.wanted} | {row.measured} | "
            f"{'ok' if row.ok else '**NOT MET**'} |"
            for row in members
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
