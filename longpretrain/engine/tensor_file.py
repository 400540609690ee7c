"""Writes safetensors files as a checkpoint needs them: hashed while they are written, on the disk
at the end, and to be called off between two pieces.

The hash is of what was meant to be written; reading the file back would hash what the disk made
of it, and a bad disk would go unnoticed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from longpretrain.safetensors_file import header, write_all

_PIECE = 8 << 20
_UNSYNCED = 64 << 20
"""Bytes that may wait for the disk. More would make somebody else's fsync, such as that of
metrics.jsonl, wait for all of them."""


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], tell: Callable[[int], None]
) -> str:
    """Writes fp32 tensors, whole, and returns the sha256 of the file.

    Args:
        path: the file, which is not there yet.
        tensors: contiguous, on the CPU. Two names may share one memory: each gets its own bytes.
        tell: hears how many bytes went out since the last time; what it raises ends the writing.

    Raises:
        OSError: of the system; the file, or what there is of it, stays.
    """
    digest = hashlib.sha256()
    unsynced = 0
    with path.open("xb", buffering=0) as file:
        for piece in _pieces(tensors):
            write_all(file.fileno(), piece)
            digest.update(piece)
            unsynced += len(piece)
            if unsynced >= _UNSYNCED:
                os.fdatasync(file.fileno())
                unsynced = 0
            tell(len(piece))
        os.fsync(file.fileno())
    return digest.hexdigest()


def _pieces(tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    yield memoryview(header((n, "F32", (*t.shape,), 4) for n, t in tensors.items()))
    for tensor in tensors.values():
        assert tensor.dtype == torch.float32
        data = tensor.detach().view(-1).numpy().view("u1").data
        for start in range(0, len(data), _PIECE):
            yield data[start : start + _PIECE]
