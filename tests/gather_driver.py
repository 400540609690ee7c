"""One rank: after two updates, is its share of a checkpoint, bit for bit, what DeepSpeed gathers?
Also if it is gathered while updates go on; and what do ranks see whose peer ends before it sends,
or does not come?

    torchrun --nproc-per-node 3 tests/gather_driver.py

Prints a line per precision and stage from rank 0; any difference ends the rank.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from torch import nn

from longpretrain.engine import gather, zero
from longpretrain.engine.gather import GatherError, Share, standing_share
from longpretrain.engine.watchdog import _is_of_a_collective
from longpretrain.engine.zero import MOMENTS, ZeroEngine
from longpretrain.errors import tell
from longpretrain.ranks import discover
from longpretrain.recipe import from_tree

PAIRS = [(p, s) for p in ("fp32", "bf16") for s in (0, 1, 2, 3) if (p, s) != ("bf16", 0)]


class Odd(nn.Module):
    """Sizes that no number of ranks divides, one of a single element, one that does not train."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(7, 13)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.last = nn.Linear(13, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x.to(self.first.weight.dtype)))).float().sum()


class Names:
    """A task that stores one parameter under two names."""

    @staticmethod
    def stored_names(parameter: str) -> tuple[str, ...]:
        return (parameter, "twin") if parameter == "first.weight" else (parameter,)

    @staticmethod
    def stored(parameter: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        return dict.fromkeys(Names.stored_names(parameter), value)


def bits(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[int]]:
    # A zero's sign may go: DeepSpeed adds zeros of other ranks to what it gathers.
    return {name: (tensor + 0.0).view(torch.int32).tolist() for name, tensor in tensors.items()}


def taken(share: Share) -> dict[str, dict[str, torch.Tensor]]:
    share.take()
    return share.gathered(lambda size: None)


def check(precision: str, stage: int) -> str:
    torch.manual_seed(0)
    tree = {"precision": precision, "zero": {"config": f"ds_configs/zero{stage}.json"}}
    config = from_tree(tree | {"optim": {"lr": 0.1}})
    model = Odd()
    standing = standing_share(model, Names())  # type: ignore[arg-type]
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    engine = ZeroEngine(model, config, accumulation=1)
    share = Share(engine, Names(), standing)  # type: ignore[arg-type]
    compare(engine, taken(share), frozen)  # before any update: moments of zeros
    for number in range(2):
        update(engine, number)
    held = compare(engine, taken(share), frozen)
    again = taken(share)
    before = bits(again["model"]) | bits(again["optimizer"])
    begun, go_on = Event(), Event()

    def moved(size: int) -> None:
        begun.set()
        assert go_on.wait(60)

    share.take()
    with ThreadPoolExecutor(1) as thread:
        meanwhile = thread.submit(share.gathered, moved)
        if stage:  # else nothing is exchanged
            assert begun.wait(60)
        for number in range(3):  # in the midst of the exchanges
            update(engine, number)
        go_on.set()
    after = meanwhile.result()
    assert bits(after["model"]) | bits(after["optimizer"]) == before
    engine._engine.destroy()
    return f"{precision} {stage}: {held}"


def check_late() -> str:
    """The last rank does not come to the exchange: the others wait as long as they are told to."""
    gather._MARGIN_S = 4.0  # also for the ranks to find each other
    config = from_tree({"precision": "fp32", "zero": {"config": "ds_configs/zero3.json"}})
    engine = ZeroEngine(Odd(), config, accumulation=1)
    share = Share(engine, Names(), hung_after_s=0.5)  # type: ignore[arg-type]
    share.take()
    told = ""
    if dist.get_rank() < dist.get_world_size() - 1:
        try:
            share.gathered(lambda size: None)
        except GatherError as error:
            told = f"late: {str(error).splitlines()[0]}"
    dist.barrier()  # training's own group is as it was
    engine._engine.destroy()
    return told


def check_lost() -> str:
    """The last rank ends between the copy and the exchange."""
    config = from_tree({"precision": "fp32", "zero": {"config": "ds_configs/zero3.json"}})
    share = Share(ZeroEngine(Odd(), config, accumulation=1), Names())  # type: ignore[arg-type]
    share.take()
    dist.barrier()
    if dist.get_rank() == dist.get_world_size() - 1:
        os._exit(0)
    try:
        share.gathered(lambda size: None)
    except GatherError as error:
        assert _is_of_a_collective(error), error  # then the watchdog names who is gone
        return f"lost: {str(error).splitlines()[0]}"
    raise AssertionError("gathered without a rank")


def update(engine: ZeroEngine, number: int) -> None:
    engine.backward(engine(torch.full((2, 7), 1.0 + number + dist.get_rank())))
    assert engine.step().applied


def compare(
    engine: ZeroEngine,
    mine: Mapping[str, Mapping[str, torch.Tensor]],
    frozen: Mapping[str, torch.Tensor],
) -> list[int]:
    """How many elements each rank holds, after all of them were compared."""
    wanted = {**frozen, **{name: engine.full_state(name) for name in engine.trained_names}}
    wanted["twin"] = wanted["first.weight"]
    for name in engine.trained_names:
        wanted |= {f"{name}.{key}": engine.full_state(name, key) for key in MOMENTS}
    found = {**mine["model"], **mine["optimizer"]}
    for name, tensor in found.items():
        assert tensor.shape == wanted[name].shape, name
        assert bits({name: tensor}) == bits({name: wanted[name]}), name
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, sorted(found))
    written = [name for names in everyone for name in names]
    assert sorted(written) == sorted(wanted), "each tensor is written once"
    return [sum(wanted[name].numel() for name in names) for names in everyone]


if __name__ == "__main__":
    gather._PIECE = 40  # several exchanges
    zero.start_ranks(discover(), torch.device("cpu"))
    for pair in PAIRS:
        line = check(*pair)
        if dist.get_rank() == 0:
            tell(line, sys.stdout)
    if late := check_late():
        tell(late, sys.stdout)
    tell(check_lost(), sys.stdout)  # ranks at once: print would run their lines together
    os._exit(0)  # no group to leave in good order
