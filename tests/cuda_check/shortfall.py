"""docs/kernels.md: what bounds the forward's interior loop, where it stays below its target, and
what would have to go for the target to be met.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from cuda_check.chips import RATES, WARP
from cuda_check.model import Machine, busiest
from cuda_check.rates import clocks_of_pass
from cuda_check.report import markdown

USE_WANTED = 0.70
WORK_WANTED, WINDOW_OF_TARGET = 1.30, 256
FORWARD = "window_forward_kernel"

# What dropout takes in issue slots of a warp, as longpretrain/attention/philox.py defines it and
# without a move: rounds of Philox, products and exclusive-ors of a round, steps of the two keys.
PHILOX_ROUNDS, SLOTS_OF_ROUND, KEYS = 10, 4, 2
WEIGHTS_OF_CALL = 16
# Of a word of four bytes: two masks, a shift, two additions, and two to take and join the carries.
SLOTS_OF_WORD = 7
SLOTS_OF_WEIGHT = 2  # its bit is tested, and the weight taken or not


@dataclass(frozen=True)
class InteriorLoop:
    """The shortest pass of the forward through a tile, for one head size on one chip.

    Args:
        slots: instructions that are issued.
        allowed: of them, for the use that is wanted.
        weights: of a lane, in a pass.
    """

    head_size: int
    dropout: bool
    tensor: float
    slots: float
    logic: float
    exponential: float
    shared_memory: float
    bound: str
    weights: int

    @property
    def use(self) -> float:
        """Of the tensor cores."""
        clocks = (self.tensor, self.slots, self.logic, self.exponential, self.shared_memory)
        return self.tensor / max(clocks)

    @property
    def allowed(self) -> float:
        """Clocks of any unit, for the use that is wanted."""
        return self.tensor / USE_WANTED

    @property
    def dropout_floor(self) -> float:
        """Slots of what dropout is made of."""
        calls = self.weights / WEIGHTS_OF_CALL
        of_rounds = calls * PHILOX_ROUNDS * SLOTS_OF_ROUND + KEYS * (PHILOX_ROUNDS - 1)
        return of_rounds + self.weights / 4 * SLOTS_OF_WORD + self.weights * SLOTS_OF_WEIGHT


def read_loops(machine: Machine, chip: int, dtype: str = "BFloat16") -> list[InteriorLoop]:
    """Of the forward in that dtype; those without dropout first."""
    found = []
    for name, loop in machine.loops.items():
        arguments = re.fullmatch(rf"{FORWARD}<{dtype}, (\d+), (true|false)>", name)
        if arguments is None or loop is None:
            continue
        clocks = clocks_of_pass(loop.shortest, RATES[chip])
        head_size, tensor = int(arguments[1]), clocks["tensor"]
        # Scores and output: two products of so many multiply-adds for each weight of the warp.
        hmma = loop.shortest.count("HMMA")
        weights = hmma * 16 * 8 * 16 // (2 * head_size) // WARP
        found.append(
            InteriorLoop(
                head_size, arguments[2] == "true", tensor, clocks["issue"], clocks["logic"],
                clocks["exponential"], clocks["shared memory"],
                busiest(loop.shortest, RATES[chip])[0], weights,
            )
        )  # fmt: skip
    return sorted(found, key=lambda one: (one.dropout, one.head_size))


def shortfall_section(
    gpu_name: str, loops: Sequence[InteriorLoop], work: Sequence[tuple[str, int, float]], label: str
) -> str:
    """``work``: layers, windows, and what the forward computes for each useful product."""
    head = [
        "head size", "dropout", "tensor", "issue", "logic", "exponential", "shared memory", "use",
        f"{USE_WANTED:.2f} allows", "bound by", "target",
    ]  # fmt: skip
    rows = [
        [
            str(one.head_size), "yes" if one.dropout else "no", f"{one.tensor:.0f}",
            f"{one.slots:.0f}", f"{one.logic:.0f}", f"{one.exponential:.0f}",
            f"{one.shared_memory:.0f}", f"{one.use:.2f}", f"{one.allowed:.0f}", one.bound,
            _verdict(one.use >= USE_WANTED),
        ]
        for one in loops
    ]  # fmt: skip
    work_rows = [
        [
            name, f"{ratio:.2f}",
            _verdict(ratio <= WORK_WANTED) if window >= WINDOW_OF_TARGET else "none",
        ]
        for name, window, ratio in work
    ]  # fmt: skip
    parts = [
        f"## The forward's interior loop on {gpu_name}, and the targets it misses\n",
        f"Clocks of each unit in one pass of a warp through a tile without a mask. {label}\n",
        markdown(head, rows, left=2),
        *(wrapped(f"* {line}") for line in arguments_of(loops)),
        f"\nComputed work over useful work of the forward window; wanted are {WORK_WANTED:.2f} at "
        f"a one-sided\nwindow of {WINDOW_OF_TARGET}. {label}\n",
        markdown(["layer", "computed/useful", "target"], work_rows),
        _WORK,
    ]
    return "\n".join(parts)


def arguments_of(loops: Sequence[InteriorLoop]) -> list[str]:
    """A line on each loop below the target: what takes the time, and what the target would ask."""
    plain = {one.head_size: one for one in loops if not one.dropout}
    lines = []
    for one in (one for one in loops if one.use < USE_WANTED):
        name = f"Heads of {one.head_size}, {'with' if one.dropout else 'without'} dropout"
        if one.dropout:
            base = plain[one.head_size]
            least = base.slots + one.dropout_floor
            room = one.allowed - base.slots
            lines.append(
                f"{name}: {one.slots - base.slots:.0f} slots more than the {base.slots:.0f} "
                f"without. Philox, a byte for each weight, a test and a choice for each of "
                f"{one.weights} weights of a lane take {one.dropout_floor:.0f}, counted without "
                f"addresses, shuffles and moves (tests/cuda_check/shortfall.py): with no more the "
                f"use would be {one.tensor / max(least, base.tensor):.2f}. {USE_WANTED:.2f} "
                + (
                    f"leaves {room:.0f} slots for dropout."
                    if room > 0
                    else f"asks for {-room:.0f} slots less than there are without dropout."
                )
            )
        else:
            products = one.tensor / RATES[80].hmma
            lines.append(
                f"{name}: {one.slots - products:.0f} of {one.slots:.0f} slots are no products. A "
                f"weight costs its maximum, scaling, exponential and sum whatever the head's size, "
                f"and the tensor cores are done with it in {one.tensor / one.weights:.0f} clocks; "
                f"the exponentials alone allow a use of {one.tensor / one.exponential:.2f}, and "
                f"{USE_WANTED:.2f} asks for {one.slots - one.allowed:.0f} slots less."
            )
    return lines


def wrapped(line: str) -> str:
    """In the width of the page; what follows the first line of a bullet is indented."""
    return textwrap.fill(line, 100, subsequent_indent="  ", break_on_hyphens=False)


def _verdict(met: bool) -> str:
    return "met" if met else "NOT MET"


_WORK = """\
A warp takes 32 queries against tiles of 32 keys, so beside the 2w + 1 keys of a query it computes
up to 31 on each side and the rest of the first and the last tile: a cost that is the same for each
window, and weighs the more the narrower it is. Smaller tiles would halve it, and with it the use of
the tensor cores, as each key would be loaded for half as many queries.
"""
