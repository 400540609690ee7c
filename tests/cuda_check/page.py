"""docs/kernels.md: the model's tables, each of them labelled, and all that they assume."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cuda_check.chips import (
    A100,
    A100_L2_BYTES_CLOCK,
    H100,
    L2_SHARE,
    MMA_SYNC_SHARE_OF_H100,
    Gpu,
)
from cuda_check.coverage import all_chips, all_kinds, coverage_section, gaps, read_coverage
from cuda_check.flash import (
    LONG,
    MIDDLE,
    PUBLISHED,
    SHORT,
    dense_s,
    floor_flops,
    share_of_floor,
)
from cuda_check.launches import Call, Launch
from cuda_check.model import (
    MEMORY_SHARE,
    START_S,
    KernelTime,
    Machine,
    launches_of,
    read_machine,
    time_of_launch,
)
from cuda_check.ran import read_record
from cuda_check.report import markdown
from cuda_check.shortfall import FORWARD, read_loops, shortfall_section
from cuda_check.table import launches_of_kernels
from cuda_check.toolchain import Toolchain
from cuda_check.work import useful_pairs

LABEL = "*Modelled, not measured.*"
GPUS = (A100, H100)
STEP_SHARE_OF_PEAK = 0.45
LARGE = {"tokens": 4096, "heads": 16, "head_size": 64, "slots": 1, "one_sided_window": 256}
LAYERS, HIDDEN, VOCABULARY, MASKED = 24, 1024, 50_265, 0.15


@dataclass(frozen=True)
class Layer:
    """A layer's two calls."""

    label: str
    forward: Call
    backward: Call


def _layer(label: str, batch: int = 1, drop_below: int = 0, **shape: int) -> Layer:
    numbers = {**LARGE, **shape}
    forward = Call(
        False, "bf16", batch, numbers["tokens"], numbers["heads"], numbers["head_size"],
        numbers["slots"], numbers["one_sided_window"], drop_below=drop_below,
    )  # fmt: skip
    return Layer(label, forward, replace(forward, backward=True))


HEADLINE = _layer("Longformer-large: H16 N4096 D64 w256")
LAYERS_SHOWN = (
    HEADLINE,
    _layer("the same, dropout 0.1", drop_below=26),
    _layer("the same, batch 4", batch=4),
    _layer("Longformer-base: H12 N4096 D64 w256, batch 4", batch=4, heads=12),
    _layer("H16 N16384 D64 w256", tokens=16_384),
    _layer("H16 N4096 D64 w64, batch 4", batch=4, one_sided_window=64),
    _layer("H16 N4096 D32 w256, batch 4", batch=4, head_size=32),
    _layer("H8 N4096 D128 w256, batch 4", batch=4, heads=8, head_size=128),
)


@dataclass(frozen=True)
class Modelled:
    """A layer on a GPU."""

    forward: list[KernelTime]
    backward: list[KernelTime]

    def floor_s(self, *, both: bool) -> float:
        """Sum over kernels, which run one after the other."""
        return sum(one.floor_s for one in self._kernels(both))

    def expected_s(self, share: float, *, both: bool) -> float:
        """The same."""
        return sum(one.expected_s(share) for one in self._kernels(both))

    @property
    def window(self) -> KernelTime:
        """The forward's largest kernel."""
        return next(one for one in self.forward if one.kernel.startswith(FORWARD))

    def _kernels(self, both: bool) -> list[KernelTime]:
        return [*self.forward, *(self.backward if both else [])]


