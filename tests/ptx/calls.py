"""Calls of the operator on interpreted kernels: the host code of csrc/cuda says what it launches,
and the interpreter runs that on memory of its own.

Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

import ctypes
import functools
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from attention_cases import Case, output_gradient
from cuda_check.toolchain import find_nvcc, whole
from torch import Tensor

from ptx.buffers import Buffer, GlobalMemory
from ptx.build import AT_ONCE, CUDA, HERE, Built, Recorder
from ptx.machine import Launch, Program

DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # as enum class DType counts them
WORKSPACE = 1 << 50  # its address
PARTS = ("flags", "document_begin", "document_end", "delta", "slot_position", "partials")
SKEW = 16  # bytes: no buffer is aligned to more


class TensorBNHD(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("strides", ctypes.c_int64 * 3))


_SIZES = ("B", "N", "M", "H", "D", "G", "q_offset", "one_sided_window")
_FORWARD = ("q", "k", "v", "q_global", "k_global", "v_global", "out")
_MASKS = ("padding_BM", "document_BM", "global_index_BG", "dropout_seed_B")
_BACKWARD = ("dout", "dq", "dk", "dv", "dq_global", "dk_global", "dv_global")


class Params(ctypes.Structure):
    """struct AttentionBackwardParams of csrc/attention.h, which begins with AttentionParams."""

    _fields_ = (
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("dilation_H", ctypes.POINTER(ctypes.c_int64)),
        ("causal", ctypes.c_bool),
        ("scale", ctypes.c_float),
        ("drop_below", ctypes.c_int32),
        *((name, TensorBNHD) for name in _FORWARD),
        ("lse_BNH", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in _MASKS),
        *((name, TensorBNHD) for name in _BACKWARD),
    )


@dataclass
class Operator:
    """The compiled kernels with their host code."""

    programs: list[Program]
    library: ctypes.CDLL

    @classmethod
    def build(cls) -> Operator:
        """From the files that `make cuda-check` reads too."""
        compiler = find_nvcc()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            built = Built(list(pool.map(lambda x: whole(compiler, x), sorted(CUDA.glob("*.cu")))))
        library = built.link([HERE / "entry.cpp", CUDA / "workspace.cpp"])
        library.call.restype = ctypes.c_char_p
        for function in (library.workspace_parts, library.bytes_of_params):
            function.restype = ctypes.c_size_t
        assert library.bytes_of_params(True) == ctypes.sizeof(Params)
        assert library.bytes_of_params(False) == Params.dout.offset
        return cls(built.programs(), library)

    def __post_init__(self) -> None:
        self.kernels = {
            stable_name(name): (program, name)
            for program in self.programs
            for name in program.module.kernels
        }

    def with_kernels_of(self, changed: list[Program]) -> Operator:
        """The same host code and kernels, but for those that these programs have as well."""
        found = Operator(self.programs, self.library)
        for program in changed:
            found.kernels |= {stable_name(x): (program, x) for x in program.module.kernels}
        return found

    def launches(self, params: Params, backward: bool) -> list[Launch]:
        recorder = Recorder(self.library, self.programs)
        error = self.library.call(ctypes.byref(params), backward, ctypes.c_void_p(WORKSPACE))
        assert error is None, error
        return recorder.launches

    def workspace(self, params: Params, backward: bool) -> list[Buffer]:
        """Each part as a buffer of its own, without what fills the gaps between them."""
        places = (ctypes.c_void_p * len(PARTS))()
        memory = ctypes.c_void_p(WORKSPACE)
        size = self.library.workspace_parts(ctypes.byref(params), backward, memory, places)
        tokens, slots = params.B * params.M, params.B * params.G
        rows = params.B * params.N * params.H
        sizes = (tokens, 4 * tokens, 4 * tokens, 4 * rows, 4 * slots, None)
        found = []
        for name, address, num_bytes in zip(PARTS, places, sizes, strict=True):
            if address:
                rest = WORKSPACE + size - address
                empty = np.zeros((1, rest if num_bytes is None else num_bytes), np.uint8)
                found.append(Buffer(f"workspace {name}", "scratch", empty, address=address))
        return found

    def run(self, params: Params, backward: bool, buffers: list[Buffer]) -> GlobalMemory:
        memory = GlobalMemory([*buffers, *self.workspace(params, backward)])
        for launch in self.launches(params, backward):
            program, name = self.kernels[stable_name(launch.kernel)]
            program.run(replace(launch, kernel=name), memory)
        assert not (missing := memory.unwritten()), f"bytes never written: {missing}"
        return memory


@functools.cache
def operator() -> Operator:
    """Compiled when first asked for, and kept for the next run."""
    return Operator.build()


def stable_name(kernel: str) -> str:
    """Without what names the file in which it was compiled."""
    return re.sub(r"\d+_GLOBAL__N__[0-9a-f]{8}_\d+_\w+?_cu_[0-9a-f]{8}", "", kernel)


class Call:
    """One case, its tensors in one layout (see ``strides_of``)."""

    def __init__(self, operator: Operator, case: Case, layout: str = "plain") -> None:
        self.operator, self.case, self.layout = operator, case, layout
        self.floats = {name.split("_B")[0]: x.detach() for name, x in case.floats.items()}
        self.dtype, self.shape = self.floats["q"].dtype, self.floats["q"].shape
        self.buffers: dict[str, Buffer] = {}
        self.params = Params()
        self._fill_params()

    def run(self) -> dict[str, Tensor]:
        """As Case.run: out, lse and the gradients."""
        found = self.forward()
        return found | self.backward(**found)

    def forward(self) -> dict[str, Tensor]:
        self._add("out", "output", torch.zeros(self.shape, dtype=self.dtype))
        self._add_flat("lse_BNH", "output", torch.zeros(self.shape[:3], dtype=torch.float32))
        memory = self.operator.run(self.params, False, list(self.buffers.values()))
        return {"out": self._tensor(memory, "out"), "lse": self._tensor(memory, "lse")}

    def backward(self, out: Tensor, lse: Tensor) -> dict[str, Tensor]:
        self._add("out", "input", out)
        self._add_flat("lse_BNH", "input", lse)
        self._add("dout", "input", output_gradient(out))
        for name, x in self.floats.items():
            self._add(f"d{name}", "output", torch.zeros_like(x))
        memory = self.operator.run(self.params, True, list(self.buffers.values()))
        names = {f"d{name}": f"d{name.split('_B')[0]}" for name in self.case.floats}
        return {full: self._tensor(memory, name) for full, name in names.items()}

    def _fill_params(self) -> None:
        params, case, masks = self.params, self.case, self.case.masks
        params.dtype = DTYPES.index(self.dtype)
        params.B, params.N, params.H, params.D = self.shape
        params.M = self.floats["k"].shape[1]
        params.q_offset = masks.get("q_offset", 0)
        params.one_sided_window = case.pattern.one_sided_window
        params.dilation_H = (ctypes.c_int64 * params.H)(*case.pattern.dilation_of_heads(params.H))
        params.causal = case.pattern.causal
        scale = masks.get("scale")
        params.scale = params.D**-0.5 if scale is None else scale
        params.drop_below = round(256 * masks.get("dropout_p", 0.0))
        if "global_index_BG" in masks:
            params.G = masks["global_index_BG"].shape[1]
        for name, x in self.floats.items():
            self._add(name, "input", x)
        kinds = {"padding_BN": torch.uint8, "document_BN": torch.int64}
        kinds |= {"global_index_BG": torch.int64, "dropout_seed_B": torch.int64}
        for name, dtype in kinds.items():
            if name in masks:
                self._add_flat(name.replace("_BN", "_BM"), "input", masks[name].to(dtype))

    def _add(self, name: str, role: str, x_BNHD: Tensor) -> None:
        """Put a tensor into memory, and the address and strides into the parameters."""
        strides = strides_of(self.layout, x_BNHD.shape)
        index = np.indices(x_BNHD.shape[:3]).reshape(3, -1)
        offsets = (np.array(strides) @ index) * x_BNHD.element_size()
        rows = np.frombuffer(_bytes(x_BNHD), np.uint8).reshape(len(offsets), -1)
        buffer = self._put(Buffer(name, role, rows, offsets, skew=SKEW))
        setattr(self.params, name, TensorBNHD(buffer.address, (ctypes.c_int64 * 3)(*strides)))

    def _add_flat(self, name: str, role: str, x: Tensor) -> None:
        rows = np.frombuffer(_bytes(x), np.uint8).reshape(1, -1)
        setattr(self.params, name, self._put(Buffer(name, role, rows, skew=SKEW)).address)

    def _put(self, buffer: Buffer) -> Buffer:
        self.buffers[buffer.name] = buffer
        place = list(self.buffers).index(buffer.name)
        buffer.address = Buffer.address_of(place, buffer.skew)
        return buffer

    def _tensor(self, memory: GlobalMemory, name: str) -> Tensor:
        if name == "lse":
            data, dtype, shape = memory.contents("lse_BNH"), torch.float32, self.shape[:3]
        else:
            data, dtype = memory.contents(name), self.dtype
            shape = self.floats[name[1:]].shape if name.startswith("d") else self.shape
        return torch.frombuffer(bytearray(data.tobytes()), dtype=dtype).view(shape)


def _bytes(x: Tensor) -> bytes:
    return bytes(x.contiguous().view(torch.uint8).numpy().tobytes())


def strides_of(layout: str, shape: Any) -> tuple[int, int, int]:
    """Of B, N and H, in elements. ``far``: where 32 bits do not name an element."""
    _, rows, heads, size = shape
    match layout:
        case "heads_first":
            return heads * rows * size, size, rows * size
        case "gaps":
            return (rows * heads + 3) * (size + 8), heads * (size + 8) + 16, size + 8
        case "far":
            return (1 << 35) + 8, (1 << 25) + 8, (1 << 24) + 8
    return rows * heads * size, heads * size, size
