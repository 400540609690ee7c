"""The one kind of error that a user can mend: it says what, got, wanted, and the way out."""

from __future__ import annotations


class InputError(ValueError):
    """A user's input cannot be used.

    The command line prints it as one line and exits with code 2; library users catch it as the
    ``ValueError`` it is. Our own invariants use ``assert`` instead.

    Args:
        what: the thing that is wrong, by the name the user knows it by (a key, a file, a flag).
        got: what was found.
        wanted: what would have been right.
        way_out: what to do about it.
    """

    def __init__(self, what: str, *, got: object, wanted: object, way_out: str) -> None:
        self.what = what
        self.got = str(got)
        self.wanted = str(wanted)
        self.way_out = way_out
        text = f"{what}: got {self.got}; wanted {self.wanted}. {way_out}"
        super().__init__(" ".join(text.split()))
