"""The fixed text that models are compared on, at fixed lengths."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from longpretrain.data.tokenizer import Tokenizer
from longpretrain.model import ModelConfig

LENGTHS = (7, 255, 512, 513, 1024)
"""Tokens of the sequences, as far as a model takes them."""
PADDED = 21
"""Tokens of the sequences of which one ends in padding."""
# Real text (Lincoln, 1863), with digits, accents and quotes to show a tokenizer that differs.
TEXT = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, "
    "conceived in Liberty, and dedicated to the proposition that all men are created equal.\n\n"
    "Now we are engaged in a great civil war, testing whether that nation, or any nation so "
    "conceived and so dedicated, can long endure. (Gettysburg, 19 November 1863: “café”, 1,234.5)\n"
)


def tokens(tokenizer: Tokenizer | None, config: ModelConfig, length: int) -> Tensor:
    """A sequence of ids, BN of one row: the text over and over, or drawn ids without a tokenizer.

    Args:
        tokenizer: the model's.
        config: the model.
        length: tokens, with those of beginning and end.
    """
    if tokenizer is not None:
        text_N = np.resize(tokenizer.encode(TEXT).astype(np.int64), max(length - 2, 0))
        ids = [tokenizer.bos_id, *text_N.tolist(), tokenizer.eos_id]
        return torch.tensor([ids[:length]])
    generator = torch.Generator().manual_seed(1)
    special = (config.pad_id, config.bos_id, config.eos_id)
    plain = torch.tensor([i for i in range(config.vocab_size) if i not in special])
    return plain[torch.randint(len(plain), (1, length), generator=generator)]


def with_padding(tokens_BN: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """The sequence twice, the second time with padding for its second half; and where that is."""
    tokens_BN = tokens_BN.repeat(2, 1)
    padding_BN = torch.zeros_like(tokens_BN, dtype=torch.bool)
    padding_BN[1, tokens_BN.shape[1] // 2 + 1 :] = True
    return tokens_BN.masked_fill(padding_BN, pad_id), padding_BN
