"""Tables for the terminal and for pages of the docs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cuda_check import ptxas, sass
from cuda_check.chips import RATES
from cuda_check.rates import clocks_of_pass, use_of_pass
from cuda_check.table import Row, product_loops, step_products
from cuda_check.toolchain import Toolchain, cubin, demangled, listing


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table whose columns line up; all but the first ``left`` columns to the right."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]

    def shown(line: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([shown(head), shown(rule), *map(shown, rows)]) + "\n"


BUDGET_HEAD = (
    "kernel", "registers", "spills B", "stack B", "shared B", "threads", "blocks/SM", "products",
    "loop", "masked", "most", "local", "use", "masked", "least",
)  # fmt: skip

LEGEND = """\
products: HMMA (t) or FFMA (f) instructions of one pass through the main loop; loop, masked, most:
instructions of the passes that do a whole step's work: the shortest, the longest without dropout,
the longest; local: instructions on local memory in loops with products; use, masked, least: bound
of the share of time that the tensor cores (or multiply-add units) are busy in these passes, by
issue slots, the other units and shared memory: modelled, not measured. -: a kernel without such a
loop, or (use) a chip whose rates are not known here.
"""


def budget_table(rows: Sequence[Row]) -> str:
    """A table for each chip."""
    text = []
    for chip in dict.fromkeys(row.chip for row in rows):
        body = [_cells(row) for row in rows if row.chip == chip]
        text.append(f"{chip}\n\n{markdown(BUDGET_HEAD, body)}")
    return "\n".join(text)


def _cells(row: Row) -> list[str]:
    plain = (
        row.registers, row.spill_bytes, row.stack_bytes, row.shared_bytes, row.threads,
        row.blocks_per_sm,
    )  # fmt: skip
    loop = (row.loop, row.loop_masked, row.loop_most)
    products = None if row.products is None else f"{row.products} {'t' if row.is_tensor else 'f'}"
    local = None if row.loop is None else row.local_in_loops
    shares = (row.use, row.use_masked, row.use_least)
    cells = (row.kernel, *plain, products, *loop, local)
    return [
        *("-" if cell is None else str(cell) for cell in cells),
        *("-" if share is None else f"{share:.2f}" for share in shares),
    ]


def loop_text(tools: Toolchain, source: Path, chip: int) -> str:
    """Of each kernel of a source: registers, and clocks of each unit in each loop with products."""
    code = cubin(tools, source, chip)
    usages = ptxas.read_log(code.log)
    names = demangled(sorted(usages))
    text = listing(tools, code, with_data=True)
    functions, threads = sass.read_functions(text), sass.read_max_threads(text)
    lines = []
    for mangled, usage in usages.items():
        lines.append(
            f"{names[mangled]}: {usage.registers} registers, {usage.spill_bytes} B spills, "
            f"{usage.stack_bytes} B stack"
        )
        of_step = step_products(names[mangled], threads[mangled])
        for loop in product_loops(sass.blocks_of(functions[mangled]), of_step)[1]:
            for name in ("shortest", "masked", "longest"):
                found = getattr(loop, name)
                use, bound = use_of_pass(found, RATES[chip])
                clocks = clocks_of_pass(found, RATES[chip])
                shown = ", ".join(f"{unit} {number:.0f}" for unit, number in clocks.items())
                lines.append(
                    f"  {loop.header} {name}: {found.count('HMMA')} HMMA, "
                    f"{found.count('FFMA')} FFMA of {found.length}; clocks: {shown}; "
                    f"use <= {use:.2f} ({bound})"
                )
            lines.append(f"    local memory: {loop.everything.count('LDL', 'STL')}")
    return "\n".join(lines)
