"""Where all sentinels report, in a thread of rank 0's: it judges, writes status.json, and tells the
verdict to all.
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from pathlib import Path

from longpretrain.engine.lines import Lines, Message
from longpretrain.engine.names import pointed_at, read_status, step_of, write_status
from longpretrain.engine.verdict import GONE, Judge
from longpretrain.errors import InputError

_POLL_S = 0.1
_FAREWELL_S = 5.0
"""How long the hub stays for ranks that are not through when the first one is."""
_LINGER_S = 3.0
"""How long it stays after the verdict, so that all can hear it."""
_DUMP_S = 5.0
"""How long it waits for stacks."""
_DISK_S = 2.0
"""How long a verdict waits for a disk to take status.json."""


class Hub:
    """Serves until the run is over.

    Args:
        listener: where sentinels connect.
        token: what they must know.
        judge: decides.
    """

    def __init__(self, listener: socket.socket, token: str, judge: Judge) -> None:
        self._listener, self._token, self._judge = listener, token, judge
        self._lines: dict[int, Lines] = {}
        self._ranks: dict[int, int] = {}
        self._roster: dict[int, Message] = {}
        self._run: Message = {}
        self._dumped: set[int] = set()
        self._poll = select.epoll()
        self.is_alone = False
        """Whether the sentinel of this process has ended: then the hub stays for a moment only."""

    def run(self) -> None:
        """In a thread of its own; returns when all have heard what there was to tell."""
        self._poll.register(self._listener.fileno(), select.EPOLLIN)
        woke = time.monotonic()
        until: float | None = None
        while until is None or (time.monotonic() < until and self._lines):
            for descriptor, _ in self._poll.poll(_POLL_S):
                if descriptor == self._listener.fileno():
                    self._accept()
                else:
                    self._hear(descriptor)
            now = time.monotonic()
            if now - woke > 2.0:  # stopped, as by Ctrl-Z: silence of that time says nothing
                self._judge.forget_pause(now)
            woke = now
            if until is None:
                until = self._decide(now)
            if until is None and self.is_alone:
                until = now + _FAREWELL_S
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            line = Lines.over(self._listener.accept()[0])
            self._lines[line.reader] = line
            self._poll.register(line.reader, select.EPOLLIN)

    def _hear(self, descriptor: int) -> None:
        line = self._lines.get(descriptor)
        messages = line.receive() if line else []
        now = time.monotonic()
        if line and messages is None:
            self._poll.unregister(descriptor)
            line.close()
            del self._lines[descriptor]
            if descriptor in self._ranks:
                self._judge.trouble(self._ranks.pop(descriptor), "lost", GONE, now)
            return
        for message in messages or []:
            self._take(descriptor, message, now)

    def _take(self, descriptor: int, message: Message, now: float) -> None:
        if "hello" in message and message.get("token") == self._token:
            rank = self._ranks[descriptor] = message["hello"]
            self._judge.hello(rank, message["host"], message["pid"], now)
            self._introduce(rank, {k: message[k] for k in ("hello", "host", "pid", "place")})
        elif descriptor not in self._ranks:
            return  # a stranger
        elif "beat" in message:
            rank = self._ranks[descriptor]
            seen = {key: message[key] for key in ("count", "age_s", "mark", "stopped_s")}
            self._judge.beat(rank, now=now, **seen)
            self._lines[descriptor].send({"beat": 0, "run": self._run})
        elif "run" in message:
            self._run = message["run"]
            self._judge.opened(now)
            self._tell({"beat": 0, "run": self._run})
        elif "died" in message:
            self._judge.trouble(message["died"], "died", message["detail"], now)
        elif "told" in message:
            self._judge.trouble(self._ranks[descriptor], message["told"], message["detail"], now)
        elif "bye" in message:
            self._judge.left(self._ranks[descriptor], now)
        elif "dumped" in message:
            self._dumped.add(self._ranks[descriptor])

    def _introduce(self, rank: int, new: Message) -> None:
        """Makes sentinels of one machine known to each other, and rank 0 to all."""
        self._roster[rank] = new
        for descriptor, other in self._ranks.items():
            if other == rank:
                known = [r for r in self._roster.values() if _concerns(r, new["place"])]
                self._lines[descriptor].send({"roster": known})
            elif _concerns(new, self._roster[other]["place"]):
                self._lines[descriptor].send({"roster": [new]})

    def _decide(self, now: float) -> float | None:
        """Ends the run if it must end; returns when this hub may."""
        verdict = self._judge.verdict(now)
        if verdict:
            return self._end(verdict, self._judge.blamed())
        if self._judge.is_hung(now):
            return self._hung()
        if self._judge.is_over(now, _FAREWELL_S):
            self._tell({"over": True})
            return now + _LINGER_S
        return None

    def _end(self, verdict: str, blamed: int | None) -> float:
        # A rank that ends lets its launcher end the rest, this process with it: the file is first.
        # A disk that hangs must not keep the others waiting, though.
        writing = threading.Thread(target=write_failed, args=(self._run, verdict), daemon=True)
        writing.start()
        writing.join(_DISK_S)
        self._tell({"verdict": verdict, "blamed": blamed})
        return time.monotonic() + _LINGER_S

    def _hung(self) -> float:
        # Who stands where is taken first: ranks may end, even all, while stacks are waited for.
        here = self._judge.here()
        blamed = (self._judge.behind() or here)[0].rank
        verdict = self._judge.hung_sentence(_stacks(self._run))
        wanted = {seen.rank for seen in here}
        self._tell({"dump": True})
        until = time.monotonic() + _DUMP_S
        while not wanted <= self._dumped and time.monotonic() < until:
            for descriptor, _ in self._poll.poll(_POLL_S):
                if descriptor != self._listener.fileno():
                    self._hear(descriptor)
        return self._end(verdict, blamed)

    def _tell(self, message: Message) -> None:
        for line in self._lines.values():
            line.send(message)


def _concerns(found: Message, place: str) -> bool:
    return bool(found["hello"] == 0 or found["place"] == place)


def _stacks(run: Message) -> str:
    return str(stacks_folder(run)) if run else "the output of each"


def stacks_folder(run: Message) -> Path:
    """Where ranks leave the stacks of their threads."""
    return Path(run["dir"]) / "stacks"


def write_failed(run: Message, reason: str) -> None:
    """Says in status.json that this attempt failed, unless it ended otherwise meanwhile, said so
    itself, or a newer attempt has begun.

    Args:
        run: dir, and the time at which status.json said that this attempt runs; empty before that.
        reason: the verdict.
    """
    if not run:
        return
    run_dir = Path(run["dir"])
    with contextlib.suppress(OSError, InputError):  # nothing more can be done about it here
        last = read_status(run_dir)
        if last.get("state") != "running" or last.get("time") != run["time"]:
            return
        kept = step_of(run_dir / pointed_at(run_dir))
        step = last.get("step", 0) if kept is None else kept
        write_status(run_dir, "failed", reason=reason, step=step)
