"""Derivatives of attention other than those of backward: torch.func, forward mode, second ones.

Letters: B batch row, N query, H head, D number of a head.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import Case
from test_attention_fused import CASES, each_case, suited
from torch import Tensor

from longpretrain.attention import AttentionPattern, sliding_attention


@each_case
def test_torch_func_grad_is_the_gradient(case: Case, backend: str) -> None:
    case = suited(case, backend)

    def loss(q_BNHD: Tensor) -> Tensor:
        return case.forward(backend, q_BNHD=q_BNHD)[0].square().sum()

    q_BNHD = case.floats["q_BNHD"]
    (right,) = torch.autograd.grad(loss(q_BNHD), q_BNHD)
    assert torch.equal(torch.func.grad(loss)(q_BNHD.detach()), right)


def test_torch_func_vjp_is_the_gradient(backend: str) -> None:
    """Of all inputs at once."""
    case = suited(CASES["everything"], backend)
    floats = {name: x.detach() for name, x in case.floats.items()}
    out, pull = torch.func.vjp(lambda given: case.forward(backend, **given)[0], floats)
    found, right = pull(torch.ones_like(out))[0], case.forward(backend)[0]
    gradients = torch.autograd.grad(right, list(case.floats.values()), torch.ones_like(right))
    assert torch.equal(out, right)
    for name, x in zip(case.floats, gradients, strict=True):
        assert torch.equal(found[name], x), name


def test_second_derivatives_are_refused(backend: str) -> None:
    case = suited(CASES["everything"], backend)
    q_BNHD = case.floats["q_BNHD"]
    loss = case.forward(backend)[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, q_BNHD, create_graph=True)
    with pytest.raises(ValueError, match="derivative: got the second one"):
        torch.autograd.grad(gradient.sum(), q_BNHD)


def test_forward_mode_is_refused_where_its_tangent_would_be_zero(backend: str) -> None:
    x_BNHD = torch.randn(1, 6, 1, 2, generator=torch.Generator().manual_seed(0))

    def tangent(backend: str) -> Tensor:
        def attend(q_BNHD: Tensor) -> Tensor:
            return sliding_attention(q_BNHD, x_BNHD, x_BNHD, AttentionPattern(2), backend=backend)

        return torch.func.jvp(attend, (x_BNHD,), (x_BNHD,))[1]

    with pytest.raises(ValueError, match=r"inputs: got tensors with a forward-mode tangent"):
        tangent(backend)
    assert tangent("reference").abs().max() > 0
