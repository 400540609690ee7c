"""The page of conversions: a line for each way of checking, a column for each transformers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from conversions.record import FAILED, NOT_RUN, PASSED, Proof, Record

COLUMNS = ("family", "direction", "how it is checked", "tests")
OK = "ok"


@dataclass(frozen=True, order=True)
class Key:
    """The cells of a line that no run changes."""

    family: str
    direction: str
    checked: str
    tests: str
    """How many, of which file."""


@dataclass
class Line:
    """Of the table."""

    key: Key
    cells: list[str] = field(default_factory=list)
    """One a version."""


def keys(proofs: Iterable[Proof]) -> list[Key]:
    """Those of the lines that these tests make, in the order of the page."""
    return [key for key, _ in _grouped(proofs)]


def lines(records: list[Record]) -> list[Line]:
    """The table: a test that one run lacks shows as not run there."""
    everything = {
        (proof.test, proof.checked): proof for record in records for proof in record.proofs
    }
    found = [(Line(key), tests) for key, tests in _grouped(everything.values())]
    for record in records:
        for line, tests in found:
            own = [p for p in record.proofs if p.test in tests and p.checked == line.key.checked]
            own = [p for p in own if p.family == line.key.family]
            own = [p for p in own if p.direction == line.key.direction]
            line.cells.append(_cell(own, len(tests)))
    return [line for line, _ in found]


def markdown(records: list[Record]) -> str:
    """A table for each family."""
    versions = [f"transformers {record.transformers}" for record in records]
    text, section = "", ""
    for line in lines(records):
        key = line.key
        if _section(key.family) != section:
            section = _section(key.family)
            text += f"{chr(10) if text else ''}## {section}\n\n"
            text += _row([*COLUMNS, *versions]) + _row(["---"] * (len(COLUMNS) + len(versions)))
        text += _row([key.family, key.direction, key.checked, key.tests, *line.cells])
    return text


def keys_of_page(text: str) -> list[Key]:
    """Read back from the page."""
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    found = [row[: len(COLUMNS)] for row in rows]
    return [Key(*row) for row in found if row[0] not in (COLUMNS[0], "---")]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _section(family: str) -> str:
    """BERT (no head) -> BERT."""
    return family.partition(" (")[0].partition(",")[0]


def _grouped(proofs: Iterable[Proof]) -> Iterator[tuple[Key, set[str]]]:
    groups: dict[tuple[str, str, str, str], set[str]] = {}
    for proof in proofs:
        key = (proof.family, proof.direction, proof.checked, proof.file)
        groups.setdefault(key, set()).add(proof.test)
    ordered = sorted(groups.items(), key=lambda group: (_section(group[0][0]), group[0]))
    for (family, direction, checked, file), tests in ordered:
        yield Key(family, direction, checked, f"{len(tests)} of {file}"), tests


def _cell(proofs: list[Proof], wanted: int) -> str:
    """ok only if every test passed."""
    outcomes = [proof.outcome for proof in proofs]
    failed = outcomes.count(FAILED)
    if failed:
        return f"**FAILED** ({failed} of {wanted})"
    missing = wanted - outcomes.count(PASSED)
    if missing:
        why = next((p.why for p in proofs if p.outcome == NOT_RUN and p.why), "")
        return f"**not run** ({missing} of {wanted})" + (f": {_plain(why)}" if why else "")
    reported: dict[str, list[str]] = {}
    for proof in proofs:
        for name, figure in proof.reported.items():
            reported.setdefault(name, []).append(figure)
    told = [f"{name} {_range(figures)}" for name, figures in reported.items()]
    return f"{OK}: {_plain(', '.join(told))}" if told else OK


def _range(figures: list[str]) -> str:
    """Of several tests: from the smallest to the largest; words one after the other."""
    try:
        ordered = sorted(set(figures), key=float)
    except ValueError:
        return ", ".join(dict.fromkeys(figures))
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]} to {ordered[-1]}"


def _plain(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
