"""What `make cuda-check` reads, counts and compares; no compiler of NVIDIA's is needed here."""

from __future__ import annotations

import itertools
import re
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from cuda_check import __main__ as command
from cuda_check import flash, launches, sass, toolchain, work
from cuda_check.budgets import Target, compare, read_budgets, write_budgets
from cuda_check.chips import A100, H100, LIMITS, RATES, blocks_per_sm
from cuda_check.model import KernelTime, imbalance
from cuda_check.report import budget_table
from cuda_check.table import Row, step_products, with_loop

HERE = Path(__file__).resolve().parent
NVCC = "13.0.88"

# --- blocks per multiprocessor -------------------------------------------------------------------

OCCUPANCY = """
#include <cstddef>
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
  int chip, registers, threads, sms_threads, sm_shared;
  long shared;
  while (std::scanf("%d %d %d %ld %d %d", &chip, &registers, &threads, &shared, &sms_threads,
                    &sm_shared) == 6) {
    cudaOccDeviceProp p;
    p.computeMajor = chip / 10, p.computeMinor = chip % 10;
    p.maxThreadsPerBlock = 1024, p.maxThreadsPerMultiprocessor = sms_threads;
    p.regsPerBlock = p.regsPerMultiprocessor = 65536, p.warpSize = 32, p.numSms = 1;
    p.sharedMemPerBlock = 49152, p.sharedMemPerMultiprocessor = sm_shared;
    p.sharedMemPerBlockOptin = sm_shared - 1024, p.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes a;
    a.maxThreadsPerBlock = 1024, a.numRegs = registers, a.numBlockBarriers = 1;
    a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, a.maxDynamicSharedSizeBytes = shared;
    cudaOccDeviceState s;
    s.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult r;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, threads, shared)) return 1;
    std::printf("%d\\n", r.activeBlocksPerMultiprocessor);
  }
}
"""


def test_blocks_are_those_of_nvidia_s_own_arithmetic(tmp_path: Path) -> None:
    try:
        nvcc = str(toolchain.find_nvcc().path)
    except toolchain.NoNvccError as error:
        pytest.skip(f"needs cuda_occupancy.h of the CUDA toolkit; {error}")
    dry_run = [nvcc, "--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null"]
    told = subprocess.run(dry_run, capture_output=True, text=True, check=True).stderr
    include = Path(re.search(r"^#\$ TOP=(.*)$", told, re.MULTILINE)[1]) / "include"  # type: ignore
    if not (include / "cuda_occupancy.h").exists():
        pytest.skip(f"{include} has no cuda_occupancy.h")
    program = tmp_path / "occupancy"
    source = tmp_path / "occupancy.cpp"
    source.write_text(OCCUPANCY)
    subprocess.run(["g++", "-w", f"-I{include}", str(source), "-o", str(program)], check=True)
    cases = list(
        itertools.product(
            LIMITS, (16, 32, 40, 63, 96, 126, 168, 169, 255), (32, 64, 96, 128, 256, 1024),
            (0, 1000, 17_408, 40_960, 41_088, 50_000, 99 << 10, 163 << 10, 227 << 10),
        )
    )  # fmt: skip
    lines = [
        f"{chip} {registers} {threads} {shared} {LIMITS[chip].threads} {LIMITS[chip].shared_bytes}"
        for chip, registers, threads, shared in cases
    ]
    ran = subprocess.run(
        [str(program)], input="\n".join(lines), capture_output=True, text=True, check=True
    )
    right = [int(line) for line in ran.stdout.split()]
    assert [blocks_per_sm(*case) for case in cases] == right


def test_blocks_of_known_kernels() -> None:
    assert blocks_per_sm(80, 126, 128, 41_088) == 3
    assert blocks_per_sm(80, 126, 128, 40_960) == 4
    assert blocks_per_sm(86, 126, 128, 100 << 10) == 0


# --- launches ------------------------------------------------------------------------------------


