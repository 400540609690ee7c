"""What is known of the chips: limits of a multiprocessor, and the rates that the model of speed
needs.

Limits are those of the CUDA programming guide's table of compute capabilities, by the arithmetic of
the toolkit's cuda_occupancy.h, which tests/test_cuda_check.py compares with this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

WARP = 32
REGISTERS = 65_536
WARPS_REGISTERS = 256  # a warp gets registers in units of so many
PARTITIONS = 4  # of a multiprocessor; each has its own scheduler, registers and tensor core
RESERVED_SHARED_BYTES = 1024  # of each block, by the driver
SHARED_UNIT_BYTES = 128


@dataclass(frozen=True)
class Limits:
    """Of one multiprocessor."""

    threads: int
    blocks: int
    shared_bytes: int
    shared_bytes_of_block: int


LIMITS: Mapping[int, Limits] = {
    80: Limits(2048, 32, 164 << 10, 163 << 10),
    86: Limits(1536, 16, 100 << 10, 99 << 10),
    89: Limits(1536, 24, 100 << 10, 99 << 10),
    90: Limits(2048, 32, 228 << 10, 227 << 10),
    100: Limits(2048, 32, 228 << 10, 227 << 10),
    120: Limits(1536, 24, 100 << 10, 99 << 10),
}


def blocks_per_sm(chip: int, registers: int, threads: int, shared_bytes: int) -> int:
    """Blocks that a multiprocessor holds at once, shared memory set to its largest share of L1.

    Args:
        chip: 80 for sm_80.
        registers: of a thread.
        threads: of a block.
        shared_bytes: of a block, static and dynamic.

    Returns:
        0 if not even one fits.
    """
    limits = LIMITS[chip]
    warps = -(-threads // WARP)
    if threads > 1024 or shared_bytes > limits.shared_bytes_of_block:
        return 0
    shared = _up(shared_bytes + RESERVED_SHARED_BYTES, SHARED_UNIT_BYTES)
    fits = [limits.threads // WARP // warps, limits.blocks, limits.shared_bytes // shared]
    if registers:
        of_warp = _up(registers * WARP, WARPS_REGISTERS)
        # A block's warps are spread over the partitions: a block alone must fit as if rounded up.
        if of_warp * _up(warps, PARTITIONS) > REGISTERS:
            return 0
        fits.append(REGISTERS // PARTITIONS // of_warp * PARTITIONS // warps)
    return min(fits)


def _up(number: int, unit: int) -> int:
    return -(-number // unit) * unit


@dataclass(frozen=True)
class Rates:
    """Clocks for which one warp's instruction keeps its unit of a partition busy.

    Args:
        hmma: mma.sync m16n8k16 with fp32 sums, as far as that instruction reaches.
        fma: 32-bit multiply-add, addition, multiplication.
        alu: logic, comparison, minimum, selection, integer addition.
        special: MUFU, the exponential.
    """

    hmma: float
    fma: float
    alu: float = 2.0
    special: float = 8.0


MMA_SYNC_SHARE_OF_H100 = 0.629
"""Of the data sheet's rate, which takes wgmma: Luo et al. 2024, "Benchmarking and Dissecting the
Nvidia Hopper GPU Architecture via Microbenchmarking", arXiv:2402.13499."""

# fma, alu, special: results per clock of the CUDA programming guide's table of arithmetic
# instructions. hmma: data sheets of A100, A40, L40S and H100, divided by multiprocessors and clock.
RATES: Mapping[int, Rates] = {
    80: Rates(hmma=8.0, fma=2.0),
    86: Rates(hmma=16.0, fma=1.0),
    89: Rates(hmma=16.0, fma=1.0),
    90: Rates(hmma=4.0 / MMA_SYNC_SHARE_OF_H100, fma=1.0),
}
SHARED_BYTES_CLOCK = 128  # of a multiprocessor


@dataclass(frozen=True)
class Gpu:
    """A product.

    Args:
        name: of the product.
        chip: 80 for sm_80.
        sms: multiprocessors.
        clock_hz: boost, with which the data sheet's rates are reckoned.
        dense_flops: 16 bit with fp32 sums, without sparsity.
        memory_bytes_s: of the data sheet.
        l2_bytes_s: from L2 to all multiprocessors: an assumption, see below.
    """

    name: str
    chip: int
    sms: int
    clock_hz: float
    dense_flops: float
    memory_bytes_s: float
    l2_bytes_s: float


A100_L2_BYTES_CLOCK = 5120
"""Read by all multiprocessors: NVIDIA A100 Tensor Core GPU Architecture (white paper, 2020)."""
L2_SHARE = 0.70
"""Of that, what a kernel is taken to get. An assumption without a source."""

A100 = Gpu(
    "A100-80GB-SXM", 80, 108, 1.41e9, 312e12, 2.039e12, L2_SHARE * A100_L2_BYTES_CLOCK * 1.41e9
)
# NVIDIA publishes no rate of the H100's L2: this one is an assumption without a source.
H100 = Gpu("H100-SXM", 90, 132, 1.83e9, 989e12, 3.35e12, 5.5e12)
