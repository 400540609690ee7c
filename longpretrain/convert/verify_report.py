"""What verify found: checks, one line each, and where every tensor comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from longpretrain.convert.shown import shown

LOGIT_LIMIT = 1e-4
"""Largest absolute difference of an output, fp32: above rounding at base size, below any slip."""


@dataclass(frozen=True, kw_only=True)
class VerifyRow:
    """One check."""

    check: str
    """What was looked at."""
    got: str
    """What was found."""
    limit: str
    """What passes."""
    ok: bool
    """Whether it passed."""


@dataclass(frozen=True, kw_only=True)
class TensorRow:
    """One tensor of a model, or of either of two."""

    name: str
    """In the file of a model alone; in memory where two are compared, as files differ in names."""
    shape: tuple[int, ...] | None
    """None: it is not there."""
    dtype: str | None
    """By torch's name."""
    origin: str
    """Where it comes from, or what is wrong with it."""
    limit: str = ""
    """What would have been right, where it is wrong."""
    ok: bool
    """Whether it is as it should be."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """All checks of a model, or of a pair."""

    rows: tuple[VerifyRow, ...]
    """In the order they ran; every tensor that is wrong has one."""
    notes: tuple[str, ...] = ()
    """What is not as it was in the source, in words; none of it is wrong."""
    relation: str = ""
    """What the second model was found to be to the first."""
    tensors: tuple[TensorRow, ...] = ()
    """Every tensor."""

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(row.ok for row in self.rows)

    def lines(self) -> list[str]:
        """An aligned table, and how many tensors have which origin."""
        cells = [("", "check", "got", "limit")]
        cells += [("ok" if r.ok else "FAIL", r.check, r.got, r.limit) for r in self.rows]
        widths = [max(len(row[column]) for row in cells) for column in range(4)]
        padded = ((c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
        table = ["  ".join(row).rstrip() for row in padded]
        relation = [f"relation: {self.relation}"] if self.relation else []
        return [*table, *relation, *self._groups(), *(f"note: {note}" for note in self.notes)]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def tree(self, first: object, second: object = None) -> dict[str, Any]:
        """All of it as plain data.

        Args:
            first: the model, as the user named it.
            second: the other one, if there is one.
        """
        return {
            "ok": self.ok,
            "a": str(first),
            "b": None if second is None else str(second),
            "relation": self.relation or None,
            "checks": [asdict(row) for row in self.rows],
            "tensors": [asdict(row) for row in self.tensors],
            "notes": list(self.notes),
        }

    def _groups(self) -> Iterator[str]:
        """Of a pair: of a model alone every tensor comes from its file."""
        counts = Counter(row.origin for row in self.tensors if row.ok and self.relation)
        for origin, count in counts.most_common():
            yield f"{count:5d} x {origin}"


def failing(tensors: tuple[TensorRow, ...]) -> Iterator[VerifyRow]:
    """A check for every tensor that is wrong."""
    for row in tensors:
        if not row.ok:
            yield VerifyRow(check=shown(row.name), got=row.origin, limit=row.limit, ok=False)
