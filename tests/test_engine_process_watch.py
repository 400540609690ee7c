"""Processes watched from outside: real ones, that end, stop and pause."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from longpretrain.engine.process_watch import Watched, in_words, place

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(SLEEP)
    yield process
    process.kill()
    process.wait()


def until(is_so: object, what: str) -> None:
    deadline = time.monotonic() + 30
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (0, "ended with exit code 0"),
        (75 << 8, "ended with exit code 75"),
        (9, "died of SIGKILL"),
        (11 | 0x80, "died of SIGSEGV"),
        (60, "died of signal 60"),
        (None, "died"),
    ],
)
def test_an_end_in_words(status: int | None, words: str) -> None:
    assert in_words(status) == words


def test_an_end_is_seen_with_its_signal_before_anybody_waits(
    sleeper: subprocess.Popen[bytes],
) -> None:
    watched = Watched(sleeper.pid)
    assert not watched.has_ended
    assert not watched.ends_within(0.05)
    sleeper.kill()
    assert watched.ends_within(30)
    assert watched.how_it_ended() == "died of SIGKILL"
    sleeper.wait()
    assert watched.how_it_ended() == "died", "its parent has the answer now"
    watched.kill()  # nobody: the number is free


def test_an_old_system_is_looked_at(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux before 5.3 gives no descriptor of a process."""

    def pidfd_open(pid: int) -> int:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(os, "pidfd_open", pidfd_open)
    watched = Watched(sleeper.pid)
    assert not watched.ends_within(0.2)
    sleeper.kill()
    assert watched.ends_within(30)
    assert watched.how_it_ended() == "died of SIGKILL"
    sleeper.wait()
    with pytest.raises(ProcessLookupError):
        Watched(sleeper.pid)


def test_ends_are_seen_in_their_order() -> None:
    """Also by one who looks late: that is how the first of several deaths is known."""
    processes = [subprocess.Popen(SLEEP) for _ in range(4)]
    poll = select.epoll()
    handles = []
    for process in processes:
        handles.append(Watched(process.pid).handle)
        poll.register(handles[-1], select.EPOLLIN)
    order = [2, 0, 3, 1]
    for number in order:
        processes[number].kill()
        processes[number].wait()
    assert [handle for handle, _ in poll.poll(0)] == [handles[number] for number in order]


def test_a_stop_is_seen_and_taken_back(sleeper: subprocess.Popen[bytes]) -> None:
    watched = Watched(sleeper.pid)
    assert watched.stopped_s(1.0) == 0
    sleeper.send_signal(signal.SIGSTOP)

    def is_stopped() -> bool:
        watched.forget_pause()  # else a stop between the two looks counts from the second
        return watched.stopped_s(10.0) == 0 and watched.stopped_s(12.5) == 2.5

    until(is_stopped, "no stop")
    watched.forget_pause()
    assert watched.stopped_s(20.0) == 0
    sleeper.send_signal(signal.SIGCONT)
    until(lambda: watched.stopped_s(30.0) == 0 and watched.stopped_s(31.0) == 0, "still stopped")
    sleeper.send_signal(signal.SIGSTOP)
    watched.kill()
    assert sleeper.wait(30) == -signal.SIGKILL


def test_a_pause_of_its_launcher_too_is_no_stop() -> None:
    """As by Ctrl-Z at a terminal."""
    code = "import subprocess, sys; p = subprocess.Popen(sys.argv[1:]); print(p.pid, flush=True)"
    launcher = subprocess.Popen(
        [sys.executable, "-c", f"{code}; p.wait()", *SLEEP], stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    rank = int(launcher.stdout.readline())
    try:
        watched = Watched(rank)
        os.kill(rank, signal.SIGSTOP)
        until(lambda: watched.stopped_s(time.monotonic()) > 0 and not watched.is_paused, "no stop")
        launcher.send_signal(signal.SIGSTOP)
        until(lambda: watched.stopped_s(time.monotonic()) == 0 and watched.is_paused, "no pause")
        os.kill(rank, signal.SIGCONT)
        until(lambda: watched.stopped_s(1.0) == 0 and not watched.is_paused, "still paused")
    finally:
        os.kill(rank, signal.SIGKILL)
        launcher.kill()
        launcher.communicate()


def test_a_parent_that_ended_before_is_watched_all_the_same(
    sleeper: subprocess.Popen[bytes],
) -> None:
    """A sentinel may start a moment later than its rank dies; the number may be another's then."""
    watched = Watched(sleeper.pid, is_parent=True)  # it is this process's child
    assert watched.has_ended
    watched.kill()
    assert sleeper.poll() is None
    gone = subprocess.Popen(["true"])
    gone.wait()
    assert Watched(gone.pid, is_parent=True).how_it_ended() == "died"
    with pytest.raises(ProcessLookupError):
        Watched(gone.pid)


def test_one_place_here() -> None:
    assert place() == place()
