"""A stand-in for NVIDIA's apex on Python's path, and what was learnt of it forgotten again."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from longpretrain import nvidia_apex

STAND_IN = Path(__file__).resolve().parent / "apex_stand_in"
_NAMES = ("apex", "amp_C", "fused_layer_norm_cuda")


@contextlib.contextmanager
def found_anew(*folders: Path) -> Iterator[None]:
    """What apex there is, is looked for again, first in these folders; so it is afterwards.

    A real one that was imported comes back as it was: it cannot be imported twice.
    """
    before = _take_modules()
    _forget()
    try:
        with pytest.MonkeyPatch.context() as patch:
            for folder in folders:
                patch.syspath_prepend(folder)
            yield
    finally:
        _take_modules()
        sys.modules.update(before)
        _forget()


def _take_modules() -> dict[str, object]:
    taken = [name for name in sys.modules if name.split(".")[0] in _NAMES]
    return {name: sys.modules.pop(name) for name in taken}


def _forget() -> None:
    for cached in vars(nvidia_apex).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
