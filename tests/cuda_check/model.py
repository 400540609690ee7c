"""How long the kernels would take on a GPU, from their machine code, launches and tiles.

Modelled, not measured. Of each kernel of a call three times are reckoned:
* units: every pass through the main loop at the clocks of its busiest unit (rates.py), shared by
  all partitions of the GPU, times the imbalance of blocks over multiprocessors;
* memory: the tensors that it must read and write, at the data sheet's rate;
* L2: the rows that its blocks load. The longest is the kernel's floor: no kernel can be quicker by
  this reckoning. The expected time divides the first and the last by the share of its own floor
  that FlashAttention-2 reaches, the second by MEMORY_SHARE, and adds START_S for a launch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from cuda_check import sass
from cuda_check.chips import PARTITIONS, RATES, WARP, Gpu, Rates
from cuda_check.launches import Call, Launch, build_recorder, record
from cuda_check.rates import clocks_of_pass
from cuda_check.table import (
    MULTIPLY_ADDS_OF_HMMA,
    PRODUCTS_OF_STEP,
    TENSOR,
    product_loops,
    step_products,
)
from cuda_check.toolchain import Toolchain, ToolError, cubin, demangled, listing, sources
from cuda_check.work import Tiling, count_tiles, useful_pairs

START_S = 2e-6
MEMORY_SHARE = 0.80
BYTES_16 = 2

# Family of kernels -> [B, N, H, D] tensors that it must read and write once.
TENSORS = {
    "prepare_tokens": 0,
    "window_forward_kernel": 4,  # q, k, v; out
    "global_rows_kernel": 2,  # k_global, v_global
    "combine_rows_kernel": 0,
    "sum_rows": 2,  # out, dout
    "backward_keys_kernel": 6,  # q, k, v, dout; dk, dv
    "backward_queries_kernel": 5,  # q, k, v, dout; dq
    "global_rows_backward_kernel": 4,  # k_global, v_global; their gradients
    "sum_query_gradients_kernel": 0,
    "global_columns_kernel": 2,  # q, dout
    "sum_key_gradients_kernel": 0,
}
# Window kernel -> alignment of a block's first tile (None: its columns); do warps skip tiles?
WALKS: Mapping[str, tuple[int | None, bool]] = {
    "window_forward_kernel": (None, True),
    "backward_keys_kernel": (1, False),
    "backward_queries_kernel": (16, False),
}
# Of a global token's row or column: products, of 16 slots with all tokens.
GLOBAL_PRODUCTS = {
    "global_rows_kernel": 2,
    "global_rows_backward_kernel": 5,
    "global_columns_kernel": 4,
}


@dataclass(frozen=True)
class KernelTime:
    """One launch on one GPU, in seconds but for the operations."""

    kernel: str
    units_s: float
    memory_s: float
    l2_s: float
    bound: str
    useful_operations: float
    computed_operations: float
    tensor_use: float | None

    @property
    def floor_s(self) -> float:
        """Not quicker than this."""
        return max(self.units_s, self.memory_s, self.l2_s)

    def expected_s(self, share_of_floor: float) -> float:
        """With that share of the floor reached."""
        within = max(self.units_s, self.l2_s) / share_of_floor
        return max(within, self.memory_s / MEMORY_SHARE) + START_S


@dataclass(frozen=True)
class Machine:
    """What the kernels of one chip look like: the main loop of each."""

    loops: Mapping[str, sass.Loop | None]


def read_machine(tools: Toolchain, chip: int, threads: Mapping[str, int]) -> Machine:
    """The machine code of all kernels that are launched, with so many threads."""
    loops: dict[str, sass.Loop | None] = {}
    for source in sources():
        code = cubin(tools, source, chip)
        if "Compiling entry function" not in code.log:
            continue
        functions = sass.read_functions(listing(tools, code))
        names = demangled(sorted(functions))
        for mangled, lines in functions.items():
            name = names[mangled]
            if name in threads:
                of_step = step_products(name, threads[name])
                loops[name] = product_loops(sass.blocks_of(lines), of_step)[0]
    return Machine(loops)


def launches_of(tools: Toolchain, calls: Sequence[Call]) -> list[list[Launch]]:
    """The launches of each call."""
    return [found.launches for found in record(build_recorder(tools), calls)[1]]


def time_of_launch(launch: Launch, machine: Machine, call: Call, gpu: Gpu) -> KernelTime:
    """One kernel of a call."""
    name = launch.kernel
    family = re.split(r"[<(]", name)[0]
    if family not in TENSORS:
        raise ToolError(f"{name} is unknown to the model: add it to tests/cuda_check/model.py")
    numbers = call.batch * call.tokens * call.heads * call.head_size
    memory_s = TENSORS[family] * numbers * BYTES_16 / gpu.memory_bytes_s
    empty = KernelTime(name, 0.0, memory_s, 0.0, "memory", 0.0, 0.0, None)
    loop = machine.loops.get(launch.kernel)
    if family in WALKS and loop is not None:
        return _window(empty, family, launch, loop, call, gpu)
    if family in GLOBAL_PRODUCTS and loop is not None:
        return _global(empty, family, launch, loop, call, gpu)
    return empty if memory_s else replace(empty, bound="launch")


def _window(
    empty: KernelTime, family: str, launch: Launch, loop: sass.Loop, call: Call, gpu: Gpu
) -> KernelTime:
    rates, products = RATES[gpu.chip], PRODUCTS_OF_STEP[family]
    tiling = tiling_of(family, launch, loop, call)
    counts = count_tiles(call.tokens, call.one_sided_window, tiling)
    heads = call.batch * call.heads
    plain, masked = loop.shortest, loop.masked
    if call.drop_below and family != "window_forward_kernel":
        plain = masked = loop.longest  # there dropout takes the way with masks
    bound, of_plain = busiest(plain, rates)
    of_masked = busiest(masked, rates)[1]
    edge_tiles = counts.warp_tiles - counts.plain_warp_tiles
    clocks = counts.plain_warp_tiles * of_plain + edge_tiles * of_masked
    # Global columns in the same softmax: a masked tile's time for as many columns.
    slots = math.ceil(call.slots / 16) * 16 if family != "backward_keys_kernel" else 0
    warps = math.ceil(call.tokens / tiling.warp_rows)
    clocks += warps * slots / tiling.columns * of_masked
    rows_columns = counts.warp_tiles * tiling.warp_rows * tiling.columns
    computed = rows_columns + warps * tiling.warp_rows * slots
    pairs = useful_pairs(call.tokens, call.one_sided_window)
    operations = 2 * products * call.head_size * heads
    loaded = counts.block_tiles * tiling.columns * 2 * call.head_size * BYTES_16 * heads
    units_s = clocks * heads * imbalance(launch, gpu) / (gpu.sms * PARTITIONS * gpu.clock_hz)
    found = replace(
        empty,
        units_s=units_s,
        l2_s=loaded / gpu.l2_bytes_s,
        useful_operations=operations * pairs,
        computed_operations=operations * computed,
        tensor_use=RATES[gpu.chip].hmma * plain.count(*TENSOR) / of_plain,
    )
    times = {bound: found.units_s, "memory": found.memory_s, "L2": found.l2_s}
    return replace(found, bound=max(times, key=lambda unit: times[unit]))


def tiling_of(family: str, launch: Launch, loop: sass.Loop, call: Call) -> Tiling:
    """Rows of a block from the grid, columns of a tile from the products of a pass."""
    warps = launch.threads // WARP
    block_rows = next(
        rows for rows in (32, 64, 128, 256) if math.ceil(call.tokens / rows) == launch.grid[0]
    )
    warp_rows = block_rows // warps
    multiply_adds = loop.shortest.count(*TENSOR) * MULTIPLY_ADDS_OF_HMMA
    columns = multiply_adds // (PRODUCTS_OF_STEP[family] * warp_rows * call.head_size)
    alignment, skips = WALKS[family]
    return Tiling(block_rows, warp_rows, columns, alignment or columns, skips)


def _global(
    empty: KernelTime, family: str, launch: Launch, loop: sass.Loop, call: Call, gpu: Gpu
) -> KernelTime:
    products = GLOBAL_PRODUCTS[family]
    heads = call.batch * call.heads
    operations = 2 * products * call.head_size * heads * call.tokens
    computed = operations * math.ceil(call.slots / 16) * 16
    multiply_adds = loop.shortest.count(*TENSOR) * MULTIPLY_ADDS_OF_HMMA
    bound, of_pass = busiest(loop.masked, RATES[gpu.chip])
    passes = computed / 2 / multiply_adds
    units_s = passes * of_pass * imbalance(launch, gpu) / (gpu.sms * PARTITIONS * gpu.clock_hz)
    use = RATES[gpu.chip].hmma * loop.masked.count(*TENSOR) / of_pass
    found = replace(
        empty, units_s=units_s, useful_operations=operations * call.slots,
        computed_operations=computed, tensor_use=use,
    )  # fmt: skip
    return replace(found, bound=bound if units_s > found.memory_s else "memory")


def busiest(found: sass.Pass, rates: Rates) -> tuple[str, float]:
    """The unit that a pass keeps busy longest, and for how many clocks."""
    clocks = clocks_of_pass(found, rates)
    unit = max(clocks, key=lambda name: clocks[name])
    return unit, clocks[unit]


def imbalance(launch: Launch, gpu: Gpu) -> float:
    """Blocks of the busiest multiprocessor over the mean of all."""
    blocks = math.prod(launch.grid)
    return math.ceil(blocks / gpu.sms) * gpu.sms / blocks
