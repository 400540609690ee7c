"""Logits, or hidden states of a model without a head, of models in memory; and how they compare."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from longpretrain.convert.verify_report import LOGIT_LIMIT, VerifyRow
from longpretrain.model import LongformerForMaskedLM, ModelConfig
from longpretrain.model.encoder import Encoder
from longpretrain.model.skeleton import without_values


class OurModel:
    """A model of ours out of memory, in fp32 on the CPU.

    Args:
        config: sizes and arithmetic.
        tensors: by their names in memory, all that the configuration asks for.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        self.config = config
        with without_values():
            whole = LongformerForMaskedLM(config)
        self._model: LongformerForMaskedLM | Encoder = (
            whole if config.has_lm_head else whole.longformer
        )
        prefix = "" if config.has_lm_head else "longformer."
        names = [name for name, _ in self._model.named_parameters()]
        own = {name: tensors[prefix + name].float().contiguous() for name in names}
        self._model.load_state_dict(own, strict=False, assign=True)
        if isinstance(self._model, LongformerForMaskedLM):
            self._model.tie_weights()
        self._model.eval()

    @property
    def encoder(self) -> Encoder:
        """The model without its head."""
        whole = self._model
        return whole.longformer if isinstance(whole, LongformerForMaskedLM) else whole

    def head(self, hidden_TC: Tensor) -> Tensor:
        """What the encoder's output becomes: logits TV, or itself where there is no head."""
        whole = self._model
        if not isinstance(whole, LongformerForMaskedLM):
            return hidden_TC
        with torch.no_grad():
            logits_TV: Tensor = whole.lm_head(hidden_TC)
        return logits_TV

    def output(
        self, tokens_BN: Tensor, padding_BN: Tensor | None = None, *, global_first: bool = False
    ) -> Tensor:
        """Logits BNV, or hidden states BNC.

        Args:
            tokens_BN: ids.
            padding_BN: where they are padding.
            global_first: the first token of each sequence is a global one.
        """
        first_BG = torch.zeros(len(tokens_BN), 1, dtype=torch.int32) if global_first else None
        with torch.no_grad():
            out: Tensor = self._model(tokens_BN, padding_BN=padding_BN, global_index_BG=first_BG)
        return out


def covering(config: ModelConfig, longest: int) -> ModelConfig:
    """The model with windows that reach every token of so short a sequence."""
    if config.model_type != "longformer":
        return config
    window = max(2 * longest, 2)
    return dataclasses.replace(
        config, attention_window=(window,) * config.num_layers, dilation=(), causal=False
    )


def what(config: ModelConfig) -> str:
    """The name of a model's output."""
    return "logits" if config.has_lm_head else "hidden states"


def compare(check: str, got: Tensor, wanted: Tensor | str) -> VerifyRow:
    """The largest difference of two outputs; or what was said instead of one."""
    if isinstance(wanted, str):
        return VerifyRow(check=check, got=wanted, limit=f"{LOGIT_LIMIT:.0e}", ok=False)
    difference = float((got - wanted).abs().max())
    return VerifyRow(
        check=check, got=f"{difference:.1e}", limit=f"{LOGIT_LIMIT:.0e}",
        ok=difference <= LOGIT_LIMIT,
    )  # fmt: skip