def test_the_recorder_s_output() -> None:
    kernels, recorded = launches.read_recording(
        "kernel _Z1a\nkernel _Z1b\nkernel _Z1c\nlaunch _Z1a 4 2 1 128 512\nmemset 64\n"
        "launch _Z1b 1 1 1 32 0\nworkspace 4096\nend\nlaunch _Z1a 1 1 1 128 512\n"
        "workspace 0\nend\nasked _Z1c\n"
    )
    assert kernels == {"_Z1a", "_Z1b"}
    assert [len(one.launches) for one in recorded] == [2, 1]
    assert recorded[0].launches[0] == launches.Launch("_Z1a", (4, 2, 1), 128, 512)
    assert (recorded[0].memset_bytes, recorded[0].workspace_bytes) == (64, 4096)
    with pytest.raises(ValueError, match="Segmentation"):
        launches.read_recording("Segmentation fault")


def test_a_call_is_written_as_the_recorder_reads_it() -> None:
    call = launches.Call(True, "bf16", 1, 4096, 16, 64, 2, 256, dilation=3, drop_below=26)
    assert call.line() == "1 1 1 4096 16 64 2 256 3 0 0 0 26"
    source = (HERE / "cuda_check" / "launches.cpp").read_text(encoding="utf-8")
    assert f"kNumbers = {len(call.line().split())};" in source


def test_a_source_is_built_anew_when_a_header_of_its_own_changes() -> None:
    names = {path.name for path in toolchain.with_includes(toolchain.CUDA / "forward.cu")}
    assert {"forward.cu", "tile.h", "attention.h", "launch.h"} <= names
    assert not {"global.h", "backward.h"} & names


def test_short_names() -> None:
    full = (
        "void longpretrain::cuda::(anonymous namespace)::f<longpretrain::cuda::T, 64, true>(X::P)"
    )
    assert toolchain.short_name(full) == "f<T, 64, true>"
    assert toolchain.short_name("prepare_tokens(longpretrain::cuda::Problem)") == "prepare_tokens"


def test_products_of_a_step() -> None:
    """64 x 64 x 64 multiply-adds are 128 HMMA, of which each warp has its share."""
    assert step_products("window_forward_kernel<BFloat16, 64, false>", 128) == 2 * 128 // 4
    assert step_products("backward_keys_kernel<Float16, 128>", 64) == 4 * 256 // 2
    assert step_products("combine_rows_kernel<BFloat16, 64>", 128) is None


# --- limits --------------------------------------------------------------------------------------

ROW = Row("f<BFloat16, 64>", "sm_80", 126, 0, 0, 40_960, 128, 4, 64, True, 430, 570, 890, 0,
          0.77, 0.77, 0.54)  # fmt: skip


@pytest.fixture
def budgets_file(tmp_path: Path) -> Path:
    path = tmp_path / "budgets.json"
    write_budgets([ROW, replace(ROW, kernel="g")], NVCC, "13.5.37", read_budgets(path), path)
    return path


def test_kept_limits_are_no_finding(budgets_file: Path) -> None:
    assert compare([ROW, replace(ROW, kernel="g")], read_budgets(budgets_file)) == []


def test_worse_is_told_with_the_difference(budgets_file: Path) -> None:
    worse = replace(ROW, registers=134, blocks_per_sm=3, use=0.7)
    findings = compare([worse, replace(ROW, kernel="g")], read_budgets(budgets_file))
    assert all(finding.is_worse for finding in findings)
    assert [str(finding) for finding in findings] == [
        "sm_80 f<BFloat16, 64>: registers 126 -> 134 (+8), worse",
        "sm_80 f<BFloat16, 64>: blocks_per_sm 4 -> 3 (-1), worse",
        "sm_80 f<BFloat16, 64>: use 0.77 -> 0.7 (-0.07), worse",
    ]


def test_better_is_told_and_passes(budgets_file: Path) -> None:
    better = replace(ROW, registers=120, use_least=0.6)
    findings = compare([better, replace(ROW, kernel="g")], read_budgets(budgets_file))
    assert [finding.is_worse for finding in findings] == [False, False]
    assert "registers 126 -> 120 (-6), better" in str(findings[0])


def test_kernels_that_come_and_go(budgets_file: Path) -> None:
    findings = compare([ROW, replace(ROW, kernel="h")], read_budgets(budgets_file))
    assert [str(finding) for finding in findings] == [
        "sm_80 h: has no limits yet",
        "sm_80 g: has limits, but is no more",
    ]


