"""The gradient of the attention operators: the same for the compiled ones and the portable ones.

``keep_for_backward`` and ``differentiate`` are for ``register_autograd``, which torch.compile and
torch.export ask. All else calls what ``differentiable`` gives: a registered gradient does not work
under torch.func, and looks at the whole signature for each argument (65 us a call instead of 25).

Letters: B batch row, N query, H head, D number of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from longpretrain.errors import InputError

NUM_FLOATS, NUM_TENSORS, NUM_INPUTS = 6, 10, 16  # of a forward operator: those that come first

Forward = Callable[..., tuple[Tensor, Tensor]]
Backward = Callable[..., list[Tensor]]


def differentiable(forward: Forward, backward: Backward) -> Forward:
    """The forward operator, with the backward operator for its gradient."""

    class WithGradient(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return forward(*inputs)

        setup_context = staticmethod(keep_for_backward)

        @staticmethod
        def backward(ctx: Any, dout_BNHD: Tensor, _: Tensor | None) -> Any:
            return differentiate(backward, ctx, dout_BNHD)

    def run(*inputs: Any) -> tuple[Tensor, Tensor]:
        needs_gradient = any(x is not None and x.requires_grad for x in inputs[:NUM_FLOATS])
        if needs_gradient and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            found: tuple[Tensor, Tensor] = WithGradient.apply(*inputs)  # type: ignore[no-untyped-call]
            return found
        return forward(*inputs)

    return run


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Saves what ``differentiate`` needs."""
    out_BNHD, lse_BNH = output
    ctx.mark_non_differentiable(lse_BNH)
    ctx.save_for_backward(out_BNHD, lse_BNH, *inputs[:NUM_TENSORS])
    ctx.numbers = inputs[NUM_TENSORS:]


def differentiate(backward: Backward, ctx: Any, dout_BNHD: Tensor) -> tuple[Tensor | None, ...]:
    """One gradient for each input of the forward operator; None for those that are no floats."""
    # Gradients are enabled here when the caller wants to differentiate once more.
    once = _Gradient.apply if torch.is_grad_enabled() else _Gradient.forward
    found = once(backward, dout_BNHD, *ctx.saved_tensors, *ctx.numbers)
    return (*found, *[None] * (NUM_INPUTS - len(found)))


class _Gradient(torch.autograd.Function):
    """The backward operator; refuses to be differentiated."""

    @staticmethod
    def forward(backward: Backward, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(backward(*inputs))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise InputError(
            "derivative",
            got="the second one of attention on the fused or the portable backend",
            wanted="the first one",
            way_out="Use backend='reference'.",
        )
