"""Which tokens of a sample the model must guess, and what it sees in their place.

Legend: N tokens of a sequence, M chosen tokens.
The rule is BERT's (Devlin et al. 2019, section 3.1) with fairseq's exact budget and without its
choice of special tokens. Every random number is ``hash64(key, stream, position)``, so a mask
depends on its key alone: not on the batch, the rank, the worker, or a library's generator.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from longpretrain.data.hashing import hash64, hash64_array
from longpretrain.errors import InputError

# One stream of draws per question, so that no two questions share a number.
_ROUNDING, _CHOICE, _KIND, _REPLACEMENT = 1, 2, 3, 4
_SHARE_MASKED, _SHARE_RANDOM = 0.8, 0.1


def mask_tokens(
    tokens_N: NDArray[np.integer],
    *,
    key: int,
    probability: float,
    special_ids: Iterable[int],
    real_ids: NDArray[np.integer],
    mask_id: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Chooses tokens to guess and hides them.

    With n maskable tokens (all but the special ones), floor(probability * n + u) of them are
    chosen, u uniform in [0, 1), and at least one when n > 0; every set of that size is equally
    likely. A chosen token becomes the mask token with probability 80 %, a uniformly drawn real
    token with 10 %, and stays as it is with 10 %.

    Args:
        tokens_N: token ids of one sequence, special tokens included; not changed.
        key: 64-bit seed of this mask, such as ``hash64(seed, sample_id, epoch)``.
        probability: share of the maskable tokens to choose, 0 < probability < 1.
        special_ids: ids that are never chosen.
        real_ids: ids that may be drawn as replacement; must hold no special id.
        mask_id: id of the mask token.

    Returns:
        inputs_N (int64): what the model sees. positions_M (int64): where it must guess, ascending;
        the targets are ``tokens_N[positions_M]``.

    Raises:
        InputError: the probability is out of range.
    """
    if not 0 < probability < 1:
        raise InputError(
            "masking probability", got=probability, wanted="0 < x < 1",
            way_out="0.15 is the published value.",
        )  # fmt: skip
    inputs_N = np.array(tokens_N, dtype=np.int64)
    maskable = np.flatnonzero(~np.isin(inputs_N, np.fromiter(special_ids, np.int64)))
    if maskable.size == 0:
        return inputs_N, maskable
    rounding = (hash64(key, _ROUNDING) >> 11) * 2.0**-53
    budget = min(max(int(probability * maskable.size + rounding), 1), maskable.size)
    # The budget's smallest draws: a uniform subset, with no loop and no rejection.
    smallest = np.argsort(_draws(key, _CHOICE, maskable), kind="stable")[:budget]
    positions_M = np.sort(maskable[smallest])

    kind_M = (_draws(key, _KIND, positions_M) >> np.uint64(11)) * 2.0**-53
    masked_M = kind_M < _SHARE_MASKED
    random_M = ~masked_M & (kind_M < _SHARE_MASKED + _SHARE_RANDOM)
    inputs_N[positions_M[masked_M]] = mask_id
    # The modulo's bias is below 2**-48 for any vocabulary.
    draw = _draws(key, _REPLACEMENT, positions_M[random_M]) % np.uint64(len(real_ids))
    inputs_N[positions_M[random_M]] = real_ids[draw.astype(np.int64)]
    return inputs_N, positions_M


def _draws(key: int, stream: int, positions: NDArray[np.int64]) -> NDArray[np.uint64]:
    return hash64_array(key, stream, positions.astype(np.uint64))
