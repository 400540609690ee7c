"""What `make test` builds of the CUDA kernels, once for two layers, and when it builds nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from cuda_check import __main__ as command
from cuda_check import toolchain
from cuda_check.toolchain import NoNvccError, Nvcc, ToolError, find_nvcc, whole

KERNEL = """
#include "number.h"
__global__ void store(float* x) { x[threadIdx.x] = kNumber; }
void start(float* x) { store<<<1, 32>>>(x); }
"""


def nvcc() -> Nvcc:
    try:
        return find_nvcc()
    except NoNvccError as error:
        pytest.skip(str(error))


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(toolchain, "BUILD", tmp_path / "build")
    (tmp_path / "number.h").write_text("constexpr float kNumber = 1.5f;\n")
    (tmp_path / "store.cu").write_text(KERNEL)
    return tmp_path / "store.cu"


def test_one_build_has_what_two_layers_need(source: Path) -> None:
    folder = whole(nvcc(), source)
    assert {path.name for path in folder.iterdir()} == {"store.ptx", "store.cubin", "host.o", "log"}
    assert ".loc" in (folder / "store.ptx").read_text()
    assert "Compiling entry function" in (folder / "log").read_text()
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_it_is_built_again_when_a_header_changes_and_only_then(source: Path) -> None:
    compiler = nvcc()
    first = whole(compiler, source)
    built_ns = first.stat().st_mtime_ns
    os.utime(source)  # the same content
    assert whole(compiler, source) == first and first.stat().st_mtime_ns == built_ns
    (source.parent / "number.h").write_text("constexpr float kNumber = 2.5f;\n")
    second = whole(compiler, source)
    assert second != first and not first.exists()


def test_what_nvcc_refuses_leaves_nothing_behind(source: Path) -> None:
    source.write_text("__global__ void store(float* x) { x = nonsense; }\n")
    with pytest.raises(ToolError, match="nonsense"):
        whole(nvcc(), source)
    assert list((source.parent / "build").iterdir()) == []


def test_without_nvcc_the_tests_pass_and_say_so_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDACXX", raising=False)
    assert command.main(["budgets", "--chips", "80", "--in-tests"]) == 0
    told = capsys.readouterr()
    assert told.out.startswith("skipped: the budgets of the CUDA kernels")
    assert "there is no nvcc on PATH or in CUDACXX" in told.out
    assert told.out.count("\n") == 1 and told.err == ""


def test_an_nvcc_that_is_named_and_lacking_is_no_skip(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CUDACXX", "/nowhere/nvcc")
    assert command.main(["budgets", "--chips", "80", "--in-tests"]) == 2
    assert "CUDACXX: got /nowhere/nvcc" in capsys.readouterr().err


def test_an_nvcc_that_cannot_build_the_library_is_as_good_as_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Debian 12 has such a one."""
    old = tmp_path / "nvcc"
    old.write_text("#!/bin/sh\necho Cuda compilation tools, release 11.8, V11.8.89\n")
    old.chmod(0o755)
    monkeypatch.setenv("CUDACXX", str(old))
    assert command.main(["budgets", "--chips", "80", "--in-tests"]) == 0
    told = capsys.readouterr()
    assert f"{old} is nvcc 11.8.89, older than 12;" in told.out and told.err == ""


def test_an_empty_cudacxx_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDACXX", raising=False)
    compiler = nvcc()
    monkeypatch.setenv("CUDACXX", "")
    assert find_nvcc() == compiler
