"""Train or valid: decided for each document by its own text.

So the decision stands when the corpus grows or is read in another order, and documents of one text
are on one side.
"""

from __future__ import annotations

from fractions import Fraction

from longpretrain.errors import InputError

WHOLE = ""
TRAIN, VALID = "train", "valid"
_HASHES = 1 << 128


class Split:
    """A way to divide documents.

    Args:
        share: of the documents that are to be valid; None divides nothing.

    Attributes:
        names: the corpora that are made, as folders below the output; WHOLE is the output itself.
    """

    def __init__(self, share: str | float | Fraction | None) -> None:
        self.share = None if share is None else _fraction(share)
        self.names = (WHOLE,) if self.share is None else (TRAIN, VALID)
        # Below it: an integer, so that no rounding moves a document.
        self._border = 0 if self.share is None else int(self.share * _HASHES)

    def __str__(self) -> str:
        return "" if self.share is None else str(self.share)

    def of(self, document_hash: bytes) -> str:
        """The corpus of a document."""
        if self.share is None:
            return WHOLE
        return VALID if int.from_bytes(document_hash) < self._border else TRAIN


def _fraction(share: str | float | Fraction) -> Fraction:
    try:
        # By way of text: 0.01 is meant, not the binary number next to it.
        found = Fraction(str(share))
    except (ValueError, ZeroDivisionError):
        found = Fraction(0)
    if not 0 < int(found * _HASHES) < _HASHES:
        raise InputError(
            "valid",
            got=share,
            wanted="a share of the documents between 0 and 1",
            way_out="Set --valid, for example to 0.01, or leave it out.",
        )
    return found
