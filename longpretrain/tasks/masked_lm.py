"""Masked language modelling on long documents: the task that both trainers run, free of fairseq.

Everything about sample ``number`` follows from the number, the run's seed and its corpora: which
block of which it is, which tokens are masked and with what, and the seed of its attention dropout.
Ranks, workers and micro-batches have no say.

Letters: B sequences, N tokens, M masked tokens, V vocabulary, G global tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from longpretrain.config import Config
from longpretrain.data.blocks import Blocks
from longpretrain.data.global_tokens import global_positions, global_tokens_of
from longpretrain.data.hashing import hash64
from longpretrain.data.masking import mask_tokens
from longpretrain.data.shards import Corpus
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.errors import InputError
from longpretrain.model.encoder import ModelConfig
from longpretrain.model.families import CONFIG_NAME
from longpretrain.model.folder import (
    changed,
    config_json,
    load_model,
    need_lm_head,
    read_config,
    read_tensors,
)
from longpretrain.model.lm_head import first_new_row
from longpretrain.model.new_positions import NEW
from longpretrain.model.weights import POSITIONS, stored_names
from longpretrain.tasks.sources import Sources

# What a key is for, so that masking and dropout of one sample do not share a stream.
_MASKING, _DROPOUT = 1, 2
_TABLE = POSITIONS.removesuffix(".weight")
_SHOWN = 24
"""Tokens of a list, on the console."""
_LOCAL_PROJECTIONS = (".query.", ".key.", ".value.")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sequence, ready to be collated."""

    tokens_N: np.ndarray
    positions_M: np.ndarray
    targets_M: np.ndarray
    global_G: np.ndarray | None
    dropout_seed: int
    sample_id: int
    document_N: np.ndarray | None = None
    """Packed documents only, as in ``data.cuts.Block``; so is position_N."""
    position_N: np.ndarray | None = None


def model_changes(config: Config) -> dict[str, object]:
    """What a recipe changes of a model folder's config.json, in ModelConfig's names."""
    recipe = config.model
    named = {
        "attention_backend": recipe.attention_backend,
        "layer_norm_backend": config.kernels.layer_norm,
        "attention_window": recipe.attention_window,
        "dilation": recipe.dilation,
        "causal": recipe.causal,
        "learnt_positions": recipe.learnt_positions or None,
        "hidden_dropout": recipe.dropout,
        "attention_dropout": recipe.attention_dropout,
    }
    return {name: value for name, value in named.items() if value is not None}


