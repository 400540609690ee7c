"""Long texts in parts whose tokens, in a row, are the text's: where a tokenizer allows it.

The libraries' memory is a multiple of the text they are given (tokenizers' about a hundredfold).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

PART_CHARS = 1 << 16

# Between letters or digits: there no normaliser makes one character of what is on both sides.
_BEFORE_SPACE = re.compile(r"(?<=\w)(?= \w)")

# Steps of a tokenizer.json that treat a text that begins with a space as they do its inside.
_LOCAL = {
    "BertNormalizer", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt",
    "Precompiled",
}  # fmt: skip
_DROPS_SPACES = {"BertPreTokenizer", "Whitespace", "WhitespaceSplit"}


def cut_at(text: str, places: re.Pattern[str] | None, part_chars: int) -> Iterator[str]:
    """Parts of part_chars or more, cut at these places; what they match is dropped."""
    start = 0
    while places and len(text) - start > part_chars:
        match = places.search(text, start + part_chars)
        if not match:
            break
        yield text[start : match.start()]
        start = match.end()
    yield text[start:]


def places_to_cut(tree: Mapping[str, Any]) -> re.Pattern[str] | None:
    """Where the text for a tokenizer.json may be cut; None: nowhere that we can tell.

    Before a single space inside prose: a part then begins with the space, and every known way to
    split a text into words begins one there.
    """
    first, *_ = [*_steps(tree.get("pre_tokenizer"), "pretokenizers"), {}]
    kind = first.get("type")
    splits = (
        kind in _DROPS_SPACES
        or (kind == "ByteLevel" and first.get("use_regex", True))
        or (kind == "Metaspace" and first.get("split", True))
    )
    steps = _steps(tree.get("normalizer"), "normalizers")
    added = [entry for entry in tree.get("added_tokens") or [] if not entry["special"]]
    reaches_over = any(
        " " in entry["content"] or entry.get("lstrip") or entry.get("rstrip") for entry in added
    )
    if splits and not reaches_over and all(map(_is_local, steps)):
        return _BEFORE_SPACE
    return None


def _steps(step: Mapping[str, Any] | None, name: str) -> list[Mapping[str, Any]]:
    if not step:
        return []
    if step.get("type") != "Sequence":
        return [step]
    return [inner for each in step[name] for inner in _steps(each, name)]


def _is_local(step: Mapping[str, Any]) -> bool:
    if step.get("type") == "Replace":  # of several spaces, or of single characters
        pattern = step["pattern"]
        return pattern == {"Regex": " {2,}"} or len(pattern.get("String", "")) == 1
    return step.get("type") in _LOCAL
