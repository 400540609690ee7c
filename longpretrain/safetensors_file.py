"""Writes safetensors files one tensor after another, so that a model larger than the memory fits.

The format: the header's length in 8 bytes, a JSON table of names, types, shapes and places, then
the numbers. The order and the table are those of the library's own writer, and so are the bytes.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from longpretrain.mapped import release

if TYPE_CHECKING:
    from torch import Tensor, dtype

_PIECE = 8 << 20
# torch's name of a type -> the format's, in the order in which the library writes them.
_TYPES = {
    "uint64": "U64", "int64": "I64", "float64": "F64", "complex64": "C64", "float32": "F32",
    "uint32": "U32", "int32": "I32", "bfloat16": "BF16", "float16": "F16", "uint16": "U16",
    "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_ORDER = list(_TYPES)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, *, dtype: dtype | None = None) -> None:
    """Writes a safetensors file, readable by whom the umask lets; it is on the disk afterwards.

    Memory is taken for one tensor at a time, and given back where a tensor is mapped from a file.

    Args:
        tensors: on the CPU. Two names may share one memory: each gets its own bytes.
        path: the file; one that stands there is written over.
        dtype: what the numbers are rounded to on the way. None: they stay as they are.

    Raises:
        OSError: of the system, such as a full disk; the file, or what there is of it, stays.
    """
    kinds = {name: _name(dtype or tensor.dtype) for name, tensor in tensors.items()}
    order = sorted(tensors, key=lambda name: (_ORDER.index(kinds[name]), name))
    sizes = {name: dtype.itemsize if dtype else tensors[name].element_size() for name in order}
    entries = ((n, _TYPES[kinds[n]], (*tensors[n].shape,), sizes[n]) for n in order)
    try:
        with path.open("wb", buffering=0) as file:
            write_all(file.fileno(), memoryview(header(entries)))
            for name in order:
                for piece in _pieces(tensors[name], dtype):
                    write_all(file.fileno(), piece)
                release(tensors[name])
            os.fsync(file.fileno())
    except OSError as error:
        if error.errno and error.filename is None:  # of a write, which knows no name
            error.filename = str(path)
        raise


def header(entries: Iterable[tuple[str, str, tuple[int, ...], int]]) -> bytes:
    """Length, names, types, shapes and places; transformers asks for the metadata.

    Args:
        entries: name, the format's type, shape and bytes per number of each tensor, in the order
            in which their numbers follow.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, kind, shape, size in entries:
        end = start + size * math.prod(shape)
        table[name] = {"dtype": kind, "shape": [*shape], "data_offsets": [start, end]}
        start = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that the numbers are aligned
    return len(text).to_bytes(8, "little") + text


def write_all(descriptor: int, piece: memoryview) -> None:
    """Writes all of it, or raises what the system says."""
    # A disk that is nearly full takes a part first, and refuses at the next call.
    while piece:
        piece = piece[os.write(descriptor, piece) :]


def _pieces(tensor: Tensor, dtype: dtype | None) -> Iterator[memoryview]:
    import torch  # data preparation does without it

    flat = tensor.detach().contiguous().view(-1)
    step = max(_PIECE // flat.element_size(), 1)
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        part = part if dtype is None else part.to(dtype)
        yield part.view(torch.uint8).numpy().data


def _name(dtype: dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    assert name in _TYPES, f"no type of safetensors: {name}"
    return name
