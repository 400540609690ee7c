"""Lines for days on a disk that fills up: told once, nothing torn, written when there is room."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_disk import fill, small_disk

from longpretrain.report import line_file
from longpretrain.report.line_file import LineFile


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", kib=64) as folder:
        yield folder


def test_lines_are_in_the_file_at_once_and_in_order(tmp_path: Path, told: list[str]) -> None:
    file = LineFile(tmp_path / "a.txt", told.append)
    file.write("one")
    assert (tmp_path / "a.txt").read_text() == "one\n"
    file.write("two\nthree \udcff")
    file.close()
    file.close()
    file.write("nobody hears this")
    assert (tmp_path / "a.txt").read_text() == "one\ntwo\nthree \\udcff\n"
    assert file.is_closed
    assert told == []


def test_a_line_that_a_crash_cut_short_stays_apart(tmp_path: Path, told: list[str]) -> None:
    (tmp_path / "a.txt").write_text("whole\nha")
    file = LineFile(tmp_path / "a.txt", told.append)
    file.write("next")
    file.close()
    assert (tmp_path / "a.txt").read_text() == "whole\nha\nnext\n"


def test_threads_do_not_mix_their_lines(tmp_path: Path, told: list[str]) -> None:
    file = LineFile(tmp_path / "a.txt", told.append)

    def write(letter: str) -> None:
        for _ in range(200):
            file.write(letter * 50)

    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = (tmp_path / "a.txt").read_text().splitlines()
    assert sorted(lines) == sorted([letter * 50 for letter in "abc"] * 200)


def test_a_slow_sync_does_not_hold_up_who_writes(
    tmp_path: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    in_sync, go_on = threading.Event(), threading.Event()

    def slow_disk(descriptor: int) -> None:
        in_sync.set()
        assert go_on.wait(60)

    monkeypatch.setattr(os, "fsync", slow_disk)
    file = LineFile(tmp_path / "a.txt", told.append)
    thread = threading.Thread(target=file.sync)
    thread.start()
    assert in_sync.wait(60)
    writer = threading.Thread(target=file.write, args=("meanwhile",))
    writer.start()
    writer.join(60)
    is_held_up = writer.is_alive()
    file.close()
    go_on.set()
    thread.join()
    assert not is_held_up
    assert (tmp_path / "a.txt").read_text() == "meanwhile\n"
    assert told == []


def test_a_full_disk_is_told_once_and_loses_nothing(
    disk: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_file, "RETRY_S", 0.0)
    file = LineFile(disk / "a.txt", told.append)
    file.write("before")
    ballast = fill(disk)
    numbers = [f"{number:05d}".ljust(80, ".") for number in range(200)]
    for text in numbers:
        file.write(text)
    file.sync()
    assert len(told) == 1
    assert "no space left on device" in told[0]
    on_disk = (disk / "a.txt").read_bytes()
    assert on_disk.endswith(b"\n")  # no half of a line
    written = on_disk.decode().splitlines()
    assert written == ["before", *numbers][: len(written)]
    assert len(written) < 200
    ballast.unlink()
    file.write("after")
    assert (disk / "a.txt").read_text().splitlines() == ["before", *numbers, "after"]
    assert len(told) == 2
    assert f"written again, {202 - len(written)} lines late" in told[1]
    file.close()


def test_a_disk_that_stays_full_ends_with_a_word(
    disk: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_file, "MOST_KEPT", 1000)
    file = LineFile(disk / "a.txt", told.append)
    fill(disk)
    for _ in range(100):
        file.write("x" * 4999)
        file.write("y" * 99)
    assert file._kept_bytes <= 1000
    file.close()
    assert told[-1] == f"{disk / 'a.txt'}: closed without its last 200 lines"
    assert (disk / "a.txt").read_bytes() == b""


def test_a_full_disk_is_not_asked_for_every_line(
    disk: Path, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = LineFile(disk / "a.txt", told.append)
    fill(disk)
    asked = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda *parts: asked.append(1) or write(*parts))
    for _ in range(1000):
        file.write("x" * 80)
    monkeypatch.undo()
    assert 1 <= len(asked) < 500
    file.close()
