"""A long model from a short one: the conversion of Longformer's section 5, for any length.

Only the position table, the attention pattern and the global projections differ, and the head where
a new one is asked for; every other tensor is the source's, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longpretrain.convert.position_rows import Init, lengthen_positions, position_origin
from longpretrain.convert.read import RECORD_NAME, hashes
from longpretrain.convert.room import told_if_full
from longpretrain.convert.source import Source, open_source
from longpretrain.errors import InputError
from longpretrain.files import fresh_folder
from longpretrain.model import ModelConfig
from longpretrain.model.families import POOLER
from longpretrain.model.folder import spread, write_model
from longpretrain.model.weights import POSITIONS

MAX_POSITIONS = 1 << 24
"""Far above any use; a table of more would not fit into memory."""
MAX_SEED = (1 << 63) - 1
"""The largest that torch takes."""
_HEAD_STREAM = 0x9E3779B97F4A7C15
_WINDOW = 512  # the paper's
_INITS = ("copy", "random", "interpolate")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Where every tensor of a converted model came from."""

    target: Path
    """The folder that was made, or found made already."""
    up_to_date: bool
    """The folder holds this very conversion since an earlier call; nothing was written."""
    origins: Mapping[str, str]
    """Tensor, by its name in memory -> a sentence on its origin."""
    has_tokenizer: bool
    """Whether the new folder has a tokenizer."""
    beyond_hugging_face: tuple[str, ...] = ()
    """What of the new model transformers cannot compute, in words."""
    notes: tuple[str, ...] = ()
    """What of the source was left out or is not as expected, in words."""

    def lines(self) -> list[str]:
        """A few lines for a person."""
        beyond = " and ".join(self.beyond_hugging_face)
        warning = f"for longpretrain alone: transformers cannot run {beyond}; export refuses it"
        warnings = [warning] if beyond else []
        if self.up_to_date:
            return [f"{self.target} is up to date", *warnings]
        counts: dict[str, int] = {}
        for origin in self.origins.values():
            counts[origin] = counts.get(origin, 0) + 1
        lines = [f"{count:5d} x {origin}" for origin, count in counts.items()]
        tokenizer = "carried over" if self.has_tokenizer else "none, as asked"
        notes = [*self.notes, *warnings]
        return [f"{self.target}: tensors", *lines, f"tokenizer: {tokenizer}", *notes]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def convert(
    source: Path | str,
    target: Path | str,
    *,
    positions: int = 4096,
    attention_window: int | Sequence[int] | None = None,
    init: Init = "copy",
    seed: int = 1,
    tokenizer: Path | str | None = None,
    need_tokenizer: bool = True,
    allow_nonfinite: bool = False,
    new_head: bool = False,
) -> Report:
    """Makes a Longformer folder from a model of RoBERTa's kind, or from another Longformer.

    The position rows of padding (0 and 1 in RoBERTa) are kept. The rows of tokens are made from the
    source's learnt ones:

    * ``copy``: repeated end to end, the last repetition cut (the paper's choice: a window sees the
      order that it was trained on everywhere but at the seams).
    * ``random``: kept as far as they go, and the new ones after them drawn from a normal
      distribution of ``initializer_range``. So we read the first Longformer row of Table 5: the
      paper's text speaks of new position embeddings only.
    * ``interpolate``: stretched linearly, first row to first and last to last.

    Global projections are copies of the local ones, unless the source has its own: a checkpoint of
    a training without global tokens has not, as they stood still while the local ones learnt.

    A source without a masked-LM head becomes a bare encoder, with its pooler if it has one.

    Args:
        source: a Hugging Face folder of any family that is read (RoBERTa, CamemBERT, XLM-RoBERTa,
            BERT, Longformer), a checkpoint of ours, a run (its newest checkpoint), or a fairseq
            `.pt` with its dict.txt beside it.
        target: the folder to make: whole, or not at all.
        positions: tokens that the new model can place; more or fewer than the source's.
        attention_window: both sides together, even, at most ``positions``; one number, or one per
            layer. None: a Longformer's own; else, or where these do not fit,
            512 or the largest that does.
        init: how to make the position rows.
        seed: of the random rows, and of a new head.
        tokenizer: a folder with the tokenizer to take instead of the source's own.
        need_tokenizer: False: no tokenizer is looked for, and the new folder has none.
        allow_nonfinite: take weights that are NaN or infinite as they are, with a note.
        new_head: draw a masked-LM head for a source that has none.

    Raises:
        InputError: the source does not read, has no tokenizer or weights that are not finite, a
            number does not fit, the target holds something other than this very conversion, or its
            disk is full.
    """
    target = Path(target)
    origin = open_source(
        source, tokenizer=tokenizer, with_tokenizer=need_tokenizer, allow_nonfinite=allow_nonfinite
    )
    old = origin.config
    if new_head:
        _need_no_head(origin)
    new = _long_config(old, positions, attention_window)
    learnt = _learnt(origin, new, init)
    new = dataclasses.replace(new, learnt_positions=learnt, has_lm_head=old.has_lm_head or new_head)
    request = _request(
        origin, new, init, seed, with_tokenizer=need_tokenizer, allow_nonfinite=allow_nonfinite
    )
    _need_tokenizer(origin, tokenizer, need_tokenizer)
    report = Report(
        target=target, up_to_date=_is_done(target, request), origins={}, notes=origin.notes,
        has_tokenizer=origin.has_tokenizer, beyond_hugging_face=new.beyond_hugging_face,
    )  # fmt: skip
    if report.up_to_date:
        return report
    new, id_notes = _with_ids(origin, new)
    state, origins = _long_state(origin, new, init, seed)
    with told_if_full(), fresh_folder(target, belongs=lambda _: False) as fresh:
        write_model((new, state), fresh)
        origin.carry_tokenizer(fresh, new.max_tokens)
        record = {**request, "files": hashes(fresh)}
        (fresh / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    notes = (*origin.notes, *id_notes, *_head_notes(origin, new))
    return dataclasses.replace(report, origins=origins, notes=notes)


def _need_tokenizer(source: Source, given: Path | str | None, needed: bool) -> None:
    if given is not None and not needed:
        raise InputError(
            "tokenizer", got=f"{given}, and that none is wanted", wanted="one of the two",
            way_out="Leave one of --tokenizer and --no-tokenizer out.",
        )  # fmt: skip
    if needed and not source.has_tokenizer:
        raise InputError(
            str(source.path), got="a model without a tokenizer",
            wanted="the tokenizer that its ids come from",
            way_out="Put the tokenizer's files there, say --tokenizer DIR, or go without one: "
            "--no-tokenizer.",
        )  # fmt: skip


def _need_no_head(source: Source) -> None:
    if source.config.has_lm_head:
        raise InputError(
            str(source.path), got="a model with a masked-LM head",
            wanted="one without, as a new one is asked for", way_out="Leave --new-head out.",
        )  # fmt: skip


def _with_ids(source: Source, new: ModelConfig) -> tuple[ModelConfig, list[str]]:
    """The tokenizer's first and last token, and notes where `config.json` says others."""
    tokenizer, notes = source.tokenizer(), []
    if tokenizer is None:
        return new, []
    ids = {"bos": (new.bos_id, tokenizer.bos_id), "eos": (new.eos_id, tokenizer.eos_id)}
    for name, (said, right) in ids.items():
        if said != right:
            notes.append(f"{name}_token_id: {right}, the tokenizer's, instead of {said}")
    return dataclasses.replace(new, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id), notes


def _head_notes(source: Source, new: ModelConfig) -> Iterator[str]:
    if source.config.has_lm_head:
        return
    has_pooler = any(name in source.names for name in POOLER)
    if new.has_lm_head:
        if has_pooler:
            yield "left out, no part of a masked-LM model: the pooler"
        return
    yield (
        "no masked-LM head in the source: a bare LongformerModel, which --new-head would give a new"
        " head to train"
    )
    if not has_pooler:
        yield "no pooler in the source: transformers draws one if it is asked for"


def _long_config(
    old: ModelConfig, positions: int, attention_window: int | Sequence[int] | None
) -> ModelConfig:
    is_count = isinstance(positions, int) and not isinstance(positions, bool)
    if not is_count or not 1 <= positions <= MAX_POSITIONS:
        raise InputError(
            "positions", got=positions, wanted=f"1 or more tokens, at most {MAX_POSITIONS:,}",
            way_out="4096 is the paper's.",
        )  # fmt: skip
    explicit = attention_window is not None
    if attention_window is None:
        widest = max(2, positions // 2 * 2)
        own = old.attention_window if max(old.attention_window, default=0) <= widest else ()
        attention_window = list(own) or min(_WINDOW, widest)
    windows = attention_window if isinstance(attention_window, int) else list(attention_window)
    new = dataclasses.replace(
        old,
        model_type="longformer",
        attention_window=spread("attention_window", windows, old.num_layers),
        max_position_embeddings=positions + old.pad_id + 1,
        learnt_positions=0,
    )
    if explicit and max(new.attention_window) > positions:
        raise InputError(
            "attention_window", got=attention_window,
            wanted=f"at most {positions}, the positions of the new model",
            way_out="Give a smaller window, or more positions.",
        )  # fmt: skip
    return new


def _learnt(source: Source, new: ModelConfig, init: Init) -> int:
    """How many positions of the new model have the row that the source learnt for them.

    A source that was itself lengthened, and not trained since, says how many it has.
    """
    known = source.config.learnt_positions or source.config.max_tokens
    learnt = min(known, new.max_tokens)
    return 0 if init == "interpolate" else learnt


def _request(
    source: Source,
    new: ModelConfig,
    init: Init,
    seed: int,
    *,
    with_tokenizer: bool,
    allow_nonfinite: bool,
) -> dict[str, Any]:
    """All that decides the outcome, for the record beside it."""
    if init not in _INITS:
        raise InputError("init", got=init, wanted=" or ".join(_INITS), way_out="Pick one.")
    if not 0 <= seed <= MAX_SEED:
        raise InputError(
            "seed", got=seed, wanted="0 to 2**63 - 1", way_out="Any seed is as good: take 1."
        )
    draws_head = new.has_lm_head and not source.config.has_lm_head
    return {
        "source": source.path.absolute().name,
        "source_files": source.hashes(),
        "positions": new.max_tokens,
        "attention_window": list(new.attention_window),
        "init": init,
        "global_tokens": source.state.get("global_tokens"),
        "seed": seed if init == "random" or draws_head else None,
        "new_head": True if draws_head else None,
        "tokenizer": None if with_tokenizer else "none",
        "allow_nonfinite": allow_nonfinite or None,
    }


def _long_state(
    source: Source, new: ModelConfig, init: Init, seed: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The new tensors, and a sentence on the origin of each."""
    state, old = source.weights(), source.config
    origins = dict.fromkeys(state, "the source's, unchanged")
    if old.model_type == "roberta" or not source.has_own_globals:
        for name, local in _global_names(list(state)):
            if name not in state:
                state[name] = state[local]  # the very same: it costs no memory
            origins[name] = "copies of the local projections"
    if new.has_lm_head and not old.has_lm_head:
        for name in POOLER:
            origins.pop(name, None)
            state.pop(name, None)
        head = _drawn_head(new, seed, state[POSITIONS].dtype)
        origins |= dict.fromkeys(head, f"masked-LM head: new, drawn with seed {seed}")
        state |= head
    kept = old.pad_id + 1
    state[POSITIONS] = lengthen_positions(
        state[POSITIONS], positions=new.max_tokens, kept=kept, init=init,
        deviation=old.initializer_range, seed=seed,
    )  # fmt: skip
    known = old.learnt_positions or old.max_tokens
    origins[POSITIONS] = position_origin(old.max_tokens, known, new.max_tokens, kept, init)
    return state, origins


def _drawn_head(config: ModelConfig, seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """New weights of a masked-LM head, as of a new model."""
    # Another stream than that of random positions.
    generator = torch.Generator().manual_seed((seed + _HEAD_STREAM) % (MAX_SEED + 1))
    width = config.hidden_size
    dense = torch.randn(width, width, generator=generator) * config.initializer_range
    head = {
        "lm_head.bias": torch.zeros(config.vocab_size),
        "lm_head.dense.weight": dense,
        "lm_head.dense.bias": torch.zeros(width),
        "lm_head.layer_norm.weight": torch.ones(width),
        "lm_head.layer_norm.bias": torch.zeros(width),
    }
    return {name: tensor.to(dtype) for name, tensor in head.items()}


def _global_names(names: Iterable[str]) -> list[tuple[str, str]]:
    """The global projections that belong to local ones: (global name, local name)."""
    return [
        (name.replace(f".{part}.", f".{part}_global."), name)
        for name in names
        for part in ("query", "key", "value")
        if f".attention.self.{part}." in name
    ]


def _is_done(target: Path, request: Mapping[str, Any]) -> bool:
    """Whether the target is the outcome of the same request, untouched since."""
    if not target.is_dir() or not any(target.iterdir()):
        return False
    try:
        record = json.loads((target / RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    different = [key for key in request if record.get(key) != request[key]]
    if not different and record.get("files") == hashes(target):
        return True
    got = "another conversion" if record else "a folder with other files"
    if record:
        got += f" ({', '.join(different)} differ)" if different else ", altered since"
    raise InputError(
        str(target), got=got, wanted="no such folder, or this very conversion",
        way_out="Choose another name, or remove the folder.",
    )  # fmt: skip