def write_page(tools: Toolchain, page: Path) -> list[str]:
    """Builds what is not built, writes the page, and returns the targets that are missed."""
    calls = [call for layer in LAYERS_SHOWN for call in (layer.forward, layer.backward)]
    launches = launches_of(tools, calls)
    threads = {name: launch.threads for name, launch in launches_of_kernels(tools).items()}
    modelled: dict[tuple[str, str], Modelled] = {}
    machines = {gpu.name: read_machine(tools, gpu.chip, threads) for gpu in GPUS}
    for gpu in GPUS:
        machine = machines[gpu.name]
        for layer, forward, backward in zip(
            LAYERS_SHOWN, launches[::2], launches[1::2], strict=True
        ):
            modelled[gpu.name, layer.label] = Modelled(
                _times(forward, machine, layer.forward, gpu),
                _times(backward, machine, layer.backward, gpu),
            )
    head = f"Read off nvcc {tools.nvcc.version}'s machine code.\n"
    targets = _targets(modelled[A100.name, HEADLINE.label])
    covered = read_coverage(tools)
    sections = [
        _targets_section(targets),
        shortfall_section(
            A100.name, read_loops(machines[A100.name], A100.chip), _work(modelled), LABEL
        ),
        coverage_section(covered, read_record().tests),
        _ASSUMPTIONS,
        _l2_text(modelled, machines, launches),
        *_sections(modelled),
    ]
    page.write_text("\n".join([_INTRODUCTION, head, *sections]), encoding="utf-8")
    missed = [x for x in targets if not x.met]
    return [f"{x.what}: {x.value:.2f}, wanted {x.most:.2f} at most" for x in missed] + gaps(
        covered, all_kinds(), all_chips()
    )


@dataclass(frozen=True)
class Target:
    """A number of the headline layer on an A100 and the most it may be."""

    what: str
    value: float
    most: float

    @property
    def met(self) -> bool:
        """Whether it is kept."""
        return self.value <= self.most


def _work(modelled: Mapping[tuple[str, str], Modelled]) -> list[tuple[str, int, float]]:
    """Layer, window, and computed work for each useful product of the forward's window."""
    found = []
    for layer in LAYERS_SHOWN:
        one = modelled[A100.name, layer.label].window
        ratio = one.computed_operations / one.useful_operations
        found.append((layer.label, layer.forward.one_sided_window, ratio))
    return found


def _targets(layer: Modelled) -> list[Target]:
    window = layer.window
    both_s = layer.expected_s(share_of_floor(A100, MIDDLE), both=True)
    return [
        Target(
            "computed/useful work of the forward window",
            window.computed_operations / window.useful_operations,
            1.30,
        ),
        Target("forward+backward, expected, ms", both_s * 1e3, 0.40),
    ]


def _targets_section(targets: Sequence[Target]) -> str:
    rows = [
        [one.what, f"{one.value:.2f}", f"<= {one.most:.2f}", "met" if one.met else "NOT MET"]
        for one in targets
    ]
    return f"## Targets: {HEADLINE.label}, on {A100.name}\n\n{LABEL}\n\n" + markdown(
        ["what", "modelled", "target", "verdict"], rows
    )


def _times(launches: Sequence[Launch], machine: Machine, call: Call, gpu: Gpu) -> list[KernelTime]:
    return [time_of_launch(launch, machine, call, gpu) for launch in launches]


def _sections(modelled: Mapping[tuple[str, str], Modelled]) -> Iterator[str]:
    yield _flash_section()
    for gpu in GPUS:
        yield _kernels_section(gpu, modelled[gpu.name, HEADLINE.label])
    yield _layers_section(modelled)
    yield _step_section(modelled)


def _l2_text(
    modelled: Mapping[tuple[str, str], Modelled],
    machines: Mapping[str, Machine],
    launches: Sequence[list[Launch]],
) -> str:
    """How much hangs on the rates of L2."""
    parts = []
    for gpu in GPUS:
        slower = replace(gpu, l2_bytes_s=0.75 * gpu.l2_bytes_s)
        with_less = Modelled(
            _times(launches[0], machines[gpu.name], HEADLINE.forward, slower),
            _times(launches[1], machines[gpu.name], HEADLINE.backward, slower),
        )
        share = share_of_floor(gpu, MIDDLE)
        was, now = (
            1e3 * x.expected_s(share, both=True)
            for x in (modelled[gpu.name, HEADLINE.label], with_less)
        )
        parts.append(f"{now:.3f} ms in place of {was:.3f} on {gpu.name}")
    return (
        "If L2 gave a quarter less, forward and backward of Longformer-large's layer would take\n"
        f"{' and '.join(parts)}.\n{LABEL}\n"
    )


def _flash_section() -> str:
    rows = [
        [
            gpu.name, length, f"{PUBLISHED[gpu.name][length]:.0f}",
            f"{floor_flops(gpu) / 1e12:.0f}", f"{share_of_floor(gpu, length):.2f}",
        ]
        for gpu in GPUS
        for length in (SHORT, MIDDLE, LONG)
    ]  # fmt: skip
    head = ["GPU", "tokens", "published TFLOP/s", "floor TFLOP/s", "share reached"]
    return f"{_FLASH}\n{LABEL} (The published column is measured, by its authors.)\n\n" + markdown(
        head, rows, left=2
    )


