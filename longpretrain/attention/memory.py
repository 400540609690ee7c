"""Where memory runs out in the compiled operators: an error of torch's own kind for it.

Through torch's C interface, which the operators are built on, an error keeps its words and loses
its kind: ``except torch.OutOfMemoryError``, as a search for a batch size that fits has it, would
miss it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Call = TypeVar("_Call", bound=Callable[..., Any])
_NO_MEMORY = re.compile("out of memory|can't allocate memory|bad_alloc", re.IGNORECASE)
# What allocating() of csrc/devices.h says; without a number where the kernels themselves allocate.
_FOR_WHAT = re.compile(r"allocating (?P<what>.+?)(?: \((?P<bytes>\d+) bytes\))?: ", re.DOTALL)
# What torch's C interface and allocators put around their words.
_AROUND = re.compile(r"\[enforce fail at [^]]*\] [^.]*\. | \(originally from .*|\n.*", re.DOTALL)


def telling_of_memory(direction: str) -> Callable[[_Call], _Call]:
    """For a function that calls a compiled operator, forward or backward.

    torch.compile leaves such functions out of what it generates: there errors stay what they were.
    """

    def wrap(call: _Call) -> _Call:
        @functools.wraps(call)
        def run(*inputs: Any) -> Any:
            if torch.compiler.is_compiling():
                return call(*inputs)
            try:
                return call(*inputs)
            except RuntimeError as error:
                if not _NO_MEMORY.search(str(error)):
                    raise
                told = _in_words(str(error), direction)
            raise torch.OutOfMemoryError(told)

        return run  # type: ignore[return-value]

    return wrap


def _in_words(error: str, direction: str) -> str:
    found = _FOR_WHAT.search(error)
    what = "memory" if found is None else found["what"]
    size = "" if found is None or found["bytes"] is None else f", {_size(int(found['bytes']))}"
    reason = _AROUND.sub("", error[found.end() :] if found else error).strip().rstrip(".")
    return (
        f"attention ({direction} pass): got no room for {what}{size} ({reason}); wanted that much "
        "free memory. Use a smaller micro-batch or shorter sequences."
    )


def _size(num_bytes: int) -> str:
    for unit, exponent in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
        if num_bytes >= 1 << exponent:
            return f"{num_bytes / (1 << exponent):,.1f} {unit}"
    return f"{num_bytes:,} bytes"
