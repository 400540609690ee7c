"""Errors that a user can mend: each says what, got, wanted, and the way out, in one line.

Ours are ``InputError``; what the operating system refuses is told in the same form, which hides
where: LONGPRETRAIN_TRACEBACK=1 prints the traceback before it.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from typing import Any, TextIO


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
        self.got = str(got) or "nothing"
        self.wanted = str(wanted)
        self.way_out = way_out
        text = f"{what}: got {self.got}; wanted {self.wanted}. {way_out}"
        super().__init__(" ".join(text.split()))

    def __reduce__(self) -> tuple[Any, ...]:
        # Out of a worker process: an exception is pickled by its message alone.
        return _input_error, (self.what, self.got, self.wanted, self.way_out), self.__dict__


class RankLostError(InputError):
    """A rank ended while others waited for it: no fault of the input, which may do another time.

    The command line prints it like any other and exits with code 1.
    """


def tell(text: str, stream: TextIO | None = None) -> None:
    """Prints one line, to stderr if no stream is given, in one write.

    Launchers start ranks as ``python -u``, where ``print`` writes the newline apart: two ranks'
    lines would run together.

    Raises:
        OSError: as ``print`` does.
    """
    stream = stream or sys.stderr
    if stream is not None:  # Python's, where it was closed
        stream.write(f"{text}\n")
        stream.flush()


def _input_error(what: str, got: str, wanted: str, way_out: str) -> InputError:
    return InputError(what, got=got, wanted=wanted, way_out=way_out)


_FREE = "Free some room there, or choose another disk; then run it again."
_AGAIN = "Run it again when the disk answers."
# What the system says -> (wanted, way out).
_OF_THE_PATH = {
    errno.ENOENT: (
        "an existing file or folder",
        "Check the path; if another program removed it meanwhile, run this again.",
    ),
    errno.ENOTDIR: ("a folder", "Choose another path: a part of this one is a file."),
    errno.EISDIR: ("a file", "Choose another path: this one is a folder."),
    errno.EACCES: ("permission", "Change its permissions, or choose another place."),
    errno.EPERM: ("permission", "Change its permissions, or choose another place."),
    errno.EROFS: ("a file system that may be written", "Choose another place."),
    errno.ENAMETOOLONG: ("a shorter name", "Choose another path."),
    errno.ELOOP: ("a link that leads somewhere", "Mend the link, or choose another path."),
    errno.EEXIST: ("a folder, or nothing of that name", "Choose another path, or move it away."),
}
_OF_THE_MACHINE = {
    errno.ENOSPC: ("room for the file", _FREE),
    errno.EDQUOT: ("room for the file", _FREE),
    errno.EFBIG: ("a file system that takes files so large", "Choose another disk."),
    errno.EIO: ("a disk that reads and writes", _AGAIN),
    errno.ESTALE: ("a file server that answers", _AGAIN),
    errno.EMFILE: ("fewer open files", "Raise the limit (ulimit -n) and run it again."),
    errno.ENFILE: ("fewer open files", "Close other programs and run it again."),
    errno.ENOMEM: ("more memory", "Close other programs, or use a larger machine."),
}


def from_system(error: OSError | UnicodeEncodeError) -> tuple[InputError, bool] | None:
    """What the system refused, in our form, and whether a path of the user's is the cause.

    None: an error that says nothing to a user, whose traceback is the better report. The path need
    not be the user's (a library may look for a program): with LONGPRETRAIN_TRACEBACK set the
    traceback is printed at once.
    """
    told = _of_text(error) if isinstance(error, UnicodeEncodeError) else _of_system(error)
    if told and os.environ.get("LONGPRETRAIN_TRACEBACK"):
        traceback.print_exception(error)
    return told


def _of_text(error: UnicodeEncodeError) -> tuple[InputError, bool]:
    name = error.object[max(0, error.start - 30) : error.end + 30]
    told = InputError(
        f"name or text {name!a}",
        got=f"a character that {error.encoding} cannot write",
        wanted="names in UTF-8, under a locale of UTF-8",
        way_out="Rename it, or set LC_ALL=C.UTF-8 and PYTHONUTF8=1. "
        "LONGPRETRAIN_TRACEBACK=1 shows where.",
    )
    return told, True


def _of_system(error: OSError) -> tuple[InputError, bool] | None:
    found = _OF_THE_PATH.get(error.errno or 0) or _OF_THE_MACHINE.get(error.errno or 0)
    if not found:
        return None
    is_path = error.errno in _OF_THE_PATH
    names = [os.fspath(n) for n in (error.filename, error.filename2) if isinstance(n, str | bytes)]
    shown = " and ".join(os.fsdecode(name) for name in names)
    what = f"path {shown}" if is_path else f"writing {shown}"
    got = (error.strerror or os.strerror(error.errno or 0)).lower()
    wanted, way_out = found
    what = what if shown else "reading or writing a file"
    told = InputError(
        what, got=got, wanted=wanted, way_out=f"{way_out} LONGPRETRAIN_TRACEBACK=1 shows where."
    )
    return told, is_path
