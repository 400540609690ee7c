"""``make cuda-check``: what nvcc makes of the CUDA kernels, held against limits; no GPU needed.

    python -m cuda_check budgets [--chips 80] [--update]
    python -m cuda_check model docs/kernels.md
    python -m cuda_check loops csrc/cuda/forward.cu --chip 80     # while a kernel is written

Exit code 1: a limit is not kept or a target is missed. 2: a tool is missing or refused its input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cuda_check.budgets import UPDATE, compare, read_budgets, write_budgets
from cuda_check.page import write_page
from cuda_check.report import LEGEND, budget_table, loop_text
from cuda_check.table import read_table
from cuda_check.toolchain import CHIPS, Toolchain, ToolError, find_toolchain


def main(arguments: list[str]) -> int:
    """Runs one of the two commands."""
    parser = argparse.ArgumentParser(prog="cuda_check", description=(__doc__ or "").split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    budgets = commands.add_parser("budgets", help="build, print the table, compare with the limits")
    budgets.add_argument("--chips", default=",".join(map(str, CHIPS)), help="such as 80,90")
    budgets.add_argument("--update", action="store_true", help="write the limits anew")
    budgets.add_argument("--jobs", type=int, default=2, help="compilers at once")
    model = commands.add_parser("model", help="write the page on modelled speed")
    model.add_argument("page", type=Path)
    loops = commands.add_parser("loops", help="what bounds each loop with products of one source")
    loops.add_argument("source", type=Path)
    loops.add_argument("--chip", type=int, choices=CHIPS, default=CHIPS[0])
    options = parser.parse_args(arguments)
    try:
        tools = find_toolchain()
        if options.command == "model":
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
        return check_budgets(tools, chips, update=options.update, jobs=options.jobs)
    except ToolError as error:
        print(f"cuda_check: {error}", file=sys.stderr)
        return 2


def check_budgets(tools: Toolchain, chips: list[int], *, update: bool, jobs: int) -> int:
    """Prints the table and what differs from the limits."""
    rows = read_table(tools, chips, jobs)
    print(f"nvcc {tools.nvcc_version}, nvdisasm {tools.nvdisasm_version}\n")
    print(budget_table(rows) + "\n" + LEGEND)
    budgets = read_budgets()
    findings = compare(rows, budgets)
    is_same_nvcc = budgets["nvcc"] == tools.nvcc_version
    worse = [finding for finding in findings if finding.is_worse]
    for finding in findings:
        print(finding)
    if update:
        write_budgets(rows, tools.nvcc_version, tools.nvdisasm_version, budgets)
        print(f"limits written; {len(worse)} of them are worse than before, or were not there")
        return 0
    if not is_same_nvcc:
        print(
            f"the limits were read with nvcc {budgets['nvcc']}, this is {tools.nvcc_version}: "
            "differences are told and not enforced"
        )
        worse = [finding for finding in worse if finding.is_absolute]
    if worse:
        print(f"{len(worse)} limits are not kept. If that is meant: {UPDATE}", file=sys.stderr)
        return 1
    if findings and is_same_nvcc:
        print(f"better than the limits; keep it: {UPDATE}")
    print(f"{len(rows)} kernels on {len(chips)} chips keep their limits")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
