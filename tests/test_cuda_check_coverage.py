"""docs/kernels.md: what each layer covered of each kernel, and the targets that are missed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_check import coverage, ran, sass, shortfall
from cuda_check.budgets import BUDGETS, read_budgets
from cuda_check.model import Machine
from cuda_check.toolchain import NoNvccError, ToolError, find_toolchain
from ptx.cases import DTYPES, HEAD_SIZES, cases

PAGE = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
KINDS = ["fp32 32", "bf16 32"]
LIMITS = {"sm_80": {"f<Float32, 32>": {}, "f<BFloat16, 32>": {}, "g": {}}, "sm_90": {"g": {}}}

# --- what the emulated tests write down ----------------------------------------------------------


def fake_operator(counted: dict[str, dict[str, int]]) -> SimpleNamespace:
    def launch_twice(x: torch.Tensor) -> torch.Tensor:
        counted.setdefault("f", {"launches": 0})["launches"] += 2
        return x

    return SimpleNamespace(default=launch_twice, other="kept")


def test_launches_belong_to_the_dtype_and_head_size_of_the_call() -> None:
    counted = {"f": {"launches": 5}, "g": {"launches": 1}}
    watch = ran.Watch(lambda: {name: dict(counts) for name, counts in counted.items()})
    operator = watch.watched(fake_operator(counted))
    assert operator.other == "kept"
    operator.default(torch.zeros(1, 3, 2, 64, dtype=torch.bfloat16))
    operator.default(torch.zeros(1, 3, 2, 32))
    operator.default(torch.zeros(1, 3, 2, 32))
    assert watch.launches == {("f", "bf16 64"): 2, ("f", "fp32 32"): 4}


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = ran.Record(ran.fingerprint())
    record.add_test({("f", "bf16 64"): 3, ("g", "fp32 32"): 1})
    record.add_test({("f", "bf16 64"): 2})
    record.add_test({})
    record.write(tmp_path / "ran.json")
    found = ran.read_record(tmp_path / "ran.json")
    assert found == record and found.tests == 3
    assert found.kernels["f"]["bf16 64"] == ran.Ran(tests=2, launches=5)


def test_a_record_of_other_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ToolError, match="run `make emulate`"):
        ran.read_record(tmp_path / "ran.json")
    ran.Record("0123").write(tmp_path / "ran.json")
    with pytest.raises(ToolError, match="of other sources; run `make emulate`"):
        ran.read_record(tmp_path / "ran.json")


def test_a_run_with_failures_leaves_no_record(tmp_path: Path) -> None:
    path = tmp_path / "ran.json"
    plugin = ran.Plugin(ran.Watch(dict), path)
    plugin.pytest_sessionfinish(0)
    assert path.exists()
    plugin.pytest_sessionfinish(1)
    assert not path.exists()


# --- the table -----------------------------------------------------------------------------------


def covered() -> list[coverage.Covered]:
    record = ran.Record("0123")
    record.add_test({("f", "fp32 32"): 3, ("f", "bf16 32"): 1, ("g", "fp32 32"): 1})
    interpreted = {"f": Counter({"fp32 32": 4}), "g": Counter({"fp32 32": 1, "bf16 32": 1})}
    return coverage.join(LIMITS, record, interpreted, {"g": (2, "no call asks for them")})


def test_layers_are_joined_by_kernel() -> None:
    f, g = covered()
    assert (f.kernel, f.variants, f.chips) == (
        "f",
        ["f<Float32, 32>", "f<BFloat16, 32>"],
        ["sm_80"],
    )
    assert f.tests == {"fp32 32": 1, "bf16 32": 1} and f.left_out is None
    assert g.chips == ["sm_80", "sm_90"] and g.left_out == (2, "no call asks for them")


def test_what_a_layer_lacks_is_told() -> None:
    assert coverage.gaps(covered(), KINDS, ["sm_80", "sm_90"]) == [
        "f: the PTX interpreter's cases lack bf16 32",
        "f: the budgets lack sm_90",
        "g: the emulator's tests lack bf16 32",
    ]


def test_the_section_names_kernels_cases_and_what_nobody_sees() -> None:
    text = coverage.coverage_section(covered(), 63)
    assert "(63 tests of the operator;" in text
    assert f"| f      | {2:>8} |" in text
    assert "* g: 2 in each variant: no call asks for them" in text
    assert all(f'"{name}"' in " ".join(text.split()) for name in cases(32, torch.float32))
    assert "NCCL" in text and "Whether it runs at all" in text


def test_a_case_becomes_the_call_that_it_makes() -> None:
    for _layout, case in cases(32, torch.bfloat16).values():
        call = coverage.call_of(case, backward=True)
        q_BNHD = case.floats["q_BNHD"]
        assert (call.batch, call.tokens, call.heads, call.head_size) == tuple(q_BNHD.shape)
        assert (call.dtype, call.backward) == ("bf16", True)
        assert (call.drop_below > 0) == ("dropout_p" in case.masks)
        assert (call.slots > 0) == ("global_index_BG" in case.masks)


def test_the_interpreter_s_cases_launch_every_kernel() -> None:
    try:
        tools = find_toolchain()
    except NoNvccError as error:
        pytest.skip(str(error))
    found = coverage.interpreted_kernels(tools)
    names = {coverage.family(kernel) for kernel in read_budgets()["limits"]["sm_80"]}
    assert found.keys() == names
    assert all(set(kinds) == set(coverage.all_kinds()) for kinds in found.values())


def test_the_page_has_every_kernel_covered_by_every_layer() -> None:
    """The page is made by hand (`make cuda-check`), and must be of the kernels that there are."""
    page = PAGE.read_text(encoding="utf-8")
    section = page.split("## What each layer has covered")[1].split("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    limits = read_budgets()["limits"]
    assert BUDGETS.exists() and len(limits) == len(coverage.all_chips())
    kernels = list(dict.fromkeys(coverage.family(kernel) for kernel in limits["sm_80"]))
    assert [row[1].strip() for row in rows if not row[1].startswith(" -")] == kernels
    whole = f"{len(DTYPES) * len(HEAD_SIZES)} of {len(DTYPES) * len(HEAD_SIZES)}"
    for row in rows:
        if not row[1].startswith(" -"):
            assert [cell.strip() for cell in (row[4], row[6], row[7])] == [whole, whole, "6"]


# --- targets that are missed ---------------------------------------------------------------------


def interior(head_size: int, dropout: bool, slots: int) -> shortfall.InteriorLoop:
    tensor = 8.0 * head_size
    return shortfall.InteriorLoop(
        head_size, dropout, tensor, slots, 300, 288, 200, "issue", weights=32
    )


def test_dropout_s_least_slots() -> None:
    """Two calls of Philox: 10 rounds of 4, 2 keys stepped 9 times; 8 words; 32 weights."""
    assert interior(64, True, 822).dropout_floor == 2 * 40 + 18 + 8 * 7 + 64


def test_loops_below_the_target_are_argued_with_numbers() -> None:
    loops = [interior(32, False, 414), interior(64, False, 510), interior(64, True, 822)]
    of_32, of_dropout = shortfall.arguments_of(loops)
    assert of_32.startswith("Heads of 32, without dropout: 382 of 414 slots are no products.")
    assert "0.70 asks for 48 slots less" in of_32
    assert "312 slots more than the 510 without" in of_dropout
    assert "take 218, counted without" in of_dropout and "would be 0.70" in of_dropout
    assert "0.70 leaves 221 slots for dropout." in of_dropout
    work = [("narrow", 64, 1.4), ("wide", 256, 1.09), ("too much", 256, 1.31)]
    section = shortfall.shortfall_section("A100", loops, work, "modelled")
    verdicts = [line.split("|")[-2].strip() for line in section.splitlines() if "|" in line]
    assert [x for x in verdicts if x.isupper() or x.islower()] == [
        "target", "NOT MET", "met", "NOT MET", "target", "none", "met", "NOT MET",
    ]  # fmt: skip
    assert max(map(len, section.splitlines())) < 140


def test_loops_are_read_off_the_machine_code() -> None:
    loop = sass.Pass(Counter({"HMMA.16816.F32.BF16": 64, "FFMA": 100, "MUFU.EX2": 36}))
    found = sass.Loop("header", loop, loop, loop, loop)
    machine = Machine({
        "window_forward_kernel<BFloat16, 64, false>": found,
        "window_forward_kernel<Float32, 64, false>": found,
        "sum_rows<BFloat16, 64>": None,
    })  # fmt: skip
    (one,) = shortfall.read_loops(machine, 80)
    assert (one.head_size, one.dropout, one.tensor, one.slots) == (64, False, 512, 200)
    assert one.weights == 32 and one.use == 1.0 and one.bound == "tensor"
