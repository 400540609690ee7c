"""The one hash behind every seed: a splitmix64 chain over 64-bit integers.

splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014) is a bijection
of 64-bit words that passes the usual statistical batteries. Chaining it over a tuple of integers
gives a key for (seed, sample, epoch) that depends on nothing else: no rank, no worker, no library
version. ``hash64`` is the definition; ``hash64_array`` is the same numbers, many at a time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def hash64(*parts: int) -> int:
    """An unsigned 64-bit hash of a tuple of integers, each taken modulo 2**64.

    For one prefix, different last parts never collide (each step is a bijection).
    """
    state = 0
    for part in parts:
        state = _mix((state ^ (int(part) & _MASK)) + _GAMMA & _MASK)
    return state


def hash64_array(*parts: int | NDArray[np.uint64]) -> NDArray[np.uint64]:
    """``hash64`` over broadcast arrays: uint64, at least one-dimensional."""
    state = np.zeros(1, np.uint64)
    for part in parts:
        word = part if isinstance(part, np.ndarray) else np.uint64(int(part) & _MASK)
        state = (state ^ word) + np.uint64(_GAMMA)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(_MIX_1)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(_MIX_2)
        state = state ^ (state >> np.uint64(31))
    return state


def _mix(word: int) -> int:
    word = (word ^ (word >> 30)) * _MIX_1 & _MASK
    word = (word ^ (word >> 27)) * _MIX_2 & _MASK
    return word ^ (word >> 31)
