"""The page of a run of ``gpu.py``, from its JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

SHOWN_FAILURES = 20
LABELS = {
    "ours": "ours",
    "flex": "FlexAttention",
    "sdpa": "SDPA, dense mask",
    "flash": "flash-attn, window only",
    "natten": "NATTEN, window only",
}


def render(results: dict[str, Any]) -> str:
    """Markdown; parts that did not run are left out."""
    machine = results["machine"]
    verdict = "all that ran is right" if results["ok"] else "SOMETHING IS WRONG, see below"
    lines = [
        f"# GPU check, {machine['gpu']}, {results['date'][:10]}",
        "",
        f"Measured by `make gpu-check`: {verdict}.",
        "",
        *table(["what", "value"], [[name, str(value)] for name, value in machine.items()]),
        "",
    ]
    if "tests" in results:
        lines += _tests(results["tests"])
    if "checks" in results:
        rows = [[row["check"], _verdict(row["ok"]), row["found"]] for row in results["checks"]]
        lines += ["## Checks", "", *table(["check", "verdict", "found"], rows), ""]
    if "sanitizer" in results:
        lines += _sanitizer(results["sanitizer"])
    if "training" in results:
        lines += ["## Training", "", TRAINING, "", *training_table(results["training"]), ""]
    if "speed" in results:
        lines += ["## Speed", "", results["speed_method"], "", *_speed(results["speed"]), ""]
    return "\n".join(lines)


def _verdict(ok: bool) -> str:
    return "ok" if ok else "FAILED"


def _tests(tests: dict[str, Any]) -> list[str]:
    failed = tests["failed"]
    lines = [
        "## Tests of the operator",
        "",
        f"{_verdict(tests['ok'])}: {tests['passed']} passed, {len(failed)} failed, "
        f"{tests['skipped']} left out. Calls: {tests['bridge']}.",
        "",
    ]
    lines += [f"* {name}" for name in failed[:SHOWN_FAILURES]]
    if len(failed) > SHOWN_FAILURES:
        lines.append(f"* and {len(failed) - SHOWN_FAILURES} more")
    return [*lines, ""] if failed else lines


def _sanitizer(sanitizer: dict[str, Any]) -> list[str]:
    lines = ["## compute-sanitizer", ""]
    if sanitizer["left_out"]:
        return [*lines, f"Left out: {sanitizer['left_out']}.", ""]
    rows = [[row["tool"], _verdict(row["ok"]), row["found"]] for row in sanitizer["tools"]]
    return [*lines, *table(["tool", "verdict", "found"], rows), ""]


TRAINING = (
    "A small Longformer over NCCL, one rank per GPU; a copy of the run goes on from the checkpoint "
    "in its middle and must end alike, bit for bit. At stage 0 only fp32 is trained: DeepSpeed "
    "takes a hidden step there in bf16, and stage 1 does the same job."
)


def training_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of gpu_training.py's rows: a table, and what was left out with the reason."""
    head = [
        "case",
        "ranks",
        "verdict",
        "found",
        "updates (skipped)",
        "loss",
        "loss scale",
        "s/update",
    ]
    body, left_out = [], []
    for row in rows:
        if row.get("why_not"):
            left_out.append(f"* {row['case']}: {row['why_not']}")
            continue
        shown = ["-"] * 4
        if "steps" in row:
            scales = row["loss_scales"]
            shown = [
                f"{row['steps']} ({row['skipped']})",
                f"{row['first_loss']:.3f} to {row['last_loss']:.3f}",
                f"{scales[0]:.0f} to {scales[-1]:.0f}" if scales else "-",
                f"{row['step_s']:.3f}",
            ]
        ranks = str(row.get("ranks", "-"))
        body.append([row["case"], ranks, _verdict(row["ok"]), row["found"], *shown])
    lines = table(head, body) if body else []
    return [*lines, "", "Left out:", "", *left_out] if left_out else lines


def _speed(rows: Sequence[dict[str, Any]]) -> list[str]:
    head = ["shape", "call", "case", "median ms", "useful TFLOP/s", "x ours"]
    ours = {(row["shape"], row["call"]): row["median_ms"] for row in rows if row["case"] == "ours"}
    body, left_out = [], {}
    for row in rows:
        label = LABELS.get(row["case"], row["case"])
        if row["median_ms"] is None:
            left_out[f"{row['shape']}, {label}: {row['why_not']}"] = None
            continue
        own_ms = ours.get((row["shape"], row["call"]))
        body.append([
            row["shape"], row["call"], label, f"{row['median_ms']:.3f}",
            f"{row['useful_operations'] / row['median_ms'] / 1e9:.1f}",
            f"{row['median_ms'] / own_ms:.2f}" if own_ms else "-",
        ])  # fmt: skip
    lines = table(head, body)
    if left_out:
        lines += ["", "Left out:", "", *(f"* {line}" for line in left_out)]
    return lines


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table; bars within a cell would end it."""
    shown = [[cell.replace("|", "/").replace("\n", " ") for cell in row] for row in rows]
    lines = ["| " + " | ".join(row) + " |" for row in [list(head), *shown]]
    return [lines[0], "| " + " | ".join("---" for _ in head) + " |", *lines[1:]]
