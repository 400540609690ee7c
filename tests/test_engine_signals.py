"""What asks a run to stop, and what stops it at once."""

from __future__ import annotations

import os
import signal

import pytest

from longpretrain.engine import signals
from longpretrain.engine.signals import StopRequest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that signals.py sees, in seconds."""
    now = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT"])
def test_a_signal_asks_and_handlers_are_put_back(name: str) -> None:
    before = signal.getsignal(signal.Signals[name])
    with StopRequest() as stop:
        assert not stop.asked
        os.kill(os.getpid(), signal.Signals[name])
        assert stop.asked
        assert stop.signal_name == name
    assert signal.getsignal(signal.Signals[name]) == before


def test_the_first_signal_is_the_reason() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == "SIGUSR1"


def test_an_echo_of_ctrl_c_is_no_second_one(clock: list[float]) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        for pause in (0.0, 0.1, 1.8):
            clock[0] += pause
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_name == "SIGINT"


def test_a_second_ctrl_c_stops_at_once(clock: list[float]) -> None:
    with StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        clock[0] += 2.1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_after_a_launchers_signal_asks_again(clock: list[float]) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        clock[0] += 60
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal_name == "SIGTERM"
