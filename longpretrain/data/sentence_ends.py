"""Which tokens of a vocabulary end a sentence."""

from __future__ import annotations

import re

from longpretrain.data.tokenizer import Tokenizer
from longpretrain.errors import InputError

# Full stops, exclamation and question marks and ellipses of many scripts (Unicode's
# Sentence_Terminal as far as it is in common use), and what may close around them.
_ENDS = ".!?…‼⁇⁈⁉。．！？｡؟۔।॥։።፧။។៕᠃᠉"  # noqa: RUF001
_CLOSING = "\"'”’»›)]}」』）】"  # noqa: RUF001
_SENTENCE_END = re.compile(f"[{re.escape(_CLOSING)}]*[{re.escape(_ENDS)}]+[{re.escape(_CLOSING)}]*")
_LETTER_OR_DIGIT = re.compile("[A-Za-z0-9]")
_INSIDE_WORD = "##"
"""BERT's mark of a token that goes on with a word."""


def sentence_end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids of the tokens that are a sentence's end and nothing else, ascending, and ``</s>``.

    Such as ``.``, ``?!`` and ``."``; a space before it does not count. A full stop of an
    abbreviation is one, too: tokens are told by themselves, without their sentence.

    Raises:
        InputError: the vocabulary has none.
    """
    found = sorted(
        number
        for name, number in tokenizer.vocab.items()
        if number not in tokenizer.special_ids
        and not _LETTER_OR_DIGIT.search(name)  # most of them, and quicker than their text
        and _SENTENCE_END.fullmatch(_text(tokenizer, number))
    )
    if not found:
        raise InputError(
            "recipe key model.global_tokens", got="sentence_ends",
            wanted="a tokenizer with full stops and question marks",
            way_out="Name the tokens by their ids: ids_A_B.",
        )  # fmt: skip
    return tuple(sorted({*found, tokenizer.eos_id}))


def _text(tokenizer: Tokenizer, number: int) -> str:
    return tokenizer.decode([number]).strip().removeprefix(_INSIDE_WORD)
