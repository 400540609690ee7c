"""How `make cuda-check` reads machine code: small listings, written here."""

from __future__ import annotations

from collections import Counter

import pytest
from cuda_check import ptxas, rates, sass
from cuda_check.chips import RATES
from cuda_check.table import product_loops

LOG = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z1aPf' for 'sm_80'
ptxas info    : Function properties for _Z1aPf
    24 bytes stack frame, 16 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 126 registers, used 1 barriers, 24 bytes cumulative stack size, 512 bytes smem, 472 bytes cmem[0]
ptxas info    : Compile time = 122.361 ms
ptxas info    : Compiling entry function '_Z1bPf' for 'sm_80'
ptxas info    : Function properties for _Z1bPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 352 bytes cmem[0]
"""  # noqa: E501


def test_what_ptxas_says() -> None:
    found = ptxas.read_log(LOG)
    assert found == {"_Z1aPf": ptxas.Usage(126, 24, 36, 512), "_Z1bPf": ptxas.Usage(32, 0, 0, 0)}
    with pytest.raises(ValueError, match="no registers"):
        ptxas.read_log(LOG.replace("Used 32 registers", ""))


def listing(*lines: str) -> str:
    """As nvdisasm writes it: a label, or an instruction with its predicate."""
    text = ['\t.section\t.text.kernel,"ax",@progbits', ".text.kernel:"]
    for number, line in enumerate(lines):
        text.append(
            line if line.startswith(".L") else f"        /*{16 * number:04x}*/     {line} ;"
        )
    return "\n".join([*text, "\t.section\t.nv.constant0.kernel"])


def steps_of(
    *lines: str, of_step: int | None = None, counted: tuple[str, ...] = ("HMMA",)
) -> list[sass.Loop]:
    functions = sass.read_functions(listing(*lines))
    return sass.step_loops(sass.blocks_of(functions["kernel"]), counted, of_step)


# Loads, then a tile without mask, with one, or with one and dropout.
ONE_LOOP = [
    "MOV R1, R2",
    ".L_x_1:",
    "LDGSTS.E.BYPASS.128 [R4], [R6.64]",
    "HMMA.16816.F32.BF16 R4, R8, R16, R4",
    "@P0 BRA `(.L_x_2)",
    "ISETP.GE.AND P1, PT, R1, R2, PT",
    "@P1 BRA `(.L_x_4)",
    "IMAD.WIDE.U32 R4, R5, R6, RZ",
    ".L_x_4:",
    'LDL R5, [R1+0x8]   (*"SpillRefill"*)',
    "MUFU.EX2 R3, R4",
    "BRA `(.L_x_3)",
    ".L_x_2:",
    "MUFU.EX2 R3, R4",
    ".L_x_3:",
    "HMMA.16816.F32.BF16 R4, R8, R16, R4",
    "@!P2 BRA `(.L_x_1)",
    "EXIT",
]


def test_the_passes_of_a_loop() -> None:
    (loop,) = steps_of(*ONE_LOOP)
    assert (loop.shortest.length, loop.masked.length, loop.longest.length) == (6, 10, 11)
    assert loop.shortest.count("HMMA") == loop.longest.count("HMMA") == 2
    assert loop.longest.count("LDL") == 1 and loop.shortest.count("LDL") == 0
    assert loop.everything.length == 12


def test_a_shorter_way_that_does_less_is_no_step() -> None:
    """The last tile loads no other one: that pass is not the one to judge."""
    lines = ["@P3 BRA `(.L_x_5)", ONE_LOOP[2], ".L_x_5:"]
    (loop,) = steps_of(*ONE_LOOP[:2], *lines, *ONE_LOOP[3:])
    assert loop.shortest.count("LDGSTS") == 1
    assert loop.shortest.length == 7


def test_a_loop_is_left_by_a_call_and_a_subroutine_is_none() -> None:
    """Where lanes may part, nvcc leaves a loop by CALL.REL.NOINC; BRA.DIV leads to a detour."""
    loops = steps_of(
        ".L_x_1:",
        "HMMA.16816.F32 R4, R8, R16, R4",
        "BRA.DIV UR4, `(.L_x_7)",
        ".L_x_6:",
        "@P0 CALL.REL.NOINC `(.L_x_2)",
        "BRA `(.L_x_1)",
        ".L_x_2:",
        "NOP",
        "EXIT",
        ".L_x_7:",
        "WARPSYNC.COLLECTIVE R3, `(.L_x_6)",
        "BRA `(.L_x_6)",
    )
    assert [loop.header for loop in loops] == ["entry"]
    assert (loops[0].shortest.length, loops[0].longest.length) == (4, 6)


INNER = [
    ".L_x_1:",
    "LDGSTS.E.BYPASS.128 [R4], [R6.64]",
    ".L_x_2:",
    "HMMA.16816.F32 R4, R8, R16, R4",
    "HMMA.16816.F32 R4, R8, R16, R4",
    "@P0 BRA `(.L_x_2)",
    "HMMA.16816.F32 R4, R8, R16, R4",
    "@P1 BRA `(.L_x_1)",
    "EXIT",
]


def test_an_inner_loop_takes_as_many_turns_as_a_step_has_products() -> None:
    (once,) = steps_of(*INNER)
    assert (once.shortest.count("HMMA"), once.shortest.length) == (3, 6)
    (loop,) = steps_of(*INNER, of_step=9)
    assert (loop.shortest.count("HMMA"), loop.shortest.length) == (9, 1 + 4 * 3 + 2)
    with pytest.raises(sass.SassError, match="no number of turns"):
        steps_of(*INNER, of_step=10)


def test_multiply_adds_are_counted_in_the_innermost_loop() -> None:
    lines = [".L_x_1:", "MOV R1, R2", ".L_x_2:", *["FFMA R1, R2, R3, R1"] * 40, "@P0 BRA `(.L_x_2)"]
    functions = sass.read_functions(listing(*lines, "@P1 BRA `(.L_x_1)", "EXIT"))
    main, loops = product_loops(sass.blocks_of(functions["kernel"]), None)
    assert main is not None and len(loops) == 1
    assert (main.shortest.count("FFMA"), main.shortest.length) == (40, 41)


@pytest.mark.parametrize(
    ("line", "message"),
    [("BRX R2 -0x100", "computed place"), ("BRA R2", "without a label")],
)
def test_a_branch_that_cannot_be_followed_is_an_error(line: str, message: str) -> None:
    with pytest.raises(sass.SassError, match=message):
        steps_of(line, "EXIT")


def test_a_listing_without_functions_is_an_error() -> None:
    with pytest.raises(sass.SassError, match="nvdisasm"):
        sass.read_functions("nvdisasm fatal: no such file")


def test_threads_of_the_launch_bounds() -> None:
    text = """\
