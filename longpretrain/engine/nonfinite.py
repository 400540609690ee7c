"""Finds where the numbers of an update stop being finite: which module, parameter and micro-batch.

It looks at one rank's own passes through hooks that change no tensor, so an update under watch has
the bits of one that is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from longpretrain.engine.zero import ZeroEngine

Found = dict[str, Any]
"""Plain data for a report."""


@dataclass(kw_only=True)
class MicroBatch:
    """What was seen of one micro-batch; None and empty: nothing that is not finite."""

    sequences: int
    loss: float = 0.0
    output: Found | None = None
    """The first output in the order of the forward pass, of the innermost module."""
    gradient: Found | None = None
    """Of a finite loss: the first gradient in the order of the backward pass, by the module whose
    output it is of."""
    parameters: list[Found] = field(default_factory=list)
    """Gradients of parameters, of this micro-batch and rank alone, in the order of the backward
    pass."""
    reached: str = ""
    """The last module in the backward pass whose output had a finite gradient."""

    @property
    def is_finite(self) -> bool:
        """Whether everything was."""
        return math.isfinite(self.loss) and not (self.output or self.gradient or self.parameters)


class Trace:
    """Watches one update of an engine; a context manager around it.

    The update calls ``start`` and ``end`` around the forward pass of each micro-batch, and
    ``read_tables`` between the last backward pass and the step.
    """

    def __init__(self, engine: ZeroEngine) -> None:
        self.micro_batches: list[MicroBatch] = []
        self.gradients: list[Found] = []
        """Of each parameter that trains, over all ranks: name, nan, inf, largest."""
        self.weights: list[Found] = []
        self._engine = engine
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, module in self._engine.module.named_modules():
            seen = partial(self._see_output, name or "the whole model")
            self._handles.append(module.register_forward_hook(seen, with_kwargs=True))
        for name, parameter in self._engine.module.named_parameters():
            if parameter.requires_grad:
                hook = partial(self._see_parameter, name)
                self._handles.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def start(self, sequences: int) -> None:
        """A forward pass over so many sequences begins."""
        self.micro_batches.append(MicroBatch(sequences=sequences))

    def end(self, loss: Tensor) -> None:
        """It ended."""
        self.micro_batches[-1].loss = float(loss.detach())

    def read_tables(self) -> None:
        """Looks at all weights, and at all gradients as the step will see them. Collective."""
        for name in self._engine.trained_names:
            self.gradients.append(_row(name, self._engine.full_gradient(name)))
            self.weights.append(_row(name, self._engine.full_state(name)))

    def _see_output(
        self,
        name: str,
        module: nn.Module,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        output: Any,
    ) -> None:
        now = self.micro_batches[-1]
        for tensor in _tensors(output):
            if tensor.requires_grad:
                hook = partial(self._see_gradient, now, name)
                tensor.register_hook(hook)  # type: ignore[no-untyped-call]
            if now.output is None and (counts := count(tensor)):
                inputs = any(count(t) for t in _tensors((arguments, keywords)))
                now.output = {
                    "module": name,
                    "kind": type(module).__name__,
                    "shape": [*tensor.shape],
                    **counts,
                    "input": "not finite either" if inputs else "finite",
                    "sequences": _sequences(tensor, now.sequences),
                }

    @staticmethod
    def _see_gradient(now: MicroBatch, name: str, gradient: Tensor) -> None:
        if now.gradient is None and math.isfinite(now.loss):
            counts = count(gradient)
            if counts:
                now.gradient = {"output_of": name, **counts, "finite_until": now.reached or None}
            now.reached = name

    def _see_parameter(self, name: str, gradient: Tensor) -> None:
        if counts := count(gradient):
            self.micro_batches[-1].parameters.append({"name": name, **counts})


def count(tensor: Tensor) -> dict[str, int]:
    """How many elements are NaN and how many infinite; empty if none is."""
    # Autograd would keep a tensor for isfinite, and recomputation miss it in the backward pass.
    tensor = tensor.detach()
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return {}
    return {"nan": int(tensor.isnan().sum()), "inf": int(tensor.isinf().sum())}


def _row(name: str, tensor: Tensor) -> Found:
    """A line of a table; ``largest`` is the largest finite magnitude, None where none is finite."""
    row: Found = {"name": name, "nan": 0, "inf": 0, **count(tensor), "largest": None}
    if row["nan"] + row["inf"] < tensor.numel():
        row["largest"] = float(tensor.abs().nan_to_num(nan=0.0, posinf=0.0).max())
    return row


def _sequences(tensor: Tensor, sequences: int) -> list[int]:
    """Rows of the batch that hold what is not finite, where a tensor still has one row for each."""
    if tensor.dim() < 3 or tensor.shape[0] != sequences:
        return []
    is_bad_B = ~torch.isfinite(tensor.detach()).flatten(1).all(1)
    return [int(row) for row in is_bad_B.nonzero().flatten().tolist()]


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in what a module takes or gives."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, tuple | list):
        for entry in value:
            yield from _tensors(entry)
