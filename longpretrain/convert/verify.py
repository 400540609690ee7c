"""Proof that a folder means the same to transformers as to us, or that two folders are one model.

The only file that imports transformers.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longpretrain.convert.read import has_tokenizer, model_folder, need_expressible, run_state
from longpretrain.data.tokenizer import ByteLevelBPE, load_tokenizer
from longpretrain.errors import InputError
from longpretrain.model import (
    LongformerForMaskedLM,
    ModelConfig,
    load_model,
    read_config,
    read_tensors,
)

LOGIT_LIMIT = 1e-4
"""Largest absolute difference of a logit, fp32: above rounding at base size, below any slip."""
_LENGTHS = (7, 255, 512, 513, 1024)
# Real text (Lincoln, 1863), with digits, accents and quotes to show a tokenizer that differs.
_TEXT = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, "
    "conceived in Liberty, and dedicated to the proposition that all men are created equal.\n\n"
    "Now we are engaged in a great civil war, testing whether that nation, or any nation so "
    "conceived and so dedicated, can long endure. (Gettysburg, 19 November 1863: “café”, 1,234.5)\n"
)
# What released RoBERTa files hold beside the masked-LM model.
_NO_PART = re.compile(r"\.pooler\.|position_ids")
# Published vectors of the RoBERTa vocabulary (fairseq's hub interface).
_VECTORS = {"Hello world": [31414, 232], " world": [232], "world": [8331]}


@dataclass(frozen=True, kw_only=True)
class VerifyRow:
    """One check."""

    check: str
    """What was looked at."""
    got: str
    """What was found."""
    limit: str
    """What passes."""
    ok: bool
    """Whether it passed."""


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """All checks of a folder, or of a pair."""

    rows: tuple[VerifyRow, ...]
    """In the order they ran."""
    notes: tuple[str, ...] = ()
    """What is not as it was in the source, in words."""

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(row.ok for row in self.rows)

    def lines(self) -> list[str]:
        """An aligned table."""
        cells = [("", "check", "got", "limit")]
        cells += [("ok" if r.ok else "FAIL", r.check, r.got, r.limit) for r in self.rows]
        widths = [max(len(row[column]) for row in cells) for column in range(4)]
        padded = ((c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
        return ["  ".join(row).rstrip() for row in padded] + [f"note: {n}" for n in self.notes]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def why_no_transformers() -> str | None:
    """Why checks against transformers cannot run; None if they can."""
    if importlib.util.find_spec("transformers") is None:
        return "the package transformers is not installed"
    return None


def verify(folder: Path | str, other: Path | str | None = None) -> VerifyReport:
    """Checks a folder against transformers or, with ``other``, two folders against each other.

    Alone: it loads whole and tied in transformers; logits of both are equal on real text of
    several lengths and with padding; all weights are finite; the tokenizers give the same ids.
    With ``other``: every tensor is equal, bit for bit, and so are the logits.

    Args:
        folder: a model folder, a checkpoint or a run.
        other: another one.

    Raises:
        InputError: a folder does not read, or is a checkpoint with an altered file; alone,
            transformers is not installed or cannot compute such a model.
    """
    if other is not None:
        return VerifyReport(rows=tuple(_compare(_whole(folder), _whole(other))))
    reason = why_no_transformers()
    if reason:
        raise InputError(
            "verify", got=reason, wanted="transformers to compare with",
            way_out="pip install 'longpretrain[dev]', or compare two folders: verify A B.",
        )  # fmt: skip
    folder = _whole(folder)
    need_expressible(folder, read_config(folder))
    return VerifyReport(rows=tuple(_check_folder(folder)))


def _whole(folder: Path | str) -> Path:
    """The model folder, and no altered checkpoint."""
    found = model_folder(folder)
    run_state(found)
    return found


def _check_folder(folder: Path) -> Iterator[VerifyRow]:
    ours = load_model(folder)
    theirs, row = _load_theirs(folder)
    yield row
    yield from _check_weights(folder, ours, theirs)
    yield from _check_logits(folder, ours, theirs)
    if has_tokenizer(folder):
        yield _check_tokenizer(folder)


def _load_theirs(folder: Path) -> tuple[Any, VerifyRow]:
    import transformers

    with _quiet():
        model, info = transformers.AutoModelForMaskedLM.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    wrong = {
        kind: names
        for kind, found in info.items()
        if (names := sorted(str(name) for name in found if not _NO_PART.search(str(name))))
    }
    return model.eval(), VerifyRow(
        check=f"transformers {transformers.__version__} loads every tensor",
        got=json.dumps(wrong) if wrong else type(model).__name__,
        limit="no missing or unexpected key", ok=not wrong,
    )  # fmt: skip


def _check_weights(folder: Path, ours: LongformerForMaskedLM, theirs: Any) -> Iterator[VerifyRow]:
    output, words = theirs.get_output_embeddings(), theirs.get_input_embeddings()
    tied = output.weight is words.weight and output.bias is theirs.lm_head.bias
    yield VerifyRow(
        check="decoder tied", got="yes" if tied else "no",
        limit="weight to the words, bias to lm_head.bias", ok=tied,
    )  # fmt: skip
    state = read_tensors(folder)
    bad = [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]
    yield VerifyRow(
        check="weights finite", got=", ".join(bad[:3]) or f"{len(state)} tensors",
        limit="no NaN or infinity", ok=not bad,
    )  # fmt: skip
    stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = stored.get("dtype", stored.get("torch_dtype", "float32"))
    found = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})
    yield VerifyRow(
        check="dtype of the weights", got=", ".join(found), limit=f"{named} (config.json)",
        ok=found == [named],
    )  # fmt: skip
    # Rows that a conversion forgot to fill hold whatever was in memory (facts: padding rows).
    positions = ours.longformer.embeddings.position_embeddings.weight.detach()
    norm = positions.norm(dim=1)
    kept, rest = norm[: ours.config.pad_id + 1].max(), norm[ours.config.pad_id + 1 :].max()
    yield VerifyRow(
        check="position rows of padding", got=f"norm {kept:.3g}", limit=f"10 x {rest:.3g}",
        ok=bool(kept <= 10 * rest),
    )  # fmt: skip


def _check_logits(folder: Path, ours: LongformerForMaskedLM, theirs: Any) -> Iterator[VerifyRow]:
    longest = ours.config.max_tokens
    for length in sorted({min(length, longest) for length in _LENGTHS}):
        tokens_BN = _tokens(folder, ours.config, length)
        got, wanted = _our_logits(ours, tokens_BN), _their_logits(theirs, tokens_BN)
        yield _logit_row(f"logits, {length} tokens", got, wanted)
        if isinstance(wanted, str):
            return
    length = min(21, longest)
    tokens_BN = _tokens(folder, ours.config, length).repeat(2, 1)
    padding_BN = torch.zeros_like(tokens_BN, dtype=torch.bool)
    padding_BN[1, length // 2 + 1 :] = True
    tokens_BN = tokens_BN.masked_fill(padding_BN, ours.config.pad_id)
    got = _our_logits(ours, tokens_BN, padding_BN)
    wanted = _their_logits(theirs, tokens_BN, padding_BN)
    if not isinstance(wanted, str):
        got, wanted = got[~padding_BN], wanted[~padding_BN]
    yield _logit_row(f"logits, {length} tokens with padding", got, wanted)


def _our_logits(
    model: LongformerForMaskedLM, tokens_BN: Tensor, padding_BN: Tensor | None = None
) -> Tensor:
    with torch.no_grad():
        logits_BNV: Tensor = model(tokens_BN, padding_BN=padding_BN)
    return logits_BNV


def _their_logits(theirs: Any, tokens_BN: Tensor, padding_BN: Tensor | None = None) -> Tensor | str:
    """Logits of transformers, or what it says where it fails."""
    mask_BN = torch.ones_like(tokens_BN) if padding_BN is None else (~padding_BN).long()
    try:
        with torch.no_grad(), _quiet():
            logits_BNV: Tensor = theirs(tokens_BN, attention_mask=mask_BN).logits
    except (RuntimeError, AssertionError) as error:
        return f"transformers fails: {' '.join(str(error).split())[:60]}"
    return logits_BNV


def _logit_row(check: str, got: Tensor, wanted: Tensor | str) -> VerifyRow:
    if isinstance(wanted, str):
        return VerifyRow(check=check, got=wanted, limit=f"{LOGIT_LIMIT:.0e}", ok=False)
    difference = float((got - wanted).abs().max())
    return VerifyRow(
        check=check, got=f"{difference:.1e}", limit=f"{LOGIT_LIMIT:.0e}",
        ok=difference <= LOGIT_LIMIT,
    )  # fmt: skip


def _check_tokenizer(folder: Path) -> VerifyRow:
    import transformers

    ours = load_tokenizer(folder)
    texts = {_TEXT: "the text", **{text: repr(text) for text in _VECTORS}}
    # Ours never puts a space there by itself; with it, the ids must be the same.
    prefix = " " if isinstance(ours, ByteLevelBPE) and ours.add_prefix_space else ""
    with _quiet():
        theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        wrong = [
            name
            for text, name in texts.items()
            if ours.encode(prefix * (text[0] != " ") + text).tolist()
            != theirs.encode(text, add_special_tokens=False)
        ]
    if ours.encode("Hello").tolist() == _VECTORS["Hello world"][:1]:  # RoBERTa's vocabulary
        wrong += [repr(t) for t, ids in _VECTORS.items() if ours.encode(t).tolist() != ids]
    special = [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id]
    if special != [ours.bos_id, ours.eos_id, ours.pad_id, ours.mask_id]:
        wrong.append("special tokens")
    count = len(ours.encode(_TEXT))
    return VerifyRow(
        check="tokenizers agree", got=f"not on {', '.join(wrong)}" if wrong else f"{count} ids",
        limit="the same ids", ok=not wrong,
    )  # fmt: skip


def _compare(first: Path, second: Path) -> Iterator[VerifyRow]:
    one, two = read_tensors(first), read_tensors(second)
    equal = 0
    for name in [*one, *(name for name in two if name not in one)]:
        difference = _difference(name, one, two)
        equal += difference is None
        if difference is not None:
            yield VerifyRow(check=name, got=difference, limit="equal", ok=False)
    yield VerifyRow(
        check="tensors equal bit for bit", got=str(equal), limit=f"{len(one.keys() | two.keys())}",
        ok=equal == len(one) == len(two),
    )  # fmt: skip
    ours, others = load_model(first), load_model(second)
    if ours.config.vocab_size != others.config.vocab_size:
        return
    longest = min(ours.config.max_tokens, others.config.max_tokens)
    for length in sorted({min(length, longest) for length in _LENGTHS}):
        tokens_BN = _tokens(first, ours.config, length)
        got, wanted = _our_logits(ours, tokens_BN), _our_logits(others, tokens_BN)
        yield _logit_row(f"logits, {length} tokens", got, wanted)


def _difference(name: str, one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> str | None:
    """What differs in a tensor, in words; None if nothing."""
    if name not in one or name not in two:
        return f"only in the {'first' if name in one else 'second'}"
    a, b = one[name], two[name]
    if a.shape != b.shape:
        return f"shape {tuple(a.shape)} and {tuple(b.shape)}"
    if a.dtype == b.dtype and torch.equal(a, b):
        return None
    largest = float((a.double() - b.double()).abs().max())
    return f"differs by {largest:.1e}" + ("" if a.dtype == b.dtype else f", {a.dtype}, {b.dtype}")


def _tokens(folder: Path, config: ModelConfig, length: int) -> Tensor:
    """A sequence of ``length`` ids: the text over and over, or drawn ids without a tokenizer."""
    if has_tokenizer(folder):
        tokenizer = load_tokenizer(folder)
        text_N = np.resize(tokenizer.encode(_TEXT).astype(np.int64), max(length - 2, 0))
        ids = [tokenizer.bos_id, *text_N.tolist(), tokenizer.eos_id]
        return torch.tensor([ids[:length]])
    generator = torch.Generator().manual_seed(1)
    special = (config.pad_id, config.bos_id, config.eos_id)
    plain = torch.tensor([i for i in range(config.vocab_size) if i not in special])
    return plain[torch.randint(len(plain), (1, length), generator=generator)]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' progress bars and advice off the console."""
    theirs = logging.getLogger("transformers")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        theirs.setLevel(level)
