"""What ran the benchmark: processor, versions, and the most arithmetic the processor does.

The peak is measured by ``peak.cpp``, in the same run as the timings: a data sheet knows neither the
clock rate of the day nor what a virtual machine gets of it.
"""

from __future__ import annotations

import atexit
import functools
import importlib.metadata
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent

# Name in peak.cpp -> the flags of /proc/cpuinfo that its instruction needs.
PROBES = {
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f"},
    "avx512_bf16": {"avx512f", "avx512_bf16"},
}
MALLOC_SETTINGS = (
    "MALLOC_ARENA_MAX", "MALLOC_ARENA_TEST", "MALLOC_CHECK_", "MALLOC_MMAP_MAX_",
    "MALLOC_MMAP_THRESHOLD_", "MALLOC_PERTURB_", "MALLOC_TOP_PAD_", "MALLOC_TRIM_THRESHOLD_",
    "GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE",
)  # fmt: skip
"""Environment variables of glibc's malloc and of torch's allocator on it."""
_SHOWN_FLAGS = (
    "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_bf16", "avx512_fp16",
    "amx_bf16",
)  # fmt: skip


def cpu_flags() -> set[str]:
    """The processor's instruction sets as /proc/cpuinfo names them; empty where it does not."""
    return set(_cpu_info().get("flags", "").split())


def describe_machine() -> dict[str, Any]:
    """The machine as plain data, for the results."""
    info = _cpu_info()
    model = info.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in info and "model" in info:
        model += f" (family {info['cpu family']}, model {info['model']})"
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    flags = cpu_flags()
    return {
        "cpu": model,
        "architecture": platform.machine(),
        "instruction_sets": [flag for flag in _SHOWN_FLAGS if flag in flags],
        "cores": num_cores(),
        "memory_gib": round(memory_bytes / 2**30, 1),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "c_library": " ".join(platform.libc_ver()),
        "transparent_huge_pages": {
            name: _read(f"/sys/kernel/mm/transparent_hugepage/{name}")
            for name in ("enabled", "defrag")
        },
        # As the caller had them: the children of the benchmark get their own.
        "memory_environment": {
            name: os.environ[name]
            for name in (*MALLOC_SETTINGS, "LD_PRELOAD")
            if name in os.environ
        },
        "load_average_at_start": list(os.getloadavg()),
    }


def num_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """What was compared with what."""
    found = {"python": platform.python_version()}
    for package in ("longpretrain", "torch", "transformers"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    if shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True, check=False)
        found["commit"] = commit.stdout.strip() or "unknown"
    return found


def measure_peak(num_threads: int) -> tuple[dict[str, float], str | None]:
    """GFLOP/s of multiply-adds by instruction set, all threads at once.

    Returns:
        The rates, and why there are none (None when there are).
    """
    flags = cpu_flags()
    names = [name for name, needed in PROBES.items() if needed <= flags]
    if not names:
        return {}, "none of the probed instruction sets (AVX2, AVX-512) is listed in /proc/cpuinfo"
    program, reason = _built_probe()
    if program is None:
        return {}, reason
    threads = str(min(num_threads, num_cores()))
    command = [str(program), threads, *names]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        return {}, f"the probe ended with code {ran.returncode}"
    lines = [line.split() for line in ran.stdout.splitlines()]
    return {name: float(rate) for name, rate in lines}, None


@functools.cache
def _built_probe() -> tuple[Path | None, str | None]:
    """``peak.cpp`` compiled, once for this process, or why it is not."""
    if shutil.which("g++") is None:
        return None, "there is no g++ to compile peak.cpp"
    folder = Path(tempfile.mkdtemp(prefix="longpretrain-peak-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program, source = folder / "peak", HERE / "peak.cpp"
    command = ["g++", "-O2", "-std=c++17", "-pthread", str(source), "-o", str(program)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        return None, f"g++ does not compile peak.cpp: {built.stderr.strip()[:300]}"
    return program, None


def peak_of(dtype: str, peak: dict[str, float]) -> float | None:
    """The rate that a kernel of that dtype is held against: the widest instruction there is."""
    order = ("avx512_bf16", "avx512", "avx2") if dtype == "bf16" else ("avx512", "avx2")
    return next((peak[name] for name in order if name in peak), None)


def _read(path: str) -> str:
    """A setting of the kernel; "unknown" where it is not told."""
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"


def _cpu_info() -> dict[str, str]:
    """/proc/cpuinfo of the first processor; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}
