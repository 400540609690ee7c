"""Large texts in little memory; freed memory goes back to the system, where there is a way."""

from __future__ import annotations

import ctypes
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longpretrain.prepare import memory
from longpretrain.prepare.memory import GrowingText, trim

# The ends of each width of a text: ASCII, Latin, two bytes, four; and halves of pairs.
CHARACTERS = "a\x7f\x80é\xff\u0100д€\ud800\udfff\uffff\U00010000😀\U0010ffff"
PARTS = st.lists(st.text(st.sampled_from(CHARACTERS), max_size=4), max_size=8)


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(r"VmRSS:\s*(\d+) kB", status)
    assert found
    return int(found[1]) << 10


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's own function")
def test_what_lies_between_blocks_in_use_is_given_back() -> None:
    blocks = [bytearray(b"x" * 100_000) for _ in range(1000)]
    before = resident_bytes()
    del blocks[::2]
    trim()
    assert resident_bytes() < before - 30_000_000


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_another_c_library(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def missing(_: object) -> None:
        raise error("no such function")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    trim()


class TestGrowingText:
    @settings(max_examples=500)
    @given(parts=st.one_of(PARTS, st.lists(st.text())))
    def test_is_what_join_makes(self, parts: list[str]) -> None:
        """Down to how Python holds it, on which comparing and hashing rest."""
        text = GrowingText()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(memory, "_PART_BYTES", 3)
            patch.setattr(memory, "_TRIM_BYTES", 9)
            for part in parts:
                text.add(part)
            found = text.take()
        joined = "".join(parts)
        assert found == joined
        assert hash(found) == hash(joined)
        assert {found: 1}[joined] == 1
        # Twice: what is new holds no UTF-8 of itself, as a text may that others have used.
        assert sys.getsizeof(found * 2) <= sys.getsizeof(joined * 2)
        assert found.isascii() == joined.isascii()

    def test_no_one_else_holds_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Else it would never be freed."""
        monkeypatch.setattr(memory, "_PART_BYTES", 3)
        text = GrowingText()
        for part in ("a", "😀", "д", "plain"):
            text.add(part)
        found = text.take()
        assert sys.getrefcount(found) == 2  # the name and the argument


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="measures what glibc keeps")
@pytest.mark.parametrize("wide_at", [0, 30])
def test_a_wide_text_takes_little_besides_itself(wide_at: int) -> None:
    """30 MiB, four times that as a text, wherever its wide character is."""
    program = f"""
import re
from pathlib import Path
from longpretrain.prepare.memory import GrowingText
told = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
text, before = GrowingText(), told()
for number in range(31):
    text.add("\\U0001f600" if number == {wide_at} else "x" * (1 << 20))
whole = text.take()
assert len(whole) == (30 << 20) + 1
print(told() - before)
"""
    out = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert 4 * 30 <= int(out.stdout) / 1024 < 4 * 30 + 20
