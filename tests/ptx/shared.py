"""Shared memory: its bytes, asynchronous copies into it, and who may touch a byte when.

What is not ordered by a barrier may happen in any order on a GPU. So all accesses between two
barriers of a block are written down, and at the second one those of different threads to one byte,
one of them a write, are errors; unless both are in one warp and a barrier of the warp is between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptx.arithmetic import Vector, i4, i8, u1, u2
from ptx.memory import ALIGNMENT, AccessError, Window, check_alignment, padded

if TYPE_CHECKING:
    from ptx.machine import Machine

UNWRITTEN, WRITTEN, IN_FLIGHT = 0, 1, 2  # of a byte
ALL_WRITTEN = 0x0101010101010101


@dataclass
class Access:
    line: int  # of the instruction
    is_write: bool
    size: int
    place: Vector
    lanes: Vector
    epochs: Vector  # of all lanes: barriers of their warps so far

    def part(self, which: Vector) -> Access | None:
        count = np.count_nonzero(which)
        if count == len(which):
            return self
        if not count:
            return None
        kept = self.place[which], self.lanes[which], self.epochs
        return Access(self.line, self.is_write, self.size, *kept)


class SharedMemory(Window):
    """Of several thread blocks side by side."""

    def __init__(self, machine: Machine, size: int) -> None:
        self.stride = padded(size)
        num_bytes = machine.num_blocks * self.stride
        super().__init__(machine, "shared", size, np.full(num_bytes, 0xFF, u1))  # NaN as a float
        self.begin = machine.block * self.stride  # of each lane's block
        self.state = np.full(num_bytes, UNWRITTEN, u1)
        self.accesses: list[Access] = []

    def places(self, address: Vector, size: int, lanes: Vector) -> Vector:
        return self.offsets(address, size) + self.begin[lanes]

    def readable(self, address: Vector, size: int, lanes: Vector, line: int) -> Vector:
        place = self.places(address, size, lanes)
        self.check_written(place, size)
        self.note(line, False, size, place, lanes)
        return place

    countable = readable  # atomic functions do not race with each other

    def writable(self, address: Vector, size: int, lanes: Vector, line: int) -> Vector:
        place = self.places(address, size, lanes)
        self.become(WRITTEN, place, size)
        self.note(line, True, size, place, lanes)
        return place

    def check_written(self, place: Vector, size: int) -> None:
        word = min(size, 8)
        states = self.state.view(f"u{word}").reshape(-1, size // word)
        states = states.take(place >> (size.bit_length() - 1), axis=0)
        bad = states != ALL_WRITTEN & (1 << 8 * word) - 1
        if np.count_nonzero(bad):
            bad = bad.any(1)
            at = int(place[np.flatnonzero(bad)[0]])
            flies = IN_FLIGHT in self.state[at : at + size]
            what = "a copy that is still in flight" if flies else "what is not written yet"
            raise AccessError(f"reads {what}, at byte {at % self.stride} of shared memory", bad)

    def become(self, state: int, place: Vector, size: int) -> None:
        """The state of bytes that are written to now."""
        spread = place[:, None] + np.arange(size)
        flies = self.state[spread] == IN_FLIGHT
        if np.count_nonzero(flies):
            at = int(spread[flies][0]) % self.stride
            what = f"writes over a copy that is still in flight, at byte {at} of shared memory"
            raise AccessError(what, flies.any(1))
        self.state[spread] = state

    def matrix_rows(self, address: Vector, lanes: Vector, line: int) -> Vector:
        """The rows of 8 numbers of 16 bits that these lanes name."""
        place = self.readable(address, 16, lanes, line)
        return self.bytes.view(u2).reshape(-1, 8).take(place >> 4, axis=0)

    # Races

    def note(self, line: int, is_write: bool, size: int, place: Vector, lanes: Vector) -> None:
        epochs = self.machine.warp_epoch
        self.accesses.append(Access(line, is_write, size, place, lanes, epochs))

    def end_epoch(self, chosen: Vector) -> None:
        """The chosen thread blocks are at a barrier, or at their end."""
        inside, rest = self.accesses, []
        if not chosen.all():
            block = self.machine.block
            parts = [(x, chosen[block[x.lanes]]) for x in self.accesses]
            inside = [y for x, is_chosen in parts if (y := x.part(is_chosen))]
            rest = [y for x, is_chosen in parts if (y := x.part(~is_chosen))]
        self.accesses = rest
        self._check(inside)

    def _check(self, accesses: list[Access]) -> None:
        """Looks at pieces of 16 bytes first: most are not written, or touched once."""
        writes = [access.place for access in accesses if access.is_write]
        if not writes:
            return
        num_pieces = len(self.bytes) // ALIGNMENT
        is_written = np.zeros(num_pieces, np.bool_)
        is_written[np.concatenate(writes) // ALIGNMENT] = True
        touched = np.concatenate([access.place for access in accesses]) // ALIGNMENT
        is_suspect = is_written & (np.bincount(touched, minlength=num_pieces) > 1)
        suspects = [access.part(is_suspect[access.place // ALIGNMENT]) for access in accesses]
        if found := [access for access in suspects if access]:
            self._check_closely(found)

    def _check_closely(self, accesses: list[Access]) -> None:
        unit = min(access.size for access in accesses)
        columns: list[Vector] = []  # place in units, lane, warp's epoch, number of the access
        for i, access in enumerate(accesses):
            units = access.place[:, None] // unit + np.arange(access.size // unit)
            whose = np.stack([access.lanes, access.epochs[access.lanes], 0 * access.lanes + i])
            columns.append(np.vstack([units.ravel(), whose.repeat(units.shape[1], axis=1)]))
        place, lane, epoch, number = np.concatenate(columns, axis=1)
        is_write = np.array([access.is_write for access in accesses])[number]
        self._check_owners(accesses, place, lane // 32, lane, number, is_write)
        for one in np.unique(epoch):
            now = [x[epoch == one] for x in (place, lane, lane, number, is_write)]
            self._check_owners(accesses, *now)

    def _check_owners(
        self,
        accesses: list[Access],
        place: Vector,
        owner: Vector,
        lane: Vector,
        number: Vector,
        is_write: Vector,
    ) -> None:
        """Owners are warps or threads: no two of them, one a writer, may share a place."""
        writer = np.full(int(place.max()) + 1, -1, i4)
        writer[place[is_write]] = owner[is_write]
        bad = (writer[place] >= 0) & (writer[place] != owner)
        if not bad.any():
            return
        first = np.flatnonzero(bad)[0]
        others = np.flatnonzero((place == place[first]) & (owner != owner[first]))
        other = next((i for i in others if is_write[i]), others[0])
        pair = sorted((first, other), key=lambda i: accesses[number[i]].line)
        one, two = (accesses[number[i]] for i in pair)
        threads = " and ".join(str(lane[i] % self.machine.num_threads) for i in pair)
        verbs = ["writes" if access.is_write else "reads" for access in (one, two)]
        what = (
            f"{verbs[0]} shared memory that PTX line {two.line} {verbs[1]}, with no barrier between"
        )
        raise self.machine.error(one.line, f"{what} (threads {threads})", int(lane[pair[0]]))


@dataclass
class Copy:
    """Of one instruction, for some lanes."""

    size: int
    lanes: Vector
    group: Vector
    place: Vector
    source: Vector
    given: Vector  # bytes that come from the source; the rest of ``size`` become zeros

    def part(self, which: Vector) -> Copy:
        columns = (self.lanes, self.group, self.place, self.source, self.given)
        return Copy(self.size, *(x[which] for x in columns))


class Copies:
    """cp.async: the place is poisoned at once, and filled when the thread waits for it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.group = np.zeros(machine.num_lanes, i8)  # number of the one not yet committed
        self.pending: list[Copy] = []

    def issue(
        self, to: Vector, source: Vector, size: int, given: Vector, mask: Vector | None, line: int
    ) -> None:
        machine, lanes = self.machine, self.machine.lanes(mask)
        if not len(lanes):
            return
        to, source, given = to[lanes], source[lanes], given[lanes]
        with machine.blame(lanes, line):
            if (bad := given > size).any():
                raise AccessError(f"copies {int(given[bad][0])} bytes of {size}", bad)
            check_alignment(source, size)
            place = machine.shared.places(to, size, lanes)
            machine.shared.become(IN_FLIGHT, place, size)
        machine.shared.note(line, True, size, place, lanes)
        copy = Copy(size, lanes, self.group[lanes], place, source, given)
        self._read(copy, line)  # what is out of bounds is told here
        machine.shared.bytes[place[:, None] + np.arange(size)] = 0xFF
        self.pending.append(copy)

    def _read(self, copy: Copy, line: int) -> Vector:
        machine, memory = self.machine, self.machine.globals.memory
        data = np.zeros((len(copy.lanes), copy.size), u1)
        for count in np.unique(copy.given[copy.given > 0]).tolist():
            chosen = copy.given == count
            lanes = copy.lanes[chosen]
            with machine.blame(lanes, line):
                place = memory.read(copy.source[chosen], count, machine.thread[lanes])
            data[chosen, :count] = memory.bytes[place[:, None] + np.arange(count)]
        return data

    def commit(self, mask: Vector | None) -> None:
        self.group[self.machine.lanes(mask)] += 1

    def wait(self, groups: int | None, mask: Vector | None, line: int) -> None:
        """Until all but the last ``groups`` committed groups of each thread have arrived."""
        shared = self.machine.shared
        waits = np.zeros(self.machine.num_lanes, np.bool_)
        waits[self.machine.lanes(mask)] = True
        pending, self.pending = self.pending, []
        for copy in pending:
            done = waits[copy.lanes]
            if groups is not None:
                done &= copy.group < self.group[copy.lanes] - groups
            if done.any():
                now = copy.part(done)
                spread = now.place[:, None] + np.arange(now.size)
                shared.bytes[spread] = self._read(now, line)
                shared.state[spread] = WRITTEN
                shared.note(line, True, now.size, now.place, now.lanes)
            if not done.all():
                self.pending.append(copy.part(~done))
