"""How good a model is on held-out text: bits per masked token."""

from longpretrain.evaluate.held_out import HeldOut, TokenLosses, score, token_losses
from longpretrain.evaluate.masked_bits import (
    Evaluation,
    comparison_table,
    evaluate,
    find_model_folder,
)

__all__ = [
    "Evaluation",
    "HeldOut",
    "TokenLosses",
    "comparison_table",
    "evaluate",
    "find_model_folder",
    "score",
    "token_losses",
]
