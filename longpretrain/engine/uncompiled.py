"""Keeps torch.compile out of a start: DeepSpeed (0.19.8) marks the functions of an optimizer that
we do not use with it, and the mark alone imports torch's code generator, for a second a rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, ``torch.compile`` gives back the function that it is given."""

    def leave(function: Callable[..., Any] | None = None, **_: object) -> Callable[..., Any]:
        return leave if function is None else function

    before = torch.compile
    torch.compile = leave  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = before
