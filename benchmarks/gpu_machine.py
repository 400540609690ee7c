"""What a machine needs for `make gpu-check`, said in one sentence where it is missing.

python benchmarks/gpu_machine.py      # before anything is built
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OLDEST = (8, 0)
LEAST_MEMORY_GIB = 8


class NotHereError(Exception):
    """This machine cannot run the check; the message says why and what would help."""


@dataclass(frozen=True)
class Facts:
    """What of a machine decides whether the check can run; plain data, so that tests can make it.

    Args:
        driver_sees_gpu: the driver's device files or its tool are there.
        torch_cuda: the CUDA version of torch; None: torch without CUDA.
        gpus: name and compute capability of each GPU that torch sees.
        nvcc: path of the compiler; None: none is found.
        cxx: the same of the C++ compiler.
    """

    driver_sees_gpu: bool
    torch_version: str
    torch_cuda: str | None
    gpus: Sequence[tuple[str, tuple[int, int]]]
    nvcc: str | None
    cxx: str | None


def read_facts() -> Facts:
    """Of this machine."""
    import torch

    gpus = []
    if torch.version.cuda is not None and torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            name = torch.cuda.get_device_name(device)
            gpus.append((name, torch.cuda.get_device_capability(device)))
    return Facts(
        driver_sees_gpu=_driver_sees_gpu(),
        torch_version=torch.__version__,
        torch_cuda=torch.version.cuda,
        gpus=gpus,
        nvcc=os.environ.get("CUDACXX") or shutil.which("nvcc"),
        cxx=shutil.which(os.environ.get("CXX", "g++")),
    )


def _driver_sees_gpu() -> bool:
    if Path("/dev/nvidia0").exists():
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    asked = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)
    return asked.returncode == 0 and "GPU" in asked.stdout


def need_gpu(facts: Facts) -> None:
    """Raises NotHereError with the first thing that is missing."""
    if not facts.driver_sees_gpu and not facts.gpus:
        raise NotHereError(
            "no NVIDIA GPU is found on this machine (neither /dev/nvidia0 nor nvidia-smi); run it "
            "on one with an A100, H100 or any other GPU of compute capability 8.0 or newer."
        )
    if facts.torch_cuda is None:
        raise NotHereError(
            f"torch {facts.torch_version} is built without CUDA; install a CUDA build of the same "
            "version into .venv (https://pytorch.org/get-started/locally)."
        )
    if not facts.gpus:
        raise NotHereError(
            f"torch {facts.torch_version} does not see the GPU: its CUDA {facts.torch_cuda} may be "
            "newer than the driver (nvidia-smi shows what the driver takes), or "
            "CUDA_VISIBLE_DEVICES is empty."
        )
    name, capability = facts.gpus[0]
    if capability < OLDEST:
        shown = ".".join(map(str, capability))
        raise NotHereError(
            f"{name} has compute capability {shown} and the kernels need 8.0 or newer; on this GPU "
            "attention runs on the portable backend, and there is nothing to check."
        )
    if facts.nvcc is None:
        raise NotHereError(
            "there is no nvcc on PATH or in CUDACXX; install the CUDA toolkit, best the version of "
            f"torch ({facts.torch_cuda}). Training alone is tried without it, by "
            "`python benchmarks/gpu_training.py`."
        )
    if facts.cxx is None:
        raise NotHereError("there is no C++ compiler; install g++ (Debian: apt-get install g++).")


def describe() -> dict[str, Any]:
    """GPU, driver and versions, for the results."""
    import torch

    properties = torch.cuda.get_device_properties(0)
    found = {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "torch_cuda": torch.version.cuda,
        "nvcc": _first_line(["nvcc", "--version"], "release"),
    }
    found["gpus"] = torch.cuda.device_count()
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    query = ["nvidia-smi", "-i", "0", "--format=csv,noheader"]
    for name in ("driver_version", "clocks.max.sm", "power.limit"):
        found[name] = _first_line([*query, f"--query-gpu={name}"])
    for package in ("longpretrain", "torch", "deepspeed", "apex", "triton", "flash-attn", "natten"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    found["commit"] = _first_line(git)
    return found


def _first_line(command: list[str], having: str = "") -> str:
    """Of the output, with that word in it; "unknown" where there is none."""
    if shutil.which(command[0]) is None:
        return "unknown"
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.strip() for line in asked.stdout.splitlines() if having in line]
    return lines[0] if lines and asked.returncode == 0 else "unknown"


def main() -> int:
    """Says what is missing; exit code 2."""
    try:
        need_gpu(read_facts())
    except NotHereError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
