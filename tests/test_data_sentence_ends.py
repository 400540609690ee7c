"""Which tokens of real vocabularies end a sentence."""

from __future__ import annotations

from pathlib import Path

import family_models
import numpy as np
import pytest

from longpretrain.data import global_positions, global_tokens_of, load_tokenizer
from longpretrain.data.sentence_ends import sentence_end_ids
from longpretrain.errors import InputError


def test_of_robertas_bpe() -> None:
    """119 of 50,265: no comma, colon, opening bracket or letter among them."""
    tokenizer = load_tokenizer()
    found = [tokenizer.decode([number]).strip() for number in sentence_end_ids(tokenizer)]
    assert {".", "!", "?", "?!", "...", "…", '."', ").", "。", "</s>"} <= set(found)
    assert not set(found) & {",", ":", ";", ")", '"', "-", ".,", "./", "<s>", "<mask>", "U.S."}
    assert 100 < len(found) < 150
    assert not any(char.isalnum() or char in ",;:-/([" for text in found[1:] for char in text)


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "camembert", "bert"])
def test_of_other_vocabularies(family: str, tmp_path: Path) -> None:
    """With the space before it and without, and inside a word where BERT has such tokens."""
    family_models.write_tokenizer(tmp_path, family)
    tokenizer = load_tokenizer(tmp_path)
    chosen = global_tokens_of("sentence_ends", tokenizer)
    assert chosen.ids == sentence_end_ids(tokenizer)
    ids = np.array([*tokenizer.encode("all men, it says. They are free!"), tokenizer.eos_id])
    ends = global_positions(ids, chosen)
    assert [tokenizer.decode([i]).strip() for i in ids[ends[:-1]]] == [".", "!"]
    assert ends[-1] == len(ids) - 1
    if family == "bert":
        assert tokenizer.vocab["##."] in chosen.ids


def test_a_vocabulary_without_any_is_refused(tmp_path: Path) -> None:
    """BERT's, whose marks have all become letters."""
    family_models.write_tokenizer(tmp_path, "bert", form="json")
    path = tmp_path / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    for mark in ".!?…。":
        text = text.replace(f'"{mark}"', f'"x{ord(mark)}"').replace(
            f'"##{mark}"', f'"##x{ord(mark)}"'
        )
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="sentence_ends; wanted a tokenizer with full stops"):
        sentence_end_ids(load_tokenizer(tmp_path))
