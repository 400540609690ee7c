"""The random bits of attention dropout, a function of nothing but names.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) turns a 128-bit
counter and a 64-bit key into 128 random bits. The key is the seed of the batch row; the counter
names the attention weight: which head (plus 2**16 in the row of a global query), which query, and
which sixteen keys. So the bits do not depend on the backend, the device, the batch a row came in,
the number of threads, or how the sequence was split, and the backward pass draws them again.

With d the head's dilation, the weight of the key at position j uses byte (j // d) % 16 of the
output for the counter (head, query position, j % d, (j // d) // 16): a window touches consecutive
bytes. A weight is dropped when its byte is below ``drop_below`` = round(256 p).

The words are unsigned 32-bit numbers held in int64 tensors, which every device multiplies.
"""

from __future__ import annotations

import torch
from torch import Tensor

GLOBAL_ROW = 1 << 16  # added to the head number in the row of a global query
KEYS_PER_CALL = 16

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32.

    Args:
        counter: int64 tensors with values in [0, 2**32) whose shapes broadcast.
        key: two more of them.

    Returns:
        Four int64 tensors of the broadcast shape with values in [0, 2**32).
    """
    # The parts of the counter broadcast only where they meet, so the first rounds run on small
    # tensors. c1 and c3 hold whole 64-bit products: their upper halves are cut after the xor.
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = ((product1 >> 32) ^ c1 ^ k0).bitwise_and_(_WORD)
        c2 = ((product0 >> 32) ^ c3 ^ k1).bitwise_and_(_WORD)
        c1, c3 = product1, product0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1 & _WORD, c2, c3 & _WORD


def _key_of(seed: Tensor) -> tuple[Tensor, Tensor]:
    return seed & _WORD, (seed >> 32) & _WORD


def dropout_byte(
    seed: Tensor, head: Tensor, query: Tensor, key: Tensor, *, dilation: Tensor
) -> Tensor:
    """The byte of each attention weight, one by one.

    Args:
        seed: int64, the seed of the batch row.
        head: int64, plus ``GLOBAL_ROW`` in the row of a global query.
        query: int64 position.
        key: int64 position.
        dilation: int64, of the head.

    Returns:
        int64 in [0, 256), of the shape all tensors broadcast to.
    """
    place = torch.div(key, dilation, rounding_mode="floor")
    words = philox4x32((head, query, key % dilation, place >> 4), _key_of(seed))
    number = (place >> 2) & 3
    word = words[0]
    for i in (1, 2, 3):
        word = torch.where(number == i, words[i], word)
    return (word >> (8 * (place & 3))) & 0xFF


def dropout_bytes(
    seed: Tensor, head: Tensor, query: Tensor, residue: Tensor, sixteen: Tensor
) -> Tensor:
    """The bytes of many attention weights, sixteen neighbouring keys at a time.

    Args:
        seed: as in ``dropout_byte``, like head and query.
        head: int64.
        query: int64.
        residue: int64, key position modulo the dilation.
        sixteen: int64, number of the sixteen keys: (key position // dilation) // 16.

    Returns:
        uint8 of the shape all tensors broadcast to, its last dimension 16 times as long.
    """
    words = philox4x32((head, query, residue, sixteen), _key_of(seed))
    # torch runs on little-endian machines only, so the bytes of a word lie in the order wanted.
    packed = torch.stack([word.to(torch.int32) for word in words], dim=-1)
    return packed.view(torch.uint8).flatten(-2)
