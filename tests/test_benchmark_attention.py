"""The attention benchmark: its arithmetic, its command line, and a tiny run. No time is judged."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark_scripts import scripts_importable

SHAPE = {"tokens": 4096, "heads": 12, "attention_window": 512}
CALLS = ("forward", "forward+backward")


with scripts_importable():
    import attention as benchmark
    import attention_arguments
    import attention_cells
    import attention_equality
    import attention_ours
    import attention_peers
    import attention_report
    import attention_results
    import attention_runs
    import attention_targets
    import machine
    import timing


def _row(section: str, case: str, call: str, ms: float, condition: str = "default") -> dict:
    return {
        "section": section, "case": case, "dtype": "fp32", **SHAPE, "call": call,
        "median_ms": ms, "min_ms": ms, "samples": 3, "disturbed_samples": 0,
        "is_disturbed": False, "condition": condition,
    }  # fmt: skip


def _data() -> dict[str, Any]:
    """Results of an imaginary machine: ours takes 10 and 40 ms, HF 200 + 100 and 800 + 300."""
    timings = []
    for condition, scale in (("default", 1), ("kept", 2)):
        for call, ours, hf, projections in ((CALLS[0], 10, 300, 100), (CALLS[1], 40, 1100, 300)):
            hf_ms = projections + (hf - projections) / scale
            for case, ms in (("ours", ours), ("hf", hf_ms), ("hf projections", projections)):
                timings.append(_row("headline", case, call, ms, condition))
    growth = [
        _row("growth", "ours", CALLS[0], 10) | {"tokens": 4096},
        _row("growth", "ours", CALLS[0], 41) | {"tokens": 16384},
    ]
    memory = [
        {"case": "ours", "dtype": "fp32", **SHAPE, "qkv_mib": 36.0, "growth_mib": 90.0,
         "multiple_of_qkv": 2.5, "peak_rss_gib": 0.5},
        {"case": "hf", "dtype": "fp32", **SHAPE, "tokens": 8192, "error": "not within 8 GiB: no"},
    ]  # fmt: skip
    probes = {"before": {"avx512": 500.0}, "after": {"avx512": 490.0}, "why_not": None}
    return {
        "benchmark": "attention", "format": attention_arguments.FORMAT,
        "date": "2026-01-31T00:00:00+00:00",
        "machine": {
            "cpu": "a processor", "architecture": "x86_64", "instruction_sets": ["avx2"],
            "cores": 2, "memory_gib": 8.0, "system": "Linux", "c_library": "glibc 2.36",
            "transparent_huge_pages": {"enabled": "[madvise]", "defrag": "[madvise]"},
            "memory_environment": {}, "load_average_at_start": [0, 0, 0],
        },
        "versions": {"python": "3.11", "commit": "abc-dirty"},
        "kernels": {"compiler": "g++ 12.2.0"}, "why_no_kernels": None,
        "conditions": {name: dict(x) for name, x in attention_cells.CONDITIONS.items()},
        "settings": {
            "backend": "fused", "threads": 2, "seconds": 1.0, "only": ["headline"],
            "peers": ["hf"], "dtypes": ["fp32"], "lengths": [4096, 16384], "windows": [512],
            "heads": [12], "mode": "default", "cpu_level": None,
        },
        "headline_shape": {**SHAPE, "dtype": ""},
        "equality": [
            {"peer": "hf", "dtype": "fp32", "tensor": "output", "difference": 1e-6,
             "limit": 1e-5, "is_equal": True},
        ],
        "timings": timings + growth, "memory": memory, "peak": {"headline default fp32": 500.0},
        "peak_probes": {"headline default fp32": probes},
        "levels": {"headline default fp32": "avx512"},
        "not_measured": ["flex: a reason"], "cells_done": [], "resumed": [],
    }  # fmt: skip


@pytest.fixture
def results() -> attention_results.Results:
    return attention_results.Results(_data())


def test_a_ratio_subtracts_projections_and_keeps_conditions_apart(results):
    assert results.time_ms("headline", "hf", "fp32", CALLS[0]) == 200
    assert results.time_ms("headline", "hf", "fp32", CALLS[0], net=False) == 300
    assert results.ratio("headline", "hf", "fp32", CALLS[0]) == 20
    assert results.ratio("headline", "hf", "fp32", CALLS[1], condition="kept") == 10
    assert results.ratio("avx2", "hf", "fp32", CALLS[0]) is None
    assert results.ratio("headline", "blocked", "fp32", CALLS[0]) is None


def test_the_share_of_peak_is_told_with_and_without_the_recomputed_product(results):
    whole = results.peak_share("headline", "fp32", CALLS[1])
    lean = results.peak_share("headline", "fp32", CALLS[1], recomputed=False)
    assert whole == pytest.approx(lean * 7 / 6)
    assert results.peak_share("headline", "fp32", CALLS[0]) == results.peak_share(
        "headline", "fp32", CALLS[0], recomputed=False
    )
    assert results.peak_share("headline", "fp32", CALLS[0], condition="kept") is None


@pytest.mark.parametrize("positions", [(0,), (0, 7, 40), ()], ids=["first", "three", "none"])
@pytest.mark.parametrize("window", [2, 16, 200])
def test_useful_operations_are_those_of_the_pairs_that_are_reached(window, positions):
    tokens, heads = 50, 3
    pairs = 0
    for query in range(tokens):
        for key in range(tokens):
            is_near = abs(query - key) <= window // 2
            pairs += is_near or query in positions or key in positions
    for call, recomputed, products in (
        (CALLS[0], True, 2), (CALLS[0], False, 2), (CALLS[1], True, 7), (CALLS[1], False, 6),
    ):  # fmt: skip
        assert attention_results.useful_operations(
            tokens=tokens, heads=heads, attention_window=window, call=call, positions=positions,
            recomputed=recomputed,
        ) == products * 2 * attention_ours.HEAD_SIZE * pairs * heads  # fmt: skip


def test_samples_beside_a_busy_program_are_dropped(monkeypatch):
    others = iter([0.0, 0.0, 0.0, 9.0, 9.0, 9.0])  # of the processor: before and after each
    monkeypatch.setattr(timing, "others_cpu_s", lambda: next(others))
    case = timing.Case("sum", lambda: sum(range(10)), lambda: None)
    monkeypatch.setattr(timing, "_MAX_REPEATS", 4)
    taken = timing.take_samples([case], timing.Pace(0.0, min_rounds=3, batch_s=1.0))["sum"]
    assert (len(taken.kept_s), len(taken.dropped_s)) == (8, 4)
    assert taken.samples_s == taken.kept_s
    assert not taken.is_disturbed


def test_with_too_few_undisturbed_samples_all_count_and_it_is_said():
    taken = timing.Timing(kept_s=[1.0, 2.0], dropped_s=[3.0])
    assert taken.is_disturbed
    assert (taken.median_s, taken.min_s) == (2.0, 1.0)
    assert not timing.Timing(kept_s=[1.0, 2.0, 3.0], dropped_s=[9.0]).is_disturbed


def test_a_case_that_finds_no_memory_is_left_out_and_the_others_are_timed():
    def too_large() -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")

    cases = [timing.Case("big", too_large, int), timing.Case("small", int, int)]
    taken = timing.take_samples(cases, timing.Pace(0.0, min_rounds=1, batch_s=0.0))
    assert taken["big"].failure == timing.OUT_OF_MEMORY
    assert taken["small"].samples_s
    with pytest.raises(RuntimeError, match="other"):
        bug = timing.Case("bug", lambda: exec("raise RuntimeError('other')"), int)
        timing.take_samples([bug], timing.Pace(0.0, min_rounds=1))


def test_targets_are_judged_under_default_memory_and_show_the_other(results):
    found = {target.name: target for target in attention_targets.targets(results)}
    hf = found["vs HF Longformer minus projections, forward fp32"]
    assert (hf.value, hf.kept, hf.is_met) == (20, 10, True)
    assert hf.texts() == ("20.0x", "10.0x", ">= 18.0x", "met")
    both = found["vs HF Longformer minus projections, forward+backward fp32"]
    assert (both.value, both.kept, both.is_met) == (20, 10, False)
    grown = found["time, 4,096 -> 16,384 tokens, forward fp32"]
    assert (grown.value, grown.is_met) == (pytest.approx(4.1), True)
    assert found["extra memory / (q+k+v), forward+backward fp32"].is_met
    assert found["cost of documents, forward fp32"].texts()[3] == "not measured"
    assert not any("bf16" in name for name in found)  # not among the run's dtypes


def test_no_target_is_judged_where_a_backend_stands_in(results):
    results.data["settings"]["backend"] = "portable"
    results.data["why_no_kernels"] = "the compiled library is not built: run make"
    assert all(target.is_met is None for target in attention_targets.targets(results))
    text = attention_report.report(results, with_verdicts=True)
    assert "stands in for the compiled one: the compiled library is not built" in text
    assert "0 of 0 measured targets met" in text


def test_the_report_shows_both_conditions_side_by_side(results):
    lines = attention_report.report(results, with_verdicts=True).splitlines()
    row = next(line for line in lines if line.startswith("  HF Longformer, minus projections"))
    assert row.split()[-6:] == ["20.00x", "/", "10.00x", "20.00x", "/", "10.00x"]
    text = "\n".join(lines)
    for part in (
        "enabled [madvise]", "MALLOC_MMAP_MAX_=0", "commit abc-dirty", "compiled by g++ 12.2.0",
        "instruction sets used: avx512", "no recomputed product", "FlashAttention's papers",
        "not within 8 GiB", "Not measured: flex: a reason", "NOT MET",
    ):  # fmt: skip
        assert part in text, part


def test_the_json_is_drawn_again_and_holds_the_ratios(tmp_path, results, capsys):
    path = tmp_path / "attention.json"
    benchmark._write(results.data, path)
    again = attention_arguments.read_results(path)
    assert attention_report.report(attention_results.Results(again), with_verdicts=False) == (
        attention_report.report(results, with_verdicts=False)
    )
    ratios = again["summary"]["ratios_to_ours"]
    assert {"section": "headline", "case": "hf", "dtype": "fp32", "call": CALLS[0],
            "default": 20.0, "kept": 10.0} in ratios  # fmt: skip
    benchmark.main(["--redraw", str(path), "--check"])
    assert "HF Longformer" in capsys.readouterr().out
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words",
    [
        ["--windows", "0"], ["--windows", "65"], ["--windows", "64,-2"], ["--lengths", "-512"],
        ["--lengths", "many"], ["--lengths", ""], ["--lengths", "512,,1024"], ["--heads", "0"],
        ["--heads", "1.5"], ["--threads", "0"], ["--seconds", "-1"], ["--seconds", "nan"],
        ["--peers", "nobody"], ["--only", "nothing"], ["--dtypes", "fp8"], ["--backend", "magic"],
        ["--quick", "--full"], ["--redraw", "missing.json"], ["--redraw", "text.json"],
        ["--redraw", "list.json"], ["--redraw", "other.json"], ["--resume", "half.json"],
        ["--out", "text.json"], ["--out", "text.json/below"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_bad_input_is_one_line_and_code_2(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("text.json").write_text("no JSON", encoding="utf-8")
    Path("list.json").write_text("[1]", encoding="utf-8")
    Path("other.json").write_text('{"benchmark": "attention"}', encoding="utf-8")
    half = {name: x for name, x in _data().items() if name != "timings"}
    Path("half.json").write_text(json.dumps(half), encoding="utf-8")
    with pytest.raises(SystemExit) as left:
        benchmark.main(words)
    assert left.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("attention.py: error: ")


def test_a_run_of_another_machine_is_not_resumed(results, tmp_path):
    with pytest.raises(ValueError, match="wanted cpu a processor, as when it started"):
        benchmark._resumed(copy.deepcopy(results.data), tmp_path / "a.json")


def test_each_condition_has_its_own_environment(monkeypatch):
    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")
    default = attention_cells.environment("default")
    assert not set(machine.MALLOC_SETTINGS) & set(default)
    kept = attention_cells.environment("kept", "avx2")
    assert kept["MALLOC_MMAP_MAX_"] == "0"
    assert kept[attention_cells.LEVEL] == "avx2"
    assert "MALLOC_TOP_PAD_" not in kept


def test_kernels_of_another_level_are_not_taken_for_avx2(monkeypatch):
    monkeypatch.setattr(attention_cells, "why_not", lambda backend: None)
    monkeypatch.setattr(attention_cells, "kernel_facts", lambda: {"used": "avx512"})
    assert attention_cells._why_not_at("", "fused") is None
    assert attention_cells._why_not_at("avx512", "fused") is None
    told = attention_cells._why_not_at("avx2", "fused")
    assert told == "asked for avx2, but the library uses avx512"
    monkeypatch.setattr(attention_cells, "why_not", lambda backend: "it is not built")
    assert attention_cells._why_not_at("avx2", "portable") == "skipped, as it is not built"


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("peer", ["blocked", "sdpa", "portable"])
def test_peers_compute_what_ours_computes(peer, dtype):
    torch.manual_seed(0)
    rows = attention_equality.compare_outputs(
        [peer], dtype=dtype, attention_window=32, backend=attention_ours.our_backend()
    )
    assert [row["tensor"] for row in rows] == ["output", *(f"gradient of {x}" for x in "qkv")]
    assert all(row["is_equal"] for row in rows), rows


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_blocked_sdpa_runs_the_fused_kernel_of_torch(dtype):
    shape = attention_ours.Shape(256, 2, 64, dtype)
    runnable = attention_peers.build_blocked(shape)["blocked"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        runnable.run_both()
    names = {event.key for event in profile.key_averages()}
    fused = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert {fused, f"{fused}_backward"} <= names


def test_shortened_inputs_share_memory_and_are_leaves_of_their_own():
    long = attention_ours.our_inputs(attention_ours.Shape(128, 2, 16, "fp32"))
    short = long.shortened(attention_ours.Shape(32, 2, 16, "fp32"))
    assert short.qkv_BNHD[0].data_ptr() == long.qkv_BNHD[0].data_ptr()
    attention_ours.build_ours(short, backend="portable").run_both()
    assert short.qkv_BNHD[0].grad.shape == (1, 32, 2, 64)
    assert long.qkv_BNHD[0].grad is None


@pytest.mark.parametrize(
    ("peer", "tokens", "reason"),
    [
        ("sdpa", 16_384, "beyond 8,192"), ("flex", 32_768, "beyond 16,384"),
        ("hf", 1000, "multiples of the attention window"), ("bigbird", 512, "it is dense"),
        ("hf", 1024, None), ("bigbird", 1024, None),
    ],
)  # fmt: skip
def test_peers_say_what_they_cannot_run(peer, tokens, reason):
    told = attention_peers.PEERS[peer].why_not(attention_ours.Shape(tokens, 2, 512, "fp32"))
    assert told == reason if reason is None else reason in (told or "")


def test_a_peer_that_grows_too_slow_is_left_out():
    shape = attention_ours.Shape(4096, 2, 512, "fp32")
    told = attention_runs._why_not("sdpa", shape, {"sdpa": (2048, 0.2)}, 0.5)
    assert told == {"sdpa": "about 0.8 s for one forward, limit 0.5 s"}
    assert not attention_runs._why_not("blocked", shape, {"blocked": (2048, 0.2)}, 0.5)


def test_a_part_that_ends_early_is_told_and_left_for_resuming(tmp_path, monkeypatch, capsys):
    stopped = {
        "cell": "growth default fp32 2 512",
        "failed": f"{attention_cells.ENDED_EARLY} code -9",
    }
    monkeypatch.setattr(benchmark, "measure_cells", lambda args, cells: iter([stopped]))
    words = ["--quick", "--only", "growth", "--dtypes", "fp32", "--lengths", "512"]
    with pytest.raises(SystemExit) as left:
        benchmark.main([*words, "--out", str(tmp_path)])
    assert left.value.code == 1
    assert "--resume" in capsys.readouterr().err
    (path,) = tmp_path.glob("*.json")
    data = json.loads(path.read_text(encoding="utf-8"))
    assert data["cells_done"] == []
    assert data["not_measured"] == ["growth default fp32 2 512: its process ended with code -9"]
    monkeypatch.setattr(benchmark, "measure_cells", lambda args, cells: iter([]))
    benchmark.main(["--resume", str(path)])
    assert json.loads(path.read_text(encoding="utf-8"))["not_measured"] == []


def test_a_tiny_run_writes_its_files_and_resumes(tmp_path, capsys):
    words = "--quick --only headline,growth,memory --dtypes fp32 --peers blocked --lengths 512"
    benchmark.main([*words.split(), "--seconds", "0.1", "--out", str(tmp_path)])
    assert "Wrote" in capsys.readouterr().out
    (path,) = tmp_path.glob("*.json")
    (plot,) = tmp_path.glob("*.png")
    assert plot.read_bytes().startswith(b"\x89PNG")
    data = json.loads(path.read_text(encoding="utf-8"))
    timed = {(row["section"], row["condition"], row["case"]) for row in data["timings"]}
    assert timed == {
        (*where, case)
        for where in (("headline", "default"), ("headline", "kept"), ("growth", "default"))
        for case in ("ours", "blocked")
    }
    assert [row["case"] for row in data["memory"]] == ["ours", "blocked"]
    last = data["cells_done"].pop()
    assert last == "memory fp32"
    rows, data["memory"] = data["memory"], []
    path.write_text(json.dumps(data), encoding="utf-8")
    benchmark.main(["--resume", str(path)])
    again = json.loads(path.read_text(encoding="utf-8"))
    assert again["timings"] == data["timings"]
    assert [row["case"] for row in again["memory"]] == [row["case"] for row in rows]
    assert len(again["resumed"]) == 1
