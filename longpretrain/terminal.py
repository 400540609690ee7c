"""The command line's manners: standard streams, locale, and how errors and exit codes are told."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import difflib
import io
import locale
import os
import re
import select
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NoReturn, TextIO

from longpretrain.errors import InputError, RankLostError, from_system, tell

BAD_INPUT = 2
FAILED = 1
"""Exit codes of a verb that did not do its work."""


def check_encoding(words: Iterable[str]) -> None:
    """Refuses a locale that is not UTF-8, and words that are not.

    torch reads some of its own files by the locale, and fails while it is imported; safetensors
    and YAML take UTF-8 alone.
    """
    encoding = "utf-8" if sys.flags.utf8_mode else codecs.lookup(locale.getencoding()).name
    if encoding != "utf-8":
        raise InputError(
            "locale",
            got=f"the encoding {encoding}",
            wanted="UTF-8",
            way_out="Set LC_ALL=C.UTF-8, and leave out PYTHONUTF8.",
        )
    for word in words:
        if any("\ud800" <= letter <= "\udfff" for letter in word):
            raise InputError(
                f"name {word!a}",
                got="bytes that are not UTF-8",
                wanted="names in UTF-8",
                way_out="Rename it: convmv does so for whole folders.",
            )


# What argparse says -> (what, got, wanted), its groups filled in.
_ARGPARSE = (
    (r"argument (.+?): invalid choice: (.+) \(choose from (.+)\)", (r"\1", r"\2", r"one of \3")),
    (r"argument (.+?): invalid int value: (.+)", (r"\1", r"\2", "a whole number")),
    (r"argument (.+?): expected (.+)", (r"\1", "nothing", r"\2")),
    (r"the following arguments are required: (.+)", (r"\1", "nothing", "a value")),
    (r"argument (.+?): not allowed with argument (.+)", (r"\1", r"\2 as well", "one of them")),
    (r"ambiguous option: (\S+) could match (.+)", (r"\1", "a part of a name", r"one of \2")),
    (r"argument (.+?): got (.+); wanted (.+)", (r"\1", r"\2", r"\3")),
    (r"unrecognized arguments: (.+)", ("arguments", r"\1", "those of the verb")),
)


class Parser(argparse.ArgumentParser):
    """Tells what is wrong with a command line as we tell everything else: one line, exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Ends the program; argparse calls it."""
        what, got, wanted = "command line", message, "the form of the help"
        for pattern, form in _ARGPARSE:
            match = re.fullmatch(pattern, message, flags=re.DOTALL)
            if match:
                what, got, wanted = (match.expand(text) for text in form)
                break
        choices = re.findall(r"'([^']+)'", wanted)
        near = difflib.get_close_matches(got.strip("'"), choices, n=1)
        way_out = f"See {self.prog} --help."
        if near:
            way_out = f"Did you mean {near[0]}? See {self.prog} --help."
        told = InputError(what, got=got, wanted=wanted.replace("'", ""), way_out=way_out)
        tell(f"{self.prog}: {told}")
        raise SystemExit(BAD_INPUT)


def path_argument(text: str) -> Path:
    """A path on the command line, for argparse."""
    if not text:  # Path("") would be the current folder
        raise argparse.ArgumentTypeError("got nothing; wanted a path (is a shell variable unset?)")
    return Path(text)


def exit_code(run: Callable[[], int], *, verb: str) -> int:
    """Runs a verb; what a user can mend is told in one line on stderr instead of a traceback."""
    told: Exception
    try:
        code = run()
        _flush()
        return code
    except InputError as error:
        told, code = error, FAILED if isinstance(error, RankLostError) else BAD_INPUT
    except BrokenPipeError:
        if _has_reader(sys.stdout):
            raise
        _flush()
        return FAILED
    except FloatingPointError as error:  # the run diverged, at every rank alike: the first tells it
        if os.environ.get("RANK", "0") not in ("", "0"):
            return FAILED
        told, code = error, FAILED
    except (OSError, UnicodeEncodeError) as error:
        found = from_system(error)
        if found is None:
            raise
        told, code = found[0], BAD_INPUT if found[1] else FAILED
    rank = os.environ.get("RANK") or "0"
    place = f" (rank {rank})" if rank != "0" else ""
    tell(f"longpretrain {verb}{place}: {told}")
    return code


def leave(code: int) -> NoReturn:
    """Ends the program.

    A process group's native threads may still hold Python objects, and one that lets go of them
    while the interpreter winds down aborts the process ("terminate called without an active
    exception": seen once, of two refused ranks). So a rank that is through ends at once; under
    MPI it does not, since mpi4py takes leave of the others when the interpreter ends.
    """
    is_rank = "deepspeed" in sys.modules and "mpi4py" not in sys.modules
    if not is_rank:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def open_streams() -> None:
    """Makes the standard streams safe to print to.

    A closed one is opened on nothing, lest the next file takes its number and is printed into. A
    name that the locale cannot show is printed with escapes.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
            os.set_inheritable(number, True)  # dup2 does so for another number only
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, for verbs that tell (done, total)."""
    from tqdm import tqdm

    with tqdm(desc=what, unit_scale=True, disable=None, leave=False) as shown:

        def progress(done: int, total: int) -> None:
            shown.total = total
            shown.update(done - shown.n)

        yield progress


def _flush() -> None:
    """Sends off what was printed. If its reader left (``| head -1``) the rest goes nowhere; a full
    disk behind ``> FILE`` is told like any other.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            error.filename = "standard output"
            raise


def _has_reader(stream: TextIO) -> bool:
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return not any(event & select.POLLERR for _, event in poll.poll(0))
