"""What tests of tokenizers share: hard text, and comparison with transformers' own tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from family_models import HARD_TEXT, sample_text
from transformers import AutoTokenizer

from longpretrain.data.tokenizer import Tokenizer

FORMS = ("published", "files", "json")
POSITIONS = 128
# Characters of all of Unicode's first two planes, between letters and after a space.
EVERYWHERE = "".join(
    f"a{chr(i)}1 {chr(i)}."
    for i in (*range(0x20, 0x3000, 7), *range(0x3000, 0xD800, 97), *range(0xE000, 0x20000, 101))
)
TEXTS = {**HARD_TEXT, "prose": sample_text()[:20_000], "everywhere": EVERYWHERE}


def named(model_type: str, folder: Path) -> Path:
    """The folder, with as much of a config.json as AutoTokenizer looks at."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def theirs_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def without_special(theirs: Any, text: str) -> list[int]:
    return list(theirs(text, add_special_tokens=False).input_ids)


def need_same_ids(ours: Tokenizer, theirs: Any, texts: Sequence[str] = tuple(TEXTS)) -> None:
    for name in texts:
        assert ours.encode(TEXTS[name]).tolist() == without_special(theirs, TEXTS[name]), name


def need_same_special_ids(ours: Tokenizer, theirs: Any) -> None:
    roles = {"bos": "cls", "eos": "sep", "pad": "pad", "mask": "mask", "unk": "unk"}
    found = {role: getattr(ours, f"{role}_id") for role in roles}
    assert found == {role: getattr(theirs, f"{name}_token_id") for role, name in roles.items()}


def save_as_longformer(tokenizer: Tokenizer, folder: Path, max_tokens: int = POSITIONS) -> Path:
    folder.mkdir()
    tokenizer.save(folder, max_tokens)
    return named("longformer", folder)
