"""transformers' own Longformer behind our model's forward, for the plain loop."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn


class HuggingFaceModel(nn.Module):
    """``LongformerForMaskedLM`` of a model folder; global projections frozen, as in the recipe."""

    def __init__(self, folder: Path) -> None:
        from transformers import LongformerForMaskedLM

        super().__init__()
        self.model = LongformerForMaskedLM.from_pretrained(
            folder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("_global." not in name)

    def forward(
        self,
        tokens_BN: Tensor,
        *,
        padding_BN: Tensor | None,
        global_index_BG: Tensor | None,
        predict_index_M: Tensor,
        dropout_seed_B: Tensor,
    ) -> Tensor:
        assert global_index_BG is None, "this twin has no global tokens"
        mask_BN = None if padding_BN is None else (~padding_BN).long()
        logits_BNV = self.model(input_ids=tokens_BN, attention_mask=mask_BN).logits
        return logits_BNV.flatten(0, 1)[predict_index_M]
