"""The small process beside each rank that sees it die, stop or stand still, and says so.

A process and not a thread: it goes on while a call of the rank holds the interpreter, while the
rank is stopped, and for the moment that it takes to tell the death of a rank whose launcher kills
all others at once. It imports nothing heavy, is deaf to what asks a run to stop, and never outlives
its rank by more than some seconds.

All of them report to a hub (hub.py) beside rank 0 and hear its verdict. If the hub is gone, so is
rank 0's node, and each sentinel says that by itself. A sentinel that is killed ends the run, which
its launcher starts again from a checkpoint: seen from another node, it is a node that was lost.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

from longpretrain.engine.hub import Hub, stacks_folder, write_failed
from longpretrain.engine.lines import Lines, Message
from longpretrain.engine.marks import open_marks, read_mark
from longpretrain.engine.process_watch import Watched, place
from longpretrain.engine.verdict import GONE, Judge

DUMP_SIGNAL = signal.SIGRTMIN + 9
"""Makes a rank write the stacks of its threads: faulthandler does, whatever holds the rank up."""
SHARED = "LONGPRETRAIN_WATCHDOG_TOKEN"
"""Environment variable with what all sentinels of a run share, and nobody else knows."""
DEAF_TO = (
    signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE,
)  # fmt: skip
_TICK_S = 1.0
_PAUSE_S = 2.0
"""How late a beat may be: later, and this process was stopped itself, as by Ctrl-Z or Slurm."""
_CONNECT_S = 20.0
"""How long it tries to reach the hub, which may start later; each try takes ``_ANSWER_S`` at most.
"""
_ANSWER_S = 1.0
_DUMP_S = 1.0
_END_S = 4.0
"""How long a rank may take to end after the verdict before it is killed."""
_OWN_ERROR_S = 15.0
"""The same for a rank that tells an error of its own."""
_PRINT_S = 1.5
"""How long that of rank 0 keeps the rank's standard error to print the verdict in its place."""
_WRITE_AFTER_S = 1.0
"""The hub writes status.json; if it did not by then, the others do."""


