"""The numbers of a `config.json`: Hugging Face's keys, what they mean, and what they may be."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from longpretrain.errors import InputError
from longpretrain.model.families import Family
from longpretrain.model.listing import printable

# Hugging Face's key -> (ours, what a file means by leaving the key out; None: it must be there)
KEYS: dict[str, tuple[str, int | float | None]] = {
    "vocab_size": ("vocab_size", None),
    "hidden_size": ("hidden_size", None),
    "num_hidden_layers": ("num_layers", None),
    "num_attention_heads": ("num_heads", None),
    "intermediate_size": ("intermediate_size", None),
    "max_position_embeddings": ("max_position_embeddings", None),
    "pad_token_id": ("pad_id", 1),
    "bos_token_id": ("bos_id", 0),
    "eos_token_id": ("eos_id", 2),
    "type_vocab_size": ("type_vocab_size", 2),
    "layer_norm_eps": ("layer_norm_eps", 1e-12),
    "hidden_dropout_prob": ("hidden_dropout", 0.1),
    "attention_probs_dropout_prob": ("attention_dropout", 0.1),
    "initializer_range": ("initializer_range", 0.02),
}
_REALS = {
    "layer_norm_eps", "hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range",
}  # fmt: skip
# Far above any model: a damaged file shall neither fill the memory nor overflow a size.
_LARGEST = {
    "num_hidden_layers": 1_000,
    "num_attention_heads": 1 << 20,
    "hidden_size": 1 << 20,
    "max_position_embeddings": 1 << 25,
    "layer_norm_eps": 1,
    "initializer_range": 100,
}
_LARGEST_OF_OTHERS = 1 << 31
# Of which the smallest is not said elsewhere.
_SMALLEST = {"layer_norm_eps": 1e-30, "initializer_range": 0}
_WAY_OUT = "Give a folder that save_pretrained or longpretrain wrote."


def read_numbers(path: Path, tree: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields of ModelConfig that stand as numbers in a file.

    Args:
        path: `config.json`.
        tree: what it holds.
        family: says what a key left out means.

    Raises:
        InputError: something else than a number, or one that no model has.
    """
    fields: dict[str, Any] = {}
    for key, (name, usual) in KEYS.items():
        number, default = tree.get(key), family.defaults.get(key, usual)
        fields[name] = read_number(path, key, default if number is None else number)
    for key in ("bos_token_id", "eos_token_id"):
        name, size = KEYS[key][0], fields["vocab_size"]
        if tree.get(key) is None:
            fields[name] = min(fields[name], size - 1)  # a usual id, which a toy may not have
        elif not 0 <= fields[name] < size:
            raise InputError(
                f"{key} in {path}", got=fields[name], wanted=f"0 <= id < {size}", way_out=_WAY_OUT
            )
    if not family.has_padding_rows:
        fields["max_position_embeddings"] += fields["pad_id"] + 1
    return fields


def read_number(path: Path, key: str, value: object) -> int | float:
    """One number of a file.

    Raises:
        InputError: something else, or a number that no model has.
    """
    kinds = (int, float) if key in _REALS else (int,)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise InputError(f"{key} in {path}", got=value, wanted="a number", way_out=_WAY_OUT)
    largest = _LARGEST.get(key, _LARGEST_OF_OTHERS)
    smallest = _SMALLEST.get(key, -largest)
    if not smallest <= value <= largest:  # nor is NaN
        wanted = f"{smallest} to {largest:,}" if key in _SMALLEST else f"at most {largest:,}"
        got = printable(str(value), 40)
        raise InputError(f"{key} in {path}", got=got, wanted=wanted, way_out=_WAY_OUT)
    return value


@contextlib.contextmanager
def told_by_key(path: Path) -> Iterator[None]:
    """Lets an error of ModelConfig name the file and its key, which is what a user can look at."""
    try:
        yield
    except InputError as error:
        keys = {name: key for key, (name, _) in KEYS.items()}
        raise InputError(
            f"{keys.get(error.what, error.what)} in {path}", got=error.got, wanted=error.wanted,
            way_out=_WAY_OUT,
        ) from error  # fmt: skip
