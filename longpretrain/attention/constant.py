"""Marks functions whose answers torch.compile takes for constants: it calls them while it traces.

What ``torch.compiler.assume_constant_result`` does (torch 2.13), without its import of the whole
compiler, which would take a second at every start of every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def constant_when_compiled(function: F) -> F:
    """Its result must not change while the process lives."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
