"""FlashAttention-2 by the same reckoning: how much of such a floor does a good kernel reach?

Published is what FlashAttention-2 measured. Its floor is reckoned here from its own machine code,
read with sass.py as ours is: the sm_80 kernels for heads of 64, bf16, no mask and no dropout, as
they lie in PyTorch 2.14.1's library for CUDA 13.0 (flash_fwd_kernel and
flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel, tiles of 128 x 128). The quotient carries all that
the reckoning leaves out: latencies, barriers, the start and end of a block, the clock rate under
load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cuda_check.chips import A100, H100, PARTITIONS, RATES, SHARED_BYTES_CLOCK, Gpu, Rates

OPERATIONS_OF_PAIR = (2 + 5) * 2 * 64  # forward and backward
SHORT, MIDDLE, LONG = "512", "1,024", "4,096"

# TFLOP/s, forward+backward, heads of 64, not causal, 16,384 tokens a batch: Dao 2023,
# "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning",
# arXiv:2307.08691, figures 4 and 7.
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    A100.name: {SHORT: 132, MIDDLE: 153, LONG: 171},
    H100.name: {SHORT: 215, MIDDLE: 254, LONG: 288},
}


@dataclass(frozen=True)
class PassOfFlash:
    """Of one pass through its main loop: instructions by unit, and pairs of query and key."""

    pairs: int
    hmma: int
    issued: int
    fma: int
    alu: int
    special: int
    shared_bytes: int

    def clocks(self, rates: Rates) -> float:
        """Of the busiest unit."""
        return max(
            self.hmma * rates.hmma,
            float(self.issued),
            self.fma * rates.fma,
            self.alu * rates.alu,
            self.special * rates.special,
            self.shared_bytes / SHARED_BYTES_CLOCK * PARTITIONS,
        )


FORWARD = PassOfFlash(32 * 128, 256, 1877, 803, 488, 132, 59_392)
BACKWARD = PassOfFlash(128 * 128 // 8, 320, 1636, 476, 443, 64, 93_184)


def floor_flops(gpu: Gpu) -> float:
    """Operations per second, forward+backward, at its floor."""
    rates = RATES[gpu.chip]
    clocks_of_pair = sum(one.clocks(rates) / one.pairs for one in (FORWARD, BACKWARD))
    return OPERATIONS_OF_PAIR / clocks_of_pair * gpu.sms * PARTITIONS * gpu.clock_hz


def share_of_floor(gpu: Gpu, length: str) -> float:
    """Published over floor."""
    return PUBLISHED[gpu.name][length] * 1e12 / floor_flops(gpu)


def dense_s(gpu: Gpu, batch: int, tokens: int, heads: int, head_size: int) -> float:
    """Dense attention of that layer, forward+backward, at what was published for 4,096 tokens."""
    operations = 7 * 2 * batch * heads * tokens**2 * head_size
    return operations / (PUBLISHED[gpu.name][LONG] * 1e12)
