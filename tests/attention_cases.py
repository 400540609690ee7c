"""Inputs for the tests of attention: all that one call of the operator takes, drawn from a seed.

Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from longpretrain.attention import AttentionPattern, sliding_attention


@dataclass(frozen=True)
class Case:
    pattern: AttentionPattern
    floats: dict[str, Tensor]  # by the operator's argument names; leaves that want a gradient
    masks: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype) -> Case:
        floats = {k: x.detach().to(dtype).requires_grad_() for k, x in self.floats.items()}
        return replace(self, floats=floats)

    def forward(self, backend: str = "portable", **changes: Any) -> tuple[Tensor, Tensor]:
        arguments = {**self.floats, **self.masks, **changes}
        return sliding_attention(
            **arguments, pattern=self.pattern, return_lse=True, backend=backend
        )

    def run(self, backend: str = "portable", **changes: Any) -> dict[str, Tensor]:
        """Output, log-sum-exp and the gradient of each input for a fixed gradient of the output."""
        out, lse = self.forward(backend, **changes)
        return {"out": out.detach(), "lse": lse} | self.gradients(out)

    def gradients(self, out: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(out, list(self.floats.values()), output_gradient(out))
        return {f"d{name}": x for name, x in zip(self.floats, found, strict=True)}


def output_gradient(out: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(99)
    return torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)


def make_case(
    pattern: AttentionPattern,
    *,
    batch: int = 2,
    heads: int = 2,
    head_size: int = 4,
    queries: int | None = None,
    keys: int = 40,
    q_offset: int = 0,
    padding: bool = False,
    slots: int = 0,
    own_projections: bool = True,
    documents: bool = False,
    dropout_p: float = 0.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Case:
    """A random case: scattered padding, ragged slots (some unused), documents of any length."""
    draw = torch.Generator().manual_seed(seed)
    queries = keys - q_offset if queries is None else queries

    def normal(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=draw, dtype=torch.float64)
        return x.to(dtype).requires_grad_()

    floats = {"q_BNHD": normal(batch, queries, heads, head_size)}
    for name in ("k_BNHD", "v_BNHD"):
        floats[name] = normal(batch, keys, heads, head_size)
    masks: dict[str, Any] = {"q_offset": q_offset}
    if padding:
        masks["padding_BN"] = torch.rand(batch, keys, generator=draw) < 0.3
    if slots:
        masks["global_index_BG"] = _slots(batch, keys, slots, draw)
        if own_projections:
            floats["q_global_BGHD"] = normal(batch, slots, heads, head_size)
            for name in ("k_global_BNHD", "v_global_BNHD"):
                floats[name] = normal(batch, keys, heads, head_size)
    if documents:
        starts = torch.rand(batch, keys, generator=draw) < 4 / keys
        masks["document_BN"] = starts.cumsum(dim=1).to(torch.int32)
    if dropout_p:
        masks["dropout_p"] = dropout_p
        masks["dropout_seed_B"] = torch.randint(-(2**62), 2**62, (batch,), generator=draw)
    return Case(pattern, floats, masks)


def _slots(batch: int, keys: int, slots: int, draw: torch.Generator) -> Tensor:
    """Distinct positions in any order, about one slot in four unused."""
    rows = []
    for _ in range(batch):
        row = torch.full((slots,), -1, dtype=torch.int32)
        named = torch.randperm(keys, generator=draw)[:slots].to(torch.int32)
        row[: len(named)] = named
        row[torch.rand(slots, generator=draw) < 0.25] = -1
        rows.append(row)
    return torch.stack(rows)


def assert_equal_to(found: dict[str, Tensor], right: dict[str, Tensor], tolerance: float) -> None:
    """Largest difference in a tensor <= tolerance times its scale: its largest magnitude.

    No gradient's scale is below a hundredth of the largest gradient's: some true gradients are 0
    (of the query of a single key) and only rounding is left. That of an output is at least 0.01
    (values are near 1), that of a log-sum-exp 1 (its error is relative to the sum). Infinities must
    be the same at the same places, and NaN equals nothing.
    """
    assert found.keys() == right.keys()
    gradients = [x.abs().max().item() for name, x in right.items() if name not in {"out", "lse"}]
    floor = {"out": 0.01, "lse": 1.0}
    for name, right_value in right.items():
        got, expected = found[name].double(), right_value.double()
        finite = expected.isfinite()
        assert torch.equal(got[~finite], expected[~finite]), f"{name}: not finite there"
        got, expected = got.where(finite, 0.0), expected.where(finite, 0.0)
        assert got.isfinite().all(), f"{name}: not finite where it should be"
        lowest = floor.get(name, max(gradients, default=0.0) / 100)
        limit = tolerance * max(lowest, expected.abs().max().item())
        error = (got - expected).abs().max().item()
        assert error <= limit, f"{name}: off by {error:.3g}, allowed {limit:.3g}"
