"""Longformer with RoBERTa's masked-LM head: the model that is pretrained.

Letters of the shape suffixes: B batch, N tokens, C hidden channels, G slots for global tokens,
M tokens to predict, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longpretrain.errors import InputError
from longpretrain.model.encoder import Encoder, ModelConfig, layer_norm
from longpretrain.model.new_positions import LearntAndNewPositions


class LMHead(nn.Module):
    """Dense, GELU, LayerNorm, and the word embeddings as decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.layer_norm = layer_norm(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)
        # Hugging Face stores this name; decoder.bias is the same parameter.
        self.bias = self.decoder.bias

    def forward(self, x_MC: Tensor) -> Tensor:
        """Logits, MV."""
        logits_MV: Tensor = self.decoder(self.layer_norm(F.gelu(self.dense(x_MC))))
        return logits_MV


class LongformerForMaskedLM(nn.Module):
    """Encoder and tied masked-LM head, under Hugging Face's parameter names.

    New weights are drawn from torch's global generator as Hugging Face does: normal with deviation
    ``initializer_range``, zero biases and padding rows, LayerNorm weights of one.

    Args:
        config: shape and arithmetic. With ``model_type="roberta"`` attention is full and there are
            no global projections; the names in memory still begin with ``longformer.``.
        activation_checkpointing: recompute each layer in the backward pass.
    """

    def __init__(self, config: ModelConfig, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        self.longformer = Encoder(config, activation_checkpointing=activation_checkpointing)
        self.lm_head = LMHead(config)
        self.tie_weights()
        self.apply(self._initialise)

    def tie_weights(self) -> None:
        """Makes the decoder's weight the word embeddings, and its bias ``lm_head.bias``, again."""
        self.lm_head.decoder.weight = self.longformer.embeddings.word_embeddings.weight
        self.lm_head.decoder.bias = self.lm_head.bias

    def freeze_global_projections(self) -> None:
        """Takes the six ``*_global`` tensors of every layer out of training."""
        for name, parameter in self.named_parameters():
            if "_global." in name:
                parameter.requires_grad_(False)

    def train_new_positions_only(self) -> None:
        """Takes everything out of training but the position rows beyond the learnt ones.

        Raises:
            InputError: how many are learnt is unknown, or all are.
        """
        first_new = first_new_row(self.config)
        self.requires_grad_(False)
        embeddings = self.longformer.embeddings
        table_PC = embeddings.position_embeddings.weight
        embeddings.position_embeddings = LearntAndNewPositions(table_PC, first_new)

    def forward(
        self,
        tokens_BN: Tensor,
        *,
        padding_BN: Tensor | None = None,
        position_BN: Tensor | None = None,
        document_BN: Tensor | None = None,
        global_index_BG: Tensor | None = None,
        predict_index_M: Tensor | None = None,
        dropout_seed_B: Tensor | None = None,
    ) -> Tensor:
        """Logits over the vocabulary.

        Args:
            tokens_BN: int64 ids.
            padding_BN: bool, True = padding, which no token attends to. None: no padding.
            position_BN: int64 rows of the position table, the first real one being pad_id + 1
                (``position_ids`` of Hugging Face). None: counted over the ids that are not
                pad_id, whatever padding_BN says; so does Hugging Face.
            document_BN: int32 document numbers; attention stays inside a document.
            global_index_BG: int32 positions of the global tokens, -1 = unused slot. None: none are.
            predict_index_M: int64 indices into the B*N tokens; the head runs on these alone.
            dropout_seed_B: int64 seed per row for attention dropout; needed in training when
                ``attention_dropout`` is more than 0.

        Returns:
            MV where predict_index_M is given, else BNV.

        Raises:
            InputError: too many tokens, ids or positions out of range (looked at on the CPU only,
                so that a GPU never waits), global tokens for a RoBERTa, a missing dropout seed.
        """
        self._check(tokens_BN, position_BN, global_index_BG, dropout_seed_B)
        x_BNC: Tensor = self.longformer(
            tokens_BN,
            padding_BN=padding_BN,
            position_BN=position_BN,
            document_BN=document_BN,
            global_index_BG=global_index_BG,
            dropout_seed_B=dropout_seed_B,
        )
        if predict_index_M is not None:
            x_BNC = x_BNC.flatten(0, 1).index_select(0, predict_index_M)
        logits: Tensor = self.lm_head(x_BNC)
        return logits

    def _initialise(self, module: nn.Module) -> None:
        with torch.no_grad():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(0.0, self.config.initializer_range)
            if isinstance(module, nn.Linear):
                module.bias.zero_()
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()
            if module is self.lm_head.decoder:  # it is the word embeddings once more
                module.weight[self.config.pad_id].zero_()

    def _check(
        self,
        tokens_BN: Tensor,
        position_BN: Tensor | None,
        global_index_BG: Tensor | None,
        dropout_seed_B: Tensor | None,
    ) -> None:
        config, num_tokens = self.config, tokens_BN.shape[1]
        # A sequence of several documents may restart its positions and so be longer than the table;
        # full attention is a window as wide as the table, so RoBERTa may not.
        restarts = position_BN is not None and config.model_type == "longformer"
        if num_tokens > config.max_tokens and not restarts:
            raise InputError(
                "tokens of a sequence", got=num_tokens,
                wanted=f"at most {config.max_tokens} (the model's position table)",
                way_out="Cut it, or lengthen the model: longpretrain convert --positions.",
            )  # fmt: skip
        if global_index_BG is not None and config.model_type == "roberta":
            raise InputError(
                "global tokens", got="a model of type roberta", wanted="a longformer",
                way_out="Convert it first: longpretrain convert.",
            )  # fmt: skip
        if self.training and config.attention_dropout > 0 and dropout_seed_B is None:
            raise InputError(
                "dropout_seed_B", got=None,
                wanted=f"one seed per row (attention_dropout is {config.attention_dropout})",
                way_out="Pass seeds, or call model.eval(), or set attention_dropout to 0.",
            )  # fmt: skip
        if not torch.compiler.is_compiling():
            _check_range("token ids", tokens_BN, config.vocab_size)
            _check_range("positions", position_BN, config.max_position_embeddings)


def first_new_row(config: ModelConfig) -> int:
    """The first row of the position table that was not learnt before the model was lengthened.

    Raises:
        InputError: how many are learnt is unknown, or all are.
    """
    learnt = config.learnt_positions
    if learnt == 0:
        raise InputError(
            "model.train_only: new_positions",
            got="a model that does not say how many of its positions are learnt",
            wanted="learnt_positions in the longpretrain block of config.json",
            way_out="Convert it anew, elsewhere (but with --init interpolate no row is learnt), or"
            " say model.learnt_positions=512 if that was its length before.",
        )
    if learnt >= config.max_tokens:
        raise InputError(
            "model.train_only: new_positions", got=f"{learnt} learnt of {config.max_tokens}",
            wanted="positions that are new",
            way_out="Lengthen the model first: longpretrain convert --positions.",
        )  # fmt: skip
    return config.pad_id + 1 + learnt


def _check_range(what: str, index: Tensor | None, end: int) -> None:
    if index is None or index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = index.aminmax()
    if low < 0 or high >= end:
        raise InputError(
            what, got=f"{int(low)} to {int(high)}", wanted=f"0 to {end - 1}",
            way_out="The data must be made with this model's tokenizer and length.",
        )  # fmt: skip
