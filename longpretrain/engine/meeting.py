"""Ranks meet before they form a process group, so that one that does not fit is named in seconds.

Without it a world size that differs, or a rank number given twice, is a hang of half an hour. Every
rank signs a TCP store at MASTER_ADDR:MASTER_PORT, which rank 0 hosts (under torchrun its agent
does). A rank that finds its number taken, or another world size at rank 0, objects; rank 0 counts
who came and gives the verdict: "" or the first objection.

A rank counts as come when its watchdog is up: from the verdict on, there is no moment at which a
rank could die unseen.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn, Protocol

from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from longpretrain.engine.process_watch import place, runs
from longpretrain.errors import InputError, RankLostError
from longpretrain.ranks import Ranks

JOIN_TIMEOUT = "LONGPRETRAIN_JOIN_TIMEOUT_S"
"""How long ranks wait for each other, in seconds: nodes of a cluster start at their own pace."""

_DEFAULT_TIMEOUT_S = 600.0
_LONGEST_TIMEOUT_S = 86_400.0
_FAREWELL_S = 5.0
"""How long rank 0 keeps the store up after a refusal, so that the others learn why; and how long
another rank 0 looks for it."""
_MEETING = "the meeting of the ranks"
"""What a rank says it does, for people."""
_LOOK_S = 0.5
"""Between two looks of rank 0 for ranks of its machine that ended."""


class Watch(Protocol):
    """What watches over the ranks from their meeting on (watchdog.py)."""

    def invite(self) -> str:
        """Rank 0's, to be handed to all."""

    def begin(self, invitation: str) -> None:
        """Starts to watch over this rank."""

    def mark(self, what: str) -> None:
        """This rank goes on: says what it does next."""

    @property
    def is_up(self) -> bool:
        """Whether it does, as far as it ever will."""

    def dismiss(self) -> None:
        """Watches no more: every rank tells by itself that they do not fit together."""


def meet(ranks: Ranks, is_stopped: Callable[[], bool], watch: Watch | None = None) -> Store:
    """Waits until all ranks are there and fit; keep what it returns until the group is formed.

    Args:
        ranks: this process's place; ``master_port`` must be set.
        is_stopped: whether a signal asked to stop; then nobody is waited for.
        watch: is up when this returns; on all ranks, or on none.

    Raises:
        InputError: a rank number twice, or world sizes that differ.
        RankLostError: a rank that did not come, or came and ended: a node or its network may be to
            blame, and another attempt find others.
        RuntimeError: rank 0 left, and ``watch`` is up, which can say why.
        KeyboardInterrupt: ``is_stopped``.
    """

    def is_asked() -> bool:
        if watch:
            watch.mark(_MEETING)  # for as long as it takes, nobody stands still
        return is_stopped()

    if watch:
        watch.mark(_MEETING)
    wait = _Wait(is_asked, join_timeout_s())
    try:
        store = _open(ranks, wait)
        verdict = _verdict(_room(store), ranks, wait, watch)
        if verdict:
            raise _from_text(verdict)
    except InputError:
        if watch:
            watch.dismiss()
        raise
    if watch:
        watch.mark("the start of the process group")
    return store


def _verdict(room: Store, ranks: Ranks, wait: _Wait, watch: Watch | None) -> str:
    """What speaks against these ranks; "" if nothing does."""
    try:
        objection = _sign(room, ranks, wait, watch)
        if ranks.is_first:
            verdict = _judge(room, ranks, wait)
            room.set("verdict", verdict)
            if verdict:
                _stay_a_moment(room)
        else:
            wait.until(lambda: bool(objection) or room.check(["verdict"]), lambda: _nobody(ranks))
            verdict = objection or room.get("verdict").decode()
            if not objection:
                room.add("left", 1)
        return verdict
    except RuntimeError as error:  # torch's errors of a store: its host went away
        if watch and watch.is_up:
            raise
        raise RankLostError(
            "rank 0",
            got=f"it left while ranks met ({error})",
            wanted="all ranks to stay",
            way_out="Its own output says why.",
        ) from error


def join_timeout_s() -> float:
    """The user's, or ten minutes."""
    text = os.environ.get(JOIN_TIMEOUT) or str(_DEFAULT_TIMEOUT_S)
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = 0.0
    if 0 < timeout_s <= _LONGEST_TIMEOUT_S:
        return timeout_s
    raise InputError(
        f"environment variable {JOIN_TIMEOUT}",
        got=text,
        wanted=f"seconds, above 0 and up to {_LONGEST_TIMEOUT_S:g}",
        way_out=f"Set it, or leave it out ({_DEFAULT_TIMEOUT_S:g}).",
    )


