"""Planted bugs: those that CUDA kernels get wrong, and which check of ours finds each of them.

The checks: `orders`, six orders of threads and blocks must all give the right result and end well;
the address and thread sanitizers; valgrind. The same kernels without the bug pass all of them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from emulation.planted import BUGS, Bug, apply, copy_sources
from emulation.programs import (
    ADDRESS,
    HERE,
    THREAD,
    Result,
    Unit,
    compile_units,
    fixed_addresses,
    kernels,
    link,
    run,
    runtime,
)

from longpretrain.attention import AttentionPattern
from longpretrain.attention.reference import reference_attention

SEEDS = range(6)
CHECKS = ("orders", "address", "thread", "valgrind")
FLAGS = {"orders": [], "address": ADDRESS, "thread": THREAD, "valgrind": []}
# Of bugs.cu: by what each is found at least.
FOUND_BY = {
    "missing_barrier_before_read": {"orders", "thread", "valgrind"},
    "missing_barrier_before_write": {"orders", "thread"},
    "weak_wait": {"orders", "valgrind"},
    "missing_warp_barrier": {"orders", "thread", "valgrind"},
    "divergent_barrier": {"orders"},
    "shared_overrun": {"orders", "address", "valgrind"},
    "global_overrun": {"address", "valgrind"},
    "uninitialised_shared": {"orders", "valgrind"},
    "unordered_sum_of_blocks": {"thread"},
    "unordered_write_of_blocks": {"orders", "thread"},
}


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """bugs.cu for each check."""
    folder = tmp_path_factory.mktemp("bugs")
    sources = [HERE / "program.cpp", HERE / "bugs.cu"]
    kinds = [[], ADDRESS, THREAD]
    objects = compile_units([unit for flags in kinds for unit in kernels(sources, *flags)], folder)
    made = []
    for i, flags in enumerate(kinds):
        own = [*runtime(tmp_path_factory.getbasetemp()), *objects[2 * i : 2 * i + 2]]
        made.append(link(folder / f"program{i}", own, *flags))
    return {"orders": made[0], "address": made[1], "thread": made[2], "valgrind": made[0]}


def finds(check: str, program: Path, part: str, *arguments: int) -> str:
    """What the check complains of; empty when of nothing."""
    if check == "orders":
        results = [run(program, part, *arguments, seed=seed) for seed in SEEDS]
        return "".join(result.errors for result in results if result.code != 0)
    if check == "valgrind":
        within = ["valgrind", "-q", "--error-exitcode=9"]
        return complaint_of(run(program, part, *arguments, within=within), 9, "==")
    if check == "thread":
        result = run(program, part, *arguments, within=fixed_addresses())
        return complaint_of(result, 66, "data race")
    return complaint_of(run(program, part, *arguments), 1, "AddressSanitizer")


def complaint_of(result: Result, code: int, word: str) -> str:
    """Of a sanitizer itself, whatever else the program says."""
    return result.errors if result.code == code and word in result.errors else ""


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("bug", FOUND_BY)
def test_a_planted_bug_is_found(programs: dict[str, Path], bug: str, check: str) -> None:
    if check == "valgrind" and shutil.which("valgrind") is None:
        pytest.skip("there is no valgrind")
    assert finds(check, programs[check], bug, 0) == ""
    if check in FOUND_BY[bug]:
        assert finds(check, programs[check], bug, 1)


# --- in the real kernels --------------------------------------------------------------------------

CHANGED = ("forward.cu", "global_rows.cu")  # what includes the edited files
SAME = ("prepare.cu", "problem.cu", "operator.cu", "workspace.cpp")


def units(csrc: Path, names: tuple[str, ...]) -> list[Unit]:
    return kernels([csrc / "cuda" / name for name in names], "-Wno-switch")


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A program without a bug, and the objects that bugs leave as they are."""
    folder = tmp_path_factory.mktemp("real")
    csrc = copy_sources(folder)
    parts = kernels([HERE / "program.cpp", HERE / "attention.cu"])
    objects = compile_units([*units(csrc, CHANGED), *units(csrc, SAME), *parts], folder, csrc)
    same = [*runtime(tmp_path_factory.getbasetemp()), *objects[len(CHANGED) :]]
    return link(folder / "program", [*objects[: len(CHANGED)], *same]), same


def error_of(program: Path, bug: Bug, seed: int) -> float:
    """Of the forward pass against the reference, the larger of 1.0 and NaN."""
    B, N, H = 2, 200, 2
    q, k, v = torch.randn(3, B, N, H, 32, generator=torch.Generator().manual_seed(5))
    sizes = (B, N, H, bug.window, bug.dilation, int(bug.causal), bug.drop_below)
    data = b"".join(x.numpy().tobytes() for x in (q, k, v))
    result = run(program, "forward", *sizes, data=data, seed=seed)
    if result.code != 0:
        return np.inf
    found = torch.from_numpy(np.frombuffer(result.output, np.float32).copy()).view_as(q)
    right, _ = reference_attention(
        *(x.double() for x in (q, k, v)),
        AttentionPattern(bug.window, bug.dilation, bug.causal),
        padding_BM=None,
        document_BM=None,
        global_index_BG=None,
        q_global_BGHD=None,
        k_global_BMHD=None,
        v_global_BMHD=None,
        dropout_seed_B=torch.arange(1, B + 1) if bug.drop_below else None,
        drop_below=bug.drop_below,
        scale=0.25,
        q_offset=0,
    )
    error = (found - right).abs().max().item()
    return np.inf if np.isnan(error) else error


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_planted_in_the_real_kernels_is_found(
    real: tuple[Path, list[Path]], tmp_path: Path, name: str
) -> None:
    bug = BUGS[name]
    program, same = real
    assert max(error_of(program, bug, seed) for seed in SEEDS) < 1e-5
    csrc = copy_sources(tmp_path)
    apply(bug.edit, csrc)
    changed = compile_units(units(csrc, CHANGED), tmp_path, csrc)
    wrong = link(tmp_path / "program", [*changed, *same])
    assert max(error_of(wrong, bug, seed) for seed in SEEDS) > 1e-3
