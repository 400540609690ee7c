"""Memory that was freed goes back to the system, where the C library would keep it."""

from __future__ import annotations

import ctypes


def trim() -> None:
    """To be called after a large document: it takes some milliseconds.

    glibc keeps up to 64 MB at the end of its heap once blocks of many MB were freed, and more in
    the middle of it. Other C libraries have no such function.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
