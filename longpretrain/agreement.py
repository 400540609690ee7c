"""Ranks agree before they train: a refusal of one stops all, and all do one and the same run.

A rank that went on alone would wait for the others in its first collective, or, worse, train
something else with them. All functions here are collectives: every rank must call them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from longpretrain.errors import InputError, from_system
from longpretrain.ranks import Ranks
from longpretrain.terminal import BAD_INPUT, FAILED

T = TypeVar("T")


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
            print(f"longpretrain train: {text}", file=sys.stderr)
    return Refused(code=refused[0][1])


def need_alike(ranks: Ranks, facts: Mapping[str, str]) -> None:
    """Refuses ranks that would train different runs together.

    Args:
        ranks: this process's place.
        facts: what this rank is about to do, by the names that a user knows.

    Raises:
        InputError: a rank's fact is not rank 0's; names both.
    """
    everyone: list[Mapping[str, str]] = [{}] * ranks.world_size
    dist.all_gather_object(everyone, dict(facts))
    for rank, theirs in enumerate(everyone):
        for what, value in everyone[0].items():
            if theirs.get(what) != value:
                raise InputError(
                    what,
                    got=f"{theirs.get(what)} at rank {rank} and {value} at rank 0",
                    wanted="the same on every rank",
                    way_out="Start all ranks by one command, in one folder that all nodes see.",
                )


def need_shared(ranks: Ranks, path: Path) -> None:
    """Refuses a run folder that each node has for itself: a checkpoint needs one that all see.

    Args:
        ranks: this process's place.
        path: a file that rank 0 has just written there.

    Raises:
        InputError: this rank sees another file there, or none.
    """
    text = [path.read_text(encoding="utf-8") if ranks.is_first else ""]
    dist.broadcast_object_list(text, src=0)
    if not path.is_file() or path.read_text(encoding="utf-8") != text[0]:
        raise InputError(
            f"run folder {path.parent}",
            got=f"another folder at rank {ranks.rank} than at rank 0",
            wanted="one that all nodes see",
            way_out="Give a run.dir on a shared file system.",
        )
