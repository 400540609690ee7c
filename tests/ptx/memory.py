"""What the memories have in common, and the simple ones: parameters and constants, local memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.arithmetic import Vector, i8, u1
from ptx.parse import WINDOW_BASE

if TYPE_CHECKING:
    from ptx.machine import Machine

ALIGNMENT = 16  # bytes; places in storage are aligned as their addresses are, up to this


class AccessError(Exception):
    """``bad``: for each thread that took part, whether it is to blame."""

    def __init__(self, what: str, bad: Vector) -> None:
        super().__init__(what)
        self.bad = bad


class Space:
    """A state space as the threads of a machine see it. Subclasses say what may be touched."""

    def __init__(self, machine: Machine, storage: Vector) -> None:
        self.machine, self.bytes = machine, storage

    def readable(self, address: Vector, size: int, lanes: Vector, line: int) -> Vector:
        """Places in ``bytes`` of the ``size`` bytes that each lane reads."""
        raise NotImplementedError

    def writable(self, address: Vector, size: int, lanes: Vector, line: int) -> Vector:
        raise NotImplementedError

    def countable(self, address: Vector, size: int, lanes: Vector, line: int) -> Vector:
        """For atomic functions."""
        raise NotImplementedError

    def load(
        self, address: Vector, dtype: type, count: int, mask: Vector | None, line: int
    ) -> list[Vector]:
        """``count`` numbers that lie side by side; any for lanes outside of the mask."""
        machine = self.machine
        lanes = machine.lanes(mask)
        if not len(lanes):
            return [np.zeros(machine.num_lanes, dtype)] * count
        size = np.dtype(dtype).itemsize * count
        with machine.blame(lanes, line):
            place = self.readable(machine.pick(address, lanes, mask), size, lanes, line)
        if mask is not None:
            (place,) = machine.spread([place], lanes, mask)
        return gather(self.bytes, place, dtype, count)

    def store(self, address: Vector, values: list[Vector], mask: Vector | None, line: int) -> None:
        machine = self.machine
        lanes = machine.lanes(mask)
        if not len(lanes):
            return
        size = values[0].itemsize * len(values)
        with machine.blame(lanes, line):
            place = self.writable(machine.pick(address, lanes, mask), size, lanes, line)
        place = place // values[0].itemsize
        for i, value in enumerate(values):
            self.bytes.view(value.dtype)[place + i] = machine.pick(value, lanes, mask)

    def atomic(
        self, address: Vector, function: str, value: Vector, mask: Vector | None, line: int
    ) -> Vector:
        """One thread after the other; returns what each found."""
        lanes, size = self.machine.lanes(mask), value.itemsize
        with self.machine.blame(lanes, line):
            place = self.countable(address[lanes], size, lanes, line)
        numbers, old = self.bytes.view(value.dtype), np.zeros_like(value)
        for lane, at in zip(lanes, place // size, strict=True):
            old[lane] = numbers[at]
            numbers[at] = ATOMIC[function](old[lane], value[lane])
        return old


ATOMIC: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
}


def gather(storage: Vector, place: Vector, dtype: Any, count: int) -> list[Vector]:
    """``count`` vectors of the numbers that lie side by side at each place."""
    numbers, size = storage.view(dtype), np.dtype(dtype).itemsize * count
    index = place >> (size.bit_length() - 1)
    if count == 1:
        return [numbers[index]]
    return list(np.ascontiguousarray(numbers.reshape(-1, count).take(index, axis=0).T))


def check_alignment(address: Vector, size: int) -> None:
    misaligned = address & address.dtype.type(size - 1)
    if np.count_nonzero(misaligned):
        bad = misaligned != 0
        raise AccessError(f"the address {int(address[bad][0]):#x} is no multiple of {size}", bad)


def padded(size: int) -> int:
    return size + -size % ALIGNMENT


class Window(Space):
    """A region at a fixed address."""

    def __init__(self, machine: Machine, name: str, size: int, storage: Vector) -> None:
        super().__init__(machine, storage)
        self.name, self.size = name, size

    def offsets(self, address: Vector, size: int) -> Vector:
        """From the beginning of the window, which has ``size`` bytes there."""
        check_alignment(address, size)
        offset = address - address.dtype.type(WINDOW_BASE[self.name])
        # Those of addresses before the window are very large: unsigned numbers wrap around.
        bad = offset > address.dtype.type(self.size - size) if size <= self.size else offset >= 0
        if np.count_nonzero(bad):
            at = int(address[bad][0]) - WINDOW_BASE[self.name]
            raise AccessError(f"{size} bytes at byte {at} of {self.size} of {self.name}", bad)
        return offset.astype(i8)


class Bank(Window):
    """Bytes that are only read: a kernel's parameters, constant arrays."""

    def __init__(self, machine: Machine, name: str, data: bytes) -> None:
        storage = np.frombuffer(data.ljust(padded(len(data)), b"\xff"), u1)
        super().__init__(machine, name, len(data), storage)

    def readable(self, address: Vector, size: int, lanes: Vector, line: int) -> Vector:
        return self.offsets(address, size)


class LocalMemory(Window):
    """Of each thread its own bytes."""

    def __init__(self, machine: Machine, size: int) -> None:
        self.stride = padded(size)
        super().__init__(machine, "local", size, np.zeros(machine.num_lanes * self.stride, u1))
        self.is_written = np.zeros(len(self.bytes), np.bool_)

    def _places(self, address: Vector, size: int, lanes: Vector) -> tuple[Vector, Vector]:
        self.machine.program.local_accesses[self.machine.kernel.name] += 1
        place = self.offsets(address, size) + lanes * self.stride
        return place, place[:, None] + np.arange(size)

    def readable(self, address: Vector, size: int, lanes: Vector, line: int) -> Vector:
        place, spread = self._places(address, size, lanes)
        if (bad := ~self.is_written[spread].all(1)).any():
            raise AccessError("reads local memory that is not written yet", bad)
        return place

    def writable(self, address: Vector, size: int, lanes: Vector, line: int) -> Vector:
        place, spread = self._places(address, size, lanes)
        self.is_written[spread] = True
        return place
