"""The acceptance on a GPU: tests, checks, compute-sanitizer, training over NCCL, speed.

    make gpu-check                                        # builds first; 30 to 60 minutes
    python benchmarks/gpu.py --only speed                 # what is built already
    python benchmarks/gpu.py --render benchmarks/results/gpu-2026-01-31-a100.json

Writes gpu-DATE-NAME.md and .json into the results folder: please open an issue with the .md, also,
or all the more, when something failed. Parts (--only):

* tests: every test of the operator, its calls carried to the GPU (gpu_bridge.py); apex's LayerNorm.
* checks: dropout's bits against the CPU's, repetition, streams, CUDA graphs, long tensors.
* sanitizer: compute-sanitizer (memcheck, racecheck, synccheck) over small calls, where it is there.
* training: over NCCL at ZeRO 0-3 in fp32, bf16 and fp16, resumed and compared bit for bit.
* speed: forward and backward beside FlexAttention, SDPA and, if installed, flash-attn and NATTEN.

Exit code 0: all that ran is right (speed is never wrong). 1: something is not. 2: it cannot run
here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from gpu_machine import NotHereError, describe, need_gpu, read_facts
from gpu_report import render

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PARTS = ("tests", "checks", "sanitizer", "training", "speed")
TESTS = ("test_attention_*.py", "test_properties_attention.py", "test_model_layer_norm.py")
TOOLS = ("memcheck", "racecheck", "synccheck")
SANITIZER_FOUND = 86


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    args = _parsed(arguments)
    if args.render is not None:
        print(render(json.loads(args.render.read_text(encoding="utf-8"))))
        return 0
    try:
        need_gpu(read_facts())
        _need_kernels()
    except NotHereError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        return 2
    results = measure(args)
    text = render(results)
    print(f"\n{text}")
    args.out.mkdir(parents=True, exist_ok=True)
    path = fresh_path(args.out, results["date"][:10], results["machine"]["gpu"])
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"Wrote {path.with_suffix('.md')} and {path}. Please open an issue with the first.")
    return 0 if results["ok"] else 1


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", type=_parts, default=PARTS, help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run at all?")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--render", type=Path, help="no measuring: the page of this JSON")
    return parser.parse_args(arguments)


def _parts(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in PARTS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(PARTS)}")
    return names


def _need_kernels() -> None:
    """The compiled library must have CUDA kernels for this GPU."""
    from longpretrain.attention import why_not
    from longpretrain.attention.fused import kernel_facts

    reason = why_not("fused")
    if reason is None and kernel_facts().get("cuda", "none") == "none":
        reason = "the compiled library has no CUDA kernels: run `make gpu-check`, which builds them"
    reason = reason or why_not("fused", "cuda")
    if reason is not None:
        raise NotHereError(f"{reason}.")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All parts that are asked for; "ok" says whether what ran is right."""
    results: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe(),
        "parts": list(args.only),
    }
    verdicts = []
    for part in args.only:
        print(f"{part}:", flush=True)
        if part == "tests":
            results["tests"] = run_tests()
            verdicts.append(results["tests"]["ok"])
        elif part == "checks":
            from gpu_checks import run_checks

            results["checks"] = list(run_checks())
            verdicts += [row["ok"] for row in results["checks"]]
        elif part == "sanitizer":
            results["sanitizer"] = run_sanitizer()
            verdicts += [row["ok"] for row in results["sanitizer"]["tools"]]
        elif part == "training":
            results["training"] = run_training(quick=args.quick)
            verdicts += [row["ok"] for row in results["training"]]
        else:
            import gpu_speed

            shapes = gpu_speed.QUICK_SHAPES if args.quick else gpu_speed.SHAPES
            results["speed"] = gpu_speed.measure(shapes, tuple(gpu_speed.PEERS))
            results["speed_method"] = gpu_speed.METHOD
    return {**results, "ok": all(verdicts)}


def run_tests() -> dict[str, Any]:
    """Pytest with the bridge, in a process of its own."""
    files = [str(path) for pattern in TESTS for path in sorted((ROOT / "tests").glob(pattern))]
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory(prefix="longpretrain-gpu-") as folder:
        report = Path(folder) / "tests.xml"
        command = [
            sys.executable, "-m", "pytest", "-p", "gpu_bridge", "-p", "no:cacheprovider",
            f"--junitxml={report}", *files,
        ]  # fmt: skip
        ran = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, check=False,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        print(ran.stdout[-3000:], flush=True)
        xml = report.read_text(encoding="utf-8") if report.exists() else ""
    return {**read_junit(xml), "bridge": bridge_line(ran.stdout), "exit_code": ran.returncode}


def read_junit(xml: str) -> dict[str, Any]:
    """Counts and the names of what failed; no report is a failure of its own."""
    if not xml:
        return {"ok": False, "passed": 0, "failed": ["pytest wrote no report"], "skipped": 0}
    cases = list(ElementTree.fromstring(xml).iter("testcase"))
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in cases
        if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - len(failed) - skipped
    return {"ok": passed > 0 and not failed, "passed": passed, "failed": failed, "skipped": skipped}


def bridge_line(output: str) -> str:
    """What the bridge said of its calls."""
    found = re.search(r"^gpu_bridge calls: (.*)$", output, re.MULTILINE)
    return found[1] if found else "the bridge did not report"


def run_sanitizer() -> dict[str, Any]:
    """Each tool of compute-sanitizer over the small calls."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        reason = "compute-sanitizer is not on PATH (it comes with the CUDA toolkit)"
        print(f"  left out: {reason}")
        return {"left_out": reason, "tools": []}
    # Allocations of their own, so that an overrun does not end in a neighbour's memory.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    rows = []
    for tool in TOOLS:
        command = [
            sanitizer, f"--tool={tool}", f"--error-exitcode={SANITIZER_FOUND}",
            "--kernel-name=kernel_substring=longpretrain",
            sys.executable, str(HERE / "gpu_checks.py"), "--small",
        ]  # fmt: skip
        ran = subprocess.run(
            command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True
        )
        found = sanitizer_summary(ran.stdout + ran.stderr)
        rows.append({"tool": tool, "ok": ran.returncode == 0, "found": found})
        print(f"  {tool}: {found}", flush=True)
    return {"left_out": None, "tools": rows}


def run_training(*, quick: bool) -> list[dict[str, Any]]:
    """Every case of gpu_training.py that this machine can run."""
    import gpu_training

    return gpu_training.measure(
        gpu_training.CASES,
        device="cuda",
        ranks=gpu_training.most_ranks(gpu_training.count_gpus()),
        size=gpu_training.QUICK if quick else gpu_training.FULL,
    )


def sanitizer_summary(output: str) -> str:
    """Its last line of totals; else the last line there is."""
    lines = [line.strip("= ").strip() for line in output.splitlines() if line.strip("= ").strip()]
    summaries = [line for line in lines if "SUMMARY" in line]
    return (summaries or lines or ["it said nothing"])[-1]


def fresh_path(folder: Path, date: str, gpu: str) -> Path:
    """A JSON file's name that is not taken."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower().replace("nvidia", "")).strip("-")
    for number in range(1, 1000):
        path = folder / (f"gpu-{date}-{name}" + (f"-{number}" if number > 1 else "") + ".json")
        if not path.exists():
            return path
    raise FileExistsError(f"{folder} has a thousand results of this day")


if __name__ == "__main__":
    sys.exit(main())
