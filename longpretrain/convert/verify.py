"""Proof that a model is whole and means the same to transformers, or that two belong together."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from longpretrain.convert.read import need_expressible
from longpretrain.convert.theirs import why_no_transformers
from longpretrain.convert.verify_alone import check_alone
from longpretrain.convert.verify_pair import check_pair
from longpretrain.convert.verify_report import (
    LOGIT_LIMIT,
    TensorRow,
    VerifyReport,
    VerifyRow,
    failing,
)
from longpretrain.convert.verify_side import Side, open_side
from longpretrain.convert.verify_theirs import check_with_transformers
from longpretrain.errors import InputError
from longpretrain.model.listing import listed

__all__ = [
    "LOGIT_LIMIT",
    "TensorRow",
    "VerifyReport",
    "VerifyRow",
    "verify",
    "why_no_transformers",
]


def verify(model: Path | str, other: Path | str | None = None) -> VerifyReport:
    """Checks a model by itself and against transformers or, with ``other``, two models.

    Alone: no tensor is missing or too many, numbers are finite and of one type, the decoder is
    tied; padding, position rows and global projections are as a conversion or a training leaves
    them; a conversion is as its record has it; all files agree on the ids; transformers loads every
    tensor and gives the same outputs on real text of several lengths, and the same ids.

    With ``other``: the relation between the two is found (one model in whatever format, or a long
    one made from a short one), and every tensor, number and output has to fit it.

    Args:
        model: a model folder of any family that is read, a checkpoint, a run, or a fairseq `.pt`.
        other: another one.

    Raises:
        InputError: a path does not hold a model, or a checkpoint with an altered file; alone,
            transformers is not installed or cannot compute such a model.
    """
    first = open_side(model)
    if other is not None:
        return check_pair(first, open_side(other))
    reason = why_no_transformers()
    if reason:
        raise InputError(
            "verify", got=reason, wanted="transformers to compare with",
            way_out="pip install 'longpretrain[dev]', or compare two models: verify A B.",
        )  # fmt: skip
    need_expressible(first.path, first.config)
    return _check_one(first)


def _check_one(side: Side) -> VerifyReport:
    alone, tensors = check_alone(side)
    rows = [*failing(tensors), *alone]
    if side.is_whole:  # else there is nothing to compute with
        rows += check_with_transformers(side)
    return VerifyReport(rows=tuple(rows), tensors=tensors, notes=tuple(_notes(side)))


def _notes(side: Side) -> Iterator[str]:
    yield from side.source.notes
    if side.left_out:
        yield f"left out, no part of the model: {listed(side.left_out, ', ')}"
