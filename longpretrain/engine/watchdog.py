"""A run that lost a rank, or stands still, ends within seconds, and says which rank it was.

Each rank has a sentinel beside it (sentinel.py). This is the rank's side: it starts that process,
leaves marks of what it does, tells its own errors, and ends when it hears the verdict. Without it a
lost rank leaves the others in a collective for as long as the process group's timeout, and then
with an error that names no rank.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from longpretrain.config import WatchdogConfig
from longpretrain.engine.lines import Lines
from longpretrain.engine.marks import Marks
from longpretrain.engine.names import read_status
from longpretrain.engine.sentinel import DEAF_TO, DUMP_SIGNAL, SHARED, source
from longpretrain.engine.verdict import START_S
from longpretrain.errors import tell
from longpretrain.ranks import Ranks

_FAILED = 1
_VERDICT_S = 6.0
"""How long a rank with a broken collective waits to hear what broke it."""
_OWN_ERROR_S = 10.0
"""How long a rank with an error of its own may take to tell it."""
_FAREWELL_S = 8.0
_BACKLOG = 4096
"""Sentinels that may knock at once."""
_COLLECTIVE_WORDS = ("gloo", "nccl", "connection", "socket", "broken pipe", "store")
"""Of messages of a collective that another rank's end broke."""


