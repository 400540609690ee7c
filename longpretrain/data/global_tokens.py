"""Which tokens of a sequence attend to, and are attended by, all others: a policy as data.

Legend: N tokens of a sequence, G global tokens.
The recipe's key ``model.global_tokens`` is one of

    none            no global token (the published masked-LM recipe)
    first           the first token, <s> (Longformer, section 3.1: classification)
    every_K         tokens 0, K, 2K, ...
    ids_A_B         every token whose id is A or B, such as a question or paragraph mark
    sentence_ends   every token that ends a sentence as far as the tokenizer shows: </s>, and tokens
                    like . ! ?

The last two go by what the model reads: a masked token is the mask, and tells nothing of what it
was.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from longpretrain.data.sentence_ends import sentence_end_ids
from longpretrain.data.tokenizer import Tokenizer
from longpretrain.errors import InputError


@dataclass(frozen=True)
class GlobalTokens:
    """A parsed policy."""

    kind: Literal["none", "first", "every", "ids", "sentence_ends"]
    every: int = 0
    """Distance between global tokens; of kind every only."""
    ids: tuple[int, ...] = ()
    """Ids of the global tokens; of kinds ids and sentence_ends only."""


def global_tokens_of(text: str, tokenizer: Tokenizer) -> GlobalTokens:
    """The policy that a recipe names, with the tokenizer's ids.

    Raises:
        InputError: not a policy; or the tokenizer has no tokens for it.
    """
    policy = parse_global_tokens(text)
    if policy.kind == "sentence_ends":
        return GlobalTokens("sentence_ends", ids=sentence_end_ids(tokenizer))
    strange = [number for number in policy.ids if number >= tokenizer.vocab_size]
    if policy.kind == "ids" and tokenizer.roles.mask and tokenizer.mask_id in policy.ids:
        raise InputError(
            "recipe key model.global_tokens",
            got=f"id {tokenizer.mask_id}, the mask",
            wanted="ids of a text's tokens",
            way_out="Leave it out: every masked token would be global.",
        )
    if strange:
        raise InputError(
            "recipe key model.global_tokens",
            got=f"ids {strange}",
            wanted=f"ids below {tokenizer.vocab_size}, the tokenizer's",
            way_out="Look the ids up in the tokenizer's files.",
        )
    return policy


def parse_global_tokens(text: str) -> GlobalTokens:
    """The policy that a recipe names; of sentence_ends the ids are still to find.

    Raises:
        InputError: not one of none, first, every_K, ids_A_B, sentence_ends.
    """
    for kind in ("none", "first", "sentence_ends"):
        if text == kind:
            return GlobalTokens(kind)
    if match := re.fullmatch(r"every_([1-9][0-9]{0,8})", text):
        return GlobalTokens("every", every=int(match[1]))
    if re.fullmatch(r"ids(_[0-9]{1,9})+", text):
        ids = sorted({int(part) for part in text.split("_")[1:]})
        return GlobalTokens("ids", ids=tuple(ids))
    raise InputError(
        "recipe key model.global_tokens",
        got=repr(text),
        wanted="none, first, every_K, ids_A_B or sentence_ends",
        way_out="For example first, every_64 or ids_0_2.",
    )


def global_positions(
    tokens_N: NDArray[np.integer],
    policy: GlobalTokens,
    position_N: NDArray[np.integer] | None = None,
) -> NDArray[np.int32]:
    """Positions of the global tokens of an unpadded sequence: int32, ascending, G of them.

    Args:
        tokens_N: ids, as the model gets them.
        policy: which of them.
        position_N: place of each token in its document where documents are packed: every document
            has the global tokens that it has alone. None: one document.
    """
    if position_N is None:
        position_N = np.arange(len(tokens_N))
    match policy.kind:
        case "none":
            chosen = np.zeros(len(tokens_N), bool)
        case "first":
            chosen = position_N == 0
        case "every":
            chosen = position_N % policy.every == 0
        case "ids" | "sentence_ends":
            assert policy.ids, "global_tokens_of finds them"
            chosen = np.isin(tokens_N, policy.ids)
    return np.flatnonzero(chosen).astype(np.int32)
