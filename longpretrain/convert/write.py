"""Weights out: a folder that another library loads, checked, with a card of facts found."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from longpretrain.convert.card import CARD_NAME, MARK, card
from longpretrain.convert.fairseq_dictionary import DICTIONARY_NAME
from longpretrain.convert.fairseq_model import need_fairseq_expressible
from longpretrain.convert.onnx_folder import need_onnx, stored_dtype, write_onnx
from longpretrain.convert.precision import (
    dtype_named,
    effect,
    is_rounded,
    name_of,
    need_representable,
)
from longpretrain.convert.read import need_expressible
from longpretrain.convert.room import told_if_full
from longpretrain.convert.source import Source, open_source
from longpretrain.convert.verify import VerifyReport, verify, why_no_transformers
from longpretrain.convert.verify_text import tokens
from longpretrain.convert.write_fairseq import FAIRSEQ_NAME, write_fairseq
from longpretrain.errors import InputError
from longpretrain.files import fresh_folder
from longpretrain.mapped import release
from longpretrain.model import ModelConfig, read_tensors
from longpretrain.model.families import POOLER, is_of_a_head
from longpretrain.model.folder import holds_a_model_only, write_model

_FAIRSEQ_FILES = {FAIRSEQ_NAME, DICTIONARY_NAME, CARD_NAME}
# Format -> the library that loads it.
_FORMATS = {"hf": "transformers", "fairseq": "fairseq", "onnx": "onnx"}
_MODELS = ("masked-lm", "bare")
_TOKENS = 512
"""Of text, on which the effect of rounding is told."""
_NO_TOKENIZER = "no tokenizer: the source has none (--tokenizer DIR gives one)"
_NOT_ASKED = "it was not asked for (--no-check)"


def export(
    source: Path | str,
    target: Path | str,
    *,
    format: str = "hf",
    tokenizer: Path | str | None = None,
    model: str = "masked-lm",
    dtype: str | None = None,
    check: bool = True,
) -> VerifyReport | None:
    """Writes weights as a folder for another library: whole and verified, or not at all.

    The files of a checkpoint are compared with their hashes first. The new folder is checked before
    it gets its name, and the model card holds the outcome: a Hugging Face folder against
    transformers; a fairseq checkpoint, as this package does without fairseq, by reading it back.

    A Hugging Face folder is written tensor by tensor, in little memory. Its check is not: it holds
    the model twice in fp32, ours and transformers', and a third time where ``dtype`` rounds. That
    of an ONNX file holds it twice, and the logits of one input at a time, which the runtime makes
    twice: up to 2**30 numbers, 4 GiB, as it compares no more tokens at once than give as many.

    Args:
        source: a run (its newest checkpoint is taken), a checkpoint, a model folder, or a fairseq
            `.pt` with its dict.txt beside it.
        target: the folder to make; an earlier export there, with no other files, is replaced.
        format: "hf"; "fairseq": model.pt of its ``roberta``, or of our plugin's ``longformer``, and
            dict.txt; "onnx": model.onnx for inputs of any size, compared with our model at many.
        tokenizer: a folder with the tokenizer to take instead of the source's own.
        model: "masked-lm", or "bare": the encoder alone, as transformers' LongformerModel. A
            source without a masked-LM head is always bare.
        dtype: "fp32", "bf16" or "fp16", to which every number is rounded. None: the source's.
        check: whether to compare a Hugging Face folder with transformers.

    Returns:
        The checks that it passed, or None where there was no comparison with transformers.

    Raises:
        InputError: a format that is not there, a model or a tokenizer that the format cannot
            express, numbers too large for the type, damaged files, weights that are not finite, or
            a target that is something else, or has no room.
        RuntimeError: a check failed; the message has the table.
    """
    target = Path(target)
    plan = _planned(
        source, tokenizer, format=format, is_bare=_is_bare(model), dtype=dtype_named(dtype)
    )
    unchecked = why_no_transformers() or ("" if check else _NOT_ASKED)
    with told_if_full(), fresh_folder(target, belongs=_is_export) as fresh:
        report = _written(plan, fresh, check=not unchecked)
        notes = plan.notes
        if report is not None:
            notes = (*notes, *report.notes)
            report = dataclasses.replace(report, notes=notes)
            if not report.ok:
                raise RuntimeError("\n".join(["the export fails its check:", *report.lines()]))
        text = card(
            target.absolute().name, plan.source, config=plan.config, tensors=plan.tensors,
            dtype=plan.dtype, report=report, unchecked=unchecked, library=_FORMATS[format],
            global_tokens=plan.global_tokens, notes=notes,
        )  # fmt: skip
        (fresh / CARD_NAME).write_text(text, encoding="utf-8")
    return report


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is to be written, of a source that was read and found fit."""

    source: Source
    format: str
    config: ModelConfig
    tensors: dict[str, Tensor]
    """By their names in memory, as the source has them."""
    dtype: torch.dtype | None
    """What they are to be rounded to; None: they stay."""
    global_tokens: str
    notes: tuple[str, ...]


