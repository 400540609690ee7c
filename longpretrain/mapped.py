"""Memory of mapped files, given back once it was read.

A tensor of a file is mapped: its pages come in when they are touched, and count as the process's
own until the file is closed, though nobody needs them twice.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

_MAPS, _PAGE_FLAGS = Path("/proc/self/maps"), Path("/proc/self/pagemap")
# Bits of an entry of pagemap: in memory, swapped out, as the file has it.
_PRESENT, _SWAPPED, _OF_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))
_DONTNEED = 4
_PIECE = 1 << 20


def all_finite(tensor: Tensor) -> bool:
    """Whether all are numbers; looked at in pieces, the memory of a mapped file given back."""
    flat = tensor.detach().reshape(-1)
    finite = all(
        bool(flat[start : start + _PIECE].isfinite().all())
        for start in range(0, flat.numel(), _PIECE)
    )
    release(tensor)
    return finite


def release(tensor: Tensor) -> None:
    """Gives the pages of a tensor back to the system if they are those of a mapped file.

    The tensor stays what it is: who reads it again reads the file again. Pages that were written to
    are no longer the file's, and stay; so does everything where the system has no such thing.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    with contextlib.suppress(OSError):
        if start < end and _is_mapped(start, end) and not _is_written(start, end):
            libc = ctypes.CDLL(None)
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)


def _is_mapped(start: int, end: int) -> bool:
    """Whether all of these addresses are those of one mapped file."""
    with _MAPS.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            addresses, _, _, _, inode, *_ = line.split()
            first, last = (int(address, 16) for address in addresses.split("-"))
            if first <= start < last:
                return inode != "0" and end <= last
    return False


def _is_written(start: int, end: int) -> bool:
    """Whether a page of these is no longer as the file has it, or cannot be told."""
    count = (end - start) // mmap.PAGESIZE
    with _PAGE_FLAGS.open("rb") as file:
        file.seek(8 * (start // mmap.PAGESIZE))
        flags = np.frombuffer(file.read(8 * count), dtype=np.uint64)
    held = (flags & (_PRESENT | _SWAPPED)) != 0
    return len(flags) != count or bool((held & ((flags & _OF_FILE) == 0)).any())