def _kernels_section(gpu: Gpu, layer: Modelled) -> str:
    rows = []
    for name, kernels in (("forward", layer.forward), ("backward", layer.backward)):
        for one in kernels:
            computed = one.computed_operations / max(one.useful_operations, 1)
            rows.append([
                one.kernel, name, _giga(one.useful_operations),
                f"{computed:.2f}" if one.useful_operations else "-",
                "-" if one.tensor_use is None else f"{one.tensor_use:.2f}",
                _us(one.units_s), _us(one.memory_s), _us(one.l2_s), _us(one.floor_s),
                _us(one.expected_s(share_of_floor(gpu, MIDDLE))), one.bound,
            ])  # fmt: skip
    head = [
        "kernel", "call", "useful GFLOP", "computed/useful", "tensor use", "units µs", "memory µs",
        "L2 µs", "floor µs", "expected µs", "bound by",
    ]  # fmt: skip
    call = HEADLINE.forward
    pairs = useful_pairs(call.tokens, call.one_sided_window)
    operations = 4 * call.head_size * call.heads * pairs
    return (
        f"## {HEADLINE.label}, one global token, bf16, on {gpu.name}\n\n"
        f"The window's useful work is {operations / 1e9:.2f} GFLOP forward and "
        f"{2.5 * operations / 1e9:.1f} backward; the backward kernels compute scores twice, so "
        f"their own products are 7 to the 5 that count. {LABEL}\n\n" + markdown(head, rows, left=2)
    )


def _layers_section(modelled: Mapping[tuple[str, str], Modelled]) -> str:
    rows = []
    for gpu in GPUS:
        for layer in LAYERS_SHOWN:
            call, found = layer.forward, modelled[gpu.name, layer.label]
            low, middle, high = (
                found.expected_s(share_of_floor(gpu, length), both=True)
                for length in (LONG, MIDDLE, SHORT)
            )
            dense = dense_s(gpu, call.batch, call.tokens, call.heads, call.head_size)
            comparable = call.head_size == 64 and not call.drop_below
            rows.append([
                gpu.name, layer.label, _ms(found.floor_s(both=False)),
                _ms(found.expected_s(share_of_floor(gpu, MIDDLE), both=False)),
                _ms(found.floor_s(both=True)), _ms(middle), f"{_ms(low)}-{_ms(high)}",
                _ms(dense) if comparable else "-",
                f"{dense / middle:.1f}" if comparable else "-",
            ])  # fmt: skip
    head = [
        "GPU", "layer", "forward, floor", "forward, expected", "both, floor", "both, expected",
        "range", "dense FA-2, both", "FA-2/ours",
    ]  # fmt: skip
    return f"{_LAYERS_TEXT}\n{LABEL} Milliseconds.\n\n" + markdown(head, rows, left=2)


def _step_section(modelled: Mapping[tuple[str, str], Modelled]) -> str:
    tokens = HEADLINE.forward.tokens
    # Query, key, value, output; global key and value; two of the feed-forward network.
    of_layers = LAYERS * (4 + 2 + 8) * HIDDEN**2 * 2 * tokens
    of_head = (VOCABULARY + HIDDEN) * HIDDEN * 2 * MASKED * tokens
    operations = 3 * (of_layers + of_head)
    rows = []
    for gpu in GPUS:
        rest_s = operations / (STEP_SHARE_OF_PEAK * gpu.dense_flops)
        share = share_of_floor(gpu, MIDDLE)
        ours_s = LAYERS * modelled[gpu.name, HEADLINE.label].expected_s(share, both=True)
        flash_s = LAYERS * dense_s(gpu, 1, tokens, 16, 64)
        rows.append([
            gpu.name, f"{operations / 1e12:.2f}", _ms(rest_s), _ms(ours_s), _ms(rest_s + ours_s),
            f"{tokens / (rest_s + ours_s):,.0f}", _ms(flash_s), _ms(rest_s + flash_s),
        ])  # fmt: skip
    head = [
        "GPU", "other work TFLOP", "other ms", "attention ms", "step ms", "tokens/s",
        "dense FA-2 attention ms", "dense FA-2 step ms",
    ]  # fmt: skip
    return f"{_STEP_TEXT}\n{LABEL}\n\n" + markdown(head, rows)


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}" if seconds else "-"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f}" if seconds < 0.01 else f"{seconds * 1e3:.1f}"