def _planned(
    path: Path | str,
    tokenizer: Path | str | None,
    *,
    format: str,
    is_bare: bool,
    dtype: torch.dtype | None,
) -> _Plan:
    _need_known("format", format, _FORMATS)
    source = open_source(path, tokenizer=tokenizer)
    has_tokenizer = source.tokenizer() is not None
    has_head = source.config.has_lm_head and not is_bare
    config = dataclasses.replace(source.config, has_lm_head=has_head)
    if format == "onnx":
        need_onnx(source.path, config, dtype)
    else:
        need = need_expressible if format == "hf" else need_fairseq_expressible
        need(source.path, config)
    tensors = source.weights()
    if not has_head:
        tensors = {name: tensor for name, tensor in tensors.items() if not is_of_a_head(name)}
    if format == "hf" and dtype is None:
        _need_one_type(source.path, tensors)
    dtype = stored_dtype(tensors, dtype) if format == "onnx" else dtype
    lacks = [] if has_tokenizer else [_NO_TOKENIZER]
    lacks += _notes_of_bare(format, source.config, config, tensors)
    if format == "onnx":  # the graph has none
        tensors = {name: tensor for name, tensor in tensors.items() if name not in POOLER}
    lost = need_representable(source.path, tensors, dtype) if dtype else ()
    return _Plan(
        source=source, format=format, config=config, tensors=tensors, dtype=dtype,
        global_tokens=_global_tokens(source, tensors), notes=(*source.notes, *lacks, *lost),
    )  # fmt: skip


def _written(plan: _Plan, folder: Path, *, check: bool) -> VerifyReport | None:
    """The folder's content but its card, and the checks that it was put to."""
    if plan.format == "onnx":
        assert plan.dtype is not None
        return write_onnx(plan.source, (plan.config, plan.tensors), folder, dtype=plan.dtype)
    if plan.format == "fairseq":
        own = {name: t.to(plan.dtype or t.dtype) for name, t in plan.tensors.items()}
        return write_fairseq(plan.source, own, folder, global_tokens=plan.global_tokens)
    write_model((plan.config, plan.tensors), folder, dtype=plan.dtype)
    plan.source.carry_tokenizer(folder, plan.config.max_tokens)
    if not check:
        return None
    report = verify(folder)
    dtype = plan.dtype
    if dtype is None or not any(is_rounded(t, dtype) for t in plan.tensors.values()):
        return dataclasses.replace(report, notes=())
    length = min(_TOKENS, plan.config.max_tokens)
    tokens_BN = tokens(plan.source.tokenizer(), plan.config, length)
    moved = effect(plan.config, plan.tensors, read_tensors(folder), tokens_BN)
    return dataclasses.replace(report, notes=(moved,))


def _is_bare(model: str) -> bool:
    _need_known("model", model, _MODELS)
    return model == "bare"


def _need_known(what: str, got: str, wanted: Iterable[str]) -> None:
    if got not in wanted:
        raise InputError(
            f"export {what}", got=got, wanted=" or ".join(wanted),
            way_out=f"Other ones are not written: pick a {what} of these.",
        )  # fmt: skip


def _need_one_type(where: Path, tensors: Mapping[str, Tensor]) -> None:
    """config.json names one type for all weights."""
    found = sorted({name_of(tensor.dtype) for tensor in tensors.values()})
    if len(found) > 1:
        raise InputError(
            f"weights of {where}", got=f"numbers of {' and '.join(found)}",
            wanted="one type, as transformers loads them in",
            way_out="Say --dtype fp32, or the type that you want.",
        )  # fmt: skip


def _notes_of_bare(
    format: str, old: ModelConfig, new: ModelConfig, tensors: dict[str, Tensor]
) -> list[str]:
    """What a folder of the bare encoder lacks, and how to load it then."""
    if new.has_lm_head:
        return []
    notes = ["without the masked-LM head"] if old.has_lm_head else []
    if format == "hf" and POOLER[0] not in tensors:
        notes.append("no pooler was trained: load it with add_pooling_layer=False")
    if format == "onnx" and POOLER[0] in tensors:
        notes.append("without the pooler: the graph gives out the hidden states of all tokens")
    return notes


def _global_tokens(source: Source, tensors: dict[str, Tensor]) -> str:
    """The training's policy; "none" makes every export copy the local projections over."""
    known = source.state.get("global_tokens")
    if known is not None and source.has_own_globals == (known != "none"):
        return str(known)
    local = {name: name.replace("_global.", ".") for name in tensors if "_global." in name}
    alike = True
    for name, twin in local.items():
        alike = alike and torch.equal(tensors[name], tensors[twin])
        release(tensors[name])
        release(tensors[twin])
    return "none" if alike else "first"


def _is_export(folder: Path) -> bool:
    path = folder / CARD_NAME
    names = {file.name for file in folder.iterdir()}
    is_fairseq = FAIRSEQ_NAME in names and names <= _FAIRSEQ_FILES
    if not path.is_file() or not (is_fairseq or holds_a_model_only(folder)):
        return False
    return MARK in path.read_text(encoding="utf-8", errors="replace")