class MaskedLMTask:
    """The masked-LM objective over one corpus or several, for the engine's loop (its Task Protocol)
    and for fairseq.

    Args:
        config: the run.
        folder: the model folder to take configuration, tokenizer and weights from. None: the
            tokenizer is RoBERTa's BPE and the model is ``new_model``.
        split: "train" or "valid": which data of the recipe.
        new_model: the configuration of a model with new weights, where there is no folder.

    Raises:
        InputError: a folder is missing or broken, the corpus has another tokenizer than the model,
            or ``data.max_tokens`` exceeds the model's positions.
    """

    def __init__(
        self,
        config: Config,
        folder: Path | None,
        *,
        split: str = "train",
        new_model: ModelConfig | None = None,
    ) -> None:
        assert (folder is None) == (new_model is not None), "a folder or a new model, one of them"
        self.config = config
        self.tokenizer = load_tokenizer(folder)
        stored = new_model if folder is None else read_config(folder)
        assert stored is not None
        need_lm_head(folder or "", stored)
        self._changes = model_changes(config)
        self.model_config = changed(stored, self._changes)
        self._global_tokens = global_tokens_of(config.model.global_tokens, self.tokenizer)
        self._has_global = self._global_tokens.kind != "none"
        self._new_positions_only = config.model.train_only == "new_positions"
        self._check_fit(folder)
        self.sources = Sources(config, split, self.tokenizer, owner=f"model {folder or 'new'}")

    def _check_fit(self, folder: Path | None) -> None:
        length, positions = self.config.data.max_tokens, self.model_config.max_tokens
        if length > positions:
            raise InputError(
                "recipe key data.max_tokens",
                got=length,
                wanted=f"at most {positions}, the positions of {folder}",
                way_out="Lengthen the model: longpretrain convert "
                f"{folder} DST --positions {length}.",
            )
        if self._new_positions_only:
            self._need_new_positions()
        self.tokenizer.need_masking(f"tokenizer of {folder}")
        if self.tokenizer.vocab_size > self.model_config.vocab_size:
            raise InputError(
                f"tokenizer of {folder}",
                got=f"{self.tokenizer.vocab_size} ids",
                wanted=f"at most {self.model_config.vocab_size}, the model's word embeddings",
                way_out="Put the tokenizer there that the model was trained with.",
            )
        if self._has_global and self.model_config.model_type == "roberta":
            raise InputError(
                "recipe key model.global_tokens",
                got=self.config.model.global_tokens,
                wanted="none, as RoBERTa has no global attention",
                way_out=f"Make a Longformer first: longpretrain convert {folder} DST.",
            )

    def _need_new_positions(self) -> None:
        """Refuses to train new positions where there are none, or none that a sample reaches."""
        first_new_row(self.model_config)
        length, learnt = self.config.data.max_tokens, self.model_config.learnt_positions
        if length <= learnt:
            raise InputError(
                "recipe key data.max_tokens", got=length,
                wanted=f"more than the {learnt} learnt positions, as only new ones train",
                way_out="Train on longer sequences, or leave model.train_only at all.",
            )  # fmt: skip

    def build_model(self, folder: Path) -> nn.Module:
        """The model of a folder with the recipe's changes; what the recipe does not train is
        frozen.
        """
        model = load_model(
            folder,
            changes=self._changes,
            activation_checkpointing=self.config.activation_checkpointing,
        )
        self._stored = stored_names(model)
        if self._new_positions_only:
            model.train_new_positions_only()
            table = model.longformer.embeddings.position_embeddings
            self._stored[f"{_TABLE}.{NEW}"] = self._stored[POSITIONS]
            self._learnt_PC = table.weight.detach().clone()
        elif not self._has_global:
            model.freeze_global_projections()
        return model

    @property
    def frozen_summary(self) -> str:
        """What does not train, for the console: ": ..." or nothing."""
        if self._new_positions_only:
            learnt = self.model_config.learnt_positions
            return f": the position rows from number {learnt:,} on (model.train_only)"
        if self._has_global or self.model_config.model_type != "longformer":
            return ""
        return "; global projections, without global tokens, are stored as copies of local ones"

    @property
    def global_summary(self) -> str:
        """Which tokens sentence_ends means; nothing of policies that say it themselves."""
        ids = self._global_tokens.ids
        if self._global_tokens.kind != "sentence_ends":
            return ""
        texts = [self.tokenizer.decode([number]).strip() for number in ids]
        shown = " ".join(sorted(dict.fromkeys(texts), key=len)[:_SHOWN])
        more = " ..." if len(set(texts)) > _SHOWN else ""
        return f"global tokens: {len(ids)} of the tokenizer end a sentence: {shown}{more}"

    def check_weights(self, folder: Path) -> None:
        """Refuses missing, truncated or misshapen weights, without building the model."""
        read_tensors(folder)

    @property
    def blocks(self) -> Blocks:
        """The blocks of a run on one corpus."""
        return self.sources.only

    @property
    def corpus(self) -> Corpus:
        """The corpus of a run on one."""
        return self.blocks.corpus

    def epoch(self, number: int) -> int:
        """The pass over its corpus, in a mix over the one most repeated, that sample ``number``
        belongs to, from 0.
        """
        return self.sources.epoch(number)

    def version(self, number: int) -> int:
        """The version of the mix that sample ``number`` belongs to, from 0."""
        return self.sources.mix.version(number)

    def describe(self, number: int) -> dict[str, Any]:
        """Source, folder, pass and block of sample ``number``."""
        return self.sources.describe(number)

    def sample(self, number: int) -> Sample:
        """Sample ``number``: its block, masked for its epoch, and its dropout seed for its
        update.
        """
        blocks, epoch, block = self.sources.locate(number)
        identity = blocks.sample_id(block)
        seed = self.config.run.seed
        update = number // self.config.batch.global_sequences + 1
        found = blocks.read(block)
        tokens_N = found.tokens_N
        inputs_N, positions_M = mask_tokens(
            tokens_N,
            key=hash64(seed, _MASKING, identity, epoch),
            probability=self.config.masking.probability,
            special_ids=self.tokenizer.special_ids,
            real_ids=self.tokenizer.real_ids,
            mask_id=self.tokenizer.mask_id,
        )
        return Sample(
            tokens_N=inputs_N,
            positions_M=positions_M,
            targets_M=tokens_N[positions_M],
            global_G=global_positions(inputs_N, self._global_tokens, found.position_N)
            if self._has_global
            else None,
            dropout_seed=hash64(seed, _DROPOUT, identity, update),
            sample_id=identity,
            document_N=found.document_N,
            position_N=found.position_N,
        )

    def collate(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """Pads to the longest sequence. ``padding_BN``, ``global_index_BG``, ``document_BN`` and
        ``position_BN`` are there only if needed.
        """
        lengths = [len(sample.tokens_N) for sample in samples]
        longest = max(lengths)
        tokens_BN = np.full((len(samples), longest), self.tokenizer.pad_id, dtype=np.int64)
        for row, sample in enumerate(samples):
            tokens_BN[row, : lengths[row]] = sample.tokens_N
        index_M = [row * longest + sample.positions_M for row, sample in enumerate(samples)]
        seeds_B = np.array([sample.dropout_seed for sample in samples], dtype=np.uint64)
        ids_B = np.array([sample.sample_id for sample in samples], dtype=np.uint64)
        batch = {
            "tokens_BN": torch.from_numpy(tokens_BN),
            "predict_index_M": torch.from_numpy(np.concatenate(index_M)),
            "targets_M": torch.from_numpy(np.concatenate([s.targets_M for s in samples])),
            "dropout_seed_B": torch.from_numpy(seeds_B.view(np.int64)),
            "sample_id_B": torch.from_numpy(ids_B.view(np.int64)),
            "length_B": torch.tensor(lengths),
        }
        if min(lengths) < longest:
            batch["padding_BN"] = torch.arange(longest)[None, :] >= batch["length_B"][:, None]
        found = [sample.global_G for sample in samples if sample.global_G is not None]
        if found:
            batch["global_index_BG"] = _pad_global(found)
        return batch | _pad_packed(samples, longest, self.tokenizer.pad_id)

    @staticmethod
    def count(batch: Mapping[str, torch.Tensor]) -> int:
        """Masked tokens of a batch."""
        return batch["targets_M"].numel()

    @staticmethod
    def tokens(batch: Mapping[str, torch.Tensor]) -> int:
        """Input tokens of a batch, padding excluded."""
        return int(batch["length_B"].sum())

    @staticmethod
    def sample_ids(batch: Mapping[str, torch.Tensor]) -> list[int]:
        """Corpus and block of each sequence, as one number (``Blocks.sample_id``)."""
        return [int(found) for found in batch["sample_id_B"].cpu().numpy().view(np.uint64)]

    @staticmethod
    def loss(model: Any, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Cross-entropy in nats, summed over the masked tokens, in fp32."""
        logits_MV = model(
            batch["tokens_BN"],
            padding_BN=batch.get("padding_BN"),
            position_BN=batch.get("position_BN"),
            document_BN=batch.get("document_BN"),
            global_index_BG=batch.get("global_index_BG"),
            predict_index_M=batch["predict_index_M"],
            dropout_seed_B=batch["dropout_seed_B"],
        )
        return F.cross_entropy(logits_MV.float(), batch["targets_M"], reduction="sum")

    def identity(self) -> dict[str, str]:
        """The corpora and the tokenizer of the run, by fingerprint."""
        return {**self.sources.identity(), "tokenizer": self.tokenizer.fingerprint}

    def stored_names(self, parameter: str) -> tuple[str, ...]:
        """Names of a parameter in a model folder.

        Global projections that stand still while the local ones train are stored as copies of
        these, as the published recipe does after pretraining (Longformer's conversion notebook), so
        a checkpoint is already what an export must be. Learnt position rows that stand still are
        stored with the new ones, in one table.
        """
        stored = self._stored[parameter]
        if self._new_positions_only:
            return () if parameter == POSITIONS else (stored,)
        if self._has_global or self.model_config.model_type != "longformer":
            return (stored,)
        for local in _LOCAL_PROJECTIONS:
            if f".attention.self{local}" in stored:
                return stored, stored.replace(local, f"{local[:-1]}_global.")
        return () if "_global." in stored else (stored,)

    def stored(self, parameter: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """What a model folder holds of a trained parameter: of new position rows the whole
        table.
        """
        if parameter == f"{_TABLE}.{NEW}":
            value = torch.cat([self._learnt_PC, value])
        return dict.fromkeys(self.stored_names(parameter), value)

    def write_model_files(self, folder: Path) -> None:
        """config.json and the tokenizer's files."""
        text = json.dumps(config_json(self.model_config), indent=2)
        (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
        self.tokenizer.save(folder, self.model_config.max_tokens)


def _pad_global(found: list[np.ndarray]) -> torch.Tensor:
    """Ragged global positions as int32 [B, G], -1 in unused slots."""
    slots = max(1, *(len(row) for row in found))
    index_BG = np.full((len(found), slots), -1, dtype=np.int32)
    for row, positions in enumerate(found):
        index_BG[row, : len(positions)] = positions
    return torch.from_numpy(index_BG)


def _pad_packed(samples: list[Sample], longest: int, pad_id: int) -> dict[str, torch.Tensor]:
    """Documents and positions of packed sequences, else nothing.

    Positions are rows of the model's table, which begin behind that of padding (RoBERTa's rule);
    padding carries on the last document, as the attention asks for.
    """
    document_BN = np.zeros((len(samples), longest), np.int32)
    position_BN = np.full((len(samples), longest), pad_id, np.int64)
    for row, sample in enumerate(samples):
        if sample.document_N is None or sample.position_N is None:
            return {}
        length = len(sample.tokens_N)
        document_BN[row, :length] = sample.document_N
        document_BN[row, length:] = sample.document_N[-1]
        position_BN[row, :length] = sample.position_N + pad_id + 1
    return {
        "document_BN": torch.from_numpy(document_BN),
        "position_BN": torch.from_numpy(position_BN),
    }
