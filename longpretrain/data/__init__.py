"""Text to tokens, tokens to samples: numpy only, random access, no state but numbers."""

from longpretrain.data.blocks import Blocks, Order
from longpretrain.data.global_tokens import (
    GlobalTokens,
    global_positions,
    global_tokens_of,
    parse_global_tokens,
)
from longpretrain.data.hashing import hash64, hash64_array
from longpretrain.data.manifest import Manifest
from longpretrain.data.masking import mask_tokens
from longpretrain.data.shards import Corpus
from longpretrain.data.tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "Blocks",
    "Corpus",
    "GlobalTokens",
    "Manifest",
    "Order",
    "Tokenizer",
    "global_positions",
    "global_tokens_of",
    "hash64",
    "hash64_array",
    "load_tokenizer",
    "mask_tokens",
    "parse_global_tokens",
]
