"""Runs the grid of a kernel: several thread blocks at a time, all of their threads together.

As long as all threads are at one place they run without a mask. Where they part, the lowest basic
block goes first, which brings them together again where branches meet.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from ptx.arithmetic import Vector, b1, i8, ldmatrix_fragments, mma_m16n8k16, u4
from ptx.buffers import GlobalMemory, GlobalSpace
from ptx.memory import AccessError, Bank, LocalMemory
from ptx.parse import Instruction, Module, PtxError, parse, source_of
from ptx.shared import Copies, SharedMemory
from ptx.translate import COLLECTIVE, Translator

LANES_AT_ONCE = 1024
MOST_STEPS = 100_000  # basic blocks that a thread block may run


@dataclass(frozen=True)
class Launch:
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int  # dynamic ones
    params: bytes


class Program:
    """The kernels of a module, and which of their basic blocks have run."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.module: Module = parse(text)
        self.translators: dict[str, Translator] = {}
        self.runs: Counter[tuple[str, int]] = Counter()  # of each kernel's basic blocks
        self.local_accesses: Counter[str] = Counter()

    def translator(self, kernel: str) -> Translator:
        if kernel not in self.translators:
            self.translators[kernel] = Translator(self.module.kernels[kernel])
        return self.translators[kernel]

    def never_run(self, kernel: str) -> list[Instruction]:
        """The first instruction of each basic block that has not run yet."""
        translator = self.translator(kernel)
        return [
            translator.kernel.code[first]
            for block, (first, last) in enumerate(translator.blocks)
            if first < last and not self.runs[kernel, block]
        ]

    def source_of(self, line: int) -> str:
        return source_of(self.text, line)

    def run(self, launch: Launch, memory: GlobalMemory) -> None:
        translator = self.translator(launch.kernel)
        kernel = translator.kernel
        if len(launch.params) != kernel.param_bytes:
            raise PtxError(f"{len(launch.params)} bytes of parameters, not {kernel.param_bytes}")
        if launch.threads % 32 or launch.threads > (kernel.max_threads or 1024):
            raise PtxError(f"{kernel.name}: a block of {launch.threads} threads")
        memory.launch += 1
        at_once = max(1, LANES_AT_ONCE // launch.threads)
        ids = [(x, y, z) for z, y, x in itertools.product(*map(range, reversed(launch.grid)))]
        with np.errstate(all="ignore"):
            for first in range(0, len(ids), at_once):
                Machine(self, translator, launch, memory, first, ids[first : first + at_once]).run()


class Machine:
    """Thread blocks that run side by side. A lane is a thread of one of them."""

    def __init__(
        self,
        program: Program,
        translator: Translator,
        launch: Launch,
        memory: GlobalMemory,
        first_block: int,
        ids: list[tuple[int, int, int]],
    ) -> None:
        self.program, self.translator, self.ids = program, translator, ids
        self.kernel = translator.kernel
        self.num_threads, self.num_blocks = launch.threads, len(ids)
        self.num_lanes = self.num_threads * self.num_blocks
        self.lane = np.arange(self.num_lanes)
        self.block = self.lane // self.num_threads
        self.thread = first_block * self.num_threads + self.lane  # in the grid
        self.special = self._special_registers(launch)
        undefined = {dtype: self._undefined(dtype) for dtype in set(translator.dtypes)}
        self.registers = [undefined[dtype] for dtype in translator.dtypes]
        self.constants: list[Vector] = []
        self._mask: Vector | None = None  # the last one, and its lanes
        self._lanes = self.lane
        self.warp_epoch = np.zeros(self.num_lanes, i8)  # barriers of a warp so far
        self.end = len(translator.blocks)
        self.pc = np.zeros(self.num_lanes, i8)  # basic block, when not all are at one
        self.waiting = np.zeros(self.num_lanes, b1)  # at the barrier of their thread block
        static = self.kernel.static_bytes
        self.shared = SharedMemory(self, static.get("shared", 0) + launch.shared_bytes)
        self.globals = GlobalSpace(self, memory)
        self.memory = {
            "global": self.globals,
            "shared": self.shared,
            "local": LocalMemory(self, static.get("local", 0)),
            "param": Bank(self, "param", launch.params),
            "const": Bank(self, "const", bytes(program.module.constants)),
        }
        self.copies = Copies(self)

    def _special_registers(self, launch: Launch) -> dict[str, Vector]:
        thread = self.lane % self.num_threads
        found = {"%laneid": thread % 32, "%tid.x": thread, "%ntid.x": self.num_threads}
        found |= {"%tid.y": 0, "%tid.z": 0, "%ntid.y": 1, "%ntid.z": 1}
        for axis, name in enumerate("xyz"):
            found[f"%ctaid.{name}"] = np.array([block[axis] for block in self.ids])[self.block]
            found[f"%nctaid.{name}"] = launch.grid[axis]
        return {name: self._filled(x, u4) for name, x in found.items()}

    def _filled(self, value: object, dtype: type) -> Vector:
        return np.broadcast_to(np.asarray(value, dtype), self.num_lanes).copy()

    def _undefined(self, dtype: str) -> Vector:
        filled = np.full(self.num_lanes * np.dtype(dtype).itemsize, 0xFF, np.uint8).view(dtype)
        return np.zeros(self.num_lanes, b1) if dtype == "b1" else filled

    # Scheduling

    def run(self) -> None:
        at: int | None = 0  # the basic block of all lanes, if it is one
        for _ in range(MOST_STEPS):
            if at == self.end:
                self.shared.end_epoch(np.ones(self.num_blocks, b1))
                return
            if at is None:
                at = self._step()
                continue
            if self.translator.kinds[at] == "barrier":
                self.pc[:] = at
                at = None
                self._arrive(np.ones(self.num_lanes, b1), int(self.pc[0]))
                continue
            self.program.runs[self.kernel.name, at] += 1
            at = self._function(at, False)(self, self.registers, self.constants)
        raise PtxError(f"{self.kernel.name}: no end after {MOST_STEPS} basic blocks")

    def _function(self, block: int, masked: bool) -> Callable[..., int | None]:
        function = self.translator.function(block, masked)
        for data, dtype in list(self.translator.constants)[len(self.constants) :]:
            self.constants.append(self._filled(np.frombuffer(data, dtype)[0], np.dtype(dtype).type))
        return function

    def split(self, taken: Vector, target: int, following: int) -> int | None:
        """Called by a branch that all lanes have reached."""
        if taken.all():
            return target
        if not taken.any():
            return following
        self.pc = np.where(taken, target, following)
        return None

    def _step(self) -> int | None:
        """Lets the lanes of the lowest basic block that can run do so."""
        if not self.waiting.any() and (self.pc == self.pc[0]).all():
            return int(self.pc[0])
        ready = np.unique(self.pc[~self.waiting])
        # Instructions of a warp wait for all of it. Where nothing else is left to run, those that
        # name their lanes go on with the ones that are there, and check that none is missing.
        for whole in (True, False):
            for block in ready[ready != self.end].tolist():
                mask = self._able(block, whole)
                if mask is None or not mask.any():
                    continue
                if self.translator.kinds[block] == "barrier":
                    self._arrive(mask, block)
                else:
                    self.program.runs[self.kernel.name, block] += 1
                    self._function(block, True)(self, self.registers, self.constants, mask)
                return None
        stuck = np.flatnonzero(self.pc != self.end)
        line = self._first(int(self.pc[stuck[0]])).line
        what = f"{len(stuck)} threads wait for others, which have left or wait elsewhere"
        raise self.error(line, what, int(stuck[0]))

    def _able(self, block: int, whole: bool) -> Vector | None:
        mask = (self.pc == block) & ~self.waiting
        kind = self.translator.kinds[block]
        needs_warp = kind in COLLECTIVE or kind == "warp_barrier"
        if not whole:
            return mask if kind in ("shuffle", "vote", "warp_barrier") else None
        return mask & mask.reshape(-1, 32).all(1).repeat(32) if needs_warp else mask

    def _first(self, block: int) -> Instruction:
        return self.kernel.code[self.translator.blocks[block][0]]

    def _arrive(self, mask: Vector, block: int) -> None:
        """Thread blocks whose last threads these are go on behind the barrier."""
        self.waiting |= mask
        at_barrier = self.waiting.reshape(self.num_blocks, -1)
        through = (self.pc == self.end).reshape(self.num_blocks, -1)
        complete = (at_barrier | through).all(1) & at_barrier.any(1)
        if not complete.any():
            return
        lanes = complete.repeat(self.num_threads)
        if (bad := lanes & (self.pc != block)).any():
            lane = int(np.flatnonzero(bad)[0])
            what = "a thread waits at another barrier or has left"
            raise self.error(self._first(block).line, what, lane)
        self.shared.end_epoch(complete)
        self.waiting &= ~lanes
        self.program.runs[self.kernel.name, block] += 1
        self._function(block, True)(self, self.registers, self.constants, lanes)

    # What translated code and the memories call

    def lanes(self, mask: Vector | None) -> Vector:
        if mask is None:
            return self.lane
        if mask is not self._mask:  # most instructions of a basic block have the same
            self._mask, self._lanes = mask, np.flatnonzero(mask)
        return self._lanes

    @contextmanager
    def blame(self, lanes: Vector, line: int) -> Iterator[None]:
        """What goes wrong is told as a fault of one of these lanes."""
        try:
            yield
        except AccessError as found:
            raise self.error(line, str(found), int(lanes[np.flatnonzero(found.bad)[0]])) from None

    def error(self, line: int, what: str, lane: int | None = None) -> PtxError:
        instruction = next(x for x in self.kernel.code if x.line == line)
        where = f"{self.program.source_of(line)}, {self.kernel.name}"
        if lane is not None:
            where += f", block {self.ids[self.block[lane]]}, thread {lane % self.num_threads}"
        return instruction.fault(f"{what} ({where})")

    def pick(self, value: Vector, lanes: Vector, mask: Vector | None) -> Vector:
        return value if mask is None else value[lanes]

    def spread(self, values: Sequence[Vector], lanes: Vector, mask: Vector | None) -> list[Vector]:
        """From vectors over the lanes of a mask to vectors over all."""
        if mask is None:
            return list(values)
        found = []
        for value in values:
            full = np.zeros(self.num_lanes, value.dtype)
            full[lanes] = value
            found.append(full)
        return found

    def check_divisor(self, divisor: Vector, mask: Vector | None, line: int) -> None:
        lanes = self.lanes(mask)
        with self.blame(lanes, line):
            if (bad := divisor[lanes] == 0).any():
                raise AccessError("a division by zero", bad)

    def block_vote(self, function: str, vote: Vector, mask: Vector) -> Vector:
        """Over the threads of each thread block; the mask holds whole ones."""
        votes = vote.reshape(self.num_blocks, -1)
        if function == "popc":
            return votes.sum(1).astype(u4).repeat(self.num_threads)
        return (votes.all(1) if function == "and" else votes.any(1)).repeat(self.num_threads)

    def warp_barrier(self, members: Vector, mask: Vector | None, line: int) -> None:
        _, is_active = self._members(members, mask, line)
        self.warp_epoch = self.warp_epoch + is_active  # a new vector: the old one is kept elsewhere

    def active(self, mask: Vector | None) -> Vector:
        is_active = np.zeros(self.num_lanes, b1)
        is_active[self.lanes(mask)] = True
        return self._ballot(is_active)

    def _ballot(self, votes: Vector) -> Vector:
        bits = votes.reshape(-1, 32).astype(i8) << np.arange(32)
        return bits.sum(1).repeat(32).astype(u4)

    def _members(self, members: Vector, mask: Vector | None, line: int) -> tuple[Vector, Vector]:
        """The lanes of a mask, and who is active; all that they name must be."""
        lanes = self.lanes(mask)
        is_active = np.zeros(self.num_lanes, b1)
        is_active[lanes] = True
        with self.blame(lanes, line):
            if (bad := members[lanes] & ~self._ballot(is_active)[lanes] != 0).any():
                raise AccessError("a lane that the member mask names is not here", bad)
            own = members[lanes] >> (lanes % 32).astype(u4) & u4(1)
            if (bad := own == 0).any():
                raise AccessError("the member mask does not name the lane itself", bad)
        return lanes, is_active

    def vote(
        self, mode: str, vote: Vector, members: Vector, mask: Vector | None, line: int
    ) -> Vector:
        _, is_active = self._members(members, mask, line)
        bits = self._ballot(vote & is_active) & members
        return {"ballot": bits, "any": bits != 0, "all": bits == members}[mode]

    def shuffle(
        self,
        mode: str,
        value: Vector,
        b: Vector,
        c: Vector,
        members: Vector,
        mask: Vector | None,
        line: int,
    ) -> tuple[Vector, Vector]:
        lanes, is_active = self._members(members, mask, line)
        lane, b = self.lane % 32, (b & u4(31)).astype(i8)
        clamp, segment = (c & u4(31)).astype(i8), (c >> u4(8) & u4(31)).astype(i8)
        lowest, limit = lane & segment, (lane & segment) | (clamp & ~segment)
        source = {
            "up": lane - b,
            "down": lane + b,
            "bfly": lane ^ b,
            "idx": lowest | (b & ~segment),
        }[mode]
        is_inside = source >= limit if mode == "up" else source <= limit
        source = (self.lane & ~31) + np.where(is_inside, source, lane)
        with self.blame(lanes, line):
            if (bad := ~is_active[source[lanes]]).any():
                raise AccessError("reads a lane that is not here", bad)
        return value[source], is_inside

    def _whole_warps(self, mask: Vector | None, line: int) -> Vector:
        lanes = self.lanes(mask)
        if mask is not None:
            warps = mask.reshape(-1, 32)
            with self.blame(lanes, line):
                if (bad := (warps.any(1) != warps.all(1)).repeat(32)[lanes]).any():
                    raise AccessError("needs a whole warp", bad)
        return lanes

    def ldmatrix(
        self, address: Vector, count: int, transposed: bool, mask: Vector | None, line: int
    ) -> list[Vector]:
        lanes = self._whole_warps(mask, line)
        naming = lanes.reshape(-1, 32)[:, : 8 * count].ravel()
        with self.blame(naming, line):
            rows = self.shared.matrix_rows(address[naming], naming, line)
        fragments = ldmatrix_fragments(rows.reshape(-1, count, 8, 8), transposed)
        return self.spread(fragments, lanes, mask)

    def mma(
        self,
        a: list[Vector],
        b: list[Vector],
        c: list[Vector],
        widen: Callable[[Vector], Vector],
        mask: Vector | None,
        line: int,
    ) -> list[Vector]:
        lanes = self._whole_warps(mask, line)
        a, b, c = ([self.pick(x, lanes, mask) for x in fragment] for fragment in (a, b, c))
        return self.spread(mma_m16n8k16(a, b, c, widen), lanes, mask)
