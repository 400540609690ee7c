"""Cleaning on the way in: filters by name, in the order given; each says what it did, and to what.

unicode=nfc|nfkc   brings the text into a normal form of Unicode
min_tokens=N       drops a document of fewer tokens
max_tokens=N       drops a document of more
deduplicate        drops a document whose text an earlier one has (deduplicate.py)

The order of the last three decides only who drops what two of them would: what is left is the same.
They see a document in the order text, tokens, duplicates.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NoReturn

from longpretrain.errors import InputError
from longpretrain.prepare.documents import Document
from longpretrain.prepare.memory import GrowingText

EXAMPLES = 3
EXAMPLE_CHARS = 80

_NAMES = "unicode=nfc, unicode=nfkc, min_tokens=N, max_tokens=N or deduplicate"
_PART_CHARS = 1 << 20
_ASCII = re.compile("[\0-\x7f]")


@dataclass(frozen=True)
class Example:
    """The beginning of a document that a filter dropped, or where it changed one."""

    place: str
    text: str


@dataclass
class FilterReport:
    """What one filter did to the documents that came to it."""

    name: str
    seen: int = 0
    dropped: int = 0
    changed: int = 0
    tokens_dropped: int = 0
    examples: list[Example] = field(default_factory=list)

    def drop(self, place: str, text: str, tokens: int) -> None:
        """Counts a document that the filter dropped."""
        self.dropped += 1
        self.tokens_dropped += tokens
        self._show(place, text)

    def change(self, place: str, text: str) -> None:
        self.changed += 1
        self._show(place, text)

    def _show(self, place: str, text: str) -> None:
        if len(self.examples) < EXAMPLES:
            self.examples.append(Example(place, text[:EXAMPLE_CHARS]))

    def add(self, other: FilterReport) -> None:
        """Counts what the same filter did to documents further on in the corpus."""
        assert self.name == other.name
        self.seen += other.seen
        self.dropped += other.dropped
        self.changed += other.changed
        self.tokens_dropped += other.tokens_dropped
        self.examples = (self.examples + other.examples)[:EXAMPLES]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> FilterReport:
        examples = [Example(**example) for example in tree["examples"]]
        return cls(**(tree | {"examples": examples}))


@dataclass(frozen=True)
class _UnicodeForm:
    name: str
    form: Literal["NFC", "NFKC"]

    def changes(self, text: str) -> bool:
        return not all(unicodedata.is_normalized(self.form, part) for part in _parts(text))

    def change(self, document: Document) -> str:
        """Changes a text of which not all is normal; returns where that begins, as it was.

        In little memory: the old text goes before the new one is put together.
        """
        changed, example = GrowingText(), ""
        at = 0
        for part in _parts(document.text):
            normal = unicodedata.normalize(self.form, part)
            if not example and normal != part:
                start = max(0, at + _first_difference(normal, part) - EXAMPLE_CHARS // 2)
                example = document.text[start : start + EXAMPLE_CHARS]
            changed.add(normal)
            at += len(part)
        document.text = ""
        document.text = changed.take()
        return example


@dataclass(frozen=True)
class _TokenLimit:
    name: str
    at_least: int
    at_most: int | None

    def __call__(self, tokens: int) -> bool:
        return tokens >= self.at_least and (self.at_most is None or tokens <= self.at_most)


@dataclass(frozen=True)
class Filters:
    """What is done to every document; ``start`` begins to count."""

    texts: tuple[_UnicodeForm, ...] = ()
    tokens: tuple[_TokenLimit, ...] = ()
    deduplicate: bool = False

    @classmethod
    def parse(cls, given: Sequence[str]) -> Filters:
        """Filters by what the command line calls them.

        Raises:
            InputError: one that is unknown, there twice, or without a number; limits that leave
                nothing.
        """
        texts: list[_UnicodeForm] = []
        tokens: list[_TokenLimit] = []
        kinds = [name.partition("=")[0] for name in given]
        for name, kind in zip(given, kinds, strict=True):
            if kinds.count(kind) > 1:
                _refuse(name, f"{kind} twice", "each filter once")
            match name.partition("="):
                case "unicode", "=", "nfc":
                    texts.append(_UnicodeForm(name, "NFC"))
                case "unicode", "=", "nfkc":
                    texts.append(_UnicodeForm(name, "NFKC"))
                case "min_tokens", "=", count:
                    tokens.append(_TokenLimit(name, _count(name, count), None))
                case "max_tokens", "=", count:
                    tokens.append(_TokenLimit(name, 0, _count(name, count)))
                case "deduplicate", "", _:
                    pass
                case _:
                    _refuse(name, repr(name), _NAMES)
        least = max((limit.at_least for limit in tokens), default=0)
        most = [limit.at_most for limit in tokens if limit.at_most is not None]
        if most and least > most[0]:
            _refuse("min_tokens", f"{least}, above max_tokens", f"at most {most[0]}")
        return cls(tuple(texts), tuple(tokens), "deduplicate" in given)

    @property
    def names(self) -> tuple[str, ...]:
        """In the order in which they see a document."""
        names = [filter_.name for filter_ in self.texts] + [limit.name for limit in self.tokens]
        return (*names, "deduplicate") if self.deduplicate else tuple(names)

    def start(self) -> FilterRun:
        return FilterRun(self)


class FilterRun:
    """Filters at work on a unit: empty documents do not come here."""

    def __init__(self, filters: Filters) -> None:
        self.reports = [FilterReport(name) for name in filters.names]
        """In the order of ``names``; who drops a duplicate tells the last."""
        texts = len(filters.texts)
        self._texts = list(zip(filters.texts, self.reports[:texts], strict=True))
        limits = self.reports[texts : texts + len(filters.tokens)]
        self._tokens = list(zip(filters.tokens, limits, strict=True))
        self._duplicates = self.reports[-1] if filters.deduplicate else None

    def clean(self, document: Document) -> Document:
        """Before tokenizing: the same document, its text as the tokenizer is to see it."""
        for filter_, report in self._texts:
            report.seen += 1
            if filter_.changes(document.text):
                report.change(document.place, filter_.change(document))
        return document

    def keep(self, document: Document, tokens: int) -> bool:
        """After tokenizing: whether the document stays."""
        for filter_, report in self._tokens:
            report.seen += 1
            if not filter_(tokens):
                report.drop(document.place, document.text, tokens)
                return False
        if self._duplicates:
            self._duplicates.seen += 1
        return True


def merge_reports(units: Iterable[Sequence[FilterReport]]) -> list[FilterReport]:
    """Of all units, given in corpus order: the first examples of the corpus."""
    merged: list[FilterReport] = []
    for reports in units:
        if not merged:
            merged = [FilterReport(report.name) for report in reports]
        for total, report in zip(merged, reports, strict=True):
            total.add(report)
    return merged


def _parts(text: str) -> Iterator[str]:
    """A long text in parts, for normalizing takes many times the memory of what it is given.

    No ASCII character joins what is before it in these forms, so a part may begin with one.
    """
    if len(text) <= _PART_CHARS:
        yield text
        return
    start = 0
    while start < len(text):
        end = start + _PART_CHARS
        found = _ASCII.search(text, end)
        end = found.start() if found else len(text)
        yield text[start:end]
        start = end


def _first_difference(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least


def _count(name: str, text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        _refuse(name, repr(text), "a number of tokens above 0")
    return int(text)


def _refuse(name: str, got: str, wanted: str) -> NoReturn:
    raise InputError(f"filter {name}", got=got, wanted=wanted, way_out="Correct --filter.")
