"""`make gpu-check`, as far as a machine without a GPU can tell: sentences, page, bridge."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import make_case
from benchmark_scripts import BENCHMARKS, scripts_importable

from longpretrain.attention import AttentionPattern

ROOT = Path(__file__).resolve().parents[1]


with scripts_importable():
    import gpu
    import gpu_bridge
    import gpu_checks
    import gpu_machine
    import gpu_report
    import gpu_speed

A100 = ("NVIDIA A100-SXM4-80GB", (8, 0))
GOOD = gpu_machine.Facts(True, "2.13.0", "13.0", [A100], "/usr/bin/nvcc", "/usr/bin/g++")


def test_a_machine_with_all_of_it_passes() -> None:
    gpu_machine.need_gpu(GOOD)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (replace(GOOD, driver_sees_gpu=False, gpus=[]), "no NVIDIA GPU is found"),
        (replace(GOOD, torch_cuda=None, gpus=[]), "built without CUDA; install a CUDA build"),
        (replace(GOOD, gpus=[]), "does not see the GPU"),
        (replace(GOOD, gpus=[("Tesla V100", (7, 0))]), "compute capability 7.0 and the kernels"),
        (replace(GOOD, nvcc=None), "no nvcc on PATH or in CUDACXX"),
        (replace(GOOD, cxx=None), "no C++ compiler"),
    ],
    ids=["no gpu", "cpu torch", "old driver", "old gpu", "no nvcc", "no g++"],
)
def test_what_is_missing_is_said_in_one_sentence(facts: gpu_machine.Facts, says: str) -> None:
    with pytest.raises(gpu_machine.NotHereError) as caught:
        gpu_machine.need_gpu(facts)
    assert says in str(caught.value)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("script", ["gpu_machine.py", "gpu.py"])
def test_without_a_gpu_the_command_ends_with_that_sentence(script: str) -> None:
    command = [sys.executable, str(BENCHMARKS / script)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("gpu-check: ") and len(ran.stderr.splitlines()) == 1


def test_a_part_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--only", "tests,fans"])
    assert "'fans' is none of tests, checks, sanitizer, training, speed" in capsys.readouterr().err


# --- the page ------------------------------------------------------------------------------------


def results(**changes: Any) -> dict[str, Any]:
    shape = gpu_speed.HEADLINE
    row = {"shape": str(shape), "call": "forward", "useful_operations": 8e9, "why_not": None}
    speed = [
        {**row, "case": "ours", "median_ms": 0.08},
        {**row, "case": "flex", "median_ms": 0.2},
        {**row, "case": "flash", "median_ms": None, "why_not": "flash_attn is not installed"},
    ]
    return {
        "date": "2026-01-31T10:00:00+00:00",
        "ok": True,
        "machine": {"gpu": "NVIDIA A100-SXM4-80GB", "torch": "2.13.0"},
        "tests": {"ok": True, "passed": 700, "failed": [], "skipped": 3, "bridge": "900 cuda"},
        "checks": [{"check": "dropout bits", "ok": True, "found": "1,000 | equal"}],
        "sanitizer": {"left_out": None, "tools": [{"tool": "memcheck", "ok": True, "found": "0"}]},
        "speed": speed,
        "speed_method": "events",
        **changes,
    }


def test_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(results()))
    assert gpu.main(["--render", str(path)]) == 0
    page = capsys.readouterr().out
    assert page.startswith("# GPU check, NVIDIA A100-SXM4-80GB, 2026-01-31\n")
    assert "all that ran is right" in page and "700 passed, 0 failed, 3 left out" in page
    assert "| dropout bits | ok | 1,000 / equal |" in page  # a bar would end the cell
    assert "| FlexAttention | 0.200 | 40.0 | 2.50 |" in page
    assert "flash-attn, window only: flash_attn is not installed" in page


def test_the_page_of_a_failure() -> None:
    failed = [f"test_{number}" for number in range(30)]
    tests = {"ok": False, "passed": 1, "failed": failed, "skipped": 0, "bridge": "none"}
    sanitizer = {"left_out": "compute-sanitizer is not on PATH", "tools": []}
    page = gpu_report.render(results(ok=False, tests=tests, sanitizer=sanitizer))
    assert "SOMETHING IS WRONG" in page and "FAILED: 1 passed, 30 failed" in page
    assert "* test_19\n* and 10 more" in page
    assert "Left out: compute-sanitizer is not on PATH." in page


def test_results_have_names_of_their_own(tmp_path: Path) -> None:
    first = gpu.fresh_path(tmp_path, "2026-01-31", "NVIDIA A100-SXM4-80GB")
    assert first.name == "gpu-2026-01-31-a100-sxm4-80gb.json"
    first.touch()
    again = gpu.fresh_path(tmp_path, "2026-01-31", "NVIDIA A100-SXM4-80GB")
    assert again.name == "gpu-2026-01-31-a100-sxm4-80gb-2.json"


# --- reading what the parts say ------------------------------------------------------------------

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.a" name="good"/><testcase classname="tests.a" name="left"><skipped/>
</testcase><testcase classname="tests.a" name="bad[x]"><failure/></testcase></testsuite>
</testsuites>"""


