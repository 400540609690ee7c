"""The launches of a call, as the operator's own host code makes them, without a device.

The sources' host objects are linked with runtime.cpp, which stands in for the CUDA runtime.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

from cuda_check.toolchain import (
    BUILD,
    CSRC,
    CUDA,
    Toolchain,
    ToolError,
    demangled,
    run,
    sources,
    whole,
)

HERE = Path(__file__).resolve().parent
DTYPES = ("fp32", "bf16", "fp16")  # in the order of enum class DType


@dataclass(frozen=True)
class Call:
    """One call of the operator; flags say what it has. The order is that of launches.cpp."""

    backward: bool
    dtype: str
    batch: int
    tokens: int
    heads: int
    head_size: int
    slots: int
    one_sided_window: int
    dilation: int = 1
    causal: bool = False
    padding: bool = False
    documents: bool = False
    drop_below: int = 0

    def line(self) -> str:
        """As launches.cpp reads it."""
        backward, dtype, *numbers = astuple(self)
        return " ".join(str(int(x)) for x in (backward, DTYPES.index(dtype), *numbers))


@dataclass(frozen=True)
class Launch:
    """One start of a kernel."""

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class Recorded:
    """What a call would do."""

    launches: list[Launch]
    memset_bytes: int
    workspace_bytes: int


def build_recorder(tools: Toolchain) -> Path:
    """The program; ToolError where the operator uses a function that the stand-in does not have."""
    objects = [whole(tools.nvcc, source) / "host.o" for source in sources()]
    inputs = [HERE / "runtime.cpp", HERE / "launches.cpp", *sorted(CUDA.glob("*.cpp"))]
    digest = hashlib.sha256("\n".join(str(path) for path in objects).encode())
    for path in [*inputs, *sorted(CSRC.glob("*.h")), *sorted(CUDA.glob("*.h"))]:
        digest.update(path.read_bytes())
    program = BUILD / f"launches-{digest.hexdigest()[:16]}"
    if not program.exists():
        for old in BUILD.glob("launches-*"):
            old.unlink()
        # nvcc for the C++ sources as well: those of csrc/cuda include its headers.
        run([
            str(tools.nvcc.path), "-std=c++20", "-O1", "-cudart", "none", f"-I{CSRC}",
            *map(str, inputs), *map(str, objects), "-o", str(program),
        ])  # fmt: skip
    return program


def record(program: Path, calls: Sequence[Call]) -> tuple[set[str], list[Recorded]]:
    """All kernels that are there to be launched, and what each call would do."""
    output = run([str(program)], stdin="\n".join(call.line() for call in calls) + "\n")
    mangled, recorded = read_recording(output)
    # Mangled names of one kernel may differ between compilations: those in anonymous namespaces.
    names = demangled(sorted(mangled))
    if len(set(names.values())) < len(names):
        raise ToolError(f"two kernels of one name among {', '.join(sorted(names.values()))}")
    return set(names.values()), [
        replace(call, launches=[replace(x, kernel=names[x.kernel]) for x in call.launches])
        for call in recorded
    ]


def read_recording(output: str) -> tuple[set[str], list[Recorded]]:
    """The program's output."""
    kernels: set[str] = set()
    recorded: list[Recorded] = []
    launches: list[Launch] = []
    memset = workspace = 0
    for line in output.splitlines():
        word, *rest = line.split()
        if word == "kernel":
            kernels.add(rest[0])
        elif word == "asked":  # whether the device could run it: it is there for nothing else
            kernels.discard(rest[0])
        elif word == "launch":
            x, y, z, threads, shared = map(int, rest[1:])
            launches.append(Launch(rest[0], (x, y, z), threads, shared))
        elif word == "memset":
            memset += int(rest[0])
        elif word == "workspace":
            workspace = int(rest[0])
        elif word == "end":
            recorded.append(Recorded(launches, memset, workspace))
            launches, memset = [], 0
        else:
            raise ValueError(f"the recorder said {line!r}")
    return kernels, recorded


def all_calls() -> list[Call]:
    """Every combination that could take a kernel of its own, short and long."""
    flags = (False, True)
    return [
        Call(
            backward, dtype, 2, tokens, 2, head_size, slots, 256, 1, causal, padding, documents,
            drop_below,
        )
        for backward, dtype, head_size, slots, causal, padding, documents, drop_below, tokens
        in itertools.product(
            flags, DTYPES, (32, 64, 128), (0, 1, 40), flags, flags, flags, (0, 26), (100, 4096)
        )
    ]  # fmt: skip
