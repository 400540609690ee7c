"""``python -m longpretrain.attention``: the report on backends, and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from longpretrain.attention import __main__, fused, why_not


def run_python(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_instruction_set_that_runs_here() -> None:
    if reason := why_not("fused"):
        pytest.skip(reason)
    facts = fused.kernel_facts()
    levels = [
        level for level in facts["built"].split(", ") if level in facts["machine"].split(", ")
    ]
    assert "plain" in levels
    with ThreadPoolExecutor(max_workers=2) as pool:
        reports = pool.map(
            lambda level: run_python("-m", "longpretrain.attention", LONGPRETRAIN_CPU_LEVEL=level),
            levels,
        )
    for level, done in zip(levels, reports, strict=True):
        assert done.returncode == 0, done.stdout + done.stderr
        assert "\nfused: yes\n" in done.stdout
        assert f"instruction sets: {level} in use" in done.stdout
        assert "FAILED" not in done.stdout


def test_the_report_without_library(tmp_path: Path) -> None:
    missing = str(tmp_path / "kernels.so")
    done = run_python("-m", "longpretrain.attention", LONGPRETRAIN_LIBRARY=missing)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"fused: no: the compiled library is missing: there is no file {missing}" in done.stdout
    assert done.stdout.count("  ok     portable") == 6


def test_the_report_fails_on_wrong_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(__main__, "LIMITS", {torch.float32: 1e-12})
    assert __main__.main([]) == 1
    assert "  FAILED portable float32  window: " in capsys.readouterr().out


def test_another_instruction_set_than_asked_for_is_no_report() -> None:
    if reason := why_not("fused"):
        pytest.skip(reason)
    done = run_python("-m", "longpretrain.attention", LONGPRETRAIN_CPU_LEVEL="avx51")
    assert (done.returncode, done.stdout) == (2, "")
    assert "LONGPRETRAIN_CPU_LEVEL: got avx51; wanted plain" in done.stderr.splitlines()[-1]


def test_the_report_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        __main__.main(["--help"])
    assert "LONGPRETRAIN_CPU_LEVEL" in capsys.readouterr().out
