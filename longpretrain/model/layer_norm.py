"""LayerNorm, by torch or on GPUs by NVIDIA's apex: the same parameters, names and numbers.

apex works in fp32 within a row, as torch does, and sums the gradients of weight and bias in a fixed
order: a run that repeats itself with torch does so with apex.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor, nn

from longpretrain import nvidia_apex
from longpretrain.errors import InputError

BACKENDS = ("auto", "torch", "apex")

_log = logging.getLogger(__name__)


class LayerNorm(nn.LayerNorm):
    """torch's module with a choice of what computes it.

    Args:
        width: numbers of a row, the last dimension.
        eps: added to the variance.
        backend: auto (apex on GPUs where it can be used), torch or apex.

    Raises:
        InputError: a name that is none of them; in forward, apex where it cannot run.
    """

    def __init__(self, width: int, *, eps: float, backend: str = "auto") -> None:
        if backend not in BACKENDS:
            raise InputError(
                "layer_norm_backend",
                got=backend,
                wanted=" or ".join(BACKENDS),
                way_out="Leave it at auto.",
            )
        super().__init__(width, eps=eps)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        """Normalises the rows; any shape whose last dimension is the width."""
        # apex launches a block per row and fails with none: a batch may have nothing to predict.
        if self.backend == "torch" or torch.compiler.is_compiling() or x.numel() == 0:
            return super().forward(x)
        if why_not(self.backend, x.device.type):
            return super().forward(x)
        by_apex = nvidia_apex.layer_norm()
        return by_apex(x, self.weight, self.bias, self.normalized_shape, self.eps)


def why_not(backend: str, device_type: str) -> str | None:
    """Why rows on a device are not normalised by apex; None where they are.

    With auto, an apex that is installed but cannot be used is told once.

    Raises:
        InputError: apex was asked for and cannot run.
    """
    if backend == "torch":
        return "torch was asked for"
    if backend == "auto" and device_type != "cuda":
        return "it is the CPU"
    reason = nvidia_apex.why_not("layer_norm", device_type)
    if reason is not None and backend == "apex":
        raise InputError(
            "layer norm by apex",
            got=reason,
            wanted="NVIDIA's apex with its CUDA extensions, and a GPU",
            way_out=nvidia_apex.HOW_TO_GET,
        )
    if reason is not None and nvidia_apex.is_meant("layer_norm"):
        _announce_once(reason)
    return reason


@functools.cache
def _announce_once(reason: str) -> None:
    _log.warning("LayerNorm runs on torch's kernel: %s", reason)