class Sentinel:
    """Watches over one rank.

    Args:
        facts: the rank's ``rank`` and ``pid``, ``dead_after_s`` of its recipe, ``hub`` (address and
            port) and ``token``.
        marks: descriptor of what the rank did last.
        stacks: descriptor of the file that takes the stacks of its threads.
    """

    def __init__(self, facts: dict[str, Any], marks: int, stacks: int) -> None:
        self._facts, self._rank = facts, int(facts["rank"])
        self._marks, self._stacks = open_marks(marks), stacks
        self._parent = Lines(0, 1)
        self._own = Watched(facts["pid"], is_parent=True)
        self._hub: Lines | None = None
        self._tick_s = min(_TICK_S, facts["dead_after_s"] / 4)
        self._hub_name, self._heard_at = "rank 0", time.monotonic()
        self._beat_at, self._age_from = self._heard_at, 0.0
        self._connect_until: float | None = self._heard_at + _CONNECT_S
        self._unsaid: list[Message] = []
        self._here: dict[int, tuple[int, Watched]] = {}
        self._known = {self._rank}
        self._run: Message = {}
        self._is_watched = False
        self._has_ended = False
        self._told_error = False
        self._is_told = False
        self._is_through = False
        self._until: float | None = None
        self._poll = select.epoll()

    def run(self) -> None:
        """Until the rank is through, or it ended and the verdict is told."""
        self._connect()
        self._poll.register(self._parent.reader, select.EPOLLIN)
        self._follow(self._rank, self._own)
        at = time.monotonic()
        while not self._is_through and (self._until is None or time.monotonic() < self._until):
            pause_s = max(0.0, at - time.monotonic())
            for descriptor, _ in self._poll.poll(pause_s if self._hub else min(pause_s, 0.2)):
                self._serve(descriptor)
            if self._hub is None:
                self._connect()
            now = time.monotonic()
            if now >= at:
                at = now + self._tick_s
                self._beat(now)

    def close(self) -> None:
        """Leaves the hub."""
        if self._hub:
            self._hub.close()

    def _serve(self, descriptor: int) -> None:
        if descriptor == self._parent.reader:
            self._hear_rank()
        elif self._hub and descriptor == self._hub.reader:
            self._hear_hub(self._hub)
        elif descriptor in self._here:
            self._see_end(descriptor)

    def _beat(self, now: float) -> None:
        if now - self._beat_at > self._tick_s + _PAUSE_S:
            self._heard_at = self._age_from = now
            self._own.forget_pause()
        self._beat_at = now
        count, at, mark = read_mark(self._marks)
        stopped_s = self._own.stopped_s(now)
        if self._own.is_paused:
            self._age_from = now
        age_s = now - max(at, self._age_from)  # a rank that is paused makes no marks
        if self._hub:
            self._hub.send(
                {"beat": 0, "count": count, "age_s": age_s, "mark": mark, "stopped_s": stopped_s}
            )
        if self._hub and now - self._heard_at > self._facts["dead_after_s"]:
            self._end_alone(f"gave no sign of life for {now - self._heard_at:.0f} s")

    def _say(self, message: Message) -> None:
        if self._hub:
            self._hub.send(message)
        elif self._connect_until is not None:
            self._unsaid.append(message)

    # The ranks of this machine.

    def _follow(self, rank: int, process: Watched) -> None:
        self._here[process.handle] = (rank, process)
        self._poll.register(process.handle, select.EPOLLIN)

    def _see_end(self, handle: int) -> None:
        rank, process = self._here.pop(handle)
        self._poll.unregister(handle)
        how = process.how_it_ended()
        if rank == self._rank:
            while self._hear_rank():  # what it said before it ended comes first
                pass
            self._beat(time.monotonic())
            self._has_ended = True
            self._let_go(_PRINT_S if rank == 0 else 0.0)
            if self._until is None:  # no longer than it takes to hear the verdict
                self._until = time.monotonic() + self._facts["dead_after_s"]
        else:
            os.close(handle)
        self._say({"died": rank, "detail": how})

    def _hear_rank(self) -> bool:
        """Whether there was something to hear."""
        if not select.select([self._parent.reader], [], [], 0)[0]:
            return False
        messages = self._parent.receive()
        if messages is None:
            with contextlib.suppress(OSError):
                self._poll.unregister(self._parent.reader)
            return False
        for message in messages:
            if "run" in message:
                self._run = message["run"]
                self._say(message)
            elif "told" in message:
                self._told_error = message["told"] == "failed"
                self._say(message)
            elif "bye" in message:
                self._say(message)
                self._is_through = True
        return True

    # The hub.

    def _connect(self) -> None:
        """Tries; the loop asks again."""
        if self._connect_until is None or self._is_told:
            return
        try:
            connection = socket.create_connection(self._facts["hub"], timeout=_ANSWER_S)
        except OSError as error:
            if time.monotonic() > self._connect_until:
                self._connect_until = None
                host, port = self._facts["hub"]
                self._parent.send({"unwatched": f"{host}:{port} ({error})"})
            elif any("told" in message for message in self._unsaid):
                self._end_alone("has no watchdog that answers")
            return
        self._connect_until = None
        self._hub = Lines.over(connection)
        self._heard_at = time.monotonic()
        self._poll.register(self._hub.reader, select.EPOLLIN)
        mine = {"host": socket.gethostname(), "pid": self._own.pid, "place": place()}
        self._hub.send({"hello": self._rank, "token": self._facts["token"], **mine})
        self._beat(self._heard_at)
        for message in self._unsaid:
            self._hub.send(message)

    def _hear_hub(self, hub: Lines) -> None:
        messages = hub.receive()
        if messages is None:
            self._poll.unregister(hub.reader)
            hub.close()
            self._hub = None
            if not self._is_told:
                self._end_alone(GONE)
            return
        self._heard_at = time.monotonic()
        for message in messages:
            if "beat" in message:
                self._run = self._run or message["run"]
            elif "roster" in message:  # the first one is the answer to "hello"
                if not self._is_watched:
                    self._is_watched = True
                    self._parent.send({"watched": 0})
                self._meet(message["roster"])
            elif "dump" in message:
                self._dump()
                self._say({"dumped": 0})
            elif "over" in message:
                self._parent.send(message)
                self._is_through = True
            elif "verdict" in message:
                self._end(message, _WRITE_AFTER_S)

    def _meet(self, roster: list[Message]) -> None:
        """Follows the other ranks of this machine, too: an epoll over all of them knows which ended
        first, even where a launcher killed the rest a moment later.
        """
        for found in roster:
            rank = found["hello"]
            if rank == 0:
                self._hub_name = f"rank 0 (process {found['pid']} on {found['host']})"
            if rank not in self._known and found["place"] == place():
                self._known.add(rank)
                with contextlib.suppress(OSError):
                    self._follow(rank, Watched(found["pid"]))

    # The end.

    def _end_alone(self, detail: str) -> None:
        mark = read_mark(self._marks)[2]
        verdict = f"{self._hub_name} {detail} when this rank was at {mark}"
        self._connect_until = None
        self._end({"verdict": verdict, "blamed": 0}, 0.02 * self._rank)

    def _end(self, message: Message, write_after_s: float) -> None:
        """Tells the rank, which ends by itself; kills one that does not."""
        if self._is_told:
            return
        self._is_told = True
        verdict = message["verdict"]
        self._parent.send(message)
        patience_s = _OWN_ERROR_S if self._told_error else _END_S
        self._until = time.monotonic() + patience_s + 1.0
        later = min(write_after_s, 1.0)
        is_stopped = self._own.stopped_s(time.monotonic()) > 0
        if self._rank == 0 and (self._has_ended or is_stopped):
            self._print(verdict)

        def write_and_kill() -> None:
            if is_stopped:  # it cannot end by itself
                self._own.kill()
            time.sleep(later)
            write_failed(self._run, verdict)
            if not self._own.ends_within(patience_s - later):
                self._own.kill()
            self._is_through = True

        threading.Thread(target=write_and_kill, daemon=True).start()

    def _print(self, verdict: str) -> None:
        """In place of a rank that cannot any more."""
        with contextlib.suppress(OSError):
            os.write(2, f"longpretrain train: {verdict}\n".encode())

    def _let_go(self, after_s: float) -> None:
        """Closes what the rank printed to: a launcher may wait for the end of it."""

        def close() -> None:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, 2)

        waiting = threading.Timer(after_s, close)
        waiting.daemon = True
        waiting.start()

    def _dump(self) -> None:
        """Has the rank write the stacks of its threads, and keeps them where people look."""
        start = os.fstat(self._stacks).st_size
        with contextlib.suppress(OSError):
            os.kill(self._own.pid, DUMP_SIGNAL)
        until = time.monotonic() + _DUMP_S
        size = start
        while time.monotonic() < until:
            time.sleep(0.1)
            before, size = size, os.fstat(self._stacks).st_size
            if start < before == size:
                break
        text = os.pread(self._stacks, size - start, start).decode(errors="replace")
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        count, _, mark = read_mark(self._marks)
        title = f"{when} rank {self._rank}, process {self._own.pid}, at {mark} (mark {count})\n"
        text = title + (text or "The process does not answer: it is stopped, or a disk holds it.\n")
        with contextlib.suppress(OSError):
            if self._run:
                folder = stacks_folder(self._run)
                folder.mkdir(exist_ok=True)
                path = folder / f"rank-{self._rank:05d}.txt"
                with path.open("a", encoding="utf-8") as file:
                    file.write(text + "\n")
            else:
                os.write(2, text.encode())


