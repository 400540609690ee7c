"""The compiled library: how it is found and loaded, what is said where there is none, and which
instruction set of it runs.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from test_attention_main import run_python

from longpretrain.attention import library, why_not


def test_the_library_is_built_wherever_there_is_a_compiler() -> None:
    """All other tests of the kernels skip without it: this one tells."""
    if shutil.which("g++") is None:
        pytest.skip("this machine has no g++")
    assert why_not("fused") is None


WITHOUT_LIBRARY = """
import logging, torch
logging.basicConfig(level=logging.INFO, format="%(message)s")
from longpretrain.attention import AttentionPattern, sliding_attention, why_not
assert not hasattr(torch.ops.longpretrain, "sliding_attention_fused"), "loaded by an import"
print(why_not("fused"))
x = torch.ones(1, 5, 1, 2)
print(sliding_attention(x, x, x, AttentionPattern(1)).sum().item())
"""


def test_a_library_that_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "kernels.so"
    monkeypatch.setenv("LONGPRETRAIN_LIBRARY", str(path))
    load = library._load_once.__wrapped__
    assert load() == f"the compiled library is missing: there is no file {path}"
    path.write_bytes(b"no machine code")
    assert load().startswith(f"the compiled library cannot be loaded: {path}: ")


def test_a_library_that_is_another(tmp_path: Path) -> None:
    """In a process of its own, as a library stays loaded."""
    done = run_python("-c", WITHOUT_LIBRARY, LONGPRETRAIN_LIBRARY=torch._C.__file__)
    assert done.returncode == 0, done.stderr
    reason, value = done.stdout.splitlines()
    assert reason == (
        f"{torch._C.__file__} is no compiled library of this version: unset LONGPRETRAIN_LIBRARY"
    )
    assert value == "10.0"
    assert f"attention runs on the portable backend: {reason}" in done.stderr.splitlines()


def load_without_library(patch: pytest.MonkeyPatch, file: Path, compiler: str | None) -> str:
    """The reason, where Python imports ``file`` and finds no library beside it."""
    patch.delenv("LONGPRETRAIN_LIBRARY", raising=False)
    patch.setattr(library.importlib.util, "find_spec", lambda name: None)
    patch.setattr(library.shutil, "which", lambda name: compiler)
    patch.setattr(library, "__file__", str(file))
    reason = library._load_once.__wrapped__()
    assert reason is not None
    return reason


def test_a_missing_library_names_the_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = tmp_path / "longpretrain" / "attention" / "library.py"
    reason = load_without_library(monkeypatch, module, "/usr/bin/g++")
    assert reason.startswith("the compiled library is not built: run pip install . once more")
    reason = load_without_library(monkeypatch, module, None)
    assert reason.startswith("the compiled library is not built: install a C++ compiler")
    assert reason.endswith("then run pip install . once more in a checkout of longpretrain")


def test_the_way_out_of_a_checkout_is_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """There ``pip install .`` leads back here: it fills site-packages, which Python asks later."""
    (tmp_path / "csrc").mkdir()
    (tmp_path / "pyproject.toml").touch()
    module = tmp_path / "longpretrain" / "attention" / "library.py"
    reason = load_without_library(monkeypatch, module, "/usr/bin/g++")
    assert reason.startswith(
        f"the compiled library is not built: run pip install -e . (or make setup) in {tmp_path}"
    )
    assert "start Python in another folder" in reason


MANY_FIRST_CALLS = """
import threading, torch
from longpretrain.attention import AttentionPattern, sliding_attention
assert not hasattr(torch.ops.longpretrain, "sliding_attention_fused"), "loaded by an import"
x, sums = torch.ones(1, 5, 1, 2), []
def call():
    sums.append(sliding_attention(x, x, x, AttentionPattern(1), backend="fused").sum().item())
threads = [threading.Thread(target=call) for _ in range(4)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
print(sums)
"""


@pytest.mark.usefixtures("library")
def test_first_calls_at_the_same_time_load_it_once() -> None:
    done = run_python("-c", MANY_FIRST_CALLS)
    assert (done.returncode, done.stdout) == (0, "[10.0, 10.0, 10.0, 10.0]\n"), done.stderr


# The instruction set that LONGPRETRAIN_CPU_LEVEL asks for


EACH_BACKEND = """
import torch
from longpretrain.attention import AttentionPattern, sliding_attention, why_not
x = torch.ones(1, 5, 1, 2)
def told(call, *words, **names):
    try:
        print(call(*words, **names))
    except ValueError as error:
        print(error)
for backend in ("auto", "fused", "portable"):
    told(lambda: sliding_attention(x, x, x, AttentionPattern(1), backend=backend).sum().item())
    told(why_not, backend)
"""


@pytest.mark.usefixtures("library")
def test_a_mistyped_instruction_set_is_an_error() -> None:
    """Also with auto, and every time; the portable backend has none."""
    done = run_python("-c", EACH_BACKEND, LONGPRETRAIN_CPU_LEVEL="avx51")
    assert done.returncode == 0, done.stderr
    *refused, value, reason = done.stdout.splitlines()
    assert len(refused) == 4
    for line in refused:
        assert line.startswith(
            "environment variable LONGPRETRAIN_CPU_LEVEL: got avx51; wanted plain"
        )
    assert (value, reason) == ("10.0", "None")


@pytest.mark.parametrize(
    ("built", "machine", "used"),
    [
        ("plain, avx2, avx512", "plain, avx2", "avx2"),
        ("plain, avx2", "plain, avx2, avx512", "avx2"),
        ("plain", "plain", "plain"),
    ],
    ids=["not_of_the_processor", "not_compiled", "neither"],
)
def test_an_instruction_set_that_cannot_be_had_is_an_error(
    built: str, machine: str, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"built": built, "machine": machine, "used": used}
    monkeypatch.setattr(library, "_facts", lambda: facts)
    monkeypatch.setenv("LONGPRETRAIN_CPU_LEVEL", "avx512")
    wanted = "plain or avx2" if used == "avx2" else "plain"
    with pytest.raises(ValueError, match=f"got avx512; wanted {wanted}, which the library has"):
        library._check_level()
    for level in (used, ""):
        monkeypatch.setenv("LONGPRETRAIN_CPU_LEVEL", level)
        library._check_level()