def test_what_pytest_reports() -> None:
    found = gpu.read_junit(JUNIT)
    assert found == {"ok": False, "passed": 1, "failed": ["tests.a::bad[x]"], "skipped": 1}
    assert gpu.read_junit(JUNIT.replace("<failure/>", ""))["ok"]
    assert gpu.read_junit("")["failed"] == ["pytest wrote no report"]
    assert gpu.bridge_line("...\ngpu_bridge calls: 12 cuda x\n1 passed") == "12 cuda x"
    assert gpu.bridge_line("1 passed") == "the bridge did not report"


def test_what_the_sanitizer_says() -> None:
    text = "========= COMPUTE-SANITIZER\nsmall calls\n========= ERROR SUMMARY: 0 errors\n"
    assert gpu.sanitizer_summary(text) == "ERROR SUMMARY: 0 errors"
    assert gpu.sanitizer_summary("Error: no device\n") == "Error: no device"
    assert gpu.sanitizer_summary("") == "it said nothing"


@pytest.mark.parametrize(("one_ms", "number"), [(0.01, 100), (5.0, 50), (900.0, 5)])
def test_number_of_samples(one_ms: float, number: int) -> None:
    assert gpu_speed.number_of_samples(one_ms) == number


@pytest.mark.parametrize("dilation", [1, 3])
def test_useful_operations_by_brute_force(dilation: int) -> None:
    shape = gpu_speed.Shape(2, 50, 3, 8, 4, dilation=dilation)
    pattern, position = AttentionPattern(4, dilation), torch.arange(50)
    reached = pattern.reaches(position[:, None], position, dilation)
    reached[0], reached[:, 0] = True, True
    pairs = int(reached.sum()) * 3 * 2
    assert shape.useful_operations("forward") == 4 * 8 * pairs
    assert shape.useful_operations("forward+backward") == 14 * 8 * pairs


def test_peers_say_why_not() -> None:
    shape = replace(gpu_speed.HEADLINE, tokens=16_384, dropout_p=0.1)
    assert gpu_speed.PEERS["sdpa"].why_not(shape) == "not set up beyond 4,096 tokens"
    assert gpu_speed.PEERS["flex"].why_not(shape) == "has no dropout"
    assert gpu_speed.PEERS["ours"].why_not(shape) is None


# --- the bridge ----------------------------------------------------------------------------------


def test_tensors_are_carried_as_they_lie() -> None:
    holder = torch.arange(240.0).view(2, 3, 4, 10)
    for x in (
        holder[..., 1::2],
        holder.transpose(1, 2),
        holder[:1, 0].expand(4, 4, 10),
        holder[1:],
    ):
        carried = gpu_bridge.carried(x, "cpu")
        assert torch.equal(carried, x)
        assert carried.stride() == x.stride() and carried.storage_offset() == x.storage_offset()
        assert carried.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def arguments_of(head_size: int) -> tuple[Any, ...]:
    x = torch.randn(1, 20, 2, head_size)
    nothing = (None,) * 7
    return (x, x, x, *nothing, 4, [1, 1], False, 0, 0.1, 0)


def test_the_bridge_calls_the_other_device_s_operator() -> None:
    name, seen = gpu_bridge.FORWARD, []

    def operator(*arguments: Any) -> Any:
        seen.append(arguments)
        return torch.ops.longpretrain.sliding_attention_portable(*arguments)

    make_case(AttentionPattern(4)).run("portable")  # registers the portable operator
    bridge = gpu_bridge.bridge(name, "cpu", operator)
    arguments = arguments_of(32)
    out, lse = bridge(*arguments)
    right = torch.ops.longpretrain.sliding_attention_portable(*arguments)
    assert torch.equal(out, right[0]) and torch.equal(lse, right[1])
    assert len(seen) == 1 and seen[0][0] is not arguments[0]
    bridge(*arguments_of(4))
    assert len(seen) == 1, "head sizes that CUDA has not go to the portable operator"


def test_what_is_about_the_cpu_is_left_out() -> None:
    assert gpu_bridge.is_cpu_only("test_attention_levels.py", ())
    assert gpu_bridge.is_cpu_only("test_attention_kernels.py", ("threads", "library"))
    assert not gpu_bridge.is_cpu_only("test_attention_kernels.py", ("library",))
    for name in gpu_bridge.CPU_ONLY_FILES:
        assert (ROOT / "tests" / name).exists(), f"{name}: is no more"
    assert all(list((ROOT / "tests").glob(pattern)) for pattern in gpu.TESTS)


def test_the_checks_own_cases_run_on_the_cpu(library: None) -> None:
    """So that the first run on a GPU does not fail on the script's own account."""
    for dtype in gpu_checks.DTYPES:
        found = gpu_checks._run(
            gpu_checks._inputs(203, 32, dtype), AttentionPattern(37, (1, 3), True), dropout_p=0.1
        )
        assert len(found) == 7 and all(x.isfinite().all() for x in found)
    assert max(gpu_checks.errors_of_last_rows("cpu", 2500, 2, 64).values()) < 0.02
    for dilation, is_global in ((1, False), (3, False), (3, True)):
        kept = gpu_checks.kept_weights(
            "cpu", torch.float32, dilation, causal=True, is_global=is_global
        )
        reached = 0.5 if is_global or dilation == 1 else 0.5 / 3
        assert kept.float().mean().item() == pytest.approx(0.7 * reached, rel=0.05)
