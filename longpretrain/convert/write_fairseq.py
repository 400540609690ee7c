"""A model as a fairseq checkpoint with its dictionary, checked by reading both back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from longpretrain.convert.fairseq_dictionary import (
    DICTIONARY_NAME,
    dictionary_text,
    read_dictionary,
)
from longpretrain.convert.fairseq_file import read_checkpoint, write_checkpoint
from longpretrain.convert.fairseq_model import CheckpointParts, from_checkpoint, to_checkpoint
from longpretrain.convert.source import Source
from longpretrain.convert.verify import VerifyReport, VerifyRow
from longpretrain.data.tokenizer import Tokenizer, load_tokenizer
from longpretrain.errors import InputError

FAIRSEQ_NAME = "model.pt"


def write_fairseq(
    source: Source, tensors: Mapping[str, Tensor], folder: Path, *, global_tokens: str
) -> VerifyReport:
    """Writes model.pt of fairseq's ``roberta`` or our plugin's ``longformer``, and dict.txt.

    Args:
        source: what is exported.
        tensors: its tensors, by their names in memory, in the type to write.
        folder: to write to.
        global_tokens: the policy to train on with.

    Raises:
        InputError: the tokenizer cannot be said in fairseq's terms, or there is none.
    """
    config, tokenizer = source.config, source.tokenizer()
    if tokenizer is None:
        raise InputError(
            f"tokenizer of {source.path}", got="none", wanted=f"one, for {DICTIONARY_NAME}",
            way_out="Say --tokenizer DIR.",
        )  # fmt: skip
    # The plugin knows RoBERTa's tokenizer only, or that of a folder, which has its own way in.
    is_plugins = config.model_type == "longformer"
    if is_plugins and tokenizer.fingerprint != load_tokenizer().fingerprint:
        raise InputError(
            f"tokenizer of {source.path}", got="another one", wanted="RoBERTa's BPE",
            way_out="Keep the Hugging Face folder; fairseq-train takes it as --model-path.",
        )  # fmt: skip
    text = dictionary_text(tokenizer, rows=config.vocab_size, where=source.path)
    parts = to_checkpoint(config, tensors, global_tokens=global_tokens)
    (folder / DICTIONARY_NAME).write_text(text, encoding="utf-8")
    write_checkpoint(folder / FAIRSEQ_NAME, parts.tensors, parts.model, parts.task)
    rows = (
        *_read_back(folder / FAIRSEQ_NAME, source, parts),
        _read_dictionary_back(folder / DICTIONARY_NAME, tokenizer, config.vocab_size),
    )
    return VerifyReport(rows=rows, notes=parts.notes)


def _read_back(path: Path, source: Source, parts: CheckpointParts) -> tuple[VerifyRow, ...]:
    checkpoint = read_checkpoint(path)
    found = checkpoint.tensors
    equal = sum(
        name in found and tensor.dtype == found[name].dtype and torch.equal(tensor, found[name])
        for name, tensor in parts.tensors.items()
    )
    # Of new weights and of the machine alone: no part of a checkpoint.
    unwritten = (
        "initializer_range", "attention_backend", "layer_norm_backend", "type_vocab_size",
        "learnt_positions",
    )  # fmt: skip
    back = from_checkpoint(checkpoint).config
    wanted = dataclasses.asdict(source.config)
    different = [
        name
        for name, value in dataclasses.asdict(back).items()
        if name not in unwritten and value != wanted[name]
    ]
    return (
        VerifyRow(
            check="read back: tensors equal bit for bit", got=str(equal),
            limit=str(len(parts.tensors)), ok=equal == len(parts.tensors) == len(found),
        ),
        VerifyRow(
            check="read back: sizes and arithmetic", got=", ".join(different) or "equal",
            limit="equal", ok=not different,
        ),
    )  # fmt: skip


def _read_dictionary_back(path: Path, tokenizer: Tokenizer, rows: int) -> VerifyRow:
    back = read_dictionary(path, rows=rows)
    if rows == tokenizer.vocab_size == len(tokenizer.vocab):
        alike = back.fingerprint == tokenizer.fingerprint
    else:  # rows without a token got a name each
        alike = tokenizer.vocab.items() <= back.vocab.items()
    return VerifyRow(
        check="read back: dictionary", got="equal" if alike else "another tokenizer",
        limit="equal", ok=alike,
    )  # fmt: skip
