"""Weights out: a folder that transformers or fairseq loads, checked, with a card of facts found."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from longpretrain.convert.card import CARD_NAME, MARK, card
from longpretrain.convert.fairseq_dictionary import (
    DICTIONARY_NAME,
    dictionary_text,
    read_dictionary,
)
from longpretrain.convert.fairseq_file import read_checkpoint, write_checkpoint
from longpretrain.convert.fairseq_model import (
    CheckpointParts,
    from_checkpoint,
    need_fairseq_expressible,
    to_checkpoint,
)
from longpretrain.convert.read import need_expressible
from longpretrain.convert.source import Source, open_source
from longpretrain.convert.verify import VerifyReport, VerifyRow, verify, why_no_transformers
from longpretrain.data.tokenizer import Tokenizer, load_tokenizer
from longpretrain.errors import InputError
from longpretrain.files import fresh_folder
from longpretrain.model.folder import holds_a_model_only, write_model

FAIRSEQ_NAME = "model.pt"
_FAIRSEQ_FILES = {FAIRSEQ_NAME, DICTIONARY_NAME, CARD_NAME}
# Format -> the library that loads it.
_FORMATS = {"hf": "transformers", "fairseq": "fairseq"}


def export(
    source: Path | str,
    target: Path | str,
    *,
    format: str = "hf",
    tokenizer: Path | str | None = None,
) -> VerifyReport | None:
    """Writes weights as a folder for another library: whole and verified, or not at all.

    The files of a checkpoint are compared with their hashes first. The new folder is checked before
    it gets its name, and the model card holds the outcome: a Hugging Face folder against
    transformers; a fairseq checkpoint, as this package does without fairseq, by reading it back.

    Args:
        source: a run (its newest checkpoint is taken), a checkpoint, a model folder, or a fairseq
            `.pt` with its dict.txt beside it.
        target: the folder to make; an earlier export there, with no other files, is replaced.
        format: "hf", or "fairseq": model.pt of its ``roberta``, or of our plugin's
            ``longformer``, and dict.txt.
        tokenizer: a folder with the tokenizer to take instead of the source's own.

    Returns:
        The checks that it passed, or None where transformers is not installed.

    Raises:
        InputError: a format that is not there, a model or a tokenizer that the format cannot
            express, damaged files, weights that are not finite, or a target that is something
            else.
        RuntimeError: a check failed; the message has the table.
    """
    if format not in _FORMATS:
        raise InputError(
            "export format", got=format, wanted=" or ".join(_FORMATS),
            way_out="Other formats are not written yet.",
        )  # fmt: skip
    target = Path(target)
    origin = open_source(source, tokenizer=tokenizer)
    need = need_expressible if format == "hf" else need_fairseq_expressible
    need(origin.path, origin.config)
    tensors = origin.weights()
    global_tokens = _global_tokens(origin, tensors)
    with fresh_folder(target, belongs=_is_export) as fresh:
        if format == "hf":
            report = _write_hugging_face(origin, tensors, fresh)
        else:
            report = _write_fairseq(origin, tensors, fresh, global_tokens)
        if report is not None and not report.ok:
            raise RuntimeError("\n".join(["the export fails its check:", *report.lines()]))
        text = card(
            target.absolute().name, origin,
            parameters=sum(tensor.numel() for tensor in tensors.values()),
            report=report, unchecked=why_no_transformers() or "", library=_FORMATS[format],
            global_tokens=global_tokens,
            notes=origin.notes if report is None else report.notes,
        )  # fmt: skip
        (fresh / CARD_NAME).write_text(text, encoding="utf-8")
    return report


def _write_hugging_face(
    source: Source, tensors: dict[str, Tensor], folder: Path
) -> VerifyReport | None:
    write_model((source.config, tensors), folder)
    source.carry_tokenizer(folder, source.config.max_tokens)
    if why_no_transformers():
        return None
    return dataclasses.replace(verify(folder), notes=source.notes)


def _write_fairseq(
    source: Source, tensors: dict[str, Tensor], folder: Path, global_tokens: str
) -> VerifyReport:
    config, tokenizer = source.config, source.tokenizer()
    if config.model_type == "longformer":
        # The plugin knows RoBERTa's tokenizer only, or that of a folder, which has its own way in.
        if tokenizer is not None and tokenizer.fingerprint != load_tokenizer().fingerprint:
            raise InputError(
                f"tokenizer of {source.path}", got="another one", wanted="RoBERTa's BPE",
                way_out="Keep the Hugging Face folder; fairseq-train takes it as --model-path.",
            )  # fmt: skip
        tokenizer = load_tokenizer()
    elif tokenizer is None:
        raise InputError(
            f"tokenizer of {source.path}", got="none", wanted=f"one, for {DICTIONARY_NAME}",
            way_out="Say --tokenizer DIR.",
        )  # fmt: skip
    text = dictionary_text(tokenizer, rows=config.vocab_size, where=source.path)
    parts = to_checkpoint(config, tensors, global_tokens=global_tokens)
    (folder / DICTIONARY_NAME).write_text(text, encoding="utf-8")
    write_checkpoint(folder / FAIRSEQ_NAME, parts.tensors, parts.model, parts.task)
    rows = (
        *_read_back(folder / FAIRSEQ_NAME, source, parts),
        _read_dictionary_back(folder / DICTIONARY_NAME, tokenizer, config.vocab_size),
    )
    return VerifyReport(rows=rows, notes=(*source.notes, *parts.notes))


def _global_tokens(source: Source, tensors: dict[str, Tensor]) -> str:
    """The training's policy; "none" makes every export copy the local projections over."""
    known = source.state.get("global_tokens")
    if known is not None:
        return str(known)
    local = {name: name.replace("_global.", ".") for name in tensors if "_global." in name}
    alike = all(torch.equal(tensors[name], tensors[twin]) for name, twin in local.items())
    return "none" if alike else "first"


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


def _is_export(folder: Path) -> bool:
    path = folder / CARD_NAME
    names = {file.name for file in folder.iterdir()}
    is_fairseq = FAIRSEQ_NAME in names and names <= _FAIRSEQ_FILES
    if not path.is_file() or not (is_fairseq or holds_a_model_only(folder)):
        return False
    return MARK in path.read_text(encoding="utf-8", errors="replace")
