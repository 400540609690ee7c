"""A pytest plugin: every call of the compiled operator on CPU tensors runs on the GPU.

    LONGPRETRAIN_LIBRARY=... PYTHONPATH=benchmarks python -m pytest -p gpu_bridge tests/...

The tests of the operator make CPU tensors and hold the results against the reference on the CPU.
Here the operator's CPU kernels are replaced by ones that carry the arguments to the GPU, with
strides and storage as they are, call the CUDA kernels, and carry the results back: so all of these
tests check the CUDA kernels, and none of them knows. Head sizes that the CUDA kernels do not have
go to the portable operator, as they do for a user; how many calls went where is printed at the end.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

FORWARD = "sliding_attention_fused"
BACKWARD = "sliding_attention_fused_backward"
PORTABLE = {
    FORWARD: "sliding_attention_portable",
    BACKWARD: "sliding_attention_portable_backward",
}
HEAD_SIZES = (32, 64, 128)
CPU_ONLY_FILES = ("test_attention_levels.py", "test_attention_library.py")
CPU_ONLY_FIXTURES = ("threads",)

calls: Counter[str] = Counter()
_kept: list[torch.library.Library] = []


def carried(x: Tensor, device: str) -> Tensor:
    """The same strides over a copy of the whole storage: gaps and shared rows stay as they are."""
    storage = x.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8, device=x.device).set_(storage)
    copy = flat.to(device, copy=True).untyped_storage()
    empty = torch.empty(0, dtype=x.dtype, device=device)
    return empty.set_(copy, x.storage_offset(), x.size(), x.stride())


def runs_on_gpu(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether the CUDA kernels take this call."""
    # The backward operator has the output's gradient, the output and the log-sum-exp in front.
    q = arguments[3 if name == BACKWARD else 0]
    return bool(q.shape[3] in HEAD_SIZES and q.shape[0] > 0)


def bridge(name: str, device: str, operator: Any) -> Any:
    """The stand-in on the CPU for that operator on the device."""

    def call(*arguments: Any) -> Any:
        if not runs_on_gpu(name, arguments):
            calls["portable"] += 1
            return getattr(torch.ops.longpretrain, PORTABLE[name])(*arguments)
        calls[f"{device} {name}"] += 1
        on_device = [carried(x, device) if isinstance(x, Tensor) else x for x in arguments]
        results = operator(*on_device)
        back = [x.cpu() for x in results]
        return tuple(back) if isinstance(results, tuple) else back

    return call


def install(device: str = "cuda") -> None:
    """Puts the stand-ins in the place of the CPU kernels, for this process."""
    from longpretrain.attention import why_not

    if reason := why_not("fused"):
        raise pytest.UsageError(f"gpu_bridge: {reason}")
    library = torch.library.Library("longpretrain", "IMPL")
    for name in PORTABLE:
        stand_in = bridge(name, device, getattr(torch.ops.longpretrain, name))
        library.impl(name, stand_in, "CPU", allow_override=True)
    _kept.append(library)  # they are taken back when it is freed


def is_cpu_only(path_name: str, fixtures: tuple[str, ...]) -> bool:
    """Tests of instruction sets, threads and loading say nothing of CUDA."""
    return path_name in CPU_ONLY_FILES or any(name in fixtures for name in CPU_ONLY_FIXTURES)


def pytest_configure(config: pytest.Config) -> None:
    """Before tests are collected."""
    install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what is about the CPU."""
    left_out = [x for x in items if is_cpu_only(x.path.name, tuple(getattr(x, "fixturenames", ())))]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How much the GPU did."""
    shown = ", ".join(f"{number} {name}" for name, number in sorted(calls.items())) or "none"
    terminalreporter.write_line(f"gpu_bridge calls: {shown}")