def _giga(operations: float) -> str:
    return f"{operations / 1e9:.2f}" if operations else "-"


_INTRODUCTION = """\
# The CUDA kernels: what is tested without a GPU, and how fast they should be

Generated by `make cuda-check`; do not edit. No GPU took part, so all times and shares of time are
modelled, not measured: registers, instructions and launches are read off what nvcc made, tiles are
counted, and the rest is arithmetic. `make gpu-check` measures on a GPU; where a measured number
stands beside one of these, it is the one to believe. Limits of every kernel:
[csrc/cuda/budgets.json](../csrc/cuda/budgets.json), which `make cuda-check` enforces for all chips
and `make test` for one.
"""

_ASSUMPTIONS = f"""\
## What is assumed

* Units: every pass through a kernel's main loop takes the clocks of its busiest unit: tensor
  cores, issue slots (one instruction a clock for each quarter of a multiprocessor), multiply-adds,
  logic, exponentials, or shared memory (128 bytes a clock, reads of one word by several lanes
  counted as several). Tiles without a mask take the shortest pass, all others the longest without
  dropout (with dropout in backward, all take the longest). In the forward that counts a branch
  for scores beyond 65,536 too, which no ordinary call takes: tiles with a mask come out a tenth
  too slow. What a block does before and after its loop is left out, and so are latencies and
  barriers: they are in the share that FlashAttention-2 reaches.
* Rates: results per clock of the CUDA programming guide, clocks and bandwidths of NVIDIA's data
  sheets (A100: 312 TFLOP/s, 1.41 GHz, 2.04 TB/s; H100: 989 TFLOP/s with wgmma, 1.83 GHz, 3.35
  TB/s). On the H100 mma.sync is taken to reach {MMA_SYNC_SHARE_OF_H100:.1%} of that
  (arXiv:2402.13499).
* L2: {A100.l2_bytes_s / 1e12:.1f} TB/s on the A100, {L2_SHARE:.0%} of the {A100_L2_BYTES_CLOCK:,}
  bytes a clock of NVIDIA's white paper on it (2020); the share is an assumption without a source.
  So are the {H100.l2_bytes_s / 1e12:.1f} TB/s on the H100, for which NVIDIA publishes no number.
* Memory: every tensor that a kernel needs goes once over the memory's bus, although at batch 1
  much of it may still be in L2. Expected times take {MEMORY_SHARE:.0%} of the data sheet's rate.
* Blocks are spread evenly; the multiprocessor with the most of them decides.
* Kernels run one after the other, and each adds {START_S * 1e6:.0f} µs.
* Floor: the longest of units, memory and L2. Expected: units and L2 divided by the share of its
  floor that FlashAttention-2 reaches at 1,024 tokens, as a block here goes through about 640 keys;
  the range takes the shares at 4,096 and 512.
"""

_FLASH = """\
## What share of such a floor a good kernel reaches

FlashAttention-2's own machine code (sm_80, heads of 64, bf16, from PyTorch 2.14.1's library), read
by the same program: its floor, and what its authors measured with the version of their day,
forward and backward together. That one model gives nearly the same share for two quite different
GPUs is the only test of the model there is.
"""

_LAYERS_TEXT = """\
## Layers

One global token with projections of its own in each row of the batch, bf16. Dense FlashAttention-2
does other, more work: all pairs, without global projections; its time is its published rate at
4,096 tokens.
"""

_STEP_TEXT = f"""\
## A training step

Longformer-large ({LAYERS} layers, hidden size {HIDDEN}), one sequence of 4,096 tokens, forward and
backward, no activation checkpointing, head on {MASKED:.0%} of the tokens. All that is not
attention is taken to run at {STEP_SHARE_OF_PEAK:.0%} of the data sheet's 16-bit rate, element-wise
work and optimizer included: an assumption, the same for both columns.
"""