\t.section\t.nv.info.kernel,"",@"SHT_CUDA_INFO"
\t//----- nvinfo : EIATTR_MAX_THREADS
\t.align\t\t4
        /*0098*/ \t.byte\t0x04, 0x05
.L_28:
        /*009c*/ \t.word\t0x00000080
        /*00a0*/ \t.word\t0x00000001
"""
    assert sass.read_max_threads(text) == {"kernel": 128}


@pytest.mark.parametrize(
    ("opcode", "bytes_"),
    [
        ("LDSM.16.M88.4", 512), ("LDSM.16.MT88.2", 256), ("LDGSTS.E.BYPASS.128.ZFILL", 512),
        ("LDS.128", 512), ("STS.64", 256), ("LDS", 128), ("LDS.U16", 128), ("LDG.E.128", 0),
    ],
)  # fmt: skip
def test_bytes_of_shared_memory(opcode: str, bytes_: int) -> None:
    assert rates.shared_bytes(opcode, 3) == 3 * bytes_


def test_the_busiest_unit_bounds_the_tensor_cores() -> None:
    found = sass.Pass(Counter({"HMMA.16816.F32": 64, "LDSM.16.M88.4": 32, "FADD": 500}))
    assert rates.use_of_pass(found, RATES[80]) == (512 / 1000, "multiply-add")
    assert rates.use_of_pass(found, RATES[90]) == (pytest.approx(64 * 4 / 0.629 / 596), "issue")
    lean = sass.Pass(Counter({"HMMA.16816.F32": 64, "LDSM.16.M88.4": 40}))
    assert rates.use_of_pass(lean, RATES[80]) == (512 / 640, "shared memory")


def test_a_plain_product_is_measured_by_its_own_unit() -> None:
    found = sass.Pass(Counter({"FFMA": 100, "LOP3.LUT": 100}))
    assert rates.use_of_pass(found, RATES[90]) == (100 / 200, "issue")
