"""What an input holds that cannot be used, before it is decided what to do about it."""

from __future__ import annotations

from longpretrain.errors import InputError

SKIP = "pass --on-error skip or --on-error replace."


class UnusableError(Exception):
    """What an InputError says, but for the place, which who found it may not know."""

    def __init__(self, got: str, wanted: str, way_out: str = f"Mend it, or {SKIP}") -> None:
        super().__init__(got)
        self.got = got
        self.wanted = wanted
        self.way_out = way_out

    def told(self, what: str) -> InputError:
        return InputError(what, got=self.got, wanted=self.wanted, way_out=self.way_out)


class DamagedError(UnusableError):
    """A file ends early, or is no such file; what came before was handed out."""

    def __init__(self, got: str) -> None:
        super().__init__(
            got, "a whole file", "Get it again from where it came, or pass --on-error skip."
        )
