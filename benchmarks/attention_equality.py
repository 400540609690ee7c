"""Whether the peers compute what ours computes: a ratio of times of unlike functions says nothing.

Outputs and gradients on a small shape. BigBird is left out: it reaches other keys.

Letters: B batch row (1 here), N token, H head, D number of a head, C hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from attention_ours import HEAD_SIZE, Shape, random_tensor
from attention_peers import PEERS, hf_layer
from torch import Tensor

from longpretrain.attention import AttentionPattern, sliding_attention

# Of the largest number in the tensor. fp32: sums in another order; bf16: its 8 bits, and that some
# peers round scores and weights to it.
LIMITS = {"fp32": 1e-5, "bf16": 2e-2}
_COMPARED = {"portable", "hf", "sdpa", "blocked", "flex"}


def compare_outputs(
    peers: Iterable[str], *, dtype: str, attention_window: int, backend: str
) -> list[dict[str, Any]]:
    """The largest difference of each peer's outputs and gradients from ours.

    Returns:
        One row for each peer and tensor: difference, as a share of the tensor's largest number.
    """
    shape = Shape(2 * attention_window, 2, attention_window, dtype)
    rows = []
    for peer in [name for name in peers if name in _COMPARED]:
        if peer != "portable" and PEERS[peer].why_not(shape):
            continue
        made = _hf(shape, backend) if peer == "hf" else _plain(peer, shape, backend)
        for tensor, (theirs, ours) in made.items():
            difference = (theirs.float() - ours.float()).abs().max() / ours.float().abs().max()
            share = float(difference)
            rows.append(
                {
                    "peer": peer, "dtype": dtype, "tensor": tensor, "difference": share,
                    "limit": LIMITS[dtype], "is_equal": share <= LIMITS[dtype],
                }
            )  # fmt: skip
    return rows


def _hf(shape: Shape, backend: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The module against our operator between the module's own projections."""
    layer = hf_layer(shape)
    module, x_BNC = layer.module, layer.x_BNC

    def ours() -> Tensor:
        q, k, v, k_global, v_global = (
            y.view(1, -1, shape.heads, HEAD_SIZE) for y in layer.project()
        )
        q_global = module.query_global(x_BNC[:, :1]).view(1, 1, shape.heads, HEAD_SIZE)
        out = sliding_attention(
            q, k, v, AttentionPattern(shape.one_sided_window),
            global_index_BG=torch.tensor([[0]]), q_global_BGHD=q_global,
            k_global_BNHD=k_global, v_global_BNHD=v_global, backend=backend,
        )  # fmt: skip
        return out.flatten(2)

    theirs = lambda: layer.attend()[0]  # noqa: E731
    return _with_gradients(theirs, ours, {"hidden states": x_BNC}, layer.grad_BNC)


def _plain(peer: str, shape: Shape, backend: str) -> dict[str, tuple[Tensor, Tensor]]:
    """A peer on q, k and v against our operator on the same; the global token has no own ones."""
    theirs: Callable[[], Tensor]
    if peer == "portable":
        sizes = (1, shape.tokens, shape.heads, HEAD_SIZE)
        leaves = [random_tensor(*sizes, dtype=shape.dtype) for _ in range(3)]
        theirs = lambda: _ours(leaves, shape, "portable", with_global=True)  # noqa: E731
        runs_backward, is_heads_first = True, False
    else:
        runnable = PEERS[peer].build(shape)[peer]
        leaves = list(runnable.leaves)
        theirs = lambda: runnable.forward()[0]  # noqa: E731
        runs_backward, is_heads_first = bool(runnable.outputs_grad), True

    def ours() -> Tensor:
        qkv = [x.transpose(1, 2) for x in leaves] if is_heads_first else leaves
        out = _ours(qkv, shape, backend, with_global=peer != "blocked")
        return out.transpose(1, 2) if is_heads_first else out

    if not runs_backward:
        with torch.no_grad():
            return {"output": (theirs(), ours())}
    grad = random_tensor(*leaves[0].shape, dtype=shape.dtype, is_leaf=False)
    return _with_gradients(theirs, ours, dict(zip("qkv", leaves, strict=True)), grad)


def _ours(qkv_BNHD: list[Tensor], shape: Shape, backend: str, *, with_global: bool) -> Tensor:
    index_BG = torch.tensor([[0]]) if with_global else None
    pattern = AttentionPattern(shape.one_sided_window)
    q, k, v = qkv_BNHD
    return sliding_attention(q, k, v, pattern, global_index_BG=index_BG, backend=backend)


def _with_gradients(
    theirs: Callable[[], Tensor],
    ours: Callable[[], Tensor],
    leaves: dict[str, Tensor],
    grad: Tensor,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Outputs and gradients of two functions, side by side."""
    sides = []
    for function in (theirs, ours):
        out = function()
        sides.append([out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad)])
    names = ["output", *(f"gradient of {name}" for name in leaves)]
    return {name: (a, b) for name, a, b in zip(names, *sides, strict=True)}
