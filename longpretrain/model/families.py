"""The families of models that are read, and how each becomes one of our two kinds of arithmetic.

In memory there are ``longformer`` and ``roberta`` (full attention), with names that begin with
``longformer.`` and positions that start after the padding rows. A family says what its files call
things, what its `config.json` means by a key left out, and where its positions start.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from longpretrain.errors import InputError
from longpretrain.files import read_json_object

CONFIG_NAME = "config.json"
POOLER = ("longformer.pooler.dense.weight", "longformer.pooler.dense.bias")
"""What a model without a masked-LM head may have beside its encoder, by the names in memory."""

# A Longformer made by hand is often saved under RoBERTa's prefix; BERT's positions start elsewhere.
_PREFIXES = ("roberta.", "longformer.", "")
_FOREIGN = "of another family: "
_WORDS = "embeddings.word_embeddings.weight"
_PARTS = ("embeddings.", "encoder.", "pooler.")
_ROBERTA_HEAD = {"lm_head.": "lm_head."}
_BERT_HEAD = {
    "cls.predictions.transform.dense.": "lm_head.dense.",
    "cls.predictions.transform.LayerNorm.": "lm_head.layer_norm.",
    "cls.predictions.decoder.": "lm_head.decoder.",
    "cls.predictions.bias": "lm_head.bias",
}
# Files made of TensorFlow's BERT have TensorFlow's names.
_OLD_ENDINGS = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}
# Key of config.json -> its role in a tokenizer's files, and names that such a token usually has.
_ROLES = {
    "pad_token_id": ("pad_token", ("[PAD]", "<pad>")),
    "bos_token_id": ("cls_token", ("[CLS]", "<s>")),
    "eos_token_id": ("sep_token", ("[SEP]", "</s>")),
}
# Buffers that some versions of transformers stored: no weights, and never missed.
_NO_WEIGHTS = re.compile(r"longformer\.embeddings\.(position_ids|token_type_ids)")
# Heads of other tasks, and the pooler that goes with them.
_LEFT_OUT = re.compile(
    r"longformer\.pooler\..+|cls\.seq_relationship\..+|"
    r"(classifier|pre_classifier|classification_heads?|qa_outputs|score|dropout)\..+"
)


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models that share one `model_type` of Hugging Face's."""

    model_type: str
    """In `config.json`."""
    title: str
    """For people."""
    becomes: Literal["longformer", "roberta"]
    """The arithmetic that is theirs."""
    prefix: str
    """What the names of their encoder begin with, if with anything."""
    head: Mapping[str, str] = field(default_factory=lambda: _ROBERTA_HEAD)
    """How names of the masked-LM head begin: in a file -> in memory."""
    defaults: Mapping[str, int] = field(default_factory=dict)
    """What `config.json` means by leaving a key out, where that differs from RoBERTa's."""
    has_padding_rows: bool = True
    """Whether the position table begins with rows for padding, as RoBERTa's does."""

    def prefix_in(self, stored: Iterable[str]) -> str:
        """What the encoder's names begin with in a file that has these names."""
        stored = set(stored)
        known = _PREFIXES if self.has_padding_rows else (self.prefix, "")
        found = [prefix for prefix in known if prefix + _WORDS in stored]
        return found[0] if found else self.prefix

    def in_memory(self, stored: str, prefix: str) -> str:
        """The name in memory of a tensor in a file; one that has none gets none of a model's."""
        for old, new in _OLD_ENDINGS.items():
            if stored.endswith(old):
                stored = stored.removesuffix(old) + new
        for theirs, ours in self.head.items():
            if stored.startswith(theirs):
                return ours + stored.removeprefix(theirs)
        rest = stored.removeprefix(prefix)
        if stored.startswith(prefix) and rest.startswith(_PARTS):
            return f"longformer.{rest}"
        is_taken = stored.startswith(("longformer.", "lm_head."))
        return _FOREIGN + stored if is_taken else stored

    def in_file(self, name: str, prefix: str) -> str:
        """The name in a file of a tensor, by its name in memory."""
        if name.startswith(_FOREIGN):
            return name.removeprefix(_FOREIGN)
        if name.startswith("longformer."):
            return prefix + name.removeprefix("longformer.")
        for theirs, ours in self.head.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    def special_ids(self, folder: Path, tree: Mapping[str, Any]) -> Mapping[str, int]:
        """Keys of `config.json` that the tokenizer's files say better, where they say them.

        BERT's `config.json` names neither the first nor the last token of a sequence. And its
        positions do not look at padding, ours do: there a wrong `pad_token_id` goes unnoticed, as
        multilingual MiniLM's, 0, which is <s> in its vocabulary of XLM-RoBERTa.
        """
        if self.has_padding_rows:
            return {}
        ids = _vocabulary(folder)
        said = _json(folder / "special_tokens_map.json") | _json(folder / "tokenizer_config.json")
        found = {}
        for key, (role, usual) in _ROLES.items():
            token = said.get(role)
            token = token.get("content") if isinstance(token, dict) else token
            names = (token,) if isinstance(token, str) else usual
            number = next((ids[name] for name in names if name in ids), None)
            if isinstance(number, int) and (key == "pad_token_id" or tree.get(key) is None):
                found[key] = number
        return found


