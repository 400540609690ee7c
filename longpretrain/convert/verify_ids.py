"""Token ids: those of `config.json`, of every tokenizer file, and the published ones of RoBERTa."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from longpretrain.convert.verify_report import VerifyRow
from longpretrain.convert.verify_side import Side
from longpretrain.data.tokenizer import ByteLevelBPE, Tokenizer, load_tokenizer
from longpretrain.data.tokenizer_files import CONFIG
from longpretrain.files import read_json_object
from longpretrain.model.listing import printable

VECTORS = {"Hello world": [31414, 232], " world": [232], "world": [8331]}
"""Published ids of RoBERTa's vocabulary (fairseq's hub interface)."""
_ROLES = {
    "bos_token_id": "bos", "cls_token_id": "bos", "eos_token_id": "eos", "sep_token_id": "eos",
    "pad_token_id": "pad", "mask_token_id": "mask", "unk_token_id": "unk",
}  # fmt: skip
_SHOWN = 3
_UNLIMITED = 1e15
"""transformers writes a larger number where a tokenizer has no length."""
# A vocabulary with so many of another's tokens under its ids is meant to be that one.
_SHARE = 0.99


def check_ids(side: Side) -> Iterator[VerifyRow]:
    """Whether all files that say what an id means say the same; nothing without a tokenizer."""
    if side.tokenizer_problem:
        yield VerifyRow(
            check="tokenizer", got=side.tokenizer_problem, limit="one that fits the model", ok=False
        )
    if side.tokenizer is None:
        return
    yield _check_special(side, side.tokenizer)
    if side.family:
        yield from _check_length(side)
    wrong = list(_unlike_files(side.path, side.tokenizer)) if side.family else []
    wrong += _unlike_published(side.tokenizer)
    yield VerifyRow(
        check="vocabulary", got="; ".join(wrong) or f"{len(side.tokenizer.vocab)} tokens",
        limit="one id per token in every file", ok=not wrong,
    )  # fmt: skip


def differing(one: Mapping[str, int], other: Mapping[str, int]) -> list[str]:
    """Tokens that do not have the same id in both, in words."""
    names = sorted(one.keys() | other.keys(), key=lambda name: (one.get(name, -1), name))
    return [
        f"{printable(name, 20)!r} is {one.get(name, 'none')} and {other.get(name, 'none')}"
        for name in names
        if one.get(name) != other.get(name)
    ]


def some(texts: list[str]) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def _check_special(side: Side, tokenizer: Tokenizer) -> VerifyRow:
    config = side.config
    wanted = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    for role in ("pad", "mask", "unk"):
        name = getattr(tokenizer.roles, role)
        if name is not None:
            wanted[role] = tokenizer.vocab[name]
    said = {key: value for key, value in side.tree.items() if isinstance(value, int)}
    said |= {
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_id,
        "pad_token_id": config.pad_id,
    }
    wrong = [
        f"{key} {said[key]}, not {wanted[role]}"
        for key, role in _ROLES.items()
        if key in said and role in wanted and said[key] != wanted[role]
    ]
    ids = ", ".join(f"{role} {number}" for role, number in wanted.items())
    return VerifyRow(
        check="special ids", got="; ".join(wrong) or ids, limit="those of the tokenizer",
        ok=not wrong,
    )  # fmt: skip


def _check_length(side: Side) -> Iterator[VerifyRow]:
    """Of texts that a tokenizer shall cut: longer ones than the model takes end in a crash."""
    path, longest = side.path / CONFIG, side.config.max_tokens
    length = read_json_object(path).get("model_max_length") if path.is_file() else None
    if isinstance(length, int | float) and length < _UNLIMITED:
        yield VerifyRow(
            check="longest text of the tokenizer", got=f"{length:,} tokens",
            limit=f"at most {longest:,}, the positions of the model", ok=length <= longest,
        )  # fmt: skip


def _unlike_files(folder: Path, tokenizer: Tokenizer) -> Iterator[str]:
    """What a file of the folder says otherwise than the tokenizer that was made of them."""
    for name, vocab in _vocabularies(folder):
        shared = vocab.keys() & tokenizer.vocab.keys()
        known = {token: tokenizer.vocab[token] for token in vocab if token in shared}
        if different := differing(known, {token: vocab[token] for token in known}):
            yield f"{name}: {some(different)}"
    if len({*map(tuple, merges := _merges(folder))}) > 1:
        yield f"merges.txt: not those of tokenizer.json, {len(merges[0])} and {len(merges[1])}"


def _merges(folder: Path) -> list[list[str]]:
    """The merges of a BPE, as each of the files has them that say them."""
    found = []
    if (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        found.append([line for line in lines if line and not line.startswith("#version")])
    if (folder / "tokenizer.json").is_file():
        model = read_json_object(folder / "tokenizer.json").get("model")
        merges = model.get("merges") if isinstance(model, dict) else None
        if isinstance(merges, list):
            found.append([m if isinstance(m, str) else " ".join(map(str, m)) for m in merges])
    return found


def _vocabularies(folder: Path) -> Iterator[tuple[str, dict[str, int]]]:
    if (folder / "vocab.json").is_file():
        yield "vocab.json", _ids(read_json_object(folder / "vocab.json"))
    if (folder / "vocab.txt").is_file():
        lines = (folder / "vocab.txt").read_text(encoding="utf-8", errors="replace").split("\n")
        yield "vocab.txt", {line.rstrip("\r"): i for i, line in enumerate(lines) if line}
    if (folder / "tokenizer.json").is_file():
        tree = read_json_object(folder / "tokenizer.json")
        model = tree.get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocab, dict):
            yield "tokenizer.json", _ids(vocab)
        elif isinstance(vocab, list):  # of Unigram: pieces and scores, by id
            yield "tokenizer.json", {str(entry[0]): i for i, entry in enumerate(vocab)}


def _ids(tree: Mapping[str, Any]) -> dict[str, int]:
    return {token: number for token, number in tree.items() if isinstance(number, int)}


def _unlike_published(tokenizer: Tokenizer) -> list[str]:
    """What a tokenizer that is meant to be RoBERTa's has otherwise."""
    published = load_tokenizer()
    alike = len(tokenizer.vocab.items() & published.vocab.items())
    if not isinstance(tokenizer, ByteLevelBPE) or alike < _SHARE * len(published.vocab):
        return []
    known = {token: tokenizer.vocab[token] for token in published.vocab if token in tokenizer.vocab}
    different = differing(known, {token: published.vocab[token] for token in known})
    wrong = [f"RoBERTa's: {some(different)}"] if different else []
    return wrong + [
        f"{text!r} is not {ids}"
        for text, ids in VECTORS.items()
        if tokenizer.encode(text).tolist() != ids
    ]
