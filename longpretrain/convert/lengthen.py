"""A long model from a short one: the conversion of Longformer's section 5, for any length.

Only the position table, the attention pattern and the global projections differ; every other tensor
is the source's, bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from longpretrain.convert.read import RECORD_NAME, hashes
from longpretrain.convert.source import Source, open_source
from longpretrain.errors import InputError
from longpretrain.files import fresh_folder
from longpretrain.model import ModelConfig
from longpretrain.model.folder import spread, write_model
from longpretrain.model.weights import POSITIONS

Init = Literal["copy", "random", "interpolate"]

MAX_POSITIONS = 1 << 24
"""Far above any use; a table of more would not fit into memory."""
MAX_SEED = (1 << 63) - 1
"""The largest that torch takes."""
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
    """Whether the source had a tokenizer to carry over."""
    beyond_hugging_face: tuple[str, ...] = ()
    """What of the new model transformers cannot compute, in words."""
    notes: tuple[str, ...] = ()
    """What of the source was left out, in words."""

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
        tokenizer = "carried over" if self.has_tokenizer else "the source has none"
        notes = [*self.notes, *warnings]
        return [f"{self.target}: tensors", *lines, f"tokenizer: {tokenizer}", *notes]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def convert(
    source: Path | str,
    target: Path | str,
    *,
    positions: int = 4096,
    attention_window: int | Sequence[int] = 512,
    init: Init = "copy",
    seed: int = 1,
    tokenizer: Path | str | None = None,
) -> Report:
    """Makes a Longformer folder from a RoBERTa, or from a Longformer of another length.

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

    Args:
        source: a Hugging Face folder, a checkpoint of ours, a run (its newest checkpoint), or a
            fairseq `.pt` with its dict.txt beside it.
        target: the folder to make: whole, or not at all.
        positions: tokens that the new model can place; more or fewer than the source's.
        attention_window: both sides together, even; one number, or one per layer.
        init: how to make the position rows.
        seed: of the random rows.
        tokenizer: a folder with the tokenizer to take instead of the source's own.

    Raises:
        InputError: the source does not read or has weights that are not finite, a number does not
            fit, or the target holds something other than this very conversion.
    """
    target = Path(target)
    origin = open_source(source, tokenizer=tokenizer)
    old = origin.config
    new = _long_config(old, positions, attention_window)
    request = _request(origin, new, init, seed)
    report = Report(
        target=target, up_to_date=_is_done(target, request), origins={}, notes=origin.notes,
        has_tokenizer=origin.has_tokenizer, beyond_hugging_face=new.beyond_hugging_face,
    )  # fmt: skip
    if report.up_to_date:
        return report
    state, origins = _long_state(origin, new, init, seed)
    with fresh_folder(target, belongs=lambda _: False) as fresh:
        write_model((new, state), fresh)
        origin.carry_tokenizer(fresh, new.max_tokens)
        record = {**request, "files": hashes(fresh)}
        (fresh / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return dataclasses.replace(report, origins=origins)


def lengthen_positions(
    table_PC: Tensor, *, positions: int, kept: int, init: Init, deviation: float, seed: int
) -> Tensor:
    """A position table with ``kept + positions`` rows.

    Args:
        table_PC: the learnt table; P rows of C channels, the first ``kept`` of them for padding.
        positions: rows for tokens in the new table.
        kept: rows that stay as they are.
        init: as in ``convert``.
        deviation: standard deviation of random rows.
        seed: of random rows.
    """
    padding_PC, learnt_PC = table_PC[:kept], table_PC[kept:]
    number = torch.arange(positions)
    if init == "interpolate":
        last = len(learnt_PC) - 1
        place = number.double() * last / max(positions - 1, 1)
        below = place.long()
        share = (place - below)[:, None].to(table_PC.dtype)
        low_PC, high_PC = learnt_PC[below], learnt_PC[(below + 1).clamp(max=last)]
        # Where the place is a whole number this is the row itself, bit for bit.
        rows_PC = low_PC + share * (high_PC - low_PC)
    else:
        rows_PC = learnt_PC[number % len(learnt_PC)]
    if init == "random" and positions > len(learnt_PC):
        generator = torch.Generator().manual_seed(seed)
        count = positions - len(learnt_PC)
        drawn_PC = torch.randn(count, table_PC.shape[1], generator=generator)
        rows_PC[len(learnt_PC) :] = (drawn_PC * deviation).to(table_PC.dtype)
    return torch.cat([padding_PC, rows_PC])


def _long_config(
    old: ModelConfig, positions: int, attention_window: int | Sequence[int]
) -> ModelConfig:
    is_count = isinstance(positions, int) and not isinstance(positions, bool)
    if not is_count or not 1 <= positions <= MAX_POSITIONS:
        raise InputError(
            "positions", got=positions, wanted=f"1 or more tokens, at most {MAX_POSITIONS:,}",
            way_out="4096 is the paper's.",
        )  # fmt: skip
    windows = attention_window if isinstance(attention_window, int) else list(attention_window)
    return dataclasses.replace(
        old,
        model_type="longformer",
        attention_window=spread("attention_window", windows, old.num_layers),
        max_position_embeddings=positions + old.pad_id + 1,
    )


def _request(source: Source, new: ModelConfig, init: Init, seed: int) -> dict[str, Any]:
    """All that decides the outcome, for the record beside it."""
    if init not in _INITS:
        raise InputError("init", got=init, wanted=" or ".join(_INITS), way_out="Pick one.")
    if not 0 <= seed <= MAX_SEED:
        raise InputError(
            "seed", got=seed, wanted="0 to 2**63 - 1", way_out="Any seed is as good: take 1."
        )
    return {
        "source": source.path.absolute().name,
        "source_files": source.hashes(),
        "positions": new.max_tokens,
        "attention_window": list(new.attention_window),
        "init": init,
        "global_tokens": source.state.get("global_tokens"),
        "seed": seed if init == "random" else None,
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
                state[name] = state[local].clone()
            origins[name] = "copies of the local projections"
    kept = old.pad_id + 1
    state[POSITIONS] = lengthen_positions(
        state[POSITIONS], positions=new.max_tokens, kept=kept, init=init,
        deviation=old.initializer_range, seed=seed,
    )  # fmt: skip
    origins[POSITIONS] = _position_origin(old.max_tokens, new.max_tokens, kept, init)
    return state, origins


def _global_names(names: Iterable[str]) -> list[tuple[str, str]]:
    """The global projections that belong to local ones: (global name, local name)."""
    return [
        (name.replace(f".{part}.", f".{part}_global."), name)
        for name in names
        for part in ("query", "key", "value")
        if f".attention.self.{part}." in name
    ]


def _position_origin(old: int, new: int, kept: int, init: Init) -> str:
    if new <= old and init != "interpolate":
        how = f"the first {new} of {old} learnt rows"
    else:
        how = {
            "copy": f"{old} learnt rows copied end to end over {new}",
            "random": f"{old} learnt rows and {new - old} random ones",
            "interpolate": f"{old} learnt rows interpolated to {new}",
        }[init]
    return f"position embeddings: {how}; rows 0 to {kept - 1} kept"


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
