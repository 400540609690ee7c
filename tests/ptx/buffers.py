"""Global memory, checked to the byte.

A buffer is made of rows: runs of bytes at any distance from each other, as of a strided tensor.
Only their bytes exist. Addresses are made up; each buffer has a range of its own, far from others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ptx.arithmetic import Vector, i8, u1, u8
from ptx.memory import ALIGNMENT, AccessError, Space, check_alignment, padded

if TYPE_CHECKING:
    from ptx.machine import Machine

RANGE_BYTES = 1 << 40
SEVERAL = -2  # threads


@dataclass
class Buffer:
    """What kernels may do with it is its role.

    input: only read it. output: write each byte exactly once, in a whole call, and not read it.
    scratch: nothing is written at first; in each kernel a byte belongs to the one thread that
    writes it. counter: touch it with atomic functions.
    """

    name: str
    role: str
    rows: Vector  # uint8 [number of rows, bytes of a row]
    offsets: Vector = field(default_factory=lambda: np.zeros(1, i8))  # of the rows, in bytes
    skew: int = 0  # of the first byte's address, in bytes
    address: int = 0  # 0: a range of its own

    @staticmethod
    def address_of(number: int, skew: int) -> int:
        return (number + 1) * RANGE_BYTES + skew

    @classmethod
    def of(cls, name: str, role: str, array: Vector, skew: int = 0) -> Buffer:
        """Contiguous, with a copy of the array's bytes."""
        rows = np.frombuffer(np.ascontiguousarray(array).tobytes(), u1)
        return cls(name, role, rows.reshape(1, -1), skew=skew)

    def runs(self) -> list[tuple[int, int]]:
        """Addresses and sizes of what lies side by side."""
        size = self.rows.shape[1]
        found: list[tuple[int, int]] = []
        for address in (self.address + np.sort(self.offsets)).tolist():
            end = sum(found[-1]) if found else 0
            assert address >= end, "rows overlap"
            if found and address == end:
                found[-1] = (found[-1][0], found[-1][1] + size)
            else:
                found.append((address, size))
        return found


