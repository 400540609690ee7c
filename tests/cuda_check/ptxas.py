"""Reads what ``ptxas -v`` says of each kernel."""

from __future__ import annotations

import re
from dataclasses import dataclass

_KERNEL = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\w+)'")
_PROPERTIES = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
_USED = re.compile(r"Used (\d+) registers(.*)")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Usage:
    """Of one kernel. Bytes of shared memory are the static ones; a launch adds its own."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    static_shared_bytes: int


def read_log(log: str) -> dict[str, Usage]:
    """Mangled name -> usage; ValueError if the log does not tell all of a kernel."""
    found: dict[str, Usage] = {}
    parts = _KERNEL.split(log)[1:]
    for name, text in zip(parts[::3], parts[2::3], strict=True):
        # The properties of functions that the kernel calls may follow its own.
        properties, used = _PROPERTIES.search(text), _USED.search(text)
        if properties is None or used is None:
            raise ValueError(f"ptxas -v: no registers or no stack frame told of {name}")
        stack, stores, loads = map(int, properties.groups())
        shared = _SHARED.search(used[2])
        found[name] = Usage(int(used[1]), stack, stores + loads, int(shared[1]) if shared else 0)
    return found
