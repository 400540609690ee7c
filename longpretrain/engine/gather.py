"""This rank's share of a checkpoint, whole tensors in host memory, gathered with little traffic.

A tensor is written by a rank that holds much of it. ZeRO 1 and 2 cut one long vector of all
parameters into equal parts: nearly every parameter lies on one rank as a whole, and only those
that lie across a cut travel. Stage 3 cuts each parameter: every rank sends each other one what that
one will write. What travels does so in a few large exchanges, in order of the parameters, so that
memory for what comes in is that of a piece of at most ``_PIECE`` elements.

Training waits for ``take``, a copy of what this rank holds. On CPUs the exchanges come after it, in
``gathered``, which a thread calls while training goes on: they have a process group of their own,
as two threads must not share one. NCCL's stay in ``take``: between GPUs they are fast, and NCCL
promises nothing for two communicators at work on one device at once. The price is host memory: what
leaves is kept beside what this rank writes, as much again at stage 3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from longpretrain.engine.task import Task
from longpretrain.engine.zero import MOMENTS, ZeroEngine

_PIECE = 1 << 25
_MARGIN_S = 60.0
_KEYS = (None, *MOMENTS)
_NOTHING: Mapping[str, torch.Tensor] = MappingProxyType({})

Span = tuple[int, int]
"""First element and number of elements, of a flattened parameter."""


class GatherError(RuntimeError):
    """The ranks could not exchange their parts, mostly as one of them is gone, or the network."""


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


@dataclass(frozen=True, kw_only=True)
class _Exchange:
    """One exchange of all ranks: parts of some parameters, of one key."""

    sent: Sequence[tuple[str, str | None]]
    """Whose parts (name and key) leave, in order of the ranks that get them."""
    received: Sequence[torch.Tensor]
    """Where what comes goes, in order of the ranks that send it: views of the whole tensors."""
    sent_sizes: Sequence[int]
    """Elements, by rank."""
    received_sizes: Sequence[int]


class Share:
    """The tensors that this rank writes: where they come from is settled once.

    All ranks must make it, call ``take`` together, and ``gathered`` after each ``take``.

    Args:
        engine: holds what trains, sharded or not.
        task: names the tensors.
        standing: what does not train and this rank writes (``standing_share``).
        hung_after_s: the watchdog's, which does not see an exchange beside the training: one that
            takes more than twice as long fails. 0: only with the group's own time.
    """

    def __init__(
        self,
        engine: ZeroEngine,
        task: Task,
        standing: Mapping[str, torch.Tensor] = _NOTHING,
        *,
        hung_after_s: float = 0.0,
    ) -> None:
        self._engine, self._task, self._standing = engine, task, standing
        self._rank, ranks = dist.get_rank(), dist.get_world_size()
        mine = [engine.own_span(name) for name in engine.trained_names]
        everyone: list[list[Span]] = [[] for _ in range(ranks)]
        dist.all_gather_object(everyone, mine)
        self._places = _places(engine, everyone)
        self._own = [place for place in self._places if place.owner == self._rank]
        self._pieces = list(_in_pieces([place for place in self._places if place.travels]))
        self._is_nccl = bool(dist.get_backend() == "nccl")
        is_apart = bool(self._pieces) and not self._is_nccl
        timeout = timedelta(seconds=2 * hung_after_s + _MARGIN_S) if hung_after_s else None
        self._group = dist.new_group(backend="gloo", timeout=timeout) if is_apart else None
        self._whole: dict[tuple[str, str | None], torch.Tensor] | None = None
        self._exchanges: list[_Exchange] = []
        self._outgoing: list[torch.Tensor] = []
        self._incoming = _floats(0)

    def take(self) -> None:
        """Copies the state as it is now. The memory is the same each time: the next ``take`` writes
        over this one's.
        """
        if self._whole is None:
            self._whole = self._allocate()
        for (name, key), tensor in self._whole.items():
            start, size = self._engine.own_span(name)
            if size:
                tensor.narrow(0, start, size).copy_(self._engine.own_part(name, key))
        if self._is_nccl:
            for exchange in self._exchanges:
                parts = self._parts(exchange)
                outgoing = torch.cat(parts) if parts else _floats(0, device="cuda")
                incoming = _floats(sum(exchange.received_sizes), device="cuda")
                self._move(exchange, incoming, outgoing)
        else:
            for exchange, memory in zip(self._exchanges, self._outgoing, strict=True):
                if memory.numel():
                    torch.cat(self._parts(exchange), out=memory)

    def gathered(self, moved: Callable[[int], None]) -> dict[str, dict[str, torch.Tensor]]:
        """What was taken: {"model": tensors, "optimizer": tensors} by stored name. On CPUs a
        collective, in a group of its own, for a thread beside the training's.

        Args:
            moved: told of the bytes of each exchange. It must not raise: other ranks would wait.

        Raises:
            GatherError: of an exchange. Other ranks may wait in it: this one must end.
        """
        assert self._whole is not None, "nothing was taken"
        try:
            for exchange, outgoing in zip(
                self._exchanges, self._outgoing, strict=not self._is_nccl
            ):
                incoming = self._incoming[: sum(exchange.received_sizes)]
                self._move(exchange, incoming, outgoing)
                moved(4 * (incoming.numel() + outgoing.numel()))
        except Exception as error:  # whatever it is, this rank did not play its part
            raise GatherError(f"gathering a checkpoint failed: {error}") from error
        shapes = {place.name: place.shape for place in self._own}
        share: dict[str, dict[str, torch.Tensor]] = {"model": {**self._standing}, "optimizer": {}}
        for (name, key), tensor in self._whole.items():
            shaped = tensor.view(shapes[name])
            if key is None:
                share["model"] |= self._task.stored(name, shaped)
            else:
                share["optimizer"][f"{name}.{key}"] = shaped
        return share

    def release(self) -> None:
        """Gives the memory back."""
        self._whole, self._exchanges, self._outgoing = None, [], []
        self._incoming = _floats(0)

    def _allocate(self) -> dict[tuple[str, str | None], torch.Tensor]:
        """The own tensors, flat, in one memory, and on CPUs what leaves and comes. It stays: fresh
        pages would cost more time than the copy. Pinned, a GPU writes to it at full speed.
        """
        sizes = [place.shape.numel() for place in self._own]
        memory = _floats(len(_KEYS) * sum(sizes), pin_memory=self._is_nccl)
        tensors = iter(torch.split(memory, sizes * len(_KEYS)))
        whole = {(place.name, key): next(tensors) for key in _KEYS for place in self._own}
        self._exchanges = [
            self._exchange(piece, key, whole) for key in _KEYS for piece in self._pieces
        ]
        if not self._is_nccl:
            self._outgoing = [_floats(sum(each.sent_sizes)) for each in self._exchanges]
            most = max((sum(each.received_sizes) for each in self._exchanges), default=0)
            self._incoming = _floats(most)
        return whole

    def _exchange(
        self,
        places: Sequence[_Place],
        key: str | None,
        whole: Mapping[tuple[str, str | None], torch.Tensor],
    ) -> _Exchange:
        """Which parts of others' tensors leave and where those of the own ones go."""
        ranks = range(dist.get_world_size())
        sent: list[list[_Place]] = [[] for _ in ranks]
        received: list[list[torch.Tensor]] = [[] for _ in ranks]
        for place in places:
            if place.owner != self._rank and place.spans[self._rank][1]:
                sent[place.owner].append(place)
            elif place.owner == self._rank:
                for rank, (start, size) in enumerate(place.spans):
                    if rank != self._rank and size:
                        received[rank].append(whole[place.name, key].narrow(0, start, size))
        return _Exchange(
            sent=[(place.name, key) for row in sent for place in row],
            received=[part for row in received for part in row],
            sent_sizes=[sum(place.spans[self._rank][1] for place in row) for row in sent],
            received_sizes=[sum(part.numel() for part in row) for row in received],
        )

    def _parts(self, exchange: _Exchange) -> list[torch.Tensor]:
        """What leaves, in fp32, on the device that it leaves from."""
        device = torch.device("cuda" if self._is_nccl else "cpu")
        return [
            self._engine.own_part(name, key).to(device, torch.float32)
            for name, key in exchange.sent
        ]

    def _move(self, exchange: _Exchange, incoming: torch.Tensor, outgoing: torch.Tensor) -> None:
        sizes = [*exchange.received_sizes], [*exchange.sent_sizes]
        dist.all_to_all_single(incoming, outgoing, *sizes, group=self._group)
        arrived = torch.split(incoming, [part.numel() for part in exchange.received])
        for part, values in zip(exchange.received, arrived, strict=True):
            if self._is_nccl:
                part.copy_(values)
            else:  # by numpy, on one processor: torch would take those of the training beside it
                np.copyto(part.numpy(), values.numpy())


def _floats(size: int, **where: Any) -> torch.Tensor:
    return torch.empty(size, dtype=torch.float32, **where)


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