def test_spills_never_pass() -> None:
    row = replace(ROW, spill_bytes=8, local_in_loops=2)
    findings = compare([row], {"nvcc": None, "targets": [], "limits": {}})
    assert [finding.is_absolute for finding in findings] == [True, True]
    assert "spill_bytes is 8, wanted 0 with any compiler" in str(findings[0])
    later = replace(row, chip="sm_100 from PTX")
    assert compare([later], {"nvcc": None, "targets": [], "limits": {}}) == []


def test_targets() -> None:
    target = Target("sm_80", ROW.kernel, "blocks_per_sm", 5)
    assert "is 4, the target is at least 5" in str(target.finding([ROW]))
    assert replace(target, least=4).finding([ROW]) is None
    assert "no such kernel" in str(replace(target, kernel="x").finding([ROW]))


def test_other_chips_keep_their_limits(budgets_file: Path) -> None:
    old = read_budgets(budgets_file)
    write_budgets([replace(ROW, chip="sm_90")], NVCC, "13.5.37", old, budgets_file)
    assert set(read_budgets(budgets_file)["limits"]) == {"sm_80", "sm_90"}
    write_budgets([replace(ROW, chip="sm_90")], "14.0", "14.0", old, budgets_file)
    assert set(read_budgets(budgets_file)["limits"]) == {"sm_90"}


