"""Cells, the pieces that a run is made of and resumed by, and the processes that measure them.

    python attention_cells.py '{"threads": 2, ..., "cells": [{...}]}'

A cell is plain data: name, part, condition of memory, instruction set, shape. Those that share
condition and instruction set run in one process, one after another; it prints a JSON row for each
as it ends. Conditions are environments that malloc reads when a process starts, so no process can
have both.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import warnings
from argparse import Namespace
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from attention_equality import compare_outputs
from attention_memory import LIMIT_GIB, status_kib
from attention_ours import Shape
from attention_runs import Row, growth, headline, say
from machine import MALLOC_SETTINGS, measure_peak, peak_of
from timing import Pace

from longpretrain.attention import why_not
from longpretrain.attention.fused import kernel_facts
from longpretrain.errors import InputError

ENDED_EARLY = "its process ended with"
LEVEL = "LONGPRETRAIN_CPU_LEVEL"
CONDITIONS: Mapping[str, Mapping[str, str]] = {
    "default": {},
    "kept": {
        # glibc takes no MALLOC_MMAP_THRESHOLD_ beyond 32 MiB, and HF Longformer's scores alone are
        # 100 MiB: no mmap at all, then, and no return of what is free at the heap's end.
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(2**40),
        "THP_MEM_ALLOC_ENABLE": "1",  # torch's own switch: it madvises huge pages
    },
}
METHOD = (
    "Timings are taken in two conditions of memory, each in its own process: 'default', as glibc's "
    "malloc and torch come (large blocks go back to the system when freed, and each call faults "
    "its temporary pages in anew), and 'kept', where freed memory stays with the process and has "
    "huge pages ("
    + " ".join(f"{name}={value}" for name, value in CONDITIONS["kept"].items())
    + "). Malloc settings of the caller's environment are removed from both. Targets are judged "
    "under 'default', what a user gets; growth is timed under it alone. A process of timings takes "
    f"at most {LIMIT_GIB:g} GiB."
)


def plan(args: Namespace) -> list[dict[str, Any]]:
    """All cells of a run but those of memory, in their order."""
    cells: list[dict[str, Any]] = []

    def add(part: str, condition: str = "default", level: str = "", **more: Any) -> None:
        names = [part, condition, *(str(value) for value in more.values())]
        where = {"part": part, "condition": condition, "level": level}
        cells.append({"name": " ".join(names), **where, **more})

    for dtype in args.dtypes if "equality" in args.only else ():
        add("equality", dtype=dtype)
    for condition in CONDITIONS if {"headline", "variants"} & set(args.only) else ():
        for dtype in args.dtypes:
            add("headline", condition, dtype=dtype)
    for condition in CONDITIONS if "avx2" in args.only else ():
        for dtype in args.dtypes:
            add("avx2", condition, "avx2", dtype=dtype)
    if "growth" in args.only:
        for heads in args.heads:
            for window in args.windows:
                for dtype in args.dtypes:
                    add("growth", dtype=dtype, heads=heads, attention_window=window)
    return cells


def measure_cells(args: Namespace, cells: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Runs the cells in child processes; yields what each found.

    A row has the cell's name, equality, timings, not_measured, level and peak; of a cell whose
    process ended under it only the name and ``failed``, why.
    """
    for (condition, level), of_one in groupby(cells, lambda c: (c["condition"], c["level"])):
        left = list(of_one)
        while left:
            ended = yield from _run_child(args, left, environment(condition, level))
            if left:
                yield {"cell": left.pop(0)["name"], "failed": f"{ENDED_EARLY} {ended}"}


def environment(condition: str, level: str = "") -> dict[str, str]:
    """Of a child: the condition's malloc settings and no others, and the instruction set."""
    mine = {name: value for name, value in os.environ.items() if name not in MALLOC_SETTINGS}
    return {**mine, **CONDITIONS[condition], **({LEVEL: level} if level else {})}


def _run_child(
    args: Namespace, left: list[dict[str, Any]], variables: Mapping[str, str]
) -> Generator[dict[str, Any], None, str]:
    """Yields rows and takes their cells off the list; what stays when it ends was not measured."""
    names = ("threads", "seconds", "peers", "only", "backend", "lengths", "mode")
    order = {name: getattr(args, name) for name in names}
    text = json.dumps({**order, "headline": asdict(args.headline), "cells": left})
    command = [sys.executable, str(Path(__file__).resolve()), text]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                left.pop(0)
                yield json.loads(line)
        except BaseException:
            process.terminate()
            raise
    return f"code {process.returncode}"


