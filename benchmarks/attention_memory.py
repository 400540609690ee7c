"""Peak memory of one forward and backward, each in a fresh process.

    python attention_memory.py '{"threads": 2, "backend": "portable", "jobs": [{...}]}'

The process imports everything once, runs nothing, and forks for each job: the child makes a small
call first (libraries set themselves up), then its inputs, and takes the growth of VmHWM, the most
that was ever resident, over what was resident before the call. The output and all gradients are
part of it. The child's address space ends at ``limit_gib``: what does not fit is told, and the
machine lives on. Prints one JSON row for each job, as it ends.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import subprocess
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from attention_ours import Runnable, Shape, build_ours, our_inputs
from attention_peers import PEERS
from machine import MALLOC_SETTINGS

LIMIT_GIB = 8.0
METHOD = (
    "Memory: growth of VmHWM over the resident size before the call, forward+backward once, in a "
    "process forked for that one measurement after the imports, warmed by a call of 512 tokens, "
    f"address space limited to {LIMIT_GIB:g} GiB. malloc returns blocks from 1 MiB on at once "
    "(MALLOC_MMAP_THRESHOLD_), so what was freed before hides nothing. Modules include their "
    "projections."
)
_SMALL_TOKENS = 512


def measure_memory(
    jobs: Sequence[dict[str, Any]], *, threads: int, backend: str
) -> Iterator[dict[str, Any]]:
    """Runs the jobs (case and shape each) one after another; yields a row for each.

    A row holds qkv_mib, growth_mib, multiple_of_qkv and peak_rss_gib, or an error.
    """
    order = json.dumps({"threads": threads, "backend": backend, "jobs": list(jobs)})
    # Nothing is timed there: idle threads need not spin.
    settings = {"MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_WAIT_POLICY": "PASSIVE"}
    inherited = {name: x for name, x in os.environ.items() if name not in MALLOC_SETTINGS}
    environment = {**inherited, **settings}
    command = [sys.executable, str(Path(__file__).resolve()), order]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"attention_memory.py ended with code {process.returncode}")


def job(case: str, shape: Shape) -> dict[str, Any]:
    """A job for ``measure_memory``."""
    return {"case": case, **asdict(shape), "limit_gib": LIMIT_GIB}


def _main(order: str) -> None:
    todo = json.loads(order)
    _import_peers({one["case"].split()[0] for one in todo["jobs"]})
    for one in todo["jobs"]:
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            with os.fdopen(write, "w") as file:
                json.dump(_measured(one, todo["threads"], todo["backend"]), file)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as file:
            text = file.read()
        _, status = os.waitpid(child, 0)
        ended = {"error": f"the process ended with status {status}"}
        print(json.dumps({**one, **(json.loads(text) if text else ended)}), flush=True)


def _import_peers(names: set[str]) -> None:
    """What builders import late, so that no child has to."""
    if "hf" in names:
        importlib.import_module("transformers.models.longformer.modeling_longformer")
    if "bigbird" in names:
        importlib.import_module("transformers.models.big_bird.modeling_big_bird")


def _measured(one: dict[str, Any], threads: int, backend: str) -> dict[str, Any]:
    """In the child."""
    limit_bytes = int(one["limit_gib"] * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    torch.set_num_threads(threads)
    shape = Shape(one["tokens"], one["heads"], one["attention_window"], one["dtype"])
    small = Shape(max(_SMALL_TOKENS, shape.attention_window), *list(asdict(shape).values())[1:])
    try:
        warm = _build(one["case"], small, backend)
        warm.run_both()
        del warm
        runnable = _build(one["case"], shape, backend)
        gc.collect()
        _forget_peak()
        before_kib = status_kib("VmRSS")
        runnable.run_both()
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error) and not isinstance(error, MemoryError):
            traceback.print_exc()
        return {"error": f"not within {one['limit_gib']:g} GiB: {str(error).splitlines()[0][:120]}"}
    peak_kib = status_kib("VmHWM")
    growth_bytes = (peak_kib - before_kib) * 1024
    return {
        "qkv_mib": round(shape.qkv_bytes / 2**20, 2),
        "growth_mib": round(growth_bytes / 2**20, 2),
        "multiple_of_qkv": round(growth_bytes / shape.qkv_bytes, 3),
        "peak_rss_gib": round(peak_kib / 2**20, 3),
    }


def _build(case: str, shape: Shape, backend: str) -> Runnable:
    if case in {"ours", "portable"}:
        return build_ours(our_inputs(shape), backend=backend if case == "ours" else case)
    peer = next(peer for peer in PEERS.values() if case in peer.cases)
    return peer.build(shape)[case]


def status_kib(name: str) -> int:
    """A number of /proc/self/status."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def _forget_peak() -> None:
    """Sets VmHWM to what is resident now; where the system does not, an old peak counts too."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


if __name__ == "__main__":
    _main(sys.argv[1])
