"""Damage of every kind, planted in a converted model: what conversions get wrong, and worse.

Each takes the folder of a long model and changes its files in place.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longpretrain.convert.read import RECORD_NAME, hashes

Plant = Callable[[Path], None]
Tensors = dict[str, Tensor]

LAYER = "longformer.encoder.layer"
POSITIONS = "longformer.embeddings.position_embeddings.weight"
WORDS = "longformer.embeddings.word_embeddings.weight"
QUERY = f"{LAYER}.1.attention.self.query.weight"
DENSE = f"{LAYER}.0.attention.output.dense.weight"


def in_tensors(change: Callable[[Tensors], None]) -> Plant:
    """Damage of the weights' file."""

    def plant(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
        change(tensors)
        save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})

    return plant


def in_config(**changes: object) -> Plant:
    """Damage of `config.json`."""

    def plant(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return plant


@in_tensors
def swapped_tensors(tensors: Tensors) -> None:
    """Two of one shape, of two layers."""
    other = QUERY.replace("layer.1", "layer.0")
    tensors[QUERY], tensors[other] = tensors[other], tensors[QUERY]


@in_tensors
def table_shifted(tensors: Tensors) -> None:
    """Every row one further, the rows of padding among them."""
    tensors[POSITIONS] = tensors[POSITIONS].roll(1, dims=0)


@in_tensors
def tiles_off_by_one(tensors: Tensors) -> None:
    """The source's rows 1 to 64 repeated, not 2 to 65: the commonest slip of all."""
    table_PC = tensors[POSITIONS]
    learnt_PC = table_PC[1:65]
    count = len(table_PC) - 2
    tensors[POSITIONS] = torch.cat([table_PC[:2], learnt_PC.repeat(3, 1)[:count]])


@in_tensors
def row_off_by_one(tensors: Tensors) -> None:
    """One row of the new ones."""
    tensors[POSITIONS][100] = tensors[POSITIONS][101]


@in_tensors
def untied_head(tensors: Tensors) -> None:
    """A decoder of its own beside the word embeddings."""
    decoder = tensors[WORDS].clone()
    decoder[7, 3] += 1e-3
    tensors["lm_head.decoder.weight"] = decoder


@in_tensors
def untied_bias(tensors: Tensors) -> None:
    """The head's bias is stored twice, and not the same."""
    tensors["lm_head.decoder.bias"] = tensors["lm_head.bias"] + 1e-3


@in_tensors
def transposed(tensors: Tensors) -> None:
    """A square weight."""
    tensors[DENSE] = tensors[DENSE].T


@in_tensors
def flipped_sign(tensors: Tensors) -> None:
    """Of one number."""
    tensors[DENSE][5, 6] *= -1


@in_tensors
def flipped_bit(tensors: Tensors) -> None:
    """The lowest of one number, which moves no output."""
    bits = tensors[DENSE].view(torch.int32)
    bits[5, 6] ^= 1


@in_tensors
def rounded_tensor(tensors: Tensors) -> None:
    """One weight has been in fp16."""
    tensors[DENSE] = tensors[DENSE].half().float()


@in_tensors
def half_tensor(tensors: Tensors) -> None:
    """One weight is in fp16."""
    tensors[DENSE] = tensors[DENSE].half()


@in_tensors
def unfilled_padding_row(tensors: Tensors) -> None:
    """Whatever was in memory: numbers of no training."""
    tensors[POSITIONS][1, ::3] = 4.6e-41
    tensors[POSITIONS][1, 1::3] = 0


@in_tensors
def huge_padding_row(tensors: Tensors) -> None:
    """The same, large."""
    tensors[POSITIONS][0] = 3e8


@in_tensors
def unfilled_padding_word(tensors: Tensors) -> None:
    """The same of the word embeddings."""
    tensors[WORDS][1] = 3e8


@in_tensors
def global_no_copy(tensors: Tensors) -> None:
    """One of the global projections is not its local one."""
    tensors[QUERY.replace("query", "query_global")] += 1e-3


@in_tensors
def missing_tensor(tensors: Tensors) -> None:
    """As if it had never been."""
    del tensors[DENSE]


@in_tensors
def extra_tensor(tensors: Tensors) -> None:
    """Nobody knows it."""
    tensors[f"{LAYER}.2.attention.self.query.weight"] = tensors[QUERY].clone()


@in_tensors
def not_a_number(tensors: Tensors) -> None:
    """One of them."""
    tensors[DENSE][5, 6] = float("nan")


@in_tensors
def other_shape(tensors: Tensors) -> None:
    """A weight that is not square, transposed."""
    name = f"{LAYER}.0.intermediate.dense.weight"
    tensors[name] = tensors[name].T


def swapped_ids(folder: Path) -> None:
    """Two tokens have each other's id, in every file."""
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    _swap(tree["model"]["vocab"])
    path.write_text(json.dumps(tree))
    swapped_ids_in_one_file(folder)


def swapped_ids_in_one_file(folder: Path) -> None:
    """Two tokens have each other's id, in vocab.json alone."""
    path = folder / "vocab.json"
    vocab = json.loads(path.read_text())
    _swap(vocab)
    path.write_text(json.dumps(vocab))


def swapped_merges(folder: Path) -> None:
    """Two merges of tokenizer.json have each other's rank."""

    def change(tree: Any) -> None:
        merges = tree["model"]["merges"]
        merges[0], merges[40] = merges[40], merges[0]

    _in_tokenizer(folder, change)


def lower_case(folder: Path) -> None:
    """tokenizer.json has a normaliser that its source's has not."""
    _in_tokenizer(folder, lambda tree: tree.update(normalizer={"type": "Lowercase"}))


def _in_tokenizer(folder: Path, change: Callable[[Any], None]) -> None:
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


def cut_merges(folder: Path) -> None:
    """merges.txt ends early, beside a whole tokenizer.json."""
    lines = (folder / "merges.txt").read_text().splitlines()
    (folder / "merges.txt").write_text("\n".join(lines[:20]) + "\n")


def too_long_texts(folder: Path) -> None:
    """The tokenizer cuts texts to more tokens than there are positions."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": 512}))


def _swap(vocab: dict[str, int]) -> None:
    one, two = "e", "t"
    vocab[one], vocab[two] = vocab[two], vocab[one]


def forget_record(folder: Path) -> None:
    """The model as somebody hands it on: without the record of its conversion."""
    (folder / RECORD_NAME).unlink()


def forge_record(folder: Path) -> None:
    """As if the conversion had gone wrong itself: its record has the files as they are."""
    record = json.loads((folder / RECORD_NAME).read_text())
    (folder / RECORD_NAME).write_text(json.dumps(record | {"files": hashes(folder)}))
