"""What each rank printed stands in a file of its own, whole, whatever ends the rank."""

from __future__ import annotations

import logging
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from small_disk import fill, small_disk

from longpretrain.report.rank_log import FOLDER, RankLog

NAME = "rank-00003.txt"
STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")


def logged(run_dir: Path) -> list[str]:
    """The lines of rank 3, without their times; every line has one."""
    lines = (run_dir / FOLDER / NAME).read_text().splitlines()
    for line in lines:
        assert STAMP.match(line) or line.startswith("--- "), line
    return [STAMP.sub("", line, count=1) for line in lines]


def test_what_is_printed_is_shown_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    streams = sys.stdout, sys.stderr
    with RankLog(3, "4 ranks by srun") as log:
        print("before the folder is ours")
        log.begin(tmp_path)
        print("half", end="")
        print(" and half")
        print("problem", file=sys.stderr)
        handler = logging.StreamHandler(sys.stdout)
        handler.handle(logging.makeLogRecord({"msg": "logged"}))
        sys.stdout.writelines(["a\n", "b\n"])
        print("unfinished", end="")
    head, *lines = logged(tmp_path)
    assert re.fullmatch(r"--- UTC, rank 3: 4 ranks by srun; host \S+, process \d+ ---", head)
    assert lines == [
        "before the folder is ours", "half and half", "problem", "logged", "a", "b", "unfinished",
        "--- ends ---",
    ]  # fmt: skip
    out, errors = capsys.readouterr()
    assert out == "before the folder is ours\nhalf and half\nlogged\na\nb\nunfinished"
    assert errors == "problem\n"
    assert (sys.stdout, sys.stderr) == streams
    handler.handle(logging.makeLogRecord({"msg": "after the end"}))  # it kept our stream
    assert capsys.readouterr().out == "after the end\n"
    assert "after the end" not in logged(tmp_path)


def test_every_attempt_has_its_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2):
        with RankLog(3, f"attempt {number}") as log:
            log.begin(tmp_path)
            print(f"number {number}")
    heads = [line for line in logged(tmp_path) if "attempt" in line]
    assert len(heads) == 2
    assert [line for line in logged(tmp_path) if line.startswith("n")] == ["number 1", "number 2"]


def test_a_refused_rank_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RankLog(3, "refused"):
        print("the run folder belongs to another run")
    assert list(tmp_path.iterdir()) == []


def test_the_traceback_is_there_where_the_command_line_tells_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(FloatingPointError), RankLog(3, "diverges") as log:
        log.begin(tmp_path)
        raise FloatingPointError("gradient: got NaN")
    lines = logged(tmp_path)
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[-2:] == [
        "FloatingPointError: gradient: got NaN",
        "--- ends by FloatingPointError ---",
    ]
    assert capsys.readouterr().err == ""  # told by whom it reaches


def test_a_bar_leaves_its_last_state_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RankLog(3, "bar") as log:
        log.begin(tmp_path)
        for share in range(100):
            sys.stderr.write(f"\r{share}% done")
        sys.stderr.write("\r\nnext\n")
        for share in range(100):  # for days on a terminal, and no line of it ends
            sys.stderr.write(f"\r{share}% done")
            sys.stderr.write("\r")
            assert len(sys.stderr._line) < 20  # type: ignore[attr-defined]
        sys.stderr.write(f"\r{' ' * 8}\r")  # it is wiped away
    assert logged(tmp_path)[1:] == ["99% done", "next", "--- ends ---"]


def test_threads_that_print_lose_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work(letter: str) -> None:
        for _ in range(2000):
            sys.stdout.write(letter)
            sys.stdout.write("\n")

    before = sys.getswitchinterval()
    with RankLog(3, "threads") as log:
        log.begin(tmp_path)
        threads = [threading.Thread(target=work, args=(letter,)) for letter in "abc"]
        sys.setswitchinterval(1e-6)
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            sys.setswitchinterval(before)
    letters = "".join(logged(tmp_path)[1:-1])
    assert {letter: letters.count(letter) for letter in "abc"} == dict.fromkeys("abc", 2000)


def test_a_full_disk_is_told_once_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", kib=64) as disk:
        with RankLog(3, "full") as log:
            log.begin(disk)
            fill(disk)
            for number in range(300):
                print(f"{number} {'x' * 60}")
        out, text = capsys.readouterr()
        assert out.count("\n") == 300
        assert text.count("rank 3: ") == 2
        assert "no space left on device" in text
        assert "closed without its last" in text
        assert (disk / FOLDER / NAME).read_bytes().endswith(b"\n")


def test_a_folder_that_cannot_be_made_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / FOLDER).write_text("a file in the way")
    with RankLog(3, "blocked") as log:
        print("early")
        log.begin(tmp_path)
        print("late")
    out, errors = capsys.readouterr()
    assert out == "early\nlate\n"
    assert errors.count("no log of this rank") == 1


@pytest.mark.parametrize(
    ("fault", "wanted", "code"),
    [
        ("ctypes.string_at(0)", "Fatal Python error: Segmentation fault", -signal.SIGSEGV),
        ("os.abort()", "Fatal Python error: Aborted", -signal.SIGABRT),
        ("os._exit(7)", "just before", 7),
        ("os.kill(os.getpid(), signal.SIGKILL)", "just before", -signal.SIGKILL),
        ("raise RuntimeError('in a thread')", "RuntimeError: in a thread", 0),
        ("warnings.warn('take care')", "UserWarning: take care", 0),
    ],
    ids=["segfault", "abort", "exit", "kill", "thread", "warning"],
)
def test_whatever_ends_a_rank_its_last_words_are_there(
    tmp_path: Path, fault: str, wanted: str, code: int
) -> None:
    script = f"""
        import ctypes, os, signal, sys, threading, warnings
        from pathlib import Path
        from longpretrain.report.rank_log import RankLog

        def work():
            print("just before")
            {fault}

        with RankLog(3, "dies") as log:
            log.begin(Path({str(tmp_path)!r}))
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == code, ran.stderr
    text = (tmp_path / FOLDER / NAME).read_text()
    assert "just before" in text
    assert wanted in text
    if "Fatal" in wanted:
        assert "in work" in text  # the stack says where
