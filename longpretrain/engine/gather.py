"""This rank's share of a checkpoint, whole tensors in host memory, gathered with little traffic.

A tensor is written by a rank that holds much of it. ZeRO 1 and 2 cut one long vector of all
parameters into equal parts: nearly every parameter lies on one rank as a whole, and only those
that lie across a cut travel. Stage 3 cuts each parameter: every rank sends each other one what that
one will write. What travels does so in a few large exchanges, in order of the parameters, so that
device memory for a piece of at most ``_PIECE`` elements is enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import nn

from longpretrain.engine.task import Task
from longpretrain.engine.zero import MOMENTS, ZeroEngine

_PIECE = 1 << 25
_KEYS = (None, *MOMENTS)
_NOTHING: Mapping[str, torch.Tensor] = MappingProxyType({})

Span = tuple[int, int]
"""First element and number of elements, of a flattened parameter."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a parameter is, and who writes it."""

    name: str
    shape: torch.Size
    spans: Sequence[Span]
    """By rank, what it holds."""
    owner: int

    @property
    def travels(self) -> bool:
        return self.spans[self.owner][1] < self.shape.numel()


def standing_share(model: nn.Module, task: Task) -> dict[str, torch.Tensor]:
    """The tensors that do not train and that this rank writes, by stored name: fp32, in host
    memory, dealt out over the ranks by size.

    Args:
        model: as it was read, on the CPU: an engine rounds and shards what stands still, too.
        task: says what is stored.
    """
    held = [0] * dist.get_world_size()
    share = {}
    for name, parameter in model.named_parameters():
        for stored in () if parameter.requires_grad else task.stored_names(name):
            owner = held.index(min(held))
            held[owner] += parameter.numel()
            if owner == dist.get_rank():
                share[stored] = parameter.detach()
    return share


class Share:
    """The tensors that this rank writes: where they come from is settled once.

    All ranks must make it and call ``take`` together.

    Args:
        engine: holds what trains, sharded or not.
        task: names the tensors.
        standing: what does not train and this rank writes (``standing_share``).
    """

    def __init__(
        self, engine: ZeroEngine, task: Task, standing: Mapping[str, torch.Tensor] = _NOTHING
    ) -> None:
        self._engine, self._task, self._standing = engine, task, standing
        self._rank, ranks = dist.get_rank(), dist.get_world_size()
        mine = [engine.own_span(name) for name in engine.trained_names]
        everyone: list[list[Span]] = [[] for _ in range(ranks)]
        dist.all_gather_object(everyone, mine)
        self._places = _places(engine, everyone)
        self._own = [place for place in self._places if place.owner == self._rank]
        self._memory: torch.Tensor | None = None

    @property
    def size_bytes(self) -> int:
        """Host memory that the copy needs."""
        return 4 * len(_KEYS) * sum(place.shape.numel() for place in self._own)

    def take(self) -> dict[str, dict[str, torch.Tensor]]:
        """Copies the state as it is now: {"model": tensors, "optimizer": tensors} by stored name.

        The memory is the same each time: the next ``take`` writes over this one's.
        """
        whole = self._whole()
        for (name, key), tensor in whole.items():
            start, size = self._engine.own_span(name)
            if size:
                tensor.narrow(0, start, size).copy_(self._engine.own_part(name, key))
        for key in _KEYS:
            for places in _in_pieces([place for place in self._places if place.travels]):
                self._exchange(places, key, whole)
        shapes = {place.name: place.shape for place in self._own}
        share: dict[str, dict[str, torch.Tensor]] = {"model": {**self._standing}, "optimizer": {}}
        for (name, key), tensor in whole.items():
            shaped = tensor.view(shapes[name])
            if key is None:
                share["model"] |= self._task.stored(name, shaped)
            else:
                share["optimizer"][f"{name}.{key}"] = shaped
        return share

    def release(self) -> None:
        """Gives the memory back."""
        self._memory = None

    def _whole(self) -> dict[tuple[str, str | None], torch.Tensor]:
        """The own tensors, flat, in one memory. It stays: fresh pages would cost more time than the
        copy. Pinned, a GPU writes to it at full speed.
        """
        sizes = [place.shape.numel() for place in self._own]
        if self._memory is None:
            self._memory = torch.empty(
                len(_KEYS) * sum(sizes), dtype=torch.float32, pin_memory=_is_nccl()
            )
        tensors = iter(torch.split(self._memory, sizes * len(_KEYS)))
        return {(place.name, key): next(tensors) for key in _KEYS for place in self._own}

    def _exchange(
        self,
        places: Sequence[_Place],
        key: str | None,
        whole: dict[tuple[str, str | None], torch.Tensor],
    ) -> None:
        """Sends the parts of others' tensors and takes those of the own ones in."""
        ranks = range(dist.get_world_size())
        sent: list[list[torch.Tensor]] = [[] for _ in ranks]
        received: list[list[torch.Tensor]] = [[] for _ in ranks]
        for place in places:
            if place.owner != self._rank and place.spans[self._rank][1]:
                sent[place.owner].append(self._engine.own_part(place.name, key))
            elif place.owner == self._rank:
                for rank, (start, size) in enumerate(place.spans):
                    if rank != self._rank and size:
                        tensor = whole[place.name, key]
                        received[rank].append(tensor.narrow(0, start, size))
        device = torch.device("cuda" if _is_nccl() else "cpu")
        parts = [part.to(device, torch.float32) for row in sent for part in row]
        outgoing = torch.cat(parts) if parts else torch.empty(0, device=device)
        wanted = [part for row in received for part in row]
        incoming = torch.empty(sum(part.numel() for part in wanted), device=device)
        dist.all_to_all_single(
            incoming,
            outgoing,
            [sum(part.numel() for part in row) for row in received],
            [sum(part.numel() for part in row) for row in sent],
        )
        arrived = torch.split(incoming, [part.numel() for part in wanted])
        for part, values in zip(wanted, arrived, strict=True):
            part.copy_(values)


def _is_nccl() -> bool:
    return bool(dist.get_backend() == "nccl")


def _places(engine: ZeroEngine, everyone: Sequence[Sequence[Span]]) -> list[_Place]:
    """The same on every rank: those who hold much of a tensor share the writing evenly."""
    held = [0] * len(everyone)
    places = []
    for number, name in enumerate(engine.trained_names):
        spans = [of_rank[number] for of_rank in everyone]
        most = max(size for _, size in spans)
        shape = engine.whole_shape(name)
        # Parts that were cut equally may differ by padding: half of the most is enough.
        able = (rank for rank, (_, size) in enumerate(spans) if 2 * size >= most)
        owner = min(able, key=held.__getitem__)
        held[owner] += shape.numel()
        places.append(_Place(name=name, shape=shape, spans=spans, owner=owner))
    return places


def _in_pieces(places: Sequence[_Place]) -> Iterator[list[_Place]]:
    piece: list[_Place] = []
    size = 0
    for place in places:
        if piece and size + place.shape.numel() > _PIECE:
            yield piece
            piece, size = [], 0
        piece.append(place)
        size += place.shape.numel()
    if piece:
        yield piece
