"""A full disk, told as any other thing that a user can mend."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from longpretrain.errors import from_system

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def told_if_full() -> Iterator[None]:
    """Turns the system's error of a full disk into an InputError: whoever asked can choose another.

    Elsewhere it stays the system's, as of a training, which nobody watches and which may go on.
    """
    try:
        yield
    except OSError as error:
        told = from_system(error) if error.errno in _FULL else None
        if told is None:
            raise
        raise told[0] from error
