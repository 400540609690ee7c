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


def _forget() -> None:
    for name in list(sys.modules):
        if name.split(".")[0] in _NAMES:
            del sys.modules[name]
    for cached in vars(nvidia_apex).values():
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()


@contextlib.contextmanager
def found_anew(*folders: Path) -> Iterator[None]:
    """What apex there is, is looked for again, first in these folders; so it is afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in folders:
            patch.syspath_prepend(folder)
        _forget()
        yield
    _forget()
