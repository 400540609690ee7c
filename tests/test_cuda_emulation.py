"""The emulator that runs CUDA kernels on the CPU keeps CUDA's rules, and tells who breaks them.

What its fragments and collectives give is held against numpy and against the formulas of the PTX
ISA; a breach of a rule must end the program with a sentence. test_cuda_bugs.py plants whole bugs.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from emulation.programs import (
    HERE,
    WRONG,
    Result,
    compile_units,
    emulator,
    kernels,
    link,
    run,
    runtime,
)

ABORTED = 128 + 6
NAN = 0xFFFFFFFF
LANES = np.arange(32)
ROW, COLUMN = LANES // 4, LANES % 4 * 2  # PTX ISA: groupID and twice threadID_in_group


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("emulation")
    parts = kernels([HERE / name for name in ("program.cpp", "rules.cu", "breaches.cu")])
    return link(
        folder / "program",
        [*runtime(tmp_path_factory.getbasetemp()), *compile_units(parts, folder)],
    )


@pytest.fixture(scope="session")
def on_ucontext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As on processors other than x86-64."""
    folder = tmp_path_factory.mktemp("ucontext")
    flags = ("-DLONGPRETRAIN_EMULATION_UCONTEXT",)
    parts = kernels([HERE / name for name in ("program.cpp", "rules.cu")])
    return link(folder / "program", compile_units([*emulator(*flags), *parts], folder))


def numbers(result: Result, dtype: type = np.uint32) -> np.ndarray:
    assert result.code == 0, result.errors
    return np.frombuffer(result.output, dtype)


# --- fragments ------------------------------------------------------------------------------------


