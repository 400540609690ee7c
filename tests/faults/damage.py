"""Kinds of damage to a run folder's checkpoints, each drawn at random: what disks, copies, power
cuts and people do to files.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

STATE, LATEST = "state.json", "latest"


def copy_of(run_dir: Path, copy: Path) -> Path:
    """The same run folder elsewhere, files shared until ``_own`` parts them."""
    shutil.copytree(run_dir, copy, copy_function=os.link)
    return copy


def _own(path: Path) -> bytes:
    """What a file holds; from now on it is this copy's alone."""
    data = path.read_bytes()
    path.unlink()
    return data


def _files(folder: Path, draw: random.Random) -> Path:
    """Any file; small ones, which are most, are no more likely than the large."""
    found = sorted(path for path in folder.iterdir() if path.is_file())
    large = [path for path in found if path.stat().st_size > 2**20]
    kinds = [[folder / STATE], large or found, found]
    return draw.choice(draw.choice(kinds))


def flip_a_bit(folder: Path, draw: random.Random) -> str:
    """As cosmic rays and bad cables do."""
    path = _files(folder, draw)
    data = bytearray(_own(path))
    place, bit = draw.randrange(len(data)), draw.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {place} of {path.name}"


def change_a_digit(folder: Path, draw: random.Random) -> str:
    """Of state.json: it stays JSON, and says something else."""
    path = folder / STATE
    data = bytearray(_own(path))
    place = draw.choice([n for n, byte in enumerate(data) if chr(byte).isdecimal()])
    data[place] = draw.choice([digit for digit in b"0123456789" if digit != data[place]])
    path.write_bytes(data)
    return f"a digit of {STATE}, byte {place}"


def truncate(folder: Path, draw: random.Random) -> str:
    """As a full disk or a broken copy does."""
    path = _files(folder, draw)
    data = _own(path)
    path.write_bytes(data[: draw.randrange(len(data))])
    return f"{path.name} cut from {len(data)} to {path.stat().st_size} bytes"


def empty(folder: Path, draw: random.Random) -> str:
    """As a power cut does to a file that was never synced."""
    path = _files(folder, draw)
    _own(path)
    path.touch()
    return f"{path.name} empty"


def zeros(folder: Path, draw: random.Random) -> str:
    """The same, on file systems that keep the length: a run of zeros up to the end."""
    path = _files(folder, draw)
    data = _own(path)
    kept = draw.choice((0, draw.randrange(len(data))))
    path.write_bytes(data[:kept] + bytes(len(data) - kept))
    return f"{path.name} zeros from byte {kept}"


def grow(folder: Path, draw: random.Random) -> str:
    """Bytes too many at the end."""
    path = _files(folder, draw)
    path.write_bytes(_own(path) + draw.randbytes(draw.randint(1, 4096)))
    return f"{path.name} longer"


def remove(folder: Path, draw: random.Random) -> str:
    """One file."""
    path = _files(folder, draw)
    path.unlink()
    return f"{path.name} missing"


def be_a_folder(folder: Path, draw: random.Random) -> str:
    """A folder in the place of a file."""
    path = _files(folder, draw)
    path.unlink()
    path.mkdir()
    return f"{path.name} is a folder"


def dangle(folder: Path, draw: random.Random) -> str:
    """A link that leads nowhere in the place of a file, as after moving half of a folder."""
    path = _files(folder, draw)
    path.unlink()
    path.symlink_to("/nowhere/at/all")
    return f"{path.name} leads nowhere"


def older(folder: Path, draw: random.Random) -> str:
    """A file of the checkpoint before, whole in itself: a mixture of two."""
    before = sorted(folder.parent.glob("step-*"))[-2]
    own = {path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".json")}
    different = [n for n in sorted(own) if (before / n).read_bytes() != (folder / n).read_bytes()]
    name = draw.choice(different)
    (folder / name).unlink()
    shutil.copy(before / name, folder / name)
    return f"{name} of {before.name}"


def swap(folder: Path, draw: random.Random) -> str:
    """Two files under each other's names."""
    first, second = draw.sample(sorted(folder.glob("*.safetensors")), 2)
    other = first.with_name("swapped")
    first.rename(other)
    second.rename(first)
    other.rename(second)
    return f"{first.name} and {second.name} swapped"


def lose_the_folder(folder: Path, draw: random.Random) -> str:
    """Gone, empty, or a file."""
    shutil.rmtree(folder)
    kind = draw.choice(("gone", "empty", "a file"))
    if kind == "empty":
        folder.mkdir()
    elif kind == "a file":
        folder.write_bytes(b"step")
    return f"{folder.name} is {kind}"


def spoil_the_pointer(folder: Path, draw: random.Random) -> str:
    """``latest`` holds something else, or is something else, or is not there."""
    path = folder.parent / LATEST
    data = _own(path)
    kind = draw.choice(
        ("missing", "empty", "cut", "flipped", "garbage", "zeros", "long", "elsewhere", "a folder")
    )
    if kind == "a folder":
        path.mkdir()
    elif kind != "missing":
        place = draw.randrange(len(data))
        flipped = bytearray(data)
        flipped[place] ^= 1 << draw.randrange(8)
        path.write_bytes(
            {
                "empty": b"",
                "cut": data[: draw.randrange(1, len(data) - 1)],
                "flipped": bytes(flipped),
                "garbage": draw.randbytes(draw.randint(1, 40)),
                "zeros": bytes(len(data)),
                "long": b"step-" + b"0" * 5000,
                "elsewhere": draw.choice((b"../models", b"/", b".", b"step-000099\n")),
            }[kind]
        )
    return f"{LATEST} {kind}"


def nest(folder: Path, draw: random.Random) -> str:
    """state.json that is hard on who reads it."""
    path = folder / STATE
    _own(path)
    kind = draw.choice(("deep", "huge number", "NaN", "list", "null", "text", "UTF-16"))
    path.write_bytes(
        {
            "deep": b'{"a":' * 100_000,
            "huge number": b'{"format": 1, "step": 1' + b"0" * 10_000 + b"}",
            "NaN": b'{"format": 1, "step": NaN}',
            "list": b"[1, 2]",
            "null": b"null",
            "text": b'"step"',
            "UTF-16": '{"format": 1}'.encode("utf-16"),
        }[kind]
    )
    return f"{STATE}: {kind}"


KINDS: dict[str, Callable[[Path, random.Random], str]] = {
    "a bit flipped": flip_a_bit,
    "a digit of state.json changed": change_a_digit,
    "cut short": truncate,
    "emptied": empty,
    "zeros written over": zeros,
    "bytes added": grow,
    "a file missing": remove,
    "a folder for a file": be_a_folder,
    "a link to nowhere": dangle,
    "a file of the checkpoint before": older,
    "two files swapped": swap,
    "the folder gone or empty": lose_the_folder,
    "`latest` spoilt": spoil_the_pointer,
    "state.json of another kind": nest,
}
