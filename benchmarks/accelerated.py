"""A Longformer of transformers as it is, and after ``longpretrain.accelerate``: time and memory.

    python benchmarks/accelerated.py [--layers 12] [--seconds 60] [--threads N] [--out FILE]

The layers are those of the base size (768 channels, 12 heads, window 512); there is no head and the
vocabulary is small, as neither attends. (Not accelerate.py: on Python's path that would be
another package's name.) Time: one process, both models with the same weights,
round robin (timing.py). Memory: the peak (VmHWM) of a process of its own beyond that of the model.
Training is forward, backward and dropout, as transformers sets it (0.1). What the two compute is
compared first, on the same inputs.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from machine import describe_machine, versions
from timing import METHOD, Case, Pace, take_samples
from torch import Tensor, nn

import longpretrain
from longpretrain.attention.library import kernel_facts

WINDOW, VOCABULARY = 512, 1000


class Row(NamedTuple):
    """What is timed."""

    does: str
    tokens: int
    global_tokens: int

    def __str__(self) -> str:
        return f"{self.does}, {self.tokens:,} tokens, {self.global_tokens} global"


ROWS = [
    Row("inference", 4096, 0), Row("inference", 4096, 1), Row("inference", 3600, 1),
    Row("training", 4096, 0), Row("training", 4096, 1),
]  # fmt: skip


def make_models(layers: int) -> dict[str, nn.Module]:
    """The model as it is, and an accelerated copy."""
    from transformers import LongformerConfig, LongformerModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    torch.manual_seed(1)
    config = LongformerConfig(
        vocab_size=VOCABULARY, num_hidden_layers=layers, attention_window=WINDOW,
        max_position_embeddings=4098, type_vocab_size=1, pad_token_id=1,
    )  # fmt: skip
    plain = LongformerModel(config, add_pooling_layer=False).eval()
    return {"plain": plain, "accelerated": longpretrain.accelerate(copy.deepcopy(plain))}


def make_inputs(row: Row) -> dict[str, Tensor]:
    """One sequence without padding, the global tokens first."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(5, VOCABULARY, (1, row.tokens), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if row.global_tokens:
        mask = torch.zeros_like(ids)
        mask[:, : row.global_tokens] = 1
        inputs["global_attention_mask"] = mask
    return inputs


def run(model: nn.Module, row: Row) -> Tensor:
    """One call, or one step of training; the hidden states."""
    model.train(row.does == "training")
    with torch.set_grad_enabled(model.training):
        out: Tensor = model(**make_inputs(row)).last_hidden_state
        if model.training:
            out.square().mean().backward()
    return out


def largest_difference(models: dict[str, nn.Module], row: Row) -> float:
    """Of any hidden state, in inference."""
    plain, ours = (run(models[name], row._replace(does="inference")) for name in models)
    return float((plain - ours).abs().max())


def peak_gb(layers: int, name: str, row: Row) -> float:
    """In a process of its own."""
    words = ["--layers", str(layers), "--threads", str(torch.get_num_threads())]
    words += ["--peak", name, json.dumps(row)]
    command = [sys.executable, __file__, *words]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return float(found.stdout)


def measure_peak(layers: int, name: str, row: Row) -> float:
    """GB beyond what the process had before the first call."""
    models = make_models(layers)
    before = _peak_gb()
    run(models[name], row)
    return _peak_gb() - before


def _peak_gb() -> float:
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def table(layers: int, seconds: float) -> list[str]:
    """Lines of markdown."""
    models = make_models(layers)
    lines = [
        "| | transformers | accelerated | times as fast | memory | memory accelerated | differ |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in ROWS:
        differ = largest_difference(models, row)
        cases = [
            Case(name, partial(run, model, row), partial(model.zero_grad, set_to_none=True))
            for name, model in models.items()
        ]
        alone = torch.get_num_threads() == 1
        timings = take_samples(cases, Pace(seconds=seconds, one_thread=alone))
        plain, ours = (timings[name].median_s for name in models)
        noisy = " (disturbed)" if any(timing.is_disturbed for timing in timings.values()) else ""
        peaks = [f"{peak_gb(layers, name, row):.2f} GB" for name in models]
        lines.append(
            f"| {row} | {plain:.2f} s | {ours:.2f} s | {plain / ours:.2f}{noisy} | "
            f"{' | '.join(peaks)} | {differ:.1e} |"
        )
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def report(layers: int, seconds: float) -> str:
    """The whole page."""
    machine, found = describe_machine(), versions()
    load = ", ".join(f"{number:.1f}" for number in machine["load_average_at_start"])
    shown = ", ".join(f"{name} {version}" for name, version in found.items())
    facts: dict[str, Any] = kernel_facts()
    head = [
        f"# longpretrain.accelerate, {datetime.now(UTC):%Y-%m-%d}",
        "",
        f"`python benchmarks/accelerated.py --layers {layers} --seconds {seconds:g} --threads "
        f"{torch.get_num_threads()}`, fp32, batch 1, {layers} of the base size's 12 layers, a "
        "small vocabulary and no head.",
        "",
        f"{machine['cpu']}, {machine['cores']} cores, {torch.get_num_threads()} threads, load "
        f"{load} at the start; {shown}; kernels {facts['used']}, {facts['compiler']}.",
        "",
        METHOD,
        "",
    ]
    return "\n".join([*head, *table(layers, seconds), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=60, help="of each line, at least")
    parser.add_argument("--threads", type=int, help="1: processor time, which load does not touch")
    parser.add_argument("--out", type=Path, help="a file for the page; none: on stdout")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.peak:
        name, row = options.peak
        print(measure_peak(options.layers, name, Row(*json.loads(row))))
        return
    page = report(options.layers, options.seconds)
    if options.out:
        options.out.write_text(page, encoding="utf-8")
    else:
        print(page)


if __name__ == "__main__":
    main()