class _Wait:
    """The time that is left until ranks must have met."""

    def __init__(self, is_stopped: Callable[[], bool], timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._is_stopped = is_stopped
        self._deadline = time.monotonic() + self.timeout_s

    def until(self, is_ready: Callable[[], bool], too_late: Callable[[], InputError]) -> None:
        """Asks in turns, often at first: a signal is heard between them."""
        pause_s = 0.01
        while not is_ready():
            if self._is_stopped():
                raise KeyboardInterrupt
            if time.monotonic() > self._deadline:
                raise too_late()
            time.sleep(pause_s)
            pause_s = min(0.05, pause_s * 1.2)

    @property
    def left(self) -> timedelta:
        return timedelta(seconds=max(1.0, self._deadline - time.monotonic()))


def _room(store: Store) -> Store:
    """Names of our own in the store; after a restart by torchrun the old ones are still there."""
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"longpretrain-meeting-{attempt}", store)


def _open(ranks: Ranks, wait: _Wait) -> Store:
    """The store that all ranks see: hosted here on rank 0, unless torchrun's agent hosts it."""
    by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not ranks.is_first or by_agent:
        wait.until(lambda: _answers(ranks), lambda: _nobody(ranks))
        store = _connect(ranks, wait)
        if store is None:
            raise _nobody(ranks)
        return store
    try:
        # torch.distributed finds this server again when it forms the group: one port is enough.
        return TCPStore(
            ranks.master_addr,
            ranks.master_port,
            is_master=True,
            timeout=wait.left,
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        _refuse_taken_port(ranks, error)


def _connect(ranks: Ranks, wait: _Wait) -> Store | None:
    """Asks a store that another process hosts; None if there is none.

    In a thread: a program that listens and is no store would hold TCPStore for ever.
    """
    found: list[Store] = []

    def connect() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(
                TCPStore(ranks.master_addr, ranks.master_port, is_master=False, timeout=wait.left)
            )

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    with contextlib.suppress(InputError):
        wait.until(lambda: not thread.is_alive(), lambda: _nobody(ranks))
    return found[0] if found else None


def _answers(ranks: Ranks) -> bool:
    """Whether somebody listens where ranks meet; TCPStore itself would wait deaf to signals."""
    try:
        with socket.create_connection((ranks.master_addr, ranks.master_port), timeout=2):
            return True
    except OSError:
        return False


def _refuse_taken_port(ranks: Ranks, error: RuntimeError) -> NoReturn:
    twice: InputError | None = None
    store = _connect(ranks, _Wait(lambda: False, timeout_s=_FAREWELL_S))
    if store:
        room = _room(store)
        with contextlib.suppress(RuntimeError):  # a store without a rank 0 is another program's
            twice = _twice(ranks, room.get("rank 0").decode())
            room.compare_set("objection", "", _to_text(twice))
    if twice:
        raise twice from error
    raise InputError(
        "MASTER_ADDR and MASTER_PORT",
        got=f"{ranks.master_addr}:{ranks.master_port}, where rank 0 cannot listen "
        f"({str(error).splitlines()[0]})",
        wanted="an address of rank 0's host and a free port",
        way_out="Set another MASTER_PORT, or leave it out and start with ./launch.sh.",
    ) from error


def _sign(room: Store, ranks: Ranks, wait: _Wait, watch: Watch | None) -> str:
    """Writes who this rank is; returns why it does not fit, having told rank 0, or ""."""
    signature = _signature(ranks)
    if watch and ranks.is_first:
        signature["watch"] = watch.invite()
    mine = json.dumps(signature)
    theirs = room.compare_set(f"rank {ranks.rank}", "", mine).decode()
    objection: InputError | None = None
    if theirs != mine:
        objection = _twice(ranks, theirs)
    else:
        wait.until(lambda: room.check(["rank 0"]), lambda: _nobody(ranks))
        first = json.loads(room.get("rank 0"))
        if first["world_size"] != ranks.world_size:
            objection = InputError(
                "world size",
                got=f"{ranks.world_size} at rank {ranks.rank} ({_who(_signature(ranks))}) and "
                f"{first['world_size']} at rank 0 ({_who(first)})",
                wanted="one number for all ranks",
                way_out="Set the same WORLD_SIZE everywhere, or start all ranks with ./launch.sh.",
            )
    if objection:
        text = _to_text(objection)
        room.compare_set("objection", "", text)
        return text
    if watch:
        watch.begin(first["watch"])

        def is_up() -> bool:
            room.check(["rank 0"])  # raises once rank 0, who hosts the store, is gone
            return watch.is_up

        wait.until(is_up, lambda: _nobody(ranks))
    room.add("came", 1)
    return ""


def _judge(room: Store, ranks: Ranks, wait: _Wait) -> str:
    """Rank 0 waits for all, or for an objection; returns what every rank shall be told."""

    def someone_is_missing() -> RankLostError:
        missing = [n for n in range(ranks.world_size) if not room.check([f"rank {n}"])]
        listed = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
        return RankLostError(
            "ranks",
            got=f"{ranks.world_size - len(missing)} of {ranks.world_size} in "
            f"{wait.timeout_s:g} s; rank {listed} did not come",
            wanted="all of them",
            way_out=f"Its own output may say why; {JOIN_TIMEOUT} sets how long to wait.",
        )

    absent = _Absent(room, ranks)

    def is_decided() -> bool:
        absent.look()
        return room.check(["objection"]) or room.add("came", 0) >= ranks.world_size

    try:
        wait.until(is_decided, someone_is_missing)
    except InputError as error:
        return _to_text(error)
    return room.get("objection").decode() if room.check(["objection"]) else ""


class _Absent:
    """Ranks of rank 0's own machine that signed and ended before all had come: nobody waits for
    them. (Those of other machines are missing when the time is over.)
    """

    def __init__(self, room: Store, ranks: Ranks) -> None:
        self._room, self._unsigned = room, set(range(ranks.world_size))
        self._here: dict[int, dict[str, object]] = {}
        self._look_at = 0.0

    def look(self) -> None:
        """Raises RankLostError for the first that it finds, unless that has told its reason."""
        now = time.monotonic()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_S
        for rank in [rank for rank in self._unsigned if self._room.check([f"rank {rank}"])]:
            self._unsigned.remove(rank)
            signature = json.loads(self._room.get(f"rank {rank}"))
            if signature["place"] == place():
                self._here[rank] = signature
        for rank, signature in self._here.items():
            is_gone = not runs(int(str(signature["pid"])))
            if is_gone and not self._room.check(["objection"]):
                raise RankLostError(
                    f"rank {rank}",
                    got=f"its end ({_who(signature)}) while ranks met",
                    wanted="all ranks to stay",
                    way_out="Its own output may say why; start all ranks again.",
                )


def _stay_a_moment(room: Store) -> None:
    until = time.monotonic() + _FAREWELL_S
    # "came" counts rank 0, which has nobody to say farewell to; who objected knows already.
    while room.add("left", 0) < room.add("came", 0) - 1 and time.monotonic() < until:
        time.sleep(0.05)


def _signature(ranks: Ranks) -> dict[str, object]:
    who = {"host": socket.gethostname(), "pid": os.getpid(), "place": place()}
    return {"world_size": ranks.world_size, **who}


def _who(signature: dict[str, object]) -> str:
    return f"process {signature['pid']} on {signature['host']}"


def _twice(ranks: Ranks, holder: str) -> InputError:
    return InputError(
        f"rank {ranks.rank}",
        got=f"it twice: {_who(json.loads(holder))}, and {_who(_signature(ranks))}",
        wanted="each rank once",
        way_out="Give each process its own RANK, and each run on this host its own MASTER_PORT.",
    )


def _nobody(ranks: Ranks) -> RankLostError:
    return RankLostError(
        "rank 0",
        got=f"no answer for rank {ranks.rank} at {ranks.master_addr}:{ranks.master_port}",
        wanted="rank 0 of the same run there",
        way_out="Its own output may say why it is not; else check MASTER_ADDR and MASTER_PORT; "
        f"{JOIN_TIMEOUT} sets how long to wait.",
    )


def _to_text(error: InputError) -> str:
    parts = {"what": error.what, "got": error.got, "wanted": error.wanted, "way_out": error.way_out}
    return json.dumps({**parts, "is_lost": isinstance(error, RankLostError)})


def _from_text(text: str) -> InputError:
    parts = json.loads(text)
    kind = RankLostError if parts["is_lost"] else InputError
    return kind(parts["what"], got=parts["got"], wanted=parts["wanted"], way_out=parts["way_out"])
