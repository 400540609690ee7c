"""The training part of `make gpu-check`, as far as a machine without a GPU can tell.

Its runs on the CPU, what it finds in two runs that differ, its page.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from apex_helper import STAND_IN, found_anew
from benchmark_scripts import scripts_importable
from safetensors.torch import load_file, save_file

with scripts_importable():
    import gpu_report
    import gpu_runs
    import gpu_training

CASES = {case.name: case for case in gpu_training.CASES}


def test_the_cases_cover_every_stage_and_precision() -> None:
    assert len(CASES) == len(gpu_training.CASES)
    pairs = {(case.stage, case.precision) for case in CASES.values()}
    assert pairs == {(0, "fp32")} | {
        (stage, precision) for stage in (1, 2, 3) for precision in ("fp32", "bf16", "fp16")
    }
    assert {size.hidden // size.heads for size in (gpu_training.FULL, gpu_training.QUICK)} == {64}


def test_what_cannot_run_says_why() -> None:
    assert gpu_training.most_ranks(0) == gpu_training.most_ranks(1) == 1
    assert gpu_training.most_ranks(8) == 2
    fp16, fewer = CASES["zero2-fp16"], CASES["zero2-bf16-to-1-rank"]
    assert gpu_training.why_not(fp16, "cpu", 1) == "DeepSpeed runs fp16 on GPUs only"
    assert gpu_training.why_not(fp16, "cuda", 1) is None
    assert gpu_training.why_not(fewer, "cuda", 1) == "needs two GPUs"
    assert gpu_training.why_not(fewer, "cuda", 2) is None
    with found_anew():
        told = gpu_training.why_not(CASES["zero3-bf16-apex"], "cuda", 1) or ""
        assert told.startswith("apex: ")
    with found_anew(STAND_IN):
        assert gpu_training.why_not(CASES["zero3-bf16-apex"], "cuda", 1) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_ends_with_that_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_training.main([]) == 2
    assert capsys.readouterr() == ("", "gpu-training: torch sees no GPU on this machine.\n")


def test_a_case_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_training.main(["--only", "zero1-fp32,zero4-fp8"])
    assert "zero4-fp8: none of zero0-fp32, zero1-fp32" in capsys.readouterr().err


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """One case in full on this machine's CPU, by the launcher of the GPU check."""
    folder = tmp_path_factory.mktemp("gpu_training")
    cases = [CASES["zero1-bf16"], CASES["zero1-fp16"]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "RANKS"):
            patch.delenv(name, raising=False)
        rows = gpu_training.measure(
            cases, device="cpu", ranks=1, size=gpu_training.QUICK, folder=folder
        )
    return folder, rows


def test_a_case_runs_here(trained: tuple[Path, list[dict]]) -> None:
    folder, (ran, left_out) = trained
    assert (ran["ok"], ran["found"]) == (True, "bits and losses the same"), ran
    assert (ran["device"], ran["world_size"], ran["steps"], ran["skipped"]) == ("cpu", 1, 4, 0)
    assert ran["loss_scales"] == [] and ran["last_loss"] < ran["first_loss"]
    assert (left_out["ok"], left_out["why_not"]) == (True, "DeepSpeed runs fp16 on GPUs only")
    runs = [folder / "zero1-bf16" / name for name in ("whole", "resumed")]
    assert gpu_runs.near(*runs) == []
    resumed = [x for x in gpu_runs.metrics(runs[1]) if x.get("event", "").startswith("resumed: ")]
    assert [line["step"] for line in resumed] == [2]


def test_differences_are_found(trained: tuple[Path, list[dict]], tmp_path: Path) -> None:
    folder, _ = trained
    whole, other = folder / "zero1-bf16" / "whole", tmp_path / "other"
    shutil.copytree(whole, other)
    assert gpu_runs.differences(whole, other) == []
    path = gpu_runs.last(other) / "optimizer.safetensors"
    moments = load_file(path)
    name = sorted(moments)[-1]
    moments[name].view(-1)[0] += 1e-3
    save_file(moments, path)
    lines = (other / "metrics.jsonl").read_text().splitlines()
    train = [number for number, line in enumerate(lines) if '"train"' in line]
    lines[train[-1]] = json.dumps(json.loads(lines[train[-1]]) | {"loss": 9.0, "sample_ids": [1]})
    (other / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    state = gpu_runs.state(other) | {"loss_scaling": {"cur_scale": 2.0}}
    (gpu_runs.last(other) / "state.json").write_text(json.dumps(state))
    count = len(gpu_runs.tensors(whole))
    assert gpu_runs.differences(whole, other) == [
        f"1 of {count} tensors differ, such as {name}",
        "the metrics differ",
        "the states of the loss scale differ",
    ]
    assert len(gpu_runs.near(whole, other)) == 2
    row = gpu_runs.facts(whole) | {"skipped": 3, "last_loss": float("nan")}
    assert gpu_runs.wrong(row, 4, whole) == [
        "the loss is not finite",
        f"the loss did not fall: {row['first_loss']:.3f} to nan",
        "3 of 4 updates were skipped",
        "the copy did not go on from the middle",
    ]


def test_a_run_that_fails_is_a_row(
    trained: tuple[Path, list[dict]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained
    case = replace(CASES["zero1-fp32"], words=("optim.lr=-1",))
    row = gpu_training.run_case(
        case, folder / "recipe.yaml", folder / "failing", 1, gpu_training.QUICK
    )
    assert row["ok"] is False
    assert row["found"].startswith("RuntimeError: whole: exit code 1; longpretrain train: recipe")
    assert "optim.lr: got -1" in row["found"]


def test_the_page() -> None:
    row = {"case": "zero3-fp16", "ranks": 2, "ok": True, "found": "bits the same", "steps": 16}
    row |= {"skipped": 3, "first_loss": 10.8, "last_loss": 9.1, "step_s": 0.05, "why_not": None}
    rows = [
        row | {"loss_scales": [65536.0, 8192.0]},
        {
            "case": "zero0-fp32",
            "ranks": 2,
            "ok": False,
            "found": "RuntimeError: no",
            "why_not": None,
        },
        {"case": "zero1-fp16-apex", "ranks": 2, "ok": True, "found": "", "why_not": "apex: none"},
    ]
    lines = gpu_report.training_table(rows)
    cells = "| zero3-fp16 | 2 | ok | bits the same | 16 (3) | 10.800 to 9.100 | 65536 to 8192 |"
    assert lines[2] == f"{cells} 0.050 |"
    assert lines[3] == "| zero0-fp32 | 2 | FAILED | RuntimeError: no | - | - | - | - |"
    assert lines[-1] == "* zero1-fp16-apex: apex: none"
    machine = {"gpu": "NVIDIA A100"}
    results = {"date": "2026-01-31", "ok": False, "machine": machine, "training": rows}
    assert "## Training\n" in gpu_report.render(results)
