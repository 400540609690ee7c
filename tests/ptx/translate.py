"""A kernel -> a Python function for each basic block: see writer.py for what it looks like."""

from __future__ import annotations

import itertools
import linecache
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx import arithmetic
from ptx.operations import DTYPE, OPERATIONS, Memory, Operation, Special
from ptx.parse import Instruction, Kernel, PtxError
from ptx.writer import ALONE, ENDS_BLOCK, BlockWriter, kind_of

COLLECTIVE = {"shuffle", "vote", "ldmatrix", "mma"}  # of the threads of a warp

ENVIRONMENT = {name: x for name, x in vars(arithmetic).items() if not name.startswith("__")}
ENVIRONMENT |= {"np": np, "where": np.where}


class Translator:
    """Cuts a kernel into blocks; ``function`` writes and compiles one when it is first run."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.constants: dict[tuple[bytes, str], int] = {}
        self.names = {name: i for i, name in enumerate(kernel.registers)}
        self.dtypes = [_stored(kind) for kind in kernel.registers.values()]
        self.operations = [_operation(instruction) for instruction in kernel.code]
        starts = self._block_starts()
        self.blocks = list(itertools.pairwise(starts))
        number = {first: i for i, first in enumerate(starts)}
        self.target = {label: number[at] for label, at in kernel.labels.items() if at in number}
        self.kinds = [kind_of(self.operations[first]) for first, _ in self.blocks]
        self.written_and_read = [
            self._written_and_read(*pair) for pair in zip(kernel.code, self.operations, strict=True)
        ]
        self.shared_registers = self._shared_registers()
        self._functions: dict[tuple[int, bool], Callable[..., Any]] = {}

    def function(self, block: int, masked: bool) -> Callable[..., Any]:
        if (block, masked) not in self._functions:
            lines = BlockWriter(self, block, masked).lines
            name = f"<{self.kernel.name} block {block}{' masked' if masked else ''}>"
            source = "\n    ".join(lines) + "\n"
            linecache.cache[name] = (len(source), None, source.splitlines(True), name)
            environment = dict(ENVIRONMENT)
            exec(compile(source, name, "exec"), environment)
            self._functions[block, masked] = environment["run"]
        return self._functions[block, masked]

    def constant(self, data: bytes, dtype: str) -> str:
        return f"c[{self.constants.setdefault((data, dtype), len(self.constants))}]"

    def register(self, name: str) -> int:
        if name not in self.names:
            raise PtxError(f"unknown register or symbol {name}")
        return self.names[name]

    def _block_starts(self) -> list[int]:
        """Where branches go, behind them, around barriers. A block that has collectives begins with
        one: whole warps are needed from there on, and no more branches follow.
        """
        starts = {0, len(self.operations)}
        for i, operation in enumerate(self.operations):
            kind = kind_of(operation)
            if kind == "branch":
                starts.add(self.kernel.labels[self.kernel.code[i].operands[0]])
            if kind in ENDS_BLOCK or kind in ALONE:
                starts.add(i + 1)
            if kind in ALONE:
                starts.add(i)
        in_collectives = False
        for i, operation in enumerate(self.operations):
            in_collectives = in_collectives and i not in starts
            if kind_of(operation) in COLLECTIVE and not in_collectives:
                starts.add(i)
                in_collectives = True
        return sorted(starts)

    def _shared_registers(self) -> set[int]:
        """Those of several blocks, and those read before they are written."""
        shared: set[int] = set()
        home: dict[int, int] = {}
        for block, (first, last) in enumerate(self.blocks):
            for i in range(first, last):
                instruction = self.kernel.code[i]
                written, read = self.written_and_read[i]
                for register in read + written:
                    is_new = register not in home
                    reads_old = register in read or instruction.guard is not None
                    if (is_new and reads_old) or home.setdefault(register, block) != block:
                        shared.add(register)
        return shared

    def _written_and_read(
        self, instruction: Instruction, operation: Operation
    ) -> tuple[list[int], list[int]]:
        def registers(text: str) -> list[int]:
            found = re.findall(r"[%$\w.@]+", text)
            return [self.names[name] for name in found if name in self.names]

        operands = list(instruction.operands)
        written = registers(operands.pop(0)) if has_result(instruction, operation) else []
        read = registers(" ".join(operands))
        return written, read + (registers(instruction.guard) if instruction.guard else [])


def has_result(instruction: Instruction, operation: Operation) -> bool:
    if isinstance(operation, Memory):
        return operation.kind == "load" or instruction.opcode.startswith("atom.")
    if isinstance(operation, Special):
        with_result = {"move", "active", *COLLECTIVE}
        return operation.kind in with_result or instruction.opcode.startswith("bar.red")
    return True


def _operation(instruction: Instruction) -> Operation:
    if instruction.opcode not in OPERATIONS:
        raise instruction.fault(f"unknown opcode {instruction.opcode}")
    return OPERATIONS[instruction.opcode]


def _stored(kind: str) -> str:
    """Registers hold unsigned numbers, but for .f32 and .f64."""
    return DTYPE[kind].replace("i", "u").replace("u1", "u2")
