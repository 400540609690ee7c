"""Byte-level BPE on tiktoken: its ranks are the merges in order, and a table turns them into ids.

tiktoken joins two neighbours when their *concatenation* is a token; a BPE joins them when the
*pair* is a merge. Both give the same tokens when every token has one merge, and that merge is what
the earlier merges make of the token (``is_exact``): so it is in any BPE trained the usual way.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

# GPT-2's split into words. The possessive form and the `\s++$` change no split, only its cost.
_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

# tiktoken's way to an array looks for special tokens, at every character if it knows none at all;
# this one (a noncharacter of Unicode) is text wherever it is met.
_NO_SPECIAL = "\U0010ffff"

# tiktoken's regex engine overflows its stack in runs of about a million spaces, so a long text is
# encoded in parts. The class is Unicode's White_Space, the engine's `\s` (Python's has more).
_PART_CHARS = 1 << 18
_SPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
_RUN = re.compile(f"(?P<space>[{_SPACE}]++)|[^{_SPACE}]++")
# A word of letters ends before a digit or a mark, always: what has no spaces is cut there.
_BORDER = re.compile(r"(?<=[A-Za-z])(?=[!-@\[-`{-~])")

# sha256 of RoBERTa's merges, which are exact (a test checks it): saves half a second a start.
_ROBERTA_MERGES = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"


def byte_symbols() -> dict[str, int]:
    """GPT-2's printable symbol of each of the 256 bytes, in the order of its vocabulary.

    Printable Latin-1 characters stand for themselves, the other bytes for U+0100, U+0101, ...
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + i): byte for i, byte in enumerate(others)
    }


class ByteBPE:
    """Encodes and decodes one exact byte-level BPE.

    Args:
        vocab: token (in byte symbols) or special token -> id.
        merges: pairs of tokens, first merged first.
        dtype: of the ids that ``encode`` gives.
    """

    def __init__(
        self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], dtype: np.dtype[Any]
    ) -> None:
        import tiktoken

        symbols = byte_symbols()
        tokens = [*symbols, *(left + right for left, right in merges)]
        ranks = {_to_bytes(token, symbols): rank for rank, token in enumerate(tokens)}
        assert len(ranks) == len(tokens), "is_exact() says whether tokens are unique"
        self._encoding = tiktoken.Encoding(
            "byte-level BPE", pat_str=_SPLIT, mergeable_ranks=ranks,
            special_tokens={_NO_SPECIAL: len(ranks)},
        )  # fmt: skip
        self._id_of_rank = np.array([vocab[token] for token in tokens], dtype=dtype)
        known = dict(zip(self._id_of_rank.tolist(), ranks, strict=True))
        self._bytes_of_id = {
            number: known.get(number, token.encode()) for token, number in vocab.items()
        }

    def encode(self, text: str) -> NDArray[Any]:
        """Ids of a text that holds no lone surrogates."""
        ids = bytearray()  # grows in place: two copies of a long text's ids would be too many
        for part in split_text(text, _PART_CHARS):
            ranks_N = self._encoding.encode_to_numpy(part, disallowed_special=())
            ids += np.take(self._id_of_rank, ranks_N).tobytes()
        return np.frombuffer(ids, dtype=self._id_of_rank.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self._bytes_of_id[int(i)] for i in ids).decode("utf-8", errors="replace")


def split_text(text: str, part_chars: int) -> Iterator[str]:
    """Cuts a text into parts of about part_chars whose tokens, in a row, are the text's.

    No word of the split crosses from a non-space to a space or from a letter to a digit or mark,
    nor does one hold the last space of a run together with the spaces before it, unless the text
    ends there.
    """
    start = 0
    while len(text) - start > part_chars:
        cut = _cut(text, start + part_chars, part_chars)
        yield text[start:cut]
        start = cut
    if start < len(text) or not text:
        yield text[start:]


def _cut(text: str, place: int, part_chars: int) -> int:
    """The first good place to cut at or after a place."""
    near = place + part_chars
    match = _RUN.match(text, place, near)
    assert match, "every character is a space or is not"
    if match.end() == near < len(text):
        border = None if match["space"] else _BORDER.search(text, place, near)
        if border:
            return border.start()
        match = _RUN.match(text, place)
        assert match, "as before"
    ends_inside = match["space"] and match.end() < len(text)
    return match.end() - 1 if ends_inside else match.end()


def is_exact(vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> bool:
    """True when tiktoken's way of merging gives the tokens of this BPE for every text."""
    symbols = byte_symbols()
    if not all(symbol in vocab for symbol in symbols):
        return False
    text = "\n".join(f"{left} {right}" for left, right in merges)
    if hashlib.sha256(text.encode()).hexdigest() == _ROBERTA_MERGES:
        return True
    rank_of = {symbol: rank for rank, symbol in enumerate(symbols)}
    for left, right in merges:
        token = left + right
        if token in rank_of or token not in vocab or left not in rank_of or right not in rank_of:
            return False
        if _merge(token, rank_of) != [left, right]:
            return False
        rank_of[token] = len(rank_of)
    return True


def _merge(token: str, rank_of: Mapping[str, int]) -> list[str]:
    """What merging by lowest rank, leftmost first, makes of a token."""
    parts = list(token)
    while len(parts) > 1:
        ranks = [rank_of.get(parts[i] + parts[i + 1], 1 << 62) for i in range(len(parts) - 1)]
        best = min(range(len(ranks)), key=ranks.__getitem__)
        if ranks[best] == 1 << 62:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def _to_bytes(token: str, symbols: Mapping[str, int]) -> bytes:
    return bytes(symbols[symbol] for symbol in token)
