"""What is read of every kernel on every chip, gathered from nvcc's output and the launches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from cuda_check import ptxas, sass
from cuda_check.chips import RATES, WARP, Rates, blocks_per_sm
from cuda_check.launches import Launch, all_calls, build_recorder, record
from cuda_check.rates import use_of_pass
from cuda_check.toolchain import (
    CHIPS,
    LATER_CHIPS,
    Cubin,
    Toolchain,
    ToolError,
    constant,
    cubin,
    cubin_of_ptx,
    demangled,
    in_parallel,
    listing,
    ptx,
    sources,
    whole,
)

TENSOR = ("HMMA",)
MULTIPLY_ADD = ("FFMA",)
LOCAL = ("LDL", "STL")
FROM_PTX = " from PTX"
# A loop with fewer multiply-adds does not multiply tiles.
LEAST_OF_A_PRODUCT = 32
MULTIPLY_ADDS_OF_HMMA = 16 * 8 * 16
PRODUCTS_OF_STEP = {
    "window_forward_kernel": 2,  # scores, output
    "backward_keys_kernel": 4,  # scores, their gradient, dv, dk
    "backward_queries_kernel": 3,  # scores, their gradient, dq
}


@dataclass(frozen=True)
class Row:
    """One kernel on one chip.

    Args:
        kernel: its name in the source with template arguments.
        chip: as nvcc calls it; "sm_100 from PTX" is what a later chip's driver would make.
        registers: of a thread.
        spill_bytes: stored to and loaded from local memory for want of registers.
        stack_bytes: of a thread.
        shared_bytes: of a block, static and dynamic; the largest of all calls.
        threads: of a block.
        blocks_per_sm: that fit on a multiprocessor together.
        products: tensor instructions (HMMA), or else multiply-adds (FFMA), of one pass through
            the main loop; this and what follows is None where a kernel has no such loop.
        is_tensor: which of them.
        loop: instructions of the shortest pass that does a whole step's work.
        loop_masked: of the longest without dropout.
        loop_most: of the longest.
        local_in_loops: instructions on local memory in loops with products; 0 without such loops.
        use: bound of the share of time that the tensor cores (or multiply-add units) are busy in
            the shortest pass, by issue slots, other units and shared memory; None as well where the
            rates of the chip are not known.
        use_masked: the same of the longest pass without dropout.
        use_least: of the longest pass.
    """

    kernel: str
    chip: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    blocks_per_sm: int
    products: int | None = None
    is_tensor: bool | None = None
    loop: int | None = None
    loop_masked: int | None = None
    loop_most: int | None = None
    local_in_loops: int = 0
    use: float | None = None
    use_masked: float | None = None
    use_least: float | None = None

    def numbers(self) -> dict[str, Any]:
        """As plain data, without the names."""
        found = asdict(self)
        del found["kernel"], found["chip"]
        return found

    @property
    def name(self) -> tuple[str, str]:
        """Chip and kernel."""
        return self.chip, self.kernel


def read_table(tools: Toolchain, chips: Sequence[int], jobs: int) -> list[Row]:
    """Builds what is not built yet, and reads it; all kernels of all chips in the order of both."""
    found = sources()
    if not found:
        raise ToolError("there are no CUDA sources in csrc/cuda")
    in_parallel(jobs, [partial(whole, tools.nvcc, source) for source in found], "whole sources")
    launched = launches_of_kernels(tools)
    tasks = [partial(cubin, tools, source, chip) for chip in chips for source in found]
    if set(chips) == set(CHIPS):
        in_parallel(jobs, [partial(ptx, tools, source) for source in found], "PTX")
        tasks += [partial(cubin_of_ptx, tools, source, c) for c in LATER_CHIPS for source in found]
    rows: list[Row] = []
    for code in in_parallel(jobs, tasks, "device code"):
        rows += rows_of(tools, code, launched)
    return rows


def launches_of_kernels(tools: Toolchain) -> dict[str, Launch]:
    """Kernel -> its launch with the most shared memory, of all kinds of calls."""
    kernels, recorded = record(build_recorder(tools), all_calls())
    found: dict[str, Launch] = {}
    for launch in (launch for calls in recorded for launch in calls.launches):
        known = found.setdefault(launch.kernel, launch)
        if known.threads != launch.threads:
            raise ToolError(
                f"{launch.kernel} is launched with {known.threads} and with {launch.threads} "
                "threads: its row would not say which"
            )
        if launch.shared_bytes > known.shared_bytes:
            found[launch.kernel] = launch
    if never := sorted(kernels - found.keys()):
        raise ToolError(
            f"compiled, but no call launches them: {', '.join(never)}; take them out, or add the "
            "call that needs them to all_calls in tests/cuda_check/launches.py"
        )
    return found


def rows_of(tools: Toolchain, code: Cubin, launched: dict[str, Launch]) -> list[Row]:
    """A row for each kernel of one cubin."""
    usages = ptxas.read_log(code.log)
    if not usages:
        return []  # a source without kernels
    names = demangled(sorted(usages))
    functions = sass.read_functions(listing(tools, code))
    rows = []
    for mangled, usage in sorted(usages.items(), key=lambda item: names[item[0]]):
        launch = launched.get(names[mangled])
        if launch is None:
            continue  # one that is only asked about: launches.py
        shared = usage.static_shared_bytes + launch.shared_bytes
        row = Row(
            kernel=names[mangled],
            chip=f"sm_{code.chip}" + (FROM_PTX if code.is_from_ptx else ""),
            registers=usage.registers,
            spill_bytes=usage.spill_bytes,
            stack_bytes=usage.stack_bytes,
            shared_bytes=shared,
            threads=launch.threads,
            blocks_per_sm=blocks_per_sm(code.chip, usage.registers, launch.threads, shared),
        )
        rows.append(with_loop(row, sass.blocks_of(functions[mangled]), RATES.get(code.chip)))
    return rows


def step_products(kernel: str, threads: int) -> int | None:
    """Tensor instructions of a warp in one step of a window kernel; None: another kernel.

    A step is a block's tile against one other tile.
    """
    found = re.match(r"(\w+)<\w+, (\d+)\b", kernel)
    if found is None or found[1] not in PRODUCTS_OF_STEP:
        return None
    numbers = PRODUCTS_OF_STEP[found[1]] * constant("kTokenTile") ** 2 * int(found[2])
    return numbers // MULTIPLY_ADDS_OF_HMMA // (threads // WARP)


def product_loops(
    blocks: dict[str, sass.Block], of_step: int | None
) -> tuple[sass.Loop | None, list[sass.Loop]]:
    """The loop with the most products in a pass (of these the one with the shortest pass), and all
    loops with products.
    """
    loops = sass.step_loops(blocks, TENSOR, of_step)
    kind = TENSOR if loops else MULTIPLY_ADD
    if not loops:
        loops = [
            loop
            for loop in sass.innermost_loops(blocks, MULTIPLY_ADD)
            if loop.shortest.count(*MULTIPLY_ADD) >= LEAST_OF_A_PRODUCT
        ]
    best = min(
        loops,
        key=lambda loop: (-loop.shortest.count(*kind), loop.shortest.length),
        default=None,
    )
    return best, loops


def with_loop(row: Row, blocks: dict[str, sass.Block], rates: Rates | None) -> Row:
    """The row with what its main loop says; without rates, no shares of time."""
    main, loops = product_loops(blocks, step_products(row.kernel, row.threads))
    if main is None:
        return row
    is_tensor = main.shortest.count(*TENSOR) > 0
    kind = TENSOR if is_tensor else MULTIPLY_ADD
    alike = [x for x in loops if x.shortest.count(*kind) == main.shortest.count(*kind)]
    masked = max((loop.masked for loop in alike), key=lambda found: found.length)
    longest = max((loop.longest for loop in alike), key=lambda found: found.length)
    row = replace(
        row,
        products=main.shortest.count(*kind),
        is_tensor=is_tensor,
        loop=main.shortest.length,
        loop_masked=masked.length,
        loop_most=longest.length,
        local_in_loops=sum(loop.everything.count(*LOCAL) for loop in loops),
    )
    if rates is None:
        return row
    return replace(
        row,
        use=round(use_of_pass(main.shortest, rates)[0], 3),
        use_masked=round(use_of_pass(masked, rates)[0], 3),
        use_least=round(use_of_pass(longest, rates)[0], 3),
    )
