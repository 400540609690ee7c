"""Longformer pretraining: long attention, exact distributed training, conversion."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import nn

__version__ = "0.1.0"

Model = TypeVar("Model", bound="nn.Module")


def accelerate(model: Model, *, backend: str = "auto") -> Model:
    """Has a loaded Longformer of transformers attend with our operator.

    See ``longpretrain.accelerated.accelerate``. Here so that importing the package stays light.
    """
    from longpretrain.accelerated import accelerate

    return accelerate(model, backend=backend)