def main(argument: str) -> None:
    """The process.

    Args:
        argument: facts as JSON: those of ``Sentinel`` but the token, which is in the environment,
            descriptors ``marks`` and ``stacks``, and at rank 0 ``listener``, ``world_size`` and
            ``hung_after_s`` for the hub.
    """
    for number in DEAF_TO:
        signal.signal(number, signal.SIG_IGN)
    facts = {**json.loads(argument), "token": os.environ[SHARED]}
    _, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # the hub needs one for each rank
        resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files))
    hub = None
    if facts.get("listener") is not None:
        patience = facts["dead_after_s"], facts["hung_after_s"]
        judge = Judge(facts["world_size"], *patience, is_opened=False)
        listener = socket.socket(fileno=facts["listener"])
        serving = Hub(listener, facts["token"], judge)
        hub = threading.Thread(target=serving.run)
        hub.start()
    sentinel = Sentinel(facts, facts["marks"], facts["stacks"])
    sentinel.run()
    sentinel.close()
    if hub:
        serving.is_alone = True
        hub.join()


def source() -> str:
    """What a bare interpreter runs to become a sentinel."""
    root = str(Path(__file__).resolve().parents[2])
    return (
        f"import sys; sys.path.insert(0, {root!a}); "
        "from longpretrain.engine.sentinel import main; main(sys.argv[1])"
    )