_ALL = (
    Family(model_type="roberta", title="RoBERTa", becomes="roberta", prefix="roberta."),
    Family(
        model_type="camembert", title="CamemBERT", becomes="roberta", prefix="roberta.",
    ),
    Family(model_type="xlm-roberta", title="XLM-RoBERTa", becomes="roberta", prefix="roberta."),
    Family(
        model_type="bert", title="BERT", becomes="roberta", prefix="bert.", head=_BERT_HEAD,
        defaults={"pad_token_id": 0, "bos_token_id": 101, "eos_token_id": 102},
        has_padding_rows=False,
    ),
    Family(model_type="longformer", title="Longformer", becomes="longformer", prefix="longformer."),
)  # fmt: skip
FAMILIES: Mapping[str, Family] = {family.model_type: family for family in _ALL}
"""By their `model_type`."""


def read_family(folder: Path | str) -> tuple[Family, dict[str, Any]]:
    """The family of a folder's model, and all of its `config.json`.

    Raises:
        InputError: no such file, not JSON, or a model of another family.
    """
    path = Path(folder) / CONFIG_NAME
    tree = read_json_object(
        path, way_out="Give a folder that save_pretrained or longpretrain wrote."
    )
    model_type = tree.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        *most, last = sorted(FAMILIES)
        raise InputError(
            f"model_type in {path}", got=model_type, wanted=f"{', '.join(most)} or {last}",
            way_out="Models of other families are not read.",
        )  # fmt: skip
    return FAMILIES[model_type], tree


def is_of_a_head(name: str) -> bool:
    """Whether a tensor, by its name in memory, belongs to the masked-LM head."""
    return name.startswith("lm_head.")


def is_no_weight(name: str) -> bool:
    """Whether a tensor, by its name in memory, is a buffer that the code makes anew."""
    return _NO_WEIGHTS.fullmatch(name) is not None


def is_left_out(name: str) -> bool:
    """Whether a tensor, by its name in memory, is known and no part of a masked-LM model."""
    return _LEFT_OUT.fullmatch(name) is not None


def _vocabulary(folder: Path) -> dict[str, Any]:
    """Tokens and their ids, as far as plain files of a folder say them."""
    path = folder / "vocab.txt"
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        return {line.rstrip("\r"): number for number, line in enumerate(lines)}
    added = _json(folder / "tokenizer.json").get("added_tokens")
    entries = added if isinstance(added, list) else []
    return {
        str(entry.get("content")): entry.get("id") for entry in entries if isinstance(entry, dict)
    }


def _json(path: Path) -> dict[str, Any]:
    """The object in a file; empty where there is none: whoever needs the file tells its damage."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return tree if isinstance(tree, dict) else {}
