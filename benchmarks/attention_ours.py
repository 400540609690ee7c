"""What all of the benchmark shares: shapes, things that run, and our operator with its variants.

Letters: B batch row (1 here), N query or key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longpretrain.attention import AttentionPattern, sliding_attention, why_not
from longpretrain.errors import InputError

HEAD_SIZE = 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
DOCUMENT_TOKENS = 700
DROPOUT = 0.1
NUM_GLOBALS = 10


@dataclass(frozen=True)
class Shape:
    """One batch row of one layer's attention; ``attention_window`` counts both sides."""

    tokens: int
    heads: int
    attention_window: int
    dtype: str

    @property
    def one_sided_window(self) -> int:
        """Our operator's number: keys on each side."""
        return self.attention_window // 2

    @property
    def channels(self) -> int:
        """C: all heads side by side."""
        return self.heads * HEAD_SIZE

    @property
    def qkv_bytes(self) -> int:
        """Size of q, k and v together."""
        return 3 * self.tokens * self.channels * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Runnable:
    """An implementation on its inputs.

    Args:
        forward: gives the outputs.
        outputs_grad: the gradients that backward starts from, one for each output; none: the
            implementation has no backward on the CPU.
        leaves: tensors whose gradients ``reset`` clears.
        module: switched to evaluation for forward alone, to training for both.
    """

    forward: Callable[[], Sequence[Tensor]]
    outputs_grad: Sequence[Tensor]
    leaves: Sequence[Tensor]
    module: nn.Module | None = None

    def run_forward(self) -> Sequence[Tensor]:
        """Inference."""
        if self.module is not None:
            self.module.eval()
        with torch.no_grad():
            return self.forward()

    def run_both(self) -> Sequence[Tensor]:
        """Forward and backward."""
        if self.module is not None:
            self.module.train()
        outputs = self.forward()
        torch.autograd.backward(list(outputs), list(self.outputs_grad))
        return outputs

    def reset(self) -> None:
        """Frees the gradients."""
        for leaf in self.leaves:
            leaf.grad = None


@dataclass(frozen=True)
class OurInputs:
    """Random inputs of our operator, leaves all of them, with global projections of their own."""

    shape: Shape
    qkv_BNHD: list[Tensor]
    kv_global_BNHD: list[Tensor]
    q_global_BGHD: Tensor
    grad_BNHD: Tensor

    def shortened(self, shape: Shape) -> OurInputs:
        """The first tokens of the same numbers, in the same memory; leaves of their own."""

        def first(x_BNHD: Tensor) -> Tensor:
            return x_BNHD.detach()[:, : shape.tokens].requires_grad_()

        qkv, kv_global = ([first(x) for x in xs] for xs in (self.qkv_BNHD, self.kv_global_BNHD))
        grad_BNHD = self.grad_BNHD[:, : shape.tokens]
        return OurInputs(shape, qkv, kv_global, self.q_global_BGHD, grad_BNHD)


def random_tensor(*sizes: int, dtype: str, is_leaf: bool = True) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*sizes).to(DTYPES[dtype]).requires_grad_(is_leaf)


def our_inputs(shape: Shape) -> OurInputs:
    """Inputs with room for ``NUM_GLOBALS`` global queries."""
    sizes = (1, shape.tokens, shape.heads, HEAD_SIZE)
    whole = [random_tensor(*sizes, dtype=shape.dtype) for _ in range(5)]
    q_global = random_tensor(1, NUM_GLOBALS, *sizes[2:], dtype=shape.dtype)
    grad = random_tensor(*sizes, dtype=shape.dtype, is_leaf=False)
    return OurInputs(shape, whole[:3], whole[3:], q_global, grad)


def our_backend(wanted: str | None = None) -> str:
    """The backend that stands for ours: the compiled one where it can run.

    Raises:
        InputError: the compiled one is wanted, and cannot.
    """
    reason = why_not("fused")
    if wanted == "fused" and reason:
        way_out = "Leave --backend out: the portable backend then stands in."
        raise InputError("--backend", got="fused", wanted=f"portable, as {reason}", way_out=way_out)
    return wanted or ("fused" if reason is None else "portable")


VARIANTS = ("dropout 0.1", "dilation 2", "documents", "ten global tokens")
"""What else the operator does; each is compared with the plain call."""


def build_ours(inputs: OurInputs, *, backend: str, variant: str = "") -> Runnable:
    """Our operator: one global token at the start, or one of ``VARIANTS``."""
    shape = inputs.shape
    options: dict[str, Any] = {}
    dilation, positions = 1, [0]
    if variant == "dropout 0.1":
        options = {"dropout_p": DROPOUT, "dropout_seed_B": torch.tensor([1])}
    elif variant == "dilation 2":
        dilation = 2
    elif variant == "documents":
        options = {"document_BN": (torch.arange(shape.tokens) // DOCUMENT_TOKENS)[None]}
    elif variant == "ten global tokens":
        positions = [slot * shape.tokens // NUM_GLOBALS for slot in range(NUM_GLOBALS)]
    else:
        assert not variant, variant
    pattern = AttentionPattern(shape.one_sided_window, dilation)
    q_global = inputs.q_global_BGHD[:, : len(positions)].detach().requires_grad_()
    q, k, v = inputs.qkv_BNHD
    k_global, v_global = inputs.kv_global_BNHD
    index_BG = torch.tensor([positions])

    def forward() -> list[Tensor]:
        return [
            sliding_attention(
                q, k, v, pattern,
                global_index_BG=index_BG,
                q_global_BGHD=q_global, k_global_BNHD=k_global, v_global_BNHD=v_global,
                backend=backend, **options,
            )
        ]  # fmt: skip

    leaves = [q, k, v, k_global, v_global, q_global]
    return Runnable(forward, [inputs.grad_BNHD], leaves)
