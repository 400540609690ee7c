"""BERT's WordPiece: vocab.txt as a tokenizer.json, and what its settings change in one.

transformers' class for BERT sets lower case, accents and Chinese characters as
tokenizer_config.json says, whatever tokenizer.json has.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longpretrain.errors import InputError

VOCAB = "vocab.txt"
_ODD_FILES = ("bpe.codes",)  # of tokenizers that have another vocab.txt
# Classes that tokenize as BERT's and the model types whose class is one of them.
_CLASSES = ("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MobileBertTokenizer")
_MODEL_TYPES = ("bert", "distilbert", "electra", "mobilebert")
_NEEDED = {"unk": "[UNK]", "bos": "[CLS]", "eos": "[SEP]"}


def class_of(settings: Mapping[str, Any], config: Mapping[str, Any]) -> str | None:
    """The tokenizer class that transformers takes, without "Fast", or the model type that it goes
    by; None: nothing is named.

    Args:
        settings: tokenizer_config.json.
        config: config.json.
    """
    named = settings.get("tokenizer_class") or config.get("tokenizer_class")
    if named:
        return str(named).removesuffix("Fast")
    kind = config.get("model_type")
    return _CLASSES[0] if kind in _MODEL_TYPES else kind


def as_set(
    tree: dict[str, Any], settings: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """A tokenizer.json as transformers reads it."""
    normalizer = tree.get("normalizer") or {}
    is_berts = class_of(settings, config) in _CLASSES
    if not is_berts or normalizer.get("type") != "BertNormalizer":
        return tree
    return tree | {"normalizer": normalizer | _normalizer(settings)}


def read_vocab(path: Path) -> dict[str, int]:
    """Token -> id, its line in vocab.txt."""
    # Only these end a line: a token may be another character that Python takes for a line's end.
    text = path.read_bytes().decode("utf-8").replace("\r\n", "\n").replace("\r", "\n")
    return {token: number for number, token in enumerate(text.removesuffix("\n").split("\n"))}


def need_berts(folder: Path, settings: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Checks that a folder's vocab.txt is of a tokenizer like BERT's.

    Raises:
        InputError: transformers has another class for it.
    """
    kind = class_of(settings, config)
    odd = [name for name in _ODD_FILES if (folder / name).is_file()]
    if odd or (kind is not None and kind not in _CLASSES):
        raise InputError(
            f"tokenizer {folder}",
            got=f"vocab.txt beside {odd[0]}" if odd else f"vocab.txt for {kind}",
            wanted=f"BERT's WordPiece ({', '.join(_CLASSES)}), or a tokenizer.json",
            way_out="Name another with --tokenizer, whose ids are the model's.",
        )


def tree_of(
    folder: Path,
    vocab: Mapping[str, int],
    added: Mapping[int, Mapping[str, Any]],
    roles: Mapping[str, str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The tokenizer.json that transformers makes of a vocab.txt.

    Args:
        folder: where it is.
        vocab: token -> id.
        added: id -> entry of a token beyond vocab.txt.
        settings: tokenizer_config.json.
        roles: role -> special token, of those in the vocabulary.

    Raises:
        InputError: there is nothing for unknown words, to begin or to end a text with, or the
            added tokens do not go on where the vocabulary ends.
    """
    import tokenizers
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

    missing = [name for role, name in _NEEDED.items() if role not in roles]
    if missing:
        raise InputError(
            f"tokenizer {folder}",
            got=f"no {' nor '.join(missing)} in vocab.txt of {len(vocab)} lines",
            wanted=f"{', '.join(_NEEDED.values())}, or what tokenizer_config.json has for them",
            way_out="The file is damaged, or of another tokenizer: get it from where it came.",
        )
    whole = tokenizers.Tokenizer(models.WordPiece(dict(vocab), unk_token=roles["unk"]))
    whole.normalizer = normalizers.BertNormalizer(clean_text=True, **_normalizer(settings))
    whole.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    whole.decoder = decoders.WordPiece(prefix="##")
    first, last = roles["bos"], roles["eos"]
    whole.post_processor = processors.TemplateProcessing(
        single=f"{first}:0 $A:0 {last}:0", pair=f"{first}:0 $A:0 {last}:0 $B:1 {last}:1",
        special_tokens=[(name, vocab[name]) for name in (first, last)],
    )  # fmt: skip
    names = sorted(set(roles.values()), key=lambda name: vocab[name])
    whole.add_special_tokens(
        [tokenizers.AddedToken(name, normalized=False, special=True) for name in names]
    )
    for number, entry in sorted(added.items()):
        whole.add_tokens([tokenizers.AddedToken(**entry)])
        if whole.token_to_id(entry["content"]) != number:
            raise InputError(
                f"tokenizer {folder}",
                got=f"added token {entry['content']!r} with id {number}",
                wanted=f"{len(vocab)} and on, the ids after vocab.txt, none left out",
                way_out="Load it in transformers and save_pretrained() it: that writes "
                "tokenizer.json.",
            )
    return dict(json.loads(whole.to_str()))


def _normalizer(settings: Mapping[str, Any]) -> dict[str, Any]:
    def is_on(key: str) -> bool:
        return settings.get(key) is not False

    return {
        "handle_chinese_chars": is_on("tokenize_chinese_chars"),
        "strip_accents": settings.get("strip_accents"),
        "lowercase": is_on("do_lower_case"),
    }