def _main(text: str) -> None:
    """In the child. Only rows go to its output: what libraries print goes to the errors."""
    rows = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    order = json.loads(text)
    order["headline"] = Shape(**order["headline"])
    warnings.filterwarnings("ignore", module="torch|transformers")
    torch.manual_seed(0)
    torch.set_num_threads(order["threads"])
    limit_memory()
    for cell in order["cells"]:
        try:
            found = _measured(cell, order)
        except InputError as error:
            found = {"not_measured": [f"{cell['name']}: {error}"]}
        print(json.dumps({"cell": cell["name"], **found}), file=rows, flush=True)


def limit_memory() -> None:
    """Lets this process grow to ``LIMIT_GIB`` resident; malloc says no to what goes beyond.

    The system limits addresses only, of which libraries reserve more than they use.
    """
    spare = int(LIMIT_GIB * 2**30) + 1024 * (status_kib("VmSize") - status_kib("VmRSS"))
    resource.setrlimit(resource.RLIMIT_AS, (spare, spare))


def _measured(cell: Mapping[str, Any], order: Mapping[str, Any]) -> dict[str, Any]:
    dtype, part, level = cell["dtype"], cell["part"], cell["level"]
    say(cell["name"])
    reason = _why_not_at(level, order["backend"])
    if reason:
        return {"not_measured": [f"{cell['name']}: {reason}"]}
    found: dict[str, Any] = {"level": kernel_facts().get("used", "")}
    if part == "equality":
        rows = compare_outputs(
            order["peers"], dtype=dtype, attention_window=512, backend=order["backend"]
        )
        return {**found, "equality": rows}
    if part == "growth":
        timings, skipped = _growth(cell, order)
    else:
        before, why_no_peak = measure_peak(order["threads"])
        timings, skipped = _headline(cell, order)
        after, _ = measure_peak(order["threads"])
        best = {name: max(rate, after.get(name, 0.0)) for name, rate in before.items()}
        found["probes"] = {"before": before, "after": after, "why_not": why_no_peak}
        found["peak"] = best.get(level) if level else peak_of(dtype, best)
    rows = [{**row, "section": part, "condition": cell["condition"]} for row in timings]
    told = [f"{line} under {cell['condition']} memory" for line in _told(skipped)]
    return {**found, "timings": rows, "not_measured": told}


def _why_not_at(level: str, backend: str) -> str | None:
    """Why a cell of that instruction set cannot be measured here; None when it can."""
    if not level:
        return None
    if backend != "fused":
        return f"skipped, as {why_not('fused') or f'ours is the {backend} backend'}"
    used = kernel_facts()["used"]
    return None if used == level else f"asked for {level}, but the library uses {used}"


def _headline(cell: Mapping[str, Any], order: Mapping[str, Any]) -> tuple[list[Row], list[Row]]:
    is_avx2 = cell["part"] == "avx2"
    peers = ["hf"] if is_avx2 else order["peers"] if "headline" in order["only"] else ()
    num_dtypes = len({one["dtype"] for one in order["cells"]})
    return headline(
        replace(order["headline"], dtype=cell["dtype"]),
        peers,
        variants="variants" in order["only"] and not is_avx2,
        backend=order["backend"],
        pace=_pace(order, order["seconds"] / num_dtypes / (4 if is_avx2 else 1), 0.25),
    )


def _growth(cell: Mapping[str, Any], order: Mapping[str, Any]) -> tuple[list[Row], list[Row]]:
    heads, window, dtype = cell["heads"], cell["attention_window"], cell["dtype"]
    return growth(
        [Shape(tokens, heads, window, dtype) for tokens in order["lengths"]],
        order["peers"],
        backend=order["backend"],
        pace=_pace(order, order["seconds"] / 4, 0.1),
        limit_s=2.0 if order["mode"] == "full" else 0.5,
    )


def _pace(order: Mapping[str, Any], seconds: float, batch_s: float) -> Pace:
    one_thread = order["threads"] == 1
    if order["mode"] == "quick":
        return Pace(seconds, min_rounds=1, batch_s=0.01, one_thread=one_thread)
    return Pace(seconds, batch_s=batch_s, one_thread=one_thread)


def _told(skipped: Sequence[Row]) -> list[str]:
    """One line for each case, with the shortest length and the reason that it gave there."""
    first: dict[str, Row] = {}
    more: dict[str, int] = {}
    for row in skipped:
        where = f"{row['heads']} heads, window {row['attention_window']}"
        name = f"{row['case']}, {row['dtype']}, {where}"
        more[name] = more.get(name, -1) + 1
        first.setdefault(name, row)
    return [
        f"{name}: {row['tokens']:,} tokens"
        + (f" and {more[name]} other lengths" if more[name] else "")
        + f" ({row['why']})"
        for name, row in first.items()
    ]


if __name__ == "__main__":
    _main(sys.argv[1])
