"""The PTX interpreter on small kernels (ptx/micro.cu): what is right gives what numpy gives, and
each thing that is wrong is told as such.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ptx.buffers import Buffer, GlobalMemory
from ptx.build import ROOT, compile_sources, nvcc
from ptx.machine import Launch, Program
from ptx.parse import PtxError

pytestmark = pytest.mark.skipif(nvcc() is None, reason="needs nvcc 12, on PATH or in CUDACXX")

MICRO = Path(__file__).parent / "ptx" / "micro.cu"
RANDOM = np.random.default_rng(0)


@pytest.fixture(scope="module")
def program() -> Program:
    return compile_sources([MICRO], ROOT / "build" / "ptx" / "micro").programs()[0]


def run(
    program: Program,
    kernel: str,
    buffers: list[Buffer],
    *numbers: int,
    blocks: int = 1,
    threads: int = 64,
    shared_bytes: int = 0,
    memory: GlobalMemory | None = None,
) -> GlobalMemory:
    memory = memory or GlobalMemory(buffers)
    addresses = [buffer.address for buffer in buffers]
    params = struct.pack(f"<{len(buffers)}Q{len(numbers)}i", *addresses, *numbers)
    launch = Launch(kernel, (blocks, 1, 1), threads, shared_bytes, params)
    program.run(launch, memory)
    return memory


def inputs(**arrays: Any) -> list[Buffer]:
    return [Buffer.of(name, "input", x) for name, x in arrays.items()]


def output(count: int, dtype: Any = np.int32) -> Buffer:
    return Buffer.of("out", "output", np.zeros(count, dtype))


def found(memory: GlobalMemory, dtype: Any, name: str = "out") -> Any:
    assert memory.unwritten() == {}
    return memory.contents(name).ravel().view(dtype)


def numbers(count: int, below: int = 2000) -> Any:
    return RANDOM.integers(1, below, count).astype(np.int32)


def steps_to_one(x: int) -> int:
    count = 0
    while x != 1:
        x, count = (3 * x + 1 if x % 2 else x // 2), count + 1
    return count


@pytest.mark.parametrize("count", [150, 3000])  # one and several thread blocks at a time
def test_loops_of_different_length(program: Program, count: int) -> None:
    x = numbers(count)
    blocks = -(-count // 64)
    memory = run(program, "collatz", [*inputs(x=x), output(count)], count, blocks=blocks)
    assert found(memory, np.int32).tolist() == [steps_to_one(int(one)) for one in x]


def test_shuffles_behind_branches(program: Program) -> None:
    x = numbers(64)
    memory = run(program, "shuffle_after_parting", [*inputs(x=x), output(64)])
    sums = []
    for t, value in enumerate(x.tolist()):
        total = 0
        for k in range(value % 7):
            total = total + k * value if (k + t) % 3 == 0 else total ^ value
        sums.append(total)
    for d in (16, 8, 4, 2, 1):
        sums = [sums[t] + sums[t + d if t % 32 + d < 32 else t] for t in range(64)]
    sums = [sums[t] + (t ^ 5) if t % 32 < 16 else sums[t] - (t ^ 3) for t in range(64)]
    for t in range(64):
        sums[t] += 1000 * (t // 8 * 8 + 7) + 100000 * (t - 3 if t % 32 >= 3 else t)

    def quotient(a: int, b: int) -> int:
        return abs(a) // b * (1 if a >= 0 else -1)

    right = [
        sums[63 - t] - 1000 * quotient(sums[63 - t], 1000) + quotient(sums[t * 7 & 63], 13)
        for t in range(64)
    ]
    assert found(memory, np.int32).tolist() == right


def test_votes(program: Program) -> None:
    x = numbers(128, 100).reshape(2, 64)
    x[1, 5] = 0
    memory = run(program, "votes", [*inputs(x=x), output(128 * 7)], blocks=2)
    got = found(memory, np.int32).reshape(2, 64, 7)
    warps = x.reshape(2, 2, 32)
    bits = ((warps > 50) << np.arange(32)).sum(2).astype(np.uint32).view(np.int32)
    for block in range(2):
        assert (got[block, :, 0] == (x[block] > 0).all()).all()
        assert (got[block, :, 1] == (x[block] > 90).any()).all()
        assert (got[block, :, 2] == (x[block] > 50).sum()).all()
        for warp in range(2):
            rows = got[block, 32 * warp : 32 * warp + 32]
            assert (rows[:, 3] == bits[block, warp]).all()
            assert (rows[:, 4] == (warps[block, warp] > 10).all()).all()
            assert (rows[:, 5] == (warps[block, warp] > 95).any()).all()
            is_third = (32 * warp + np.arange(32)) % 3 == 0
            thirds = (is_third << np.arange(32)).sum().astype(np.uint32).view(np.int32)
            assert (rows[:, 6] == np.where(is_third, thirds, 0)).all()


def test_indexed_parameters_and_local_memory(program: Program) -> None:
    x, table = numbers(32 * 8), numbers(128)
    memory = GlobalMemory(buffers := [*inputs(x=x), output(32)])
    params = struct.pack("<2Q", *(buffer.address for buffer in buffers)) + table.tobytes()
    program.run(Launch("tables", (1, 1, 1), 32, 0, params), memory)
    right = []
    for t in range(32):
        own = x[8 * t : 8 * t + 8].tolist()
        own[x[t] & 7] += 5
        right.append(table[x[t] & 127] + own[(x[t] + 1) & 7] * 1000 + 100 * (t & 3))
    assert found(memory, np.int32).tolist() == right


def test_integer_atomics(program: Program) -> None:
    x = numbers(500)
    sizes = {"n": 16, "most": 1}
    counters = [Buffer.of(name, "counter", np.zeros(n, np.int32)) for name, n in sizes.items()]
    memory = run(program, "count", [*inputs(x=x), *counters], 500, blocks=8)
    assert found(memory, np.int32, "n").tolist() == np.bincount(x % 16, minlength=16).tolist()
    assert found(memory, np.int32, "most").tolist() == [x.max()]


def test_floats(program: Program) -> None:
    n = 256
    x, y = ((RANDOM.standard_normal(n) * 3).astype(np.float32) for _ in range(2))
    buffers = [*inputs(x=x, y=y), output(9 * n, np.float32)]
    got = found(run(program, "floats", buffers, threads=n), np.float32).reshape(9, n)
    a, b = x.astype(float), y.astype(float)
    right = [
        np.exp2(a),
        np.log2(abs(a)),
        a / b,
        np.sqrt(abs(a)),
        abs(x - y),
        np.rint(x * np.float32(9.7)),
        np.trunc(x * np.float32(1e3)).astype(float) + np.trunc(abs(y) * np.float32(77)),
        a / b + 1 / np.sqrt(abs(b)) + np.floor(a) + np.trunc(b),
        np.where(x > y, x, np.copysign(y, x)),
    ]
    for one, expected in zip(got, right, strict=True):
        np.testing.assert_allclose(one, expected, rtol=2e-6, atol=2e-6)


def test_integers(program: Program) -> None:
    n, ones = 256, 2**32 - 1
    x, y = (RANDOM.integers(0, 2**32, n).astype(np.uint32) for _ in range(2))
    y[:40] >>= 20
    buffers = [*inputs(x=x, y=y), output(10 * n, np.uint32)]
    got = found(run(program, "integers", buffers, threads=n), np.uint32).reshape(10, n)
    for i, (a, b) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        signed_a, signed_b = (z - 2**32 if z >> 31 else z for z in (a, b))
        byte, wide, shift = struct.pack("<II", a, b), signed_a * signed_b, b & 31
        low_byte = (a & 255) - 256 * (a >> 7 & 1)
        right = [
            byte[5] | byte[1] << 8 | byte[7] << 16 | byte[3] << 24,
            int(f"{a:032b}"[::-1], 2) ^ (32 - b.bit_length()),
            a.bit_count() + (b & -b).bit_length(),
            a * b >> 32 ^ wide >> 32,
            a >> shift ^ a << shift ^ signed_a >> shift,
            a % (b | 1) + a // (b | 1),
            (b << 32 | a) << 7 >> 32 ^ (b << 32 | a) >> shift,
            min(signed_a, signed_b) ^ max(a, b),
            wide >> 20 ^ (abs(wide) // 1000003 * (1 if wide >= 0 else -1)),
            low_byte + (b & 0xFFFF),
        ]
        assert got[:, i].tolist() == [value & ones for value in right], i


def test_asynchronous_copies(program: Program) -> None:
    x = RANDOM.standard_normal((100, 4)).astype(np.float32)
    memory = run(program, "sum_copied", [*inputs(x=x), output(32, np.float32)], 4, 100, threads=32)
    padded = np.concatenate([x, np.zeros((28, 4), np.float32)]).reshape(4, 32, 4)[:, ::-1]
    right = (padded * np.array([1, 2, 3, 4])).sum((0, 2))
    np.testing.assert_allclose(found(memory, np.float32), right, rtol=1e-5)


def test_barriers_that_are_there_are_seen(program: Program) -> None:
    x = numbers(64)
    for kernel, right in (
        ("exchanges_in_block", x[::-1]),
        ("overwrites_in_block", x[::-1][np.arange(64) ^ 1]),
        ("exchanges_in_warp", x[np.arange(64) ^ 31]),
    ):
        memory = run(program, kernel, [*inputs(x=x), output(64)], 1)
        assert (found(memory, np.int32) == right).all(), kernel


INTS, FLOATS = numbers(64), RANDOM.standard_normal((128, 4)).astype(np.float32)
WRONG: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "shuffles_with_absent": ("a lane that the member mask names is not here", (), {}),
    "parted_at_barrier": ("threads wait for others, which have left", (), {}),
    "leaves_before_barrier": ("threads wait for others, which have left", (), {}),
    "exchanges_in_block": ("writes shared memory that PTX line .* reads", (0,), {}),
    "overwrites_in_block": ("reads shared memory that PTX line .* writes", (0,), {}),
    "exchanges_in_warp": ("writes shared memory that PTX line .* reads", (0,), {}),
    "reads_unwritten": ("reads what is not written yet.*thread 9", (), {}),
    "shared_outside": ("4 bytes at byte 252 of 252 of shared", (), {"shared_bytes": 252}),
    "reads_outside": ("4 bytes at byte 256 of 'x'.*thread 63", (), {}),
    "reads_misaligned": ("is no multiple of 4.*thread 1", (), {}),
    "writes_twice": ("writes bytes a second time, of 'out'", (), {}),
    "writes_input": ("writes to what is no output: 'x'", (), {}),
    "divides_by_zero": ("a division by zero.*thread 5", (), {}),
}


@pytest.mark.parametrize("kernel", WRONG)
def test_what_is_wrong(program: Program, kernel: str) -> None:
    message, more, changes = WRONG[kernel]
    with pytest.raises(PtxError, match=message):
        run(program, kernel, [*inputs(x=INTS), output(64)], *more, **changes)


def test_copies_in_flight(program: Program) -> None:
    buffers = [*inputs(x=FLOATS), output(32, np.float32)]
    with pytest.raises(PtxError, match="reads a copy that is still in flight"):
        run(program, "waits_too_weakly", buffers, 4, 128, threads=32)
    with pytest.raises(PtxError, match="writes over a copy that is still in flight"):
        run(program, "overwrites_copy", buffers, threads=32)
    with pytest.raises(PtxError, match="16 bytes at byte 2048 of 'x'"):
        run(program, "sum_copied", buffers, 5, 130, threads=32)


def test_scratch_memory(program: Program) -> None:
    scratch = Buffer.of("scratch", "scratch", np.zeros(64, np.int32))
    memory = GlobalMemory(buffers := [*inputs(x=INTS), scratch, output(64)])
    with pytest.raises(PtxError, match=r"bytes that are not written yet, of 'scratch'.*thread 0"):
        run(program, "reads_scratch", buffers[1:], memory=memory)
    run(program, "writes_scratch", buffers[:2], 63, memory=memory)
    with pytest.raises(PtxError, match=r"bytes that are not written yet, of 'scratch'.*thread 63"):
        run(program, "reads_scratch", buffers[1:], memory=memory)
    run(program, "writes_scratch", buffers[:2], 64, memory=memory)
    run(program, "reads_scratch", buffers[1:], memory=memory)
    assert (found(memory, np.int32) == INTS).all()
    memory = GlobalMemory(buffers)
    with pytest.raises(PtxError, match="bytes that another thread writes, of 'scratch'"):
        run(program, "reads_what_it_writes", buffers, memory=memory)


def test_outputs_are_written_in_full(program: Program) -> None:
    out = Buffer.of("out", "output", np.zeros(64, np.int32))
    memory = run(program, "writes_scratch", [*inputs(x=INTS), out], 60)
    assert memory.unwritten() == {"out": 16}


def test_strided_rows() -> None:
    """Rows far apart, in any order: between them nothing may be touched."""
    rows = RANDOM.integers(0, 256, (3, 8)).astype(np.uint8)
    offsets = np.array([1 << 33, 0, 8])
    memory = GlobalMemory([Buffer("x", "input", rows, offsets, skew=16)])
    assert (memory.contents("x") == rows).all()
    assert len(memory.addresses) == 2  # the last two make one run


def test_unknown_instructions(program: Program) -> None:
    with pytest.raises(PtxError, match=r"PTX line \d+: .*: unknown opcode atom.global.add.f32"):
        run(program, "sums_floats", [*inputs(x=INTS), output(1)])


def test_lines_are_those_of_the_text(program: Program) -> None:
    """Errors and survivors of ptx/mutate.py name them."""
    lines = program.text.split("\n")
    code = [x for kernel in program.module.kernels.values() for x in kernel.code]
    assert all(x.opcode in lines[x.line - 1] for x in code)