@pytest.mark.parametrize(
    ("row", "nvcc", "code", "says"),
    [
        pytest.param(ROW, NVCC, 0, "keep their limits", id="kept"),
        pytest.param(replace(ROW, registers=134), NVCC, 1, "(+8), worse", id="worse"),
        pytest.param(replace(ROW, registers=120), NVCC, 0, "keep it: ", id="better"),
        pytest.param(replace(ROW, registers=134), "13.1.2", 0, "not enforced", id="other nvcc"),
        pytest.param(replace(ROW, spill_bytes=4), "13.1.2", 1, "any compiler", id="spills"),
    ],
)
def test_the_command(
    row: Row, nvcc: str, code: int, says: str, budgets_file: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    tools = toolchain.Toolchain(toolchain.Nvcc(Path("nvcc"), nvcc), Path("nvdisasm"), "13.5.37")
    monkeypatch.setattr(command, "find_toolchain", lambda: tools)
    rows = [row, replace(ROW, kernel="g")]
    monkeypatch.setattr(command, "read_table", lambda _tools, _chips, _jobs: rows)
    monkeypatch.setattr(command, "read_budgets", lambda: read_budgets(budgets_file))
    assert command.main(["budgets", "--chips", "80"]) == code
    assert says in capsys.readouterr().out


def test_in_tests_there_is_no_table_and_of_another_nvcc_one_line(
    budgets_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = toolchain.Toolchain(toolchain.Nvcc(Path("nvcc"), "13.1.2"), Path("nvdisasm"), "13.5.37")
    rows = [replace(ROW, registers=134), replace(ROW, kernel="g", registers=134)]
    monkeypatch.setattr(command, "find_toolchain", lambda: tools)
    monkeypatch.setattr(command, "read_table", lambda _tools, _chips, _jobs: rows)
    monkeypatch.setattr(command, "read_budgets", lambda: read_budgets(budgets_file))
    assert command.main(["budgets", "--chips", "80", "--in-tests"]) == 0
    told = capsys.readouterr().out
    assert "2 differences are told by `make cuda-check` and not enforced" in told
    assert len(told.splitlines()) == 3


def test_without_nvcc_the_command_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDACXX", raising=False)
    assert command.main(["budgets"]) == 2
    assert "there is no nvcc on PATH or in CUDACXX" in capsys.readouterr().err


def test_the_table_has_a_line_for_each_kernel() -> None:
    nothing = dict.fromkeys(
        ("products", "is_tensor", "loop", "loop_masked", "loop_most", "use", "use_masked",
         "use_least")
    )  # fmt: skip
    without_rates = {"use": None, "use_masked": None, "use_least": None}
    rows = [
        ROW,
        replace(ROW, kernel="plain", **nothing),
        replace(ROW, kernel="later", **without_rates),
    ]
    text = budget_table(rows)
    assert "| f<BFloat16, 64> |       126 |" in text
    assert text.count("\n| ") == 5  # with head and rule
    cells = {line.split("|")[1].strip(): line.replace(" ", "") for line in text.splitlines()[2:]}
    assert cells["plain"].endswith("|4|-|-|-|-|-|-|-|-|")
    assert cells["later"].endswith("|4|64t|430|570|890|0|-|-|-|")


def test_a_chip_without_rates_has_loops_and_no_shares() -> None:
    """What is not known is None, not a 0 that reads as counted."""
    products = [sass.Instruction("HMMA.16816.F32", "", False)] * 8
    lines = [".L_1", *products, sass.Instruction("BRA", "P0, `(.L_1)", False)]
    blocks = sass.blocks_of([*lines, sass.Instruction("EXIT", "", False)])
    empty = Row("f", "sm_100 from PTX", 126, 0, 0, 0, 128, 4)
    found = with_loop(empty, blocks, None)
    assert (found.products, found.loop, found.use, found.use_least) == (8, 9, None, None)
    assert with_loop(empty, blocks, RATES[80]).use is not None
    assert (empty.products, empty.loop, empty.use) == (None, None, None)


# --- work and time -------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 31, 64, 150, 300])
@pytest.mark.parametrize("window", [0, 5, 40, 500])
@pytest.mark.parametrize(
    "tiling",
    [
        work.Tiling(128, 32, 32, 32, True),
        work.Tiling(64, 32, 64, 1, False),
        work.Tiling(64, 16, 64, 16, False),
    ],
    ids=["forward", "keys", "queries"],
)
def test_tiles_by_brute_force(tokens: int, window: int, tiling: work.Tiling) -> None:
    """Every pair in the window is in exactly one tile, and plain tiles hold nothing else."""
    covered: Counter[tuple[int, int]] = Counter()
    pairs = {(i, j) for i in range(tokens) for j in range(tokens) if abs(i - j) <= window}
    warp_tiles = plain = block_tiles = 0
    for first in range(0, tokens, tiling.block_rows):
        rows = range(first, min(first + tiling.block_rows, tokens))
        begin = max(rows[0] - window, 0) // tiling.alignment * tiling.alignment
        for start in range(begin, min(rows[-1] + window, tokens - 1) + 1, tiling.columns):
            block_tiles += 1
            for warp in range(0, tiling.block_rows, tiling.warp_rows):
                of_warp = list(range(first + warp, first + warp + tiling.warp_rows))
                of_warp = [r for r in of_warp if r < tokens]
                tile = [(r, c) for r in of_warp for c in range(start, start + tiling.columns)]
                if not tile or (tiling.skips_by_warp and not pairs & set(tile)):
                    continue
                warp_tiles += 1
                plain += pairs >= set(tile)
                covered.update(pairs & set(tile))
    assert covered == Counter(pairs)
    assert len(pairs) == work.useful_pairs(tokens, window)
    assert work.count_tiles(tokens, window, tiling) == work.Counts(warp_tiles, plain, block_tiles)


def test_flash_attention_s_share_of_its_floor() -> None:
    """The tensor cores are its forward's bound on an A100: 2 of 7 products at full rate."""
    assert flash.FORWARD.clocks(RATES[80]) == 256 * 8
    assert flash.floor_flops(A100) == pytest.approx(284e12, rel=0.01)
    for length in (flash.SHORT, flash.MIDDLE, flash.LONG):
        assert flash.share_of_floor(H100, length) == pytest.approx(
            flash.share_of_floor(A100, length), rel=0.05
        )
    assert flash.dense_s(A100, 1, 4096, 16, 64) == pytest.approx(1.41e-3, rel=0.01)


def test_time_of_a_kernel() -> None:
    time = KernelTime("f", 30e-6, 17e-6, 10e-6, "issue", 1.0, 1.0, 0.8)
    assert time.floor_s == 30e-6
    assert time.expected_s(0.5) == pytest.approx(62e-6)
    launch = launches.Launch("f", (32, 16, 1), 128, 0)
    assert imbalance(launch, A100) == pytest.approx(5 * 108 / 512)
