"""``python -m longpretrain.attention``: which backends run here, and whether they compute right.

Letters: B batch row, N query and key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import longpretrain
from longpretrain.attention.backends import BACKENDS, why_not
from longpretrain.attention.fused import sliding_attention
from longpretrain.attention.library import kernel_facts
from longpretrain.attention.pattern import AttentionPattern
from longpretrain.errors import InputError

# Of a tensor's scale. float32: docs/numerics.md. bfloat16 keeps 8 bits, so that rounding alone is
# 0.004: five roundings, enough to tell a wrong kernel; the tests hold a narrower limit.
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 0.02}


@dataclass(frozen=True)
class Case:
    """One call of the operator, in float64."""

    name: str
    pattern: AttentionPattern
    floats: dict[str, Tensor]
    others: dict[str, Any] = field(default_factory=dict)

    def run(self, backend: str, inputs: torch.dtype, compute: torch.dtype) -> dict[str, Tensor]:
        """Output and gradients by name; the numbers are rounded to ``inputs`` before."""
        floats = {
            name: x.to(inputs).to(compute).requires_grad_() for name, x in self.floats.items()
        }
        arguments: dict[str, Any] = floats | self.others
        out = sliding_attention(**arguments, pattern=self.pattern, backend=backend)
        # Any direction will do that is not the same in all places.
        direction = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
        direction = direction.to(inputs).to(compute)
        gradients = torch.autograd.grad(out, list(floats.values()), direction)
        named = zip(floats, gradients, strict=True)
        return {"output": out.detach()} | {f"gradient of {name}": x for name, x in named}


def main(words: Sequence[str] | None = None) -> int:
    """Prints the report. Returns 0, or 1 when a backend that runs here computes wrong numbers.

    Ends the program with code 2 when LONGPRETRAIN_CPU_LEVEL cannot be had.
    """
    parser = argparse.ArgumentParser(
        prog="python -m longpretrain.attention",
        description="Shows which attention backends run on this machine and why others do not, "
        "and holds those that do against the reference. Exit code 1: one computes wrong numbers; "
        "2: bad usage.",
        epilog="LONGPRETRAIN_CPU_LEVEL=plain, avx2, avx512 or avx512_bf16 lowers the instruction "
        "set; OMP_NUM_THREADS sets the threads.",
    )
    parser.parse_args(words)
    try:
        kernel_facts()
    except InputError as error:  # another instruction set than asked for
        parser.error(str(error))
    for line in _machine():
        print(line)
    print("held against the reference, of scale:", flush=True)
    all_right = True
    for backend in ("fused", "portable"):
        if why_not(backend) is None:
            all_right &= _check(backend)
    return 0 if all_right else 1


def _machine() -> Iterator[str]:
    threads = torch.get_num_threads()
    yield f"longpretrain {longpretrain.__version__}, torch {torch.__version__}, {threads} threads"
    for backend in BACKENDS[1:]:
        reason = why_not(backend)
        yield f"{backend}: {'yes' if reason is None else f'no: {reason}'}"
    facts = kernel_facts()
    if not facts:
        return
    yield f"compiled by {facts['compiler']} with the headers of torch {facts['torch']}"
    yield (
        f"instruction sets: {facts['used']} in use; compiled {facts['built']}; "
        f"this machine runs {facts['machine']}"
    )
    yield f"CUDA kernels: {facts['cuda']}"


def _check(backend: str) -> bool:
    right = True
    for case in _cases():
        for dtype, limit in LIMITS.items():
            error, where = _worst(case, backend, dtype)
            good = error <= limit
            right &= good
            print(
                f"  {'ok' if good else 'FAILED':6} {backend:8} {str(dtype)[6:]:8} {case.name}: "
                f"{error:.1e} in the {where}, limit {limit:.0e}",
                flush=True,
            )
    return right


def _worst(case: Case, backend: str, dtype: torch.dtype) -> tuple[float, str]:
    """The largest error of a tensor, of its scale, and the tensor's name.

    No scale is below a hundredth of the largest: some true gradients are 0.
    """
    found = case.run(backend, dtype, dtype)
    right = case.run("reference", dtype, torch.float64)
    lowest = max(float(x.abs().max()) for x in right.values()) / 100
    errors = []
    for name, x in right.items():
        scale = max(lowest, float(x.abs().max()))
        error = float((found[name].double() - x).abs().max()) / scale
        errors.append((math.inf if math.isnan(error) else error, name))
    return max(errors)


def _cases(batch: int = 2, tokens: int = 150, heads: int = 2, head_size: int = 32) -> list[Case]:
    draw = torch.Generator().manual_seed(0)

    def normal(tokens: int) -> Tensor:
        shape = (batch, tokens, heads, head_size)
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    def floats(names: Sequence[str]) -> dict[str, Tensor]:
        return {f"{name}_BNHD": normal(tokens) for name in names}

    length_B1 = torch.tensor([[tokens], [tokens - 40]])
    padding_BN = torch.arange(tokens) >= length_B1
    starts_BN = torch.rand(batch, tokens, generator=draw) < 4 / tokens
    slots_BG = torch.tensor([[0, 100, -1], [tokens // 2, 7, 3]])
    own = floats(["k_global", "v_global"]) | {"q_global_BGHD": normal(slots_BG.shape[1])}
    seed_B = torch.arange(batch, dtype=torch.int64)
    return [
        Case("window", AttentionPattern(20), floats("qkv")),
        Case(
            "causal, documents, padding",
            AttentionPattern(20, causal=True),
            floats("qkv"),
            {"padding_BN": padding_BN, "document_BN": starts_BN.cumsum(dim=1)},
        ),
        Case(
            "global tokens, dilation, dropout, padding",
            AttentionPattern(16, (1, 3)),
            floats("qkv") | own,
            {
                "padding_BN": padding_BN,
                "global_index_BG": slots_BG,
                "dropout_p": 0.1,
                "dropout_seed_B": seed_B,
            },
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
