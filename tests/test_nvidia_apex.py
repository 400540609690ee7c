"""Whose apex is installed: NVIDIA's is used, PyPI's is refused by name, what is broken says why.

NVIDIA's cannot be built without CUDA: here a stand-in with its interface is found in its place.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from apex_helper import STAND_IN, found_anew
from ranks_helper import ROOT, rank_environment
from told import FORM

from longpretrain.nvidia_apex import why_not

PYPI = ROOT / "build" / "pypi-apex"
has_none = pytest.mark.skipif(importlib.util.find_spec("apex") is not None, reason="has an apex")


@has_none
def test_what_is_not_installed() -> None:
    with found_anew():
        assert why_not("layer_norm", "cuda") == "no package of that name is installed"


def test_nvidias_runs_on_gpus_alone() -> None:
    with found_anew(STAND_IN):
        assert why_not("layer_norm", "cuda") is None
        assert why_not("adam", "cuda") is None
        assert why_not("adam", "cpu") == "its kernels run on GPUs, and this is the CPU"


def test_a_build_without_the_extensions(tmp_path: Path) -> None:
    shutil.copytree(STAND_IN / "apex", tmp_path / "apex")
    with found_anew(tmp_path):
        for part, module in (("layer_norm", "fused_layer_norm_cuda"), ("adam", "amp_C")):
            assert why_not(part, "cuda") == (
                f"NVIDIA's apex in {tmp_path / 'apex'} was built without its CUDA extensions "
                f"(there is no module {module})"
            )


def test_a_build_for_another_torch(tmp_path: Path) -> None:
    shutil.copytree(STAND_IN, tmp_path / "site")
    broken = "raise ImportError('fused_layer_norm_cuda.so: undefined symbol: _ZN3c10\\nmore')"
    (tmp_path / "site" / "fused_layer_norm_cuda.py").write_text(broken, encoding="utf-8")
    with found_anew(tmp_path / "site"):
        assert why_not("layer_norm", "cuda") == (
            "NVIDIA's apex does not load (ImportError: fused_layer_norm_cuda.so: undefined symbol: "
            "_ZN3c10)"
        )
        assert why_not("adam", "cuda") is None


@has_none
def test_sources_that_lie_about(tmp_path: Path) -> None:
    """A clone of the repository in the working folder is a package to Python, of a kind."""
    (tmp_path / "apex" / "csrc").mkdir(parents=True)
    with found_anew(tmp_path):
        told = why_not("adam", "cuda") or ""
    assert f"finds only {tmp_path / 'apex'}, a folder without a package in it" in told


def test_somebody_elses_package(tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    own = tmp_path / "apex" / "__init__.py"
    own.write_text("raise SystemExit('nobody may import this')", encoding="utf-8")
    with found_anew(tmp_path):
        told = why_not("layer_norm", "cuda")
    assert told == f"{own.parent} is another package of that name, not NVIDIA's"


# --- PyPI's, the real one ------------------------------------------------------------------------

PYPI_CHECK = """
import logging, sys
ran = []
sys.addaudithook(lambda event, args: event == "exec" and "pypi-apex" in
                 getattr(args[0], "co_filename", "") and ran.append(args[0].co_filename))
import torch
from longpretrain import nvidia_apex
from longpretrain.cli import main
from longpretrain.engine import zero
from longpretrain.model.layer_norm import LayerNorm, why_not
logging.basicConfig(format="%(message)s")
print(nvidia_apex.why_not("layer_norm", "cuda"))
why_not("auto", "cuda"), why_not("auto", "cuda")
LayerNorm(8, eps=1e-5)(torch.ones(2, 8))
zero._deepspeed()
code = main(["train", *sys.argv[1:]])
print(f"of its code ran: {ran}")
sys.exit(code)
"""


def test_pypis_package_is_named_refused_and_never_imported(small_run: Path, tmp_path: Path) -> None:
    if not (PYPI / "apex").is_dir():
        pytest.skip("PyPI's apex is not in build/pypi-apex: make pypi-apex")
    environment = rank_environment()
    environment["PYTHONPATH"] = f"{PYPI}:{environment['PYTHONPATH']}"
    words = [small_run / "recipe.yaml", f"run.dir={tmp_path / 'run'}", "kernels.layer_norm=apex"]
    ran = subprocess.run(
        [sys.executable, "-c", PYPI_CHECK, *map(str, words)],
        env=environment, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert ran.returncode == 2, ran.stderr
    told, state = ran.stdout.splitlines()
    assert told == (
        f"{PYPI / 'apex'} is not NVIDIA's but PyPI's package of that name: version 0.9.10.dev0, "
        '"Pyramid toolkit to add Velruse, Flash Messages,CSRF, ReCaptcha and Sessions"'
    )
    assert state == "of its code ran: []"
    announced, *_, refused = ran.stderr.splitlines()
    assert announced == f"LayerNorm runs on torch's kernel: {told}"  # on a GPU
    assert ran.stderr.count(announced) == 1
    assert FORM.fullmatch(refused), ran.stderr
    assert refused.startswith(
        f"longpretrain train: recipe key kernels.layer_norm: got apex, but {told}; wanted "
    )
    assert "Build NVIDIA's from https://github.com/NVIDIA/apex" in refused
    assert not (tmp_path / "run").exists()