def bits_of(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The 16 bits of each number."""
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)


def pairs(matrix: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """A register per lane: two neighbours of a row, the first in the lower half."""
    low, high = matrix[row, column], matrix[row, column + 1]
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


@pytest.mark.parametrize(
    ("name", "dtype"), [("mma_bf16", torch.bfloat16), ("mma_fp16", torch.float16)]
)
def test_mma_multiplies_fragments_of_the_ptx_isa(
    program: Path, name: str, dtype: torch.dtype
) -> None:
    draw = np.random.default_rng(1)
    a, b = draw.normal(size=(16, 16)), draw.normal(size=(16, 8))
    a[3, 5], a[4, 6] = 3e-7, 2e-41  # subnormal in float16 and in bfloat16
    d = draw.normal(size=(16, 8)).astype(np.float32)
    a_bits, b_bits = bits_of(a, dtype), bits_of(b, dtype)
    halves = [(0, 0), (8, 0), (0, 8), (8, 8)]
    registers = [pairs(a_bits, ROW + down, COLUMN + right) for down, right in halves]
    registers += [pairs(b_bits.T, ROW, COLUMN + down) for down in (0, 8)]
    of_d = [(ROW + down, COLUMN + right) for down in (0, 8) for right in (0, 1)]
    registers += [d[place].view(np.uint32) for place in of_d]

    made = numbers(run(program, name, data=np.stack(registers, 1).tobytes())).reshape(32, 10)
    found = np.empty_like(d)
    for i, place in enumerate(of_d):
        found[place] = made[:, 6 + i].view(np.float32)
    exact_a, exact_b = (torch.from_numpy(x).to(dtype).double().numpy() for x in (a, b))
    assert np.abs(found - (d + exact_a @ exact_b)).max() < 3e-6
    in_order = d.copy()  # products are exact, and added in fp32, the first column of a first
    for k in range(16):
        in_order += (exact_a[:, k : k + 1] * exact_b[k]).astype(np.float32)
    assert (found == in_order).all()


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "transposed"])
def test_ldmatrix_hands_out_rows(program: Path, transposed: bool) -> None:
    draw = np.random.default_rng(2)
    rows = draw.integers(0, 1 << 16, size=(256, 8), dtype=np.uint16)
    named = draw.permutation(256)[:32].astype(np.uint32)
    made = numbers(run(program, "ldmatrix", int(transposed), data=rows.tobytes() + named.tobytes()))
    for i in range(4):
        matrix = rows[named[8 * i : 8 * i + 8]]
        expected = pairs(matrix.T if transposed else matrix, ROW, COLUMN)
        assert (made.reshape(32, 4)[:, i] == expected).all()


def test_numbers_are_rounded_as_by_the_device(program: Path) -> None:
    draw = np.random.default_rng(3)
    x = np.concatenate(
        [
            draw.integers(0, 1 << 32, size=20000, dtype=np.uint32).view(np.float32),
            np.float32([0.0, -0.0, 1.0, 65519.99, 65520.0, -1e9, np.inf, -np.inf, 1e-40, -140.0]),
            np.float32([2.0**-24, 2.0**-25, 1.5 * 2.0**-25, 2.0**-14, 127.9, -126.5, 3e-8, 6.0e-5]),
        ]
    )
    x = x[~np.isnan(x)]
    made = numbers(run(program, "numbers", data=x.tobytes())).reshape(-1, 6)
    for column, dtype in enumerate((torch.bfloat16, torch.float16)):
        low, high = bits_of(x, dtype), bits_of(-x, dtype)
        assert (made[:, column] == low.astype(np.uint32) | high.astype(np.uint32) << 16).all()
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        half = x.astype(np.float16).astype(np.float32)
        power, logarithm = np.exp2(x.astype(np.float64)), np.log2(x.astype(np.float64))
    assert (made[:, 2].view(np.float32) == half).all() and (
        made[:, 3].view(np.float32) == -half
    ).all()
    tiny = np.finfo(np.float32).tiny
    power[power < tiny], logarithm[np.abs(x) < tiny] = 0.0, -np.inf
    power[np.abs(x) < tiny] = 1.0
    power[power > np.finfo(np.float32).max] = np.inf
    np.testing.assert_allclose(made[:, 4].view(np.float32), power, rtol=2e-7)
    np.testing.assert_allclose(made[:, 5].view(np.float32), logarithm, rtol=2e-7, equal_nan=True)


# --- collectives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_shuffles_and_votes(program: Path, seed: int) -> None:
    made = numbers(run(program, "collectives", seed=seed)).reshape(32, 9)
    value = 100 + LANES
    half = np.where(LANES < 16, LANES ^ 1, LANES ^ 2)
    expected = [
        value[LANES * 7 % 32],
        value[LANES ^ 5],
        value[np.where(LANES + 3 < 32, LANES + 3, LANES)],
        np.full(32, sum(1 << i for i in range(0, 32, 3))),
        np.ones(32),
        np.zeros(32),
        value[half],
        np.where(LANES < 16, 0x0000FFFF, 0xAAAA0000),
        np.full(32, 3),
    ]
    assert (made == np.stack(expected, 1)).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_block_votes_at_a_barrier(program: Path, seed: int) -> None:
    made = numbers(run(program, "votes", seed=seed)).reshape(2, 64, 4)
    assert (made[0] == [0, 1, 0, 0]).all() and (made[1] == [0, 1, 1, 0]).all()


def test_copies_arrive_when_waited_for(program: Path) -> None:
    seen = numbers(run(program, "copies"))
    moments = [[NAN, NAN, NAN], [1000, NAN, NAN], [1000, 0, NAN], [1000, 0, 1008]]
    assert seen[:12].reshape(4, 3).tolist() == moments  # the second copy is one of zeros
    assert seen[12] == NAN  # shared memory that was never written


@pytest.mark.parametrize(("stride", "turns"), [(1, 0), (2, 1), (8, 7), (32, 31), (33, 0)])
def test_bank_conflicts_are_counted(program: Path, stride: int, turns: int) -> None:
    counted = run(program, "conflicts", stride).output.decode()
    counts = {what: int(count) for what, count in re.findall(r"(\w+)=(\d+)", counted)}
    assert counted.startswith("kernel_of_a_test ")
    # Of ldmatrix's four, only that of rows 128 bytes apart: each matrix takes 8 turns, not 1.
    assert counts["ldmatrix"] == 4 and counts["ldmatrix_conflicts"] == 4 * 7
    # 512 copies side by side, then 32 that are 256 bytes apart: 4 groups of 8.
    assert counts["async_copies"] == 512 + 32 and counts["async_conflicts"] == 4 * 7
    assert counts["async_bytes"] == 16 * counts["async_copies"]
    assert counts["shared_accesses"] == 1 and counts["shared_conflicts"] == turns
    assert counts["barriers"] == 2 and counts["launches"] == counts["blocks"] == 1


# --- order ----------------------------------------------------------------------------------------


def orders(program: Path, seed: int, threads: int) -> tuple[bytes, list[int]]:
    """In which order threads ran within their blocks, and the blocks."""
    made = numbers(run(program, "order", seed=seed, threads=threads))
    return made[:-8].tobytes(), made[-8:].tolist()


def test_seeds_change_the_order_and_os_threads_do_not(program: Path) -> None:
    in_order, blocks = orders(program, seed=0, threads=1)
    first = np.frombuffer(in_order, np.uint32).reshape(8, 128, 3)[:, :, 0]
    assert blocks == list(range(8)) and (np.diff(first[:, :32]) > 0).all()
    found = [orders(program, seed, threads=1) for seed in range(1, 7)]
    assert len({threads for threads, _ in found} | {in_order}) == 7
    assert len({tuple(blocks) for _, blocks in found} | {tuple(range(8))}) == 7
    for seed, (of_threads, of_blocks) in enumerate(found[:3], start=1):
        assert orders(program, seed, threads=1) == (of_threads, of_blocks)
        assert orders(program, seed, threads=3)[0] == of_threads


def test_without_assembly_all_is_the_same(program: Path, on_ucontext: Path) -> None:
    for part in ("collectives", "votes", "copies", "order"):
        results = [run(it, part, seed=4, threads=1) for it in (program, on_ucontext)]
        assert results[0].output == results[1].output and results[1].code == 0


# --- breaches -------------------------------------------------------------------------------------

ENDS = {
    "two_barriers": "divergent barrier: threads of one block wait in different calls",
    "barrier_of_some": "divergent barrier: some threads have ended",
    "two_kinds_of_barrier": "divergent barrier: threads of one block wait in different calls",
    "deadlock": "deadlock: no thread can go on",
    "two_collectives": "threads of one warp wait for each other at different operations",
    "two_masks": "a thread ends that its warp waits for|waits for one that has ended",
    "not_in_mask": "a thread is not in the mask that it names",
    "waits_for_ended": "a thread ends that its warp waits for|waits for one that has ended",
    "shuffle_from_outside": "a shuffle reads a lane outside its mask",
    "copy_in_flight": "a thread ends with asynchronous copies in flight",
    "copy_not_committed": "a thread ends with asynchronous copies in flight",
    "copy_to_odd_place": "the target of an asynchronous copy is not aligned to 16 bytes",
    "copy_past_the_end": "the target of an asynchronous copy is outside shared memory",
    "ldmatrix_past_the_end": "a row of ldmatrix is outside shared memory",
    "write_into_gap": "the block wrote between two parts of its shared memory",
    "write_past_the_end": "the block wrote past its shared memory",
}
REFUSED = {
    "too_much_shared": "more shared memory than the 166912 bytes of the device",
    "too_many_parameters": "more than 4096 bytes of parameters",
    "too_many_threads": "no or too many threads",
    "half_a_warp": "not made of whole warps",
    "no_blocks": "the grid is empty",
    "too_many_rows_of_blocks": "the grid is too large",
}


@pytest.mark.parametrize("breach", ENDS)
@pytest.mark.parametrize("seed", [0, 3])
def test_a_breach_ends_the_process_with_a_sentence(program: Path, breach: str, seed: int) -> None:
    result = run(program, breach, seed=seed, threads=1)
    assert result.code == ABORTED
    assert f"kernel breaking_kernel, block ({'' if seed else '0,0,0'}" in result.errors
    assert f"seed {seed}: " in result.errors and re.search(ENDS[breach], result.errors)


def test_a_report_says_where_threads_wait(program: Path) -> None:
    """Lines of breaches.cu."""
    source = (HERE / "breaches.cu").read_text().splitlines()
    part = next(i for i, line in enumerate(source) if "PART(deadlock)" in line)
    at = [i + 1 for i, line in enumerate(source) if i > part and "__sync" in line][:2]
    lines = run(program, "deadlock").errors.splitlines()
    assert re.fullmatch(rf"  threads 0 to 15: __syncwarp, .*breaches.cu:{at[0]}", lines[1])
    assert re.fullmatch(rf"  threads 16 to 31: __syncthreads, .*breaches.cu:{at[1]}", lines[2])


@pytest.mark.parametrize("launch", REFUSED)
def test_a_launch_that_cuda_refuses_is_an_exception(program: Path, launch: str) -> None:
    result = run(program, launch)
    assert result.code == WRONG
    assert "launch of breaking_kernel, grid (" in result.errors and REFUSED[launch] in result.errors


def test_all_shared_memory_of_the_device_can_be_had(program: Path) -> None:
    assert run(program, "as_much_shared_as_there_is").code == 0
