"""Standard input, kept in the work folder: its size is known then, and a second run may need it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

from longpretrain.prepare.inputs import InputFile, Kind, spooled

_READ_BYTES = 1 << 20


def spool(stream: BinaryIO, folder: Path, kind: Kind) -> InputFile:
    """Reads a stream to its end; what an interrupted run read already stays the file it was."""
    part = folder / ".stdin"
    digest = hashlib.sha256()
    with part.open("wb") as file:
        while data := stream.read(_READ_BYTES):
            digest.update(data)
            file.write(data)
    path = folder / f"stdin-{digest.hexdigest()[:32]}"
    for old in folder.glob("stdin-*"):
        if old != path:
            old.unlink()
    if path.exists():  # with its time, by which its parts are known
        part.unlink()
    else:
        part.rename(path)
    return spooled(path, kind)
