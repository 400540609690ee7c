"""pytest's plugin of `make emulate`: writes down which kernels the emulator ran, in how many tests.

The emulator counts launches by a kernel's name without its template arguments; dtype and head size
are those of the operator's call. docs/kernels.md shows the record beside the other layers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from cuda_check.toolchain import BUILD, CUDA, ToolError

RECORD = BUILD.with_name("emulated") / "ran.json"
OPERATORS = ("sliding_attention_fused", "sliding_attention_fused_backward")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Ran:
    """Of one kernel with one dtype and head size."""

    tests: int = 0
    launches: int = 0


@dataclass
class Record:
    """Of a run of tests.

    Args:
        kernels: kernel -> dtype and head size, such as ``bf16 64`` -> how often.
    """

    sources: str
    tests: int = 0
    kernels: dict[str, dict[str, Ran]] = field(default_factory=dict)

    def add_test(self, launches: dict[tuple[str, str], int]) -> None:
        """One that passed: (kernel, dtype and head size) -> launches."""
        self.tests += 1
        for (kernel, kind), number in launches.items():
            ran = self.kernels.setdefault(kernel, {}).setdefault(kind, Ran())
            ran.tests += 1
            ran.launches += number

    def write(self, path: Path) -> None:
        """As JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self, default=vars, indent=1, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")


def fingerprint() -> str:
    """Of the kernels' sources."""
    digest = hashlib.sha256()
    for path in sorted(CUDA.glob("*")):
        if path.suffix in {".cu", ".h", ".cpp"}:
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def read_record(path: Path = RECORD) -> Record:
    """ToolError if it is not there, or of other sources than those that lie here."""
    way_out = "; run `make emulate`, which writes it"
    if not path.exists():
        raise ToolError(f"there is no {path.name} of the emulated tests{way_out}")
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["sources"] != fingerprint():
        raise ToolError(f"{path.name} of the emulated tests is of other sources{way_out}")
    kernels = {
        kernel: {kind: Ran(**ran) for kind, ran in kinds.items()}
        for kernel, kinds in found["kernels"].items()
    }
    return Record(found["sources"], found["tests"], kernels)


class Watch:
    """Stands for the operators of torch.ops.longpretrain, and counts what a call launches."""

    def __init__(self, counters: Any) -> None:
        self.counters = counters
        self.launches: dict[tuple[str, str], int] = {}

    def watched(self, operator: Any) -> Any:
        """In the operator's place: its ``default`` is all that longpretrain calls."""
        call, watch = operator.default, self

        class Watched:
            def __getattr__(self, name: str) -> Any:
                return getattr(operator, name)

            @staticmethod
            def default(*inputs: Any) -> Any:
                before = watch.counters()
                result = call(*inputs)
                x = inputs[0]
                watch.note(before, f"{DTYPES.get(x.dtype, x.dtype)} {x.shape[-1]}")
                return result

        return Watched()

    def note(self, before: dict[str, dict[str, int]], kind: str) -> None:
        """What is counted now and was not before."""
        for kernel, counts in self.counters().items():
            if new := counts["launches"] - before.get(kernel, {}).get("launches", 0):
                key = (kernel, kind)
                self.launches[key] = self.launches.get(key, 0) + new


class Plugin:
    """Of one run of pytest."""

    def __init__(self, watch: Watch, path: Path) -> None:
        self.watch, self.path = watch, path
        self.record = Record(fingerprint())

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self) -> Iterator[None]:
        """Only a test that passes counts."""
        self.watch.launches = {}
        yield
        self.record.add_test(self.watch.launches)

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """A run with failures leaves no record."""
        self.path.unlink(missing_ok=True)
        if exitstatus == 0:
            self.record.write(self.path)


def pytest_configure(config: pytest.Config) -> None:
    """Registers the plugin; the library must be the emulated one."""
    from emulation.library import emulator

    from longpretrain.attention.fused import kernel_facts

    assert kernel_facts()["cuda"] == "emulated", "this plugin is for the emulated library"
    watch = Watch(emulator().counters)
    for name in OPERATORS:
        setattr(torch.ops.longpretrain, name, watch.watched(getattr(torch.ops.longpretrain, name)))
    config.pluginmanager.register(Plugin(watch, RECORD))
