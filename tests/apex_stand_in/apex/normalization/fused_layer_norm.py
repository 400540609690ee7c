"""The function behind ``FusedLayerNorm``; counts its calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

calls: list[int] = []
"""Rows of each call."""


def fused_layer_norm_affine(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized_shape: Sequence[int],
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    """The kernel's grid has one block per row: CUDA refuses one of none."""
    calls.append(input.numel() // input.shape[-1])
    assert calls[-1] > 0, "invalid configuration argument"
    assert not memory_efficient
    return torch.layer_norm(input, normalized_shape, weight, bias, eps)
