"""Memory that runs out in the compiled operators: what is told, and as which kind of error.

Inputs are one row in memory; what the operators would allocate is beyond any machine.
"""

from __future__ import annotations

import os
import re

import pytest
import torch
from torch import Tensor

from longpretrain.attention import AttentionPattern, sliding_attention
from longpretrain.attention.memory import telling_of_memory

pytestmark = pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="the address sanitizer ends a process that asks for so much",
)

PATTERN = AttentionPattern(2)
WAY_OUT = r"wanted that much free memory\. Use a smaller micro-batch or shorter sequences\.$"


def expanded(*shape: int) -> Tensor:
    return torch.zeros(shape[-1]).expand(shape)


@pytest.mark.usefixtures("library")
def test_the_output() -> None:
    x = expanded(1, 2**29, 60_000, 128)
    with pytest.raises(torch.OutOfMemoryError) as told:
        sliding_attention(x, x, x, PATTERN, backend="fused")
    assert re.fullmatch(
        r"attention \(forward pass\): got no room for the output, 15,000\.0 TiB "
        rf"\([^\n]*(can't allocate|out of) memory[^\n]*\); {WAY_OUT}",
        str(told.value),
    )
    assert told.value.__cause__ is None


@pytest.mark.usefixtures("library")
def test_a_copy_of_an_input() -> None:
    x = torch.zeros(1).expand(1, 2**29, 60_000, 128)
    with pytest.raises(torch.OutOfMemoryError, match=r"no room for a copy of q, 15,000\.0 TiB"):
        sliding_attention(x, x, x, PATTERN, backend="fused")


@pytest.mark.usefixtures("library")
def test_a_gradient() -> None:
    """One query among many keys: the forward pass is small."""
    number = torch.zeros(128, requires_grad=True)
    keys = number.expand(1, 2**29, 1000, 128)
    out = sliding_attention(expanded(1, 1, 1000, 128), keys, keys, PATTERN, backend="fused")
    with pytest.raises(
        torch.OutOfMemoryError,
        match=rf"attention \(backward pass\): got no room for the gradient of k, 250\.0 TiB .*"
        rf"{WAY_OUT}",
    ):
        out.sum().backward()


def test_what_cuda_says() -> None:
    """As a GPU's allocator words it, and the kernels' own on the CPU."""

    @telling_of_memory("backward")
    def call(words: str) -> None:
        raise RuntimeError(words)

    with pytest.raises(torch.OutOfMemoryError) as told:
        call(
            "allocating scratch memory (3221225472 bytes): CUDA out of memory. Tried to allocate "
            "3.00 GiB. GPU 0 has 1.00 GiB free.\nframe #0: c10::Error\n"
            ' (originally from torch_call_dispatcher( "aten::new_empty" ) API call failed)'
        )
    assert str(told.value) == (
        "attention (backward pass): got no room for scratch memory, 3.0 GiB (CUDA out of memory. "
        "Tried to allocate 3.00 GiB. GPU 0 has 1.00 GiB free); wanted that much free memory. "
        "Use a smaller micro-batch or shorter sequences."
    )
    with pytest.raises(torch.OutOfMemoryError, match="got no room for scratch memory "):
        call("allocating scratch memory: out of memory")
    with pytest.raises(RuntimeError, match=r"^a launch failed$") as other:
        call("a launch failed")
    assert not isinstance(other.value, torch.OutOfMemoryError)
