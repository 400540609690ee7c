"""Freed memory goes back to the system, where there is a way."""

from __future__ import annotations

import ctypes
import platform
import re
from pathlib import Path

import pytest

from longpretrain.prepare.memory import trim


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
