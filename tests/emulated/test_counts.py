"""What the emulator counts while the operator runs: conflicts, work; and no order changes a bit.

As test_operator.py: only where LONGPRETRAIN_LIBRARY names the emulated library.

Letters: B batch row, N query, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_check import work
from cuda_check.model import MULTIPLY_ADDS_OF_HMMA
from emulation.library import Emulator
from emulation.library import emulator as find_emulator
from torch import Tensor

from longpretrain.attention import AttentionPattern, sliding_attention
from longpretrain.attention.fused import kernel_facts

FLOPS_OF_MMA = 2 * 16 * 8 * 16
CONFLICTS = ("ldmatrix_conflicts", "async_conflicts", "shared_conflicts")


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    assert kernel_facts()["cuda"] == "emulated"
    found = find_emulator()
    found.reset_counters()
    yield found
    found.set_seed(0)
    found.set_threads(0)


def tensors(dtype: torch.dtype, N: int, H: int, D: int, B: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    made = torch.randn(4, B, N, H, D, generator=generator).to(dtype)
    return [x.clone().requires_grad_() for x in made[:3]] + [made[3]]


def run(dtype: torch.dtype, N: int, D: int, pattern: AttentionPattern, H: int = 2) -> list[Tensor]:
    """Output and gradients of a call with everything in it."""
    q, k, v, dout = tensors(dtype, N, H, D)
    out = sliding_attention(
        q,
        k,
        v,
        pattern,
        padding_BN=(torch.arange(N) % 37 == 5)[None],
        global_index_BG=torch.tensor([[0, N // 2, -1]], dtype=torch.int32),
        document_BN=(torch.arange(N) // (N // 2))[None],
        dropout_p=0.1,
        dropout_seed_B=torch.tensor([3]),
        backend="fused",
    )
    out.backward(dout)
    return [out.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("D", [32, 64, 128])
@pytest.mark.parametrize("dilation", [1, 3])
def test_no_bank_conflicts(emulator: Emulator, dtype: torch.dtype, D: int, dilation: int) -> None:
    run(dtype, 200, D, AttentionPattern(30, dilation))
    counted = emulator.counters()
    assert sum(counts["async_copies"] for counts in counted.values()) > 0
    if dtype != torch.float32:
        assert sum(counts["ldmatrix"] for counts in counted.values()) > 0
    met = {name: sum(counts[what] for what in CONFLICTS) for name, counts in counted.items()}
    assert not any(met.values()), counted


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_no_order_of_threads_and_blocks_changes_a_bit(
    emulator: Emulator, dtype: torch.dtype
) -> None:
    results = []
    for seed in range(4):
        emulator.set_seed(seed)
        emulator.set_threads(1 + seed % 2)
        results.append(run(dtype, 150, 32, AttentionPattern(20, (1, 2), causal=True)))
    for found in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found, results[0], strict=True))


@pytest.mark.parametrize("window", [64, 256])
def test_little_is_computed_in_vain(emulator: Emulator, window: int) -> None:
    """Products of the tensor cores, against those that the windows need: docs/kernels.md."""
    N, D = 4096, 64
    q, k, v, _ = tensors(torch.bfloat16, N, 1, D)
    with torch.no_grad():
        sliding_attention(q, k, v, AttentionPattern(window), backend="fused")
    computed = sum(counts["mma"] for counts in emulator.counters().values()) * FLOPS_OF_MMA
    positions = torch.arange(N)
    keys = (positions + window).clamp(max=N - 1) - (positions - window).clamp(min=0) + 1
    useful = 2 * 2 * D * int(keys.sum())
    print(f"w={window}: computed / useful work {computed / useful:.3f}")
    assert computed / useful <= (1.30 if window == 256 else 1.5)


@pytest.mark.parametrize(("tokens", "window"), [(700, 100), (500, 37)])
def test_tiles_are_those_of_the_model(emulator: Emulator, tokens: int, window: int) -> None:
    """docs/kernels.md counts tiles in Python: as many tensor instructions as are run here."""
    q, k, v, dout = tensors(torch.bfloat16, tokens, 1, 64)
    sliding_attention(q, k, v, AttentionPattern(window), backend="fused").backward(dout)
    tilings = {  # of the forward, dk and dv, dq: products, and how each goes through its tiles
        2: work.Tiling(128, 32, 32, 32, True),
        4: work.Tiling(64, 32, 32, 1, False),
        3: work.Tiling(64, 32, 64, 16, False),
    }
    expected = sum(
        products * tiling.warp_rows * tiling.columns * 64 // MULTIPLY_ADDS_OF_HMMA
        * work.count_tiles(tokens, window, tiling).warp_tiles
        for products, tiling in tilings.items()
    )  # fmt: skip
    assert sum(counts["mma"] for counts in emulator.counters().values()) == expected
