"""A model without values: shapes and names only, made in no time and no memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def without_values() -> Iterator[None]:
    """Modules made inside have tensors of the meta device, and nothing draws values for them.

    To torch (2.13) drawing them is an operation like any other, and on that device one that imports
    its whole compiler: a second at every start of every verb.
    """
    with torch.device("meta"), _Undrawn():
        yield


class _Undrawn(TorchFunctionMode):
    """Leaves a tensor as it is where it would be filled in place."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        is_of_init = getattr(func, "__module__", "") == "torch.nn.init"
        if func is torch.Tensor.normal_ or (is_of_init and func.__name__.endswith("_")):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
