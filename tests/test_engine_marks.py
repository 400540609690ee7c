"""What a rank did last, read through memory that it shares: by another descriptor, as another
process would."""

from __future__ import annotations

import os
import time

from longpretrain.engine.marks import SIZE, Marks, open_marks, read_mark


def test_a_mark_is_seen_with_its_time() -> None:
    marks = Marks()
    memory = open_marks(marks.descriptor)
    assert read_mark(memory)[0::2] == (1, "its start")
    before = time.monotonic()
    marks.write("step 1: Ворота")
    count, at, text = read_mark(memory)
    assert (count, text) == (2, "step 1: Ворота")
    assert before <= at <= time.monotonic()


def test_the_same_again_is_progress_and_does_not_count() -> None:
    """Ranks are compared by the count: each waits for its own disk for a while of its own."""
    marks = Marks()
    memory = open_marks(marks.descriptor)
    marks.write("step 1: checkpoint")
    first = read_mark(memory)
    time.sleep(0.01)
    marks.write("step 1: checkpoint")
    again = read_mark(memory)
    assert again[0] == first[0]
    assert again[1] > first[1]


def test_a_long_mark_is_cut() -> None:
    marks = Marks()
    marks.write("x" * 2 * SIZE)
    text = read_mark(open_marks(marks.descriptor))[2]
    assert text == "x" * len(text)
    assert SIZE - 64 < len(text) < SIZE


def test_no_reader_sees_half_a_mark() -> None:
    """Another process writes all the while, with a pause now and then as a rank has."""
    marks = Marks()
    memory = open_marks(marks.descriptor)
    writer = os.fork()
    if not writer:
        for count in range(2, 20_002):
            marks.write(f"{count} " * (count % 100 + 1))
            if count % 4 == 0:
                time.sleep(2e-5)
        os._exit(0)
    seen = set()
    while os.waitpid(writer, os.WNOHANG) == (0, 0):
        count, _, text = read_mark(memory)
        assert count == 1 or text == f"{count} " * (count % 100 + 1)
        seen.add(count)
    assert len(seen) > 10
