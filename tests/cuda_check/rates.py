"""How long one pass through a loop keeps each unit of a multiprocessor busy.

A unit that is busy longer than the tensor cores bounds their use. All are counted for one partition
of
a multiprocessor, which issues one instruction per clock; shared memory serves all four partitions,
which are taken to do the same. Latencies are not modelled: with enough warps others run meanwhile.
"""

from __future__ import annotations

from collections.abc import Mapping

from cuda_check.chips import PARTITIONS, SHARED_BYTES_CLOCK, Rates
from cuda_check.sass import Pass

_FMA = ("FFMA", "FADD", "FMUL", "IMAD")
_ALU = (
    "BMSK", "F2FP", "FCHK", "FLO", "FMNMX", "FMNMX3", "FSEL", "FSET", "FSETP", "IABS", "IADD",
    "IADD3", "IMNMX", "ISETP", "LEA", "LOP", "LOP3", "MOV", "P2R", "PLOP3", "POPC", "PRMT", "R2P",
    "SEL", "SGXT", "SHF", "VIADD", "VIADDMNMX", "VIMNMX", "VIMNMX3",
)  # fmt: skip
_SPECIAL = ("MUFU",)
_SHARED = ("LDS", "STS", "LDSM", "LDGSTS", "STSM", "ATOMS")


def shared_bytes(opcode: str, count: int) -> int:
    """Bytes that so many instructions of a warp move in or out of shared memory, at most: lanes
    that read the same word are counted as if they read different ones.
    """
    base, *modifiers = opcode.split(".")
    if base not in _SHARED:
        return 0
    if base in {"LDSM", "STSM"}:  # 8 x 8 matrices of 16 bits; the last modifier is their number
        matrices = int(modifiers[-1]) if modifiers[-1].isdigit() else 1
        return 128 * matrices * count
    width = next((int(m) for m in modifiers if m in {"64", "128"}), 32)
    if any(m in {"U8", "S8", "U16", "S16"} for m in modifiers):
        width = 32  # a bank is as wide
    return 32 * width // 8 * count


def clocks_of_pass(found: Pass, rates: Rates) -> Mapping[str, float]:
    """Unit -> clocks."""
    moved = sum(shared_bytes(opcode, count) for opcode, count in found.opcodes.items())
    return {
        "tensor": rates.hmma * found.count("HMMA"),
        "multiply-add": rates.fma * found.count(*_FMA),
        "issue": float(found.length),
        "logic": rates.alu * found.count(*_ALU),
        "exponential": rates.special * found.count(*_SPECIAL),
        "shared memory": moved / SHARED_BYTES_CLOCK * PARTITIONS,
    }


def use_of_pass(found: Pass, rates: Rates) -> tuple[float, str]:
    """Share of time for which the unit that does the products can be busy, and what bounds it."""
    clocks = clocks_of_pass(found, rates)
    own = clocks["tensor"] or rates.fma * found.count("FFMA")
    bound = max(clocks, key=lambda unit: clocks[unit])
    return own / clocks[bound], bound
