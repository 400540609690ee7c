"""A basic block -> the source of a Python function over vectors with one number per thread.

The list r holds the registers, c the constants, S the machine. No vector is ever changed in place,
so registers may share one. Registers of a single block stay local variables there: what threads
outside of the mask m get is never read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ptx.operations import DTYPE, Memory, Operation, Special, Value
from ptx.parse import TYPE_BYTES, PtxError, vector

if TYPE_CHECKING:
    from ptx.translate import Translator

ENDS_BLOCK = {"branch", "exit"}
ALONE = {"barrier", "warp_barrier"}  # a block of their own
SPECIAL_REGISTERS = {
    f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"
} | {"%laneid"}


def kind_of(operation: Operation) -> str:
    return operation.kind if isinstance(operation, Special) else "plain"


SUM = "fma.rn.f32"
SUMS_AT_ONCE = 8  # of 1024 lanes: what fits into the processor's nearest cache


class PendingSums:
    """fma instructions of a basic block that can wait until a result is wanted. In kernels for
    float32 they come in hundreds, and many at once take a third of the time of one by one.
    """

    def __init__(self) -> None:
        self.levels: list[list[tuple[int, list[str]]]] = []  # none depends on one of its own level
        self.written: dict[int, int] = {}  # register -> level
        self.read: dict[int, int] = {}  # the highest one

    def concerns(self, written: list[int], read: list[int]) -> bool:
        """Whether an instruction must come after these."""
        is_wanted = any(x in self.written for x in read)
        return is_wanted or any(x in self.written or x in self.read for x in written)

    def _level(self, read: list[int]) -> int:
        return 1 + max((self.written.get(x, -1) for x in read), default=-1)

    def fits(self, written: list[int], read: list[int]) -> bool:
        """Whether the result replaces nothing that one of these still needs."""
        before = max(self.written.get(written[0], -1), self.read.get(written[0], 0) - 1)
        return self._level(read) > before

    def add(self, result: int, read: list[int], sources: list[str]) -> None:
        level = self._level(read)
        if level == len(self.levels):
            self.levels.append([])
        self.levels[level].append((result, sources))
        self.written[result] = level
        for register in read:
            self.read[register] = max(level, self.read.get(register, 0))

    def batches(self) -> Iterator[tuple[list[str], str, str, str]]:
        """Names of results, and each operand of all of them."""
        for level in self.levels:
            for first in range(0, len(level), SUMS_AT_ONCE):
                some = level[first : first + SUMS_AT_ONCE]
                a, b, c = (", ".join(column) for column in zip(*(x for _, x in some), strict=True))
                yield [f"v{register}" for register, _ in some], a, b, c


class BlockWriter:
    def __init__(self, kernel: Translator, block: int, masked: bool) -> None:
        self.kernel, self.block, self.masked = kernel, block, masked
        self.lines = [f"def run(S, r, c{', m' if masked else ''}):"]
        self.known: set[int] = set()  # registers that have a local variable
        self.changed: set[int] = set()
        self.mask = "m" if masked else "None"
        self.sums = PendingSums()
        first, last = kernel.blocks[block]
        for i in range(first, last):
            self.instruction = kernel.kernel.code[i]
            try:
                self._write(kernel.operations[i], *kernel.written_and_read[i])
            except (PtxError, KeyError, IndexError, ValueError) as error:
                raise self.instruction.fault(str(error)) from error
        if self.lines[-1] != "#end":
            self._leave(None, block + 1)
        self.lines.pop()

    def _write(self, operation: Operation, written: list[int], read: list[int]) -> None:
        self.mask, predicate = "m" if self.masked else "None", None
        is_sum = self.instruction.opcode == SUM and not self.instruction.guard and bool(written)
        if not is_sum and self.sums.concerns(written, read):
            self._emit_sums()
        if is_sum:
            if not self.sums.fits(written, read):
                self._emit_sums()
            self.sums.add(
                written[0], read, [self._source(x, "f32") for x in self.instruction.operands[1:]]
            )
            self.known.add(written[0])
            self.changed.add(written[0])
            return
        if guard := self.instruction.guard:
            predicate = ("~" if self.instruction.guard_negated else "") + self._local(guard)
        kind = kind_of(operation)
        if kind in ENDS_BLOCK:
            is_exit = kind == "exit"
            label = None if is_exit else self.instruction.operands[0]
            end = len(self.kernel.blocks)
            self._leave(predicate, end if label is None else self.kernel.target[label])
            return
        if predicate:
            if kind in ALONE:
                raise PtxError("a barrier under a predicate is not supported")
            self._emit(f"q = {predicate}" + (" & m" if self.masked else ""))
            self.mask = "q"
        if isinstance(operation, Value):
            self._value(operation)
        elif isinstance(operation, Memory):
            getattr(self, f"_{operation.kind}")(operation, self.instruction.operands)
        else:
            getattr(self, f"_{kind}")(operation, self.instruction.operands)

    def _emit(self, text: str) -> None:
        self.lines.append(text)

    def _emit_sums(self) -> None:
        for results, a, b, c in self.sums.batches():
            if len(results) == 1:
                self._emit(f"{results[0]} = fma({a}, {b}, {c})")
            else:
                self._emit(f"{', '.join(results)} = fma_all(({a}), ({b}), ({c}))")
        self.sums = PendingSums()

    def _leave(self, predicate: str | None, target: int) -> None:
        self._emit_sums()
        for register in sorted(self.changed & self.kernel.shared_registers):
            new = f"v{register}"
            self._emit(
                f"r[{register}] = " + (f"where(m, {new}, r[{register}])" if self.masked else new)
            )
        if predicate is None:
            self._emit(f"S.pc[m] = {target}" if self.masked else f"return {target}")
        elif self.masked:
            self._emit(f"S.pc[m] = where({predicate}, {target}, {self.block + 1})[m]")
        else:
            self._emit(f"return S.split({predicate}, {target}, {self.block + 1})")
        self._emit("#end")

    # Operands

    def _local(self, name: str) -> str:
        register = self.kernel.register(name)
        if register not in self.known:
            self._emit(f"v{register} = r[{register}]")
            self.known.add(register)
        return f"v{register}"

    def _source(self, operand: str, kind: str) -> str:
        """A Python expression for the operand as a vector of this PTX type."""
        wanted = DTYPE[kind]
        if operand.startswith("!"):
            return f"(~{self._source(operand[1:], kind)})"
        if operand in SPECIAL_REGISTERS:
            expression, have = f"S.special[{operand!r}]", "u4"
        elif match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})|0[dD]([0-9a-fA-F]{16})", operand):
            data = bytes.fromhex(match[1] or match[2])[::-1]
            if len(data) != TYPE_BYTES[kind]:
                raise PtxError(f"{operand} where {kind} belongs")
            return self.kernel.constant(data, wanted)
        elif re.fullmatch(r"-?\d+|0[xX][0-9a-fA-F]+", operand):
            return self._literal(int(operand, 0), kind)
        elif match := re.fullmatch(r"([$\w]+)(?:\+(\d+))?", operand):
            if match[1] not in self.kernel.kernel.symbols:
                raise PtxError(f"unknown operand {operand}")
            address = self.kernel.kernel.symbols[match[1]] + int(match[2] or 0)
            return self._literal(address, kind)
        else:
            expression = self._local(operand)
            have = self.kernel.dtypes[self.kernel.register(operand)]
        if have == wanted:
            return expression
        if "b1" in (have, wanted) or int(have[1]) < int(wanted[1]):
            raise PtxError(f"{operand} holds {have}, not {kind}")
        if int(have[1]) > int(wanted[1]):
            expression, have = f"{expression}.astype(u{wanted[1]})", f"u{wanted[1]}"
        return expression if have == wanted else f"{expression}.view({wanted})"

    def _literal(self, value: int, kind: str) -> str:
        wanted = DTYPE[kind]
        if wanted[0] == "f":
            raise PtxError(f"an integer where {kind} belongs: {value}")
        size = int(wanted[1])
        return self.kernel.constant((value % (1 << 8 * size)).to_bytes(size, "little"), wanted)

    def _assign(self, name: str, dtype: str, expression: str) -> None:
        """``dtype`` is that of the expression; a wider register extends it by its sign."""
        if name == "_":
            return
        register = self.kernel.register(name)
        stored = self.kernel.dtypes[register]
        if stored != dtype:
            if "b1" in (stored, dtype) or int(stored[1]) < int(dtype[1]):
                raise PtxError(f"{dtype} does not fit into {name}")
            if int(stored[1]) > int(dtype[1]):
                dtype = dtype[0] + stored[1]
                expression = f"({expression}).astype({dtype})"
            if stored != dtype:
                expression = f"({expression}).view({stored})"
        if self.mask == "q" and register in self.known | self.kernel.shared_registers:
            expression = f"where(q, {expression}, {self._local(name)})"
        self._emit(f"v{register} = {expression}")
        self.known.add(register)
        self.changed.add(register)

    def _assign_all(self, names: list[str], dtype: str) -> None:
        for i, name in enumerate(names):
            self._assign(name, dtype, f"t[{i}]")

    # Instructions

    def _value(self, operation: Value) -> None:
        result, *operands = self.instruction.operands
        if len(operands) != len(operation.sources):
            raise PtxError(f"{len(operands)} operands, {len(operation.sources)} expected")
        expression, kinds = operation.expression, operation.sources
        bits = 8 * TYPE_BYTES.get(kinds[0], 0)
        if operation.with_literal and operands[-1].isdecimal() and int(operands[-1]) < bits:
            expression, kinds = operation.with_literal, (kinds[0],) * len(kinds)
        sources = [
            str(int(x, 0)) if kind == "literal" else self._source(x, kind)
            for x, kind in zip(operands, kinds, strict=True)
        ]
        if operation.divides:
            self._emit(f"S.check_divisor({sources[1]}, {self.mask}, {self._at()})")
        expression = expression.format(*sources)
        first, *second = result.split("|")
        self._assign(first, DTYPE[operation.result], expression)
        if second:
            raise PtxError("a second result is not supported")

    def _at(self) -> int:
        """Names this instruction in errors."""
        return self.instruction.line

    def _move(self, operation: Special, operands: tuple[str, ...]) -> None:
        result, source = operands
        dtype = DTYPE[operation.type]
        if result.startswith("{"):  # the lowest part first
            parts = vector(result)
            size = int(dtype[1]) // len(parts)
            self._emit(f"t = {self._source(source, operation.type)}")
            for i, part in enumerate(parts):
                self._assign(part, f"u{size}", f"(t >> {dtype}({8 * size * i})).astype(u{size})")
        elif source.startswith("{"):
            parts = vector(source)
            bits = 8 * int(dtype[1]) // len(parts)
            shifted = [
                f"({self._source(x, f'b{bits}')}.astype({dtype}) << {dtype}({bits * i}))"
                for i, x in enumerate(parts)
            ]
            self._assign(result, dtype, " | ".join(shifted))
        else:
            self._assign(result, dtype, self._source(source, operation.type))

    def _address(self, operand: str, space: str) -> str:
        match = re.fullmatch(r"\[([%$\w.@]+)(?:\+(-?\d+))?\]", operand)
        if not match:
            raise PtxError(f"cannot read the address {operand}")
        is_32_bit = space == "shared"
        if not is_32_bit and self.kernel.kernel.registers.get(match[1], "b64")[1:] == "32":
            raise PtxError(f"the address {operand} has 32 bits")
        kind = "u32" if is_32_bit else "u64"
        base = self._source(match[1], kind)
        return f"{base} + {self._literal(int(match[2]), kind)}" if match[2] else base

    def _load(self, operation: Memory, operands: tuple[str, ...]) -> None:
        address = self._address(operands[1], operation.space)
        dtype = DTYPE[operation.type]
        detail = f"{dtype}, {operation.count}, {self.mask}, {self._at()}"
        self._emit(f"t = S.memory[{operation.space!r}].load({address}, {detail})")
        self._assign_all(vector(operands[0]), dtype)

    def _store(self, operation: Memory, operands: tuple[str, ...]) -> None:
        address = self._address(operands[0], operation.space)
        values = [self._source(x, operation.type) for x in vector(operands[1])]
        detail = f"[{', '.join(values)}], {self.mask}, {self._at()}"
        self._emit(f"S.memory[{operation.space!r}].store({address}, {detail})")

    def _atomic(self, operation: Memory, operands: tuple[str, ...]) -> None:
        *results, place, source = operands
        address = self._address(place, operation.space)
        value = self._source(source, operation.type)
        detail = f"{operation.function!r}, {value}, {self.mask}, {self._at()}"
        self._emit(f"t = S.memory[{operation.space!r}].atomic({address}, {detail})")
        for result in results:
            self._assign(result, DTYPE[operation.type], "t")

    def _copy(self, operation: Special, operands: tuple[str, ...]) -> None:
        if operands[2] not in operation.detail.split():
            raise PtxError(f"copies of {operands[2]} bytes do not exist")
        size = int(operands[2])
        given = self._source(operands[3] if len(operands) > 3 else operands[2], "u32")
        to, source = self._address(operands[0], "shared"), self._address(operands[1], "global")
        self._emit(f"S.copies.issue({to}, {source}, {size}, {given}, {self.mask}, {self._at()})")

    def _commit(self, operation: Special, operands: tuple[str, ...]) -> None:
        self._emit(f"S.copies.commit({self.mask})")

    def _wait(self, operation: Special, operands: tuple[str, ...]) -> None:
        groups = None if operation.detail == "all" else int(operands[0])
        self._emit(f"S.copies.wait({groups}, {self.mask}, {self._at()})")

    def _barrier(self, operation: Special, operands: tuple[str, ...]) -> None:
        results = list(operands[:1]) if operation.detail else []
        rest = operands[len(results) :]
        if rest[0] != "0" or len(rest) != (2 if results else 1):
            raise PtxError("only barrier 0 of all threads is supported")
        if results:
            vote = self._source(rest[1], "pred")
            self._emit(f"t = S.block_vote({operation.detail!r}, {vote}, {self.mask})")
            self._assign(results[0], DTYPE[operation.type], "t")

    def _warp_barrier(self, operation: Special, operands: tuple[str, ...]) -> None:
        members = self._source(operands[0], "b32")
        self._emit(f"S.warp_barrier({members}, {self.mask}, {self._at()})")

    def _shuffle(self, operation: Special, operands: tuple[str, ...]) -> None:
        result, *sources = operands
        values = ", ".join(self._source(x, "b32") for x in sources)
        self._emit(f"t = S.shuffle({operation.detail!r}, {values}, {self.mask}, {self._at()})")
        first, *second = result.split("|")
        self._assign(first, "u4", "t[0]")
        if second:
            self._assign(second[0], "b1", "t[1]")

    def _vote(self, operation: Special, operands: tuple[str, ...]) -> None:
        result, vote, members = operands
        sources = f"{self._source(vote, 'pred')}, {self._source(members, 'b32')}"
        self._emit(f"t = S.vote({operation.detail!r}, {sources}, {self.mask}, {self._at()})")
        self._assign(result, DTYPE[operation.type], "t")

    def _active(self, operation: Special, operands: tuple[str, ...]) -> None:
        self._assign(operands[0], "u4", f"S.active({self.mask})")

    def _ldmatrix(self, operation: Special, operands: tuple[str, ...]) -> None:
        results = vector(operands[0])
        count, _, way = operation.detail.partition(".")
        if len(results) != int(count):
            raise PtxError(f"{len(results)} results, {count} expected")
        address = self._address(operands[1], "shared")
        detail = f"{count}, {way == 'trans'}, {self.mask}, {self._at()}"
        self._emit(f"t = S.ldmatrix({address}, {detail})")
        self._assign_all(results, "u4")

    def _mma(self, operation: Special, operands: tuple[str, ...]) -> None:
        fragments = [vector(x) for x in operands]
        if [len(x) for x in fragments] != [4, 4, 2, 4]:
            raise PtxError("fragments of the wrong size")
        kinds = ("b32", "b32", "f32")
        a, b, c = (
            "[" + ", ".join(self._source(x, kind) for x in fragment) + "]"
            for fragment, kind in zip(fragments[1:], kinds, strict=True)
        )
        self._emit(f"t = S.mma({a}, {b}, {c}, {operation.detail}, {self.mask}, {self._at()})")
        self._assign_all(fragments[0], "f4")
