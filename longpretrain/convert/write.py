"""Weights out: a folder that another library loads, checked, with a card of facts found."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from longpretrain.convert.card import CARD_NAME, MARK, card
from longpretrain.convert.fairseq_dictionary import DICTIONARY_NAME
from longpretrain.convert.fairseq_model import need_fairseq_expressible
from longpretrain.convert.onnx_folder import need_onnx, stored_dtype, write_onnx
from longpretrain.convert.precision import dtype_named, effect, need_representable
from longpretrain.convert.read import need_expressible
from longpretrain.convert.source import Source, open_source
from longpretrain.convert.verify import VerifyReport, verify, why_no_transformers
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
    the model twice in fp32, ours and transformers', and a third time where ``dtype`` rounds.

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
            a target that is something else.
        RuntimeError: a check failed; the message has the table.
    """
    _need_known("format", format, _FORMATS)
    _need_known("model", model, _MODELS)
    target, rounded = Path(target), dtype_named(dtype)
    origin = open_source(source, tokenizer=tokenizer)
    is_bare = model == "bare" or not origin.config.has_lm_head
    config = dataclasses.replace(origin.config, has_lm_head=not is_bare)
    if format == "onnx":
        need_onnx(origin.path, config, rounded)
    else:
        need = need_expressible if format == "hf" else need_fairseq_expressible
        need(origin.path, config)
    tensors = origin.weights()
    if is_bare:
        tensors = {name: tensor for name, tensor in tensors.items() if not is_of_a_head(name)}
    rounded = stored_dtype(tensors, rounded) if format == "onnx" else rounded
    global_tokens = _global_tokens(origin, tensors)
    notes = [*origin.notes, *_notes_of_bare(format, origin.config, config, tensors)]
    notes += need_representable(origin.path, tensors, rounded) if rounded else ()
    with fresh_folder(target, belongs=_is_export) as fresh:
        unchecked = why_no_transformers() or ("" if check else _NOT_ASKED)
        if format == "hf":
            report = _write_hugging_face(origin, (config, tensors), fresh, rounded, not unchecked)
        elif format == "onnx":
            assert rounded is not None
            report = write_onnx(origin, (config, tensors), fresh, dtype=rounded)
        else:
            own = {name: tensor.to(rounded or tensor.dtype) for name, tensor in tensors.items()}
            report = write_fairseq(origin, own, fresh, global_tokens=global_tokens)
        if report is not None:
            report = dataclasses.replace(report, notes=(*notes, *report.notes))
            if not report.ok:
                raise RuntimeError("\n".join(["the export fails its check:", *report.lines()]))
        text = card(
            target.absolute().name, origin, config=config, tensors=tensors, dtype=rounded,
            report=report, unchecked=unchecked, library=_FORMATS[format],
            global_tokens=global_tokens, notes=notes if report is None else report.notes,
        )  # fmt: skip
        (fresh / CARD_NAME).write_text(text, encoding="utf-8")
    return report


def _need_known(what: str, got: str, wanted: Iterable[str]) -> None:
    if got not in wanted:
        raise InputError(
            f"export {what}", got=got, wanted=" or ".join(wanted),
            way_out=f"Other ones are not written: pick a {what} of these.",
        )  # fmt: skip


def _write_hugging_face(
    source: Source,
    model: tuple[ModelConfig, dict[str, Tensor]],
    folder: Path,
    dtype: torch.dtype | None,
    check: bool,
) -> VerifyReport | None:
    config, tensors = model
    write_model(model, folder, dtype=dtype)
    source.carry_tokenizer(folder, config.max_tokens)
    if not check:
        return None
    report = verify(folder)
    if dtype is None or all(tensor.dtype == dtype for tensor in tensors.values()):
        return dataclasses.replace(report, notes=())
    return dataclasses.replace(report, notes=(effect(config, tensors, read_tensors(folder)),))


def _notes_of_bare(
    format: str, old: ModelConfig, new: ModelConfig, tensors: dict[str, Tensor]
) -> tuple[str, ...]:
    """What a folder of the bare encoder lacks, and how to load it then."""
    if new.has_lm_head:
        return ()
    notes = ["without the masked-LM head"] if old.has_lm_head else []
    if format == "hf" and POOLER[0] not in tensors:
        notes.append("no pooler was trained: load it with add_pooling_layer=False")
    return tuple(notes)


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
