"""``make cuda-check``: what nvcc makes of the CUDA kernels, held against limits; no GPU needed.

    python -m cuda_check budgets [--chips 80] [--update] [--in-tests]
    python -m cuda_check model docs/kernels.md
    python -m cuda_check loops csrc/cuda/forward.cu --chip 80     # while a kernel is written

``--in-tests`` is for ``make test``: no table, and a machine without nvcc is no fault.
Exit code 1: a limit is not kept or a target is missed. 2: a tool is missing or refused its input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cuda_check.budgets import UPDATE, compare, read_budgets, write_budgets
from cuda_check.chips import RATES
from cuda_check.report import LEGEND, budget_table, loop_text
from cuda_check.table import read_table
from cuda_check.toolchain import CHIPS, NoNvccError, Toolchain, ToolError, find_toolchain


def main(arguments: list[str]) -> int:
    """Runs one of the two commands."""
    parser = argparse.ArgumentParser(prog="cuda_check", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    budgets = commands.add_parser("budgets", help="build, print the table, compare with the limits")
    budgets.add_argument("--chips", default=",".join(map(str, CHIPS)), help="such as 80,90")
    budgets.add_argument("--update", action="store_true", help="write the limits anew")
    budgets.add_argument("--jobs", type=int, default=2, help="compilers at once")
    budgets.add_argument("--in-tests", action="store_true", help="no table; pass without nvcc")
    model = commands.add_parser("model", help="write the page on modelled speed")
    model.add_argument("page", type=Path)
    loops = commands.add_parser("loops", help="what bounds each loop with products of one source")
    loops.add_argument("source", type=Path)
    loops.add_argument("--chip", type=int, choices=list(RATES), default=CHIPS[0])
    options = parser.parse_args(arguments)
    try:
        tools = find_toolchain()
        if options.command == "model":
            from cuda_check.page import write_page  # torch and the lists of tests: seconds

            missed = write_page(tools, options.page)
            print(f"written: {options.page}")
            for line in missed:
                print(f"missed: {line}", file=sys.stderr)
            return 1 if missed else 0
        if options.command == "loops":
            print(loop_text(tools, options.source, options.chip))
            return 0
        chips = [int(chip) for chip in options.chips.split(",")]
        if unknown := set(chips) - set(CHIPS):
            parser.error(f"--chips: got {sorted(unknown)}, wanted some of {list(CHIPS)}")
        return check_budgets(
            tools, chips, update=options.update, jobs=options.jobs, brief=options.in_tests
        )
    except ToolError as error:
        if isinstance(error, NoNvccError) and getattr(options, "in_tests", False):
            print(f"skipped: the budgets of the CUDA kernels (layer 3 of 3), as {error}")
            return 0
        print(f"cuda_check: {error}", file=sys.stderr)
        return 2


def check_budgets(
    tools: Toolchain, chips: list[int], *, update: bool, jobs: int, brief: bool
) -> int:
    """Prints the table (``brief``: not) and what differs from the limits."""
    rows = read_table(tools, chips, jobs)
    print(f"nvcc {tools.nvcc.version}, nvdisasm {tools.nvdisasm_version}")
    if not brief:
        print("\n" + budget_table(rows) + "\n" + LEGEND)
    budgets = read_budgets()
    findings = compare(rows, budgets)
    is_same_nvcc = budgets["nvcc"] == tools.nvcc.version
    worse = [finding for finding in findings if finding.is_worse]
    for finding in findings:
        # Of another compiler all numbers may differ: too many lines for `make test`.
        if is_same_nvcc or finding.is_absolute or not brief:
            print(finding)
    if update:
        write_budgets(rows, tools.nvcc.version, tools.nvdisasm_version, budgets)
        print(f"limits written; {len(worse)} of them are worse than before, or were not there")
        return 0
    if not is_same_nvcc:
        print(
            f"the limits were read with nvcc {budgets['nvcc']}, this is {tools.nvcc.version}: "
            f"{len(findings)} differences are told by `make cuda-check` and not enforced"
        )
        worse = [finding for finding in worse if finding.is_absolute]
    if worse:
        print(f"{len(worse)} limits are not kept. If that is meant: {UPDATE}", file=sys.stderr)
        return 1
    if findings and is_same_nvcc:
        print(f"better than the limits; keep it: {UPDATE}")
    names = ", ".join(dict.fromkeys(row.chip for row in rows))
    print(f"{len({row.kernel for row in rows})} kernels on {names} keep their limits")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