class Watchdog:
    """Watches over this rank, with those of the other ranks; a context manager.

    It begins where the ranks meet (meeting.py), before they form a process group. In a process
    whose group is up from an earlier run, entering it is a collective, and it begins there.

    Args:
        ranks: this process's place.
        settings: the recipe's.
    """

    def __init__(self, ranks: Ranks, settings: WatchdogConfig) -> None:
        self._ranks, self._settings = ranks, settings
        self._marks = Marks()
        self._told = ""
        self._is_through = False
        self._listener: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._up, self._heard = threading.Event(), threading.Event()

    def __enter__(self) -> Watchdog:
        if dist.is_initialized():
            shared = [self.invite() if self._ranks.is_first else ""]
            dist.broadcast_object_list(shared, src=0)
            self.begin(shared[0])
        return self

    def invite(self) -> str:
        """On rank 0: listens for the sentinels of all ranks, and says what they must know.

        The token tells them from strangers who knock by mistake: another run, a scan of ports. It
        is no secret to whoever asks the store at MASTER_PORT, where ranks meet, on purpose.
        """
        self._listener = _listener()
        port = self._listener.getsockname()[1]
        return json.dumps({"port": port, "token": secrets.token_hex(16)})

    def begin(self, invitation: str) -> None:
        """Starts the sentinel beside this rank."""
        stacks = os.memfd_create("longpretrain-stacks")
        # It stays registered: a signal on its way would end the process otherwise.
        faulthandler.register(DUMP_SIGNAL, file=stacks, all_threads=True)
        found = json.loads(invitation)
        facts = self._facts(stacks)
        here = "127.0.0.1" if self._listener else self._ranks.master_addr
        facts["hub"] = [here, found["port"]]
        self._process = process = self._start(facts, found["token"])
        self._close_listener()
        assert process.stdin and process.stdout
        self._line = Lines(process.stdout.fileno(), process.stdin.fileno())
        self._thread = threading.Thread(
            target=self._listen, args=(process,), name="watchdog", daemon=True
        )
        self._thread.start()

    @property
    def is_up(self) -> bool:
        """Whether the sentinel has reached rank 0's, or gave up."""
        return self._up.is_set()

    def dismiss(self) -> None:
        """Watches no more, whatever leaves the block."""
        self._take_leave()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_through:
            return
        if error is not None:
            self._tell(error)
        if error is None or self._ranks.world_size == 1:
            self._take_leave()

    def mark(self, what: str) -> None:
        """This rank goes on: says what it does next. All ranks make the same marks."""
        self._marks.write(what)

    def opened(self, run_dir: Path) -> None:
        """The run folder is this run's, and its status.json says "running"."""
        self.mark("the start of training")
        if self._ranks.is_first:  # whose status it is; the others hear it from the hub
            since = read_status(run_dir)["time"]
            self._line.send({"run": {"dir": str(run_dir.absolute()), "time": since}})

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Tells the other ranks an error that leaves the block; does not return from one that
        another rank caused, but ends this process when it knows the cause.
        """
        try:
            yield
        except BaseException as error:
            self._tell(error)
            raise

    def _start(self, facts: dict[str, Any], token: str) -> subprocess.Popen[bytes]:
        descriptors = [facts[name] for name in ("marks", "stacks", "listener") if name in facts]
        # Until it is deaf to them by itself: what is blocked here is blocked there.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, DEAF_TO)
        try:
            return subprocess.Popen(  # noqa: S603
                [sys.executable, "-I", "-S", "-c", source(), json.dumps(facts)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                # Not in the command line, which every listing of processes shows.
                env={**os.environ, SHARED: token},
                pass_fds=descriptors,
                start_new_session=True,  # else a launcher kills it with its rank
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _facts(self, stacks: int) -> dict[str, Any]:
        facts: dict[str, Any] = {
            "rank": self._ranks.rank,
            "pid": os.getpid(),
            "dead_after_s": self._settings.dead_after_s,
            "marks": self._marks.descriptor,
            "stacks": stacks,
        }
        if self._listener:
            facts["listener"] = self._listener.fileno()
            facts["world_size"] = self._ranks.world_size
            facts["hung_after_s"] = self._settings.hung_after_s
        return facts

    def _tell(self, error: BaseException) -> None:
        if self._told or self._ranks.world_size == 1 or self._process is None:
            return
        self._told = "broken" if _is_of_a_collective(error) else "failed"
        detail = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")[:2000]
        self._line.send({"told": self._told, "detail": detail})
        if self._told == "broken":
            self._heard.wait(_VERDICT_S)

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """In a thread: it runs while the main thread waits in a collective."""
        while (messages := self._line.receive()) is not None:
            for message in messages:
                if "watched" in message:
                    self._up.set()
                elif "unwatched" in message:
                    self._up.set()
                    tell(
                        f"watchdog of rank {self._ranks.rank}: no answer of rank 0's at "
                        f"{message['unwatched']}; a rank that dies may go unnoticed"
                    )
                elif "over" in message:
                    self._is_through = True
                    self._heard.set()
                elif "verdict" in message:
                    self._leave(message["verdict"], message["blamed"])
        if not self._is_through:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
            self._leave(
                f"the watchdog of rank {self._ranks.rank} (process {process.pid} on "
                f"{socket.gethostname()}) ended (exit code {process.returncode})"
            )

    def _leave(self, verdict: str, blamed: int | None = None) -> None:
        rank = self._ranks.rank
        if self._told == "failed" or (self._told and blamed in (None, rank)):
            self._heard.set()  # its own error is worth telling
            time.sleep(_OWN_ERROR_S)
            os._exit(_FAILED)
        place = f" (rank {rank})" if rank else ""
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                if stream is sys.stderr:
                    tell(f"longpretrain train{place}: {verdict}")
                stream.flush()
        os._exit(_FAILED)

    def _take_leave(self) -> None:
        self._is_through = True
        self._close_listener()
        if self._process:
            self._line.send({"bye": 0})
            try:
                self._process.wait(_FAREWELL_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._thread.join()
            for pipe in (self._process.stdin, self._process.stdout):
                if pipe:
                    with contextlib.suppress(OSError):
                        pipe.close()
        self._marks.close()

    def _close_listener(self) -> None:
        """The sentinel has it; this process does not need it any more."""
        if self._listener:
            self._listener.close()
            self._listener = None


def patience(settings: WatchdogConfig) -> timedelta:
    """How long a collective may take: the watchdog, which names the rank, comes first."""
    if not settings.hung_after_s:
        return timedelta(days=30)
    return timedelta(seconds=1.2 * max(settings.hung_after_s, START_S) + 600)


def _listener() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(
            ("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG
        )
    return socket.create_server(("", 0), backlog=_BACKLOG)


def _is_of_a_collective(error: BaseException) -> bool:
    """Whether another rank's end may be the cause."""
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause).lower()
        if isinstance(cause, dist.DistError) or (
            isinstance(cause, RuntimeError) and any(word in text for word in _COLLECTIVE_WORDS)
        ):
            return True
        cause = cause.__cause__ or cause.__context__
    return False
