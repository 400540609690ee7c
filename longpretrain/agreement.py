"""Ranks agree before they train: a refusal of one stops all, and all do one and the same run.

A rank that went on alone would wait for the others in its first collective, or, worse, train
something else with them. All functions here are collectives: every rank must call them.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from longpretrain.errors import InputError, from_system, tell
from longpretrain.ranks import Ranks
from longpretrain.terminal import BAD_INPUT, FAILED

T = TypeVar("T")
_LISTED = 4
"""Ranks of one value that a message names; on a cluster there may be hundreds."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """Some rank's input was refused, and every rank knows."""

    code: int
    """What the ranks exit with."""


def agree(ranks: Ranks, prepare: Callable[[], T]) -> T | Refused:
    """Runs a part of the start on every rank; what a user can mend, on any rank, stops all of them
    and is told once, by rank 0.
    """
    result: T | None = None
    refusal, code = "", BAD_INPUT
    try:
        result = prepare()
    except InputError as error:
        refusal = str(error)
    except (OSError, UnicodeEncodeError) as error:
        found = from_system(error)
        if found is None:
            raise
        refusal, code = str(found[0]), BAD_INPUT if found[1] else FAILED
    everyone: list[tuple[str, int]] = [("", 0)] * ranks.world_size
    dist.all_gather_object(everyone, (refusal, code))
    refused = [told for told in everyone if told[0]]
    if not refused:
        return result  # type: ignore[return-value]
    if ranks.is_first:
        for text in dict.fromkeys(text for text, _ in refused):
            tell(f"longpretrain train: {text}")
    return Refused(code=refused[0][1])


@dataclass(frozen=True, kw_only=True)
class Fact:
    """Something about this rank that must be the same on all of them."""

    value: str
    way_out: str
    """What to do where it is not."""


def need_alike(ranks: Ranks, find: Callable[[], Mapping[str, Fact]]) -> Refused | None:
    """Refuses ranks that would train different runs together; rank 0 tells all that differs.

    Args:
        ranks: this process's place.
        find: what this rank is about to do, by the names that a user knows.
    """
    facts = agree(ranks, find)
    if isinstance(facts, Refused):
        return facts
    mine = Told(place=f"process {os.getpid()} on {socket.gethostname()}", facts=facts)
    everyone: list[Told] = [mine] * ranks.world_size
    dist.all_gather_object(everyone, mine)
    found = mismatches(everyone)
    if ranks.is_first:
        for error in found:
            tell(f"longpretrain train: {error}")
    return Refused(code=BAD_INPUT) if found else None


@dataclass(frozen=True, kw_only=True)
class Told:
    """What one rank tells the others."""

    place: str
    facts: Mapping[str, Fact]


def mismatches(everyone: Sequence[Told]) -> list[InputError]:
    """One error for each fact that is not the same everywhere, with the ranks that stand alone."""
    found = []
    names = dict.fromkeys(name for rank in everyone for name in rank.facts)
    for name in names:  # of all ranks: another version may know other facts
        told = [rank.facts.get(name) for rank in everyone]
        by_value: dict[str, list[int]] = {}
        for rank, fact in enumerate(told):
            by_value.setdefault(fact.value if fact else "nothing", []).append(rank)
        if len(by_value) > 1:
            found.append(
                InputError(
                    name,
                    got=_who_has_what(by_value, everyone),
                    wanted="the same on every rank",
                    way_out=next(fact for fact in told if fact).way_out,
                )
            )
    return found


def _who_has_what(by_value: Mapping[str, Sequence[int]], everyone: Sequence[Told]) -> str:
    """The values of the odd ranks first; that of more than half the ranks needs no list of them.

    Without such a majority nobody knows who is right: all are listed, rank 0 last.
    """
    groups = sorted(by_value.items(), key=lambda group: (len(group[1]), 0 in group[1]))
    texts = []
    for value, ranks in groups:
        is_majority = 2 * len(ranks) > len(everyone)
        who = f"the other {len(ranks)} ranks" if is_majority else _listed(ranks, everyone)
        texts.append(f"{value} at {who}")
    return f"{', '.join(texts[:-1])} and {texts[-1]}"


def _listed(ranks: Sequence[int], everyone: Sequence[Told]) -> str:
    shown = [f"rank {rank} ({everyone[rank].place})" for rank in ranks[:_LISTED]]
    more = len(ranks) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def need_shared(ranks: Ranks, path: Path) -> None:
    """Refuses a run folder that each node has for itself: a checkpoint needs one that all see.

    Args:
        ranks: this process's place.
        path: a file that rank 0 has just written there.

    Raises:
        InputError: this rank sees another file there, or none.
    """
    seen = ""
    with contextlib.suppress(OSError):  # who leaves here would leave the others in the broadcast
        seen = path.read_text(encoding="utf-8")
    text = [seen]
    dist.broadcast_object_list(text, src=0)
    if not seen or seen != text[0]:
        raise InputError(
            f"run folder {path.parent}",
            got=f"another folder at rank {ranks.rank} than at rank 0",
            wanted="one that all nodes see",
            way_out="Give a run.dir on a shared file system.",
        )
