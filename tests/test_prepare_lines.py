"""Lines of chunks are those of the whole, however it is cut; none above the limit is handed out."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from longpretrain.prepare.lines import split_lines


@given(
    data=st.lists(st.sampled_from([b"\n", b"a", b"\r", b"bcdefgh"]), max_size=30).map(b"".join),
    cuts=st.lists(st.integers(0, 100), max_size=10),
    max_bytes=st.integers(0, 12),
    offset=st.integers(0, 9),
)
def test_any_cut(data: bytes, cuts: list[int], max_bytes: int, offset: int) -> None:
    ends = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    chunks = [data[start:end] for start, end in pairwise(ends)]
    right = []
    start = offset
    for number, line in enumerate(data.split(b"\n"), start=1):
        right.append((number, start, line if len(line) <= max_bytes else None))
        start += len(line) + 1
    if not data or data.endswith(b"\n"):
        right.pop()
    assert list(split_lines(chunks, max_bytes, offset)) == right


def test_a_line_that_is_emptied_leaves_the_next_alone() -> None:
    found = []
    for _, _, line in split_lines([b"a", b"b\nc", b"d\n", b"e"], 9):
        assert line
        found.append(bytes(line))
        if isinstance(line, bytearray):
            line.clear()
    assert found == [b"ab", b"cd", b"e"]