class GlobalMemory:
    """All buffers of a call, over all of its kernels."""

    def __init__(self, buffers: list[Buffer]) -> None:
        self.buffers = {buffer.name: buffer for buffer in buffers}
        assert len(self.buffers) == len(buffers)
        self.names, self.role = list(self.buffers), np.array([buffer.role for buffer in buffers])
        used = self._lay_out(buffers)
        self.bytes = np.full(used, 0xFF, u1)
        # Of each byte: whether it was written, and in which launch by whom it was last touched
        self.is_written = np.zeros(used, np.bool_)
        self.writing_launch = np.full(used, -1, np.int16)
        self.writing_thread = np.full(used, -1, i8)
        self.reading_launch = np.full(used, -1, np.int16)
        self.reading_thread = np.full(used, -1, i8)  # or SEVERAL
        self.launch = 0
        for buffer in buffers:
            if buffer.role in ("input", "counter"):
                spread = self._bytes_of(buffer)
                self.bytes[spread] = buffer.rows
                self.is_written[spread] = True

    def _lay_out(self, buffers: list[Buffer]) -> int:
        """Gives each run of bytes its place in storage, inputs first. Returns the bytes needed."""
        for i, buffer in enumerate(buffers):
            buffer.address = buffer.address or Buffer.address_of(i, buffer.skew)
        runs: list[tuple[int, int, int, int]] = []  # address, bytes, place, buffer
        used, self.first_writable = ALIGNMENT, 0
        for i, buffer in sorted(enumerate(buffers), key=lambda x: x[1].role != "input"):
            if buffer.role != "input":
                self.first_writable = self.first_writable or used
            for address, size in buffer.runs():
                used += (address - used) % ALIGNMENT
                runs.append((address, size, used, i))
                used += size
        addresses, sizes, places, owners = zip(*sorted(runs), strict=True)
        self.addresses, self.sizes = np.array(addresses, u8), np.array(sizes, i8)
        self.places, self.owners = np.array(places, i8), np.array(owners)
        self.first_writable = self.first_writable or used
        return padded(used)

    def contents(self, name: str) -> Vector:
        """uint8 [number of rows, bytes of a row]"""
        return self.bytes[self._bytes_of(self.buffers[name])]

    def unwritten(self) -> dict[str, int]:
        """For each output with bytes that no kernel has written: how many."""
        outputs = [buffer for buffer in self.buffers.values() if buffer.role == "output"]
        missing = {x.name: int((~self.is_written[self._bytes_of(x)]).sum()) for x in outputs}
        return {name: count for name, count in missing.items() if count}

    def _bytes_of(self, buffer: Buffer) -> Vector:
        size = buffer.rows.shape[1]
        place, _ = self._find((buffer.address + buffer.offsets).astype(u8), size)
        return place[:, None] + np.arange(size)

    def _find(self, address: Vector, size: int) -> tuple[Vector, Vector]:
        """Places in storage, and numbers of runs."""
        run = np.maximum(np.searchsorted(self.addresses, address, "right") - 1, 0)
        behind = (address - self.addresses[run]).view(i8)
        bad = (behind < 0) | (behind + size > self.sizes[run])
        if np.count_nonzero(bad):
            raise AccessError(self._outside(int(address[bad][0]), size), bad)
        return self.places[run] + behind, run

    def _outside(self, address: int, size: int) -> str:
        run = int(np.searchsorted(self.addresses, u8(address), "right")) - 1
        buffer = self.buffers[self.names[self.owners[max(run, 0)]]]
        if not 0 <= address - buffer.address < RANGE_BYTES:
            return f"the wild global address {address:#x}"
        return (
            f"{size} bytes at byte {address - buffer.address} of '{buffer.name}', which has "
            f"{buffer.offsets.size} x {buffer.rows.shape[1]} bytes and none there"
        )

    def read(self, address: Vector, size: int, threads: Vector) -> Vector:
        """Places in storage of ``size`` bytes each, which may be read."""
        place, run = self._find(address, size)
        if place.max() >= self.first_writable:
            self._check_read(place, run, size, threads)
        return place

    def _check_read(self, place: Vector, run: Vector, size: int, threads: Vector) -> None:
        spread, thread = place[:, None] + np.arange(size), threads[:, None]
        role = self.role[self.owners[run]]
        self._refuse((role == "output") | (role == "counter"), run, "reads what is no input:")
        unwritten = ~self.is_written[spread].all(1)
        self._refuse(unwritten, run, "reads bytes that are not written yet, of")
        now = self.writing_launch[spread] == self.launch
        others = (now & (self.writing_thread[spread] != thread)).any(1)
        self._refuse(others, run, "reads bytes that another thread writes, of")
        again = self.reading_launch[spread] == self.launch
        again &= self.reading_thread[spread] != thread
        self.reading_thread[spread] = thread
        again |= self.reading_thread[spread] != thread  # two of this very instruction
        self.reading_thread[spread[again]] = SEVERAL
        self.reading_launch[spread] = self.launch

    def _refuse(self, bad: Vector, run: Vector, what: str) -> None:
        if bad.any():
            name = self.names[self.owners[run[np.flatnonzero(bad)[0]]]]
            raise AccessError(f"{what} '{name}'", bad)

    def write(self, address: Vector, size: int, threads: Vector) -> Vector:
        """Places in storage of ``size`` bytes each, which may be written."""
        place, run = self._find(address, size)
        spread, thread = place[:, None] + np.arange(size), threads[:, None]
        role = self.role[self.owners[run]]
        self._refuse((role == "input") | (role == "counter"), run, "writes to what is no output:")
        now = self.writing_launch[spread] == self.launch
        others = now & (self.writing_thread[spread] != thread)
        again = np.where((role == "output")[:, None], self.is_written[spread], others)
        self.writing_thread[spread] = thread
        again |= self.writing_thread[spread] != thread  # two of this very instruction
        self._refuse(again.any(1), run, "writes bytes a second time, of")
        read = self.reading_launch[spread] == self.launch
        read &= self.reading_thread[spread] != thread
        self._refuse(read.any(1), run, "writes bytes that another thread reads, of")
        self.is_written[spread] = True
        self.writing_launch[spread] = self.launch
        return place

    def count(self, address: Vector, size: int) -> Vector:
        """Places in storage of ``size`` bytes each, for atomic functions."""
        place, run = self._find(address, size)
        self._refuse(self.role[self.owners[run]] != "counter", run, "counts in what is no counter:")
        return place


class GlobalSpace(Space):
    """Global memory as the threads of a machine see it."""

    def __init__(self, machine: Machine, memory: GlobalMemory) -> None:
        super().__init__(machine, memory.bytes)
        self.memory = memory

    def readable(self, address: Vector, size: int, lanes: Vector, line: int) -> Vector:
        check_alignment(address, size)
        return self.memory.read(address, size, self.machine.thread[lanes])

    def writable(self, address: Vector, size: int, lanes: Vector, line: int) -> Vector:
        check_alignment(address, size)
        return self.memory.write(address, size, self.machine.thread[lanes])

    def countable(self, address: Vector, size: int, lanes: Vector, line: int) -> Vector:
        check_alignment(address, size)
        return self.memory.count(address, size)
