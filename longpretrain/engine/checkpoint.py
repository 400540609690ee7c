"""Checkpoints that are model folders, hold whole fp32 parameters, and never look whole when they
are not. Here: reading one, and telling whether it is whole.

``checkpoints/step-000500/`` holds the master weights as ``model*.safetensors`` (transformers
loads the
folder as it is), both moments as ``optimizer*.safetensors``, and ``state.json``. Each parameter is
written once, whole, by one rank; so world size, ZeRO stage and precision may change at a resume.
``state.json`` has the sha256 of every other file and, as its last entry, its own: with the digits
of that entry taken as zeros. So no byte of a checkpoint can change unseen.

The folder is written under another name, synced, and renamed; then ``checkpoints/latest`` moves.
Only names of ``step-`` and digits are the run's; any other, such as a copy, is left alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

import longpretrain
from longpretrain.code_version import code_version
from longpretrain.engine.names import LATEST, pointed_at, step_of
from longpretrain.engine.zero import ZeroEngine
from longpretrain.errors import InputError
from longpretrain.files import read_json_object, sha256, told_as, write_atomically

FORMAT = 2
"""Format 1 was the same without a hash of state.json itself; it is still read."""
STATE = "state.json"
SEAL = "sha256"
"""The entry of state.json that holds its own hash."""
_OPEN_SEAL = "0" * 64
_LONGEST_NAME = 200
_DAMAGED = "The checkpoint is damaged: point checkpoints/latest at an older step folder."
_COUNTS = ("step", "samples_done", "skipped", "updates_applied")
_VERSIONS = ("torch", "deepspeed", "numpy", "safetensors")


def folders(run_dir: Path) -> list[tuple[int, Path]]:
    """The run's own checkpoint folders by step, whole or not."""
    return sorted(
        (step, path)
        for path in (run_dir / "checkpoints").glob("step-*")
        if (step := step_of(path)) is not None and path.is_dir()
    )


def point_at(run_dir: Path, folder: Path) -> None:
    """Makes ``checkpoints/latest`` name a checkpoint."""
    write_atomically(run_dir / "checkpoints" / LATEST, folder.name + "\n")


def latest(run_dir: Path) -> Path | None:
    """The folder that ``checkpoints/latest`` names, if there is one; nothing of it is checked."""
    name = pointed_at(run_dir)
    is_name = 0 < len(name) < _LONGEST_NAME and "/" not in name and name not in (".", "..")
    folder = run_dir / "checkpoints" / name
    return folder if is_name and folder.is_dir() else None


def kept_step(run_dir: Path) -> int:
    """The step that ``checkpoints/latest`` means, unchecked; 0 without one."""
    folder = latest(run_dir)
    if folder is None:
        return 0
    step = step_of(folder)
    if step is None:  # a copy, under a name of somebody's own
        with contextlib.suppress(InputError):
            step = read_state(folder)["step"]
    return step or 0


def sealed(state: Mapping[str, Any]) -> str:
    """The text of state.json: ``state`` and the text's own hash."""
    text = json.dumps({**state, SEAL: _OPEN_SEAL}, indent=1)
    before, _, after = text.rpartition(_OPEN_SEAL)
    return before + hashlib.sha256(text.encode("utf-8")).hexdigest() + after


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint, with the keys and types that a resume needs.

    Raises:
        InputError: it is damaged or of another format, or the folder was given another's name.
    """
    path = folder / STATE
    state = read_json_object(path, way_out=_DAMAGED)
    _check_seal(path, state)
    if state.get("format") not in (1, FORMAT):
        raise _foreign(path, state)
    for key in _COUNTS:
        if type(state.get(key)) is not int or state[key] < 0:  # a bool is an int, too
            raise _damaged(path, state, key, "a whole number from 0")
    for key in ("task", "files"):
        texts = state.get(key)
        if not isinstance(texts, dict) or not all(isinstance(v, str) for v in texts.values()):
            raise _damaged(path, state, key, "texts by name")
    named = step_of(folder)
    if named not in (None, state["step"]):
        raise InputError(
            f"{path}",
            got=f"step {state['step']}",
            wanted=f"step {named}, as the folder's name says",
            way_out="Give the folder its own name back, or point checkpoints/latest at another.",
        )
    return state


def is_foreign(folder: Path) -> bool:
    """Whether a checkpoint is whole, but of another version of longpretrain."""
    path = folder / STATE
    try:
        state = read_json_object(path)
        _check_seal(path, state)
    except InputError:
        return False
    return state.get("format") not in (1, FORMAT)


def _foreign(path: Path, state: Mapping[str, Any]) -> InputError:
    return InputError(
        f"{path}",
        got=f"format {state.get('format')}",
        wanted=f"format {FORMAT}",
        way_out="It was written by another version of longpretrain: use that one.",
    )


def _check_seal(path: Path, state: Mapping[str, Any]) -> None:
    if SEAL not in state and state.get("format") == 1:
        return
    seal = state.get(SEAL)
    if not isinstance(seal, str) or len(seal) != len(_OPEN_SEAL):
        raise _damaged(path, state, SEAL, "the hash of this file")
    before, _, after = path.read_bytes().rpartition(seal.encode("utf-8"))
    got = hashlib.sha256(before + _OPEN_SEAL.encode("ascii") + after).hexdigest()
    if got != seal:
        raise InputError(
            f"{path}",
            got=f"sha256 {got[:16]}",
            wanted=f"sha256 {seal[:16]}",
            way_out=_DAMAGED,
        )


def _damaged(path: Path, state: Mapping[str, Any], key: str, wanted: str) -> InputError:
    got = repr(state[key])[:80] if key in state else "nothing"
    return InputError(f"{path}, key {key}", got=got, wanted=wanted, way_out=_DAMAGED)


def verify_files(
    folder: Path, part: int = 0, parts: int = 1, *, largest: float = float("inf")
) -> None:
    """Compares the sha256 of every ``parts``-th file with state.json.

    Args:
        folder: the checkpoint.
        part: which of the parts is this caller's.
        parts: among how many callers the files are dealt out; each looks whether all are there.
        largest: files of more bytes are not read.

    Raises:
        InputError: a file is missing, truncated or altered; names it. Or weights or moments are not
            even listed, or there are some that are not.
    """
    files = read_state(folder)["files"]
    for kind in ("model", "optimizer"):
        if not any(name.startswith(kind) and name.endswith(".safetensors") for name in files):
            raise InputError(
                f"{folder / STATE}, key files",
                got=f"no {kind} file",
                wanted=f"the hash of {kind}*.safetensors",
                way_out=_DAMAGED,
            )
    for path in sorted(folder.glob("*.safetensors*")):
        if path.name not in files:  # it might be read instead of what the run wrote
            raise InputError(
                f"checkpoint file {path}",
                got="a file that the run did not write",
                wanted="those of state.json only",
                way_out="Move it elsewhere.",
            )
    for number, (name, wanted) in enumerate(sorted(files.items())):
        path = folder / name
        if not path.is_file():
            got = "no file"
        elif number % parts == part and path.stat().st_size <= largest:
            with told_as(path, path):
                got = sha256(path)
        else:
            continue
        if got != wanted:
            raise InputError(
                f"checkpoint file {path}",
                got=f"sha256 {got[:16]}" if got != "no file" else got,
                wanted=f"sha256 {wanted[:16]}",
                way_out="The file was altered: point checkpoints/latest at an older step folder.",
            )


def restore_moments(engine: ZeroEngine, folder: Path) -> None:
    """Sets both moments of every parameter from a checkpoint. All ranks must call it."""
    moments = _MomentFiles(folder)
    engine.set_moments(
        lambda name, key: moments.read(f"{name}.{key}"), read_state(folder)["updates_applied"]
    )


class _MomentFiles:
    """Reads moments by name, from one file or from shards with an index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = folder / "optimizer.safetensors.index.json"
        self._files: dict[str, str] = (
            json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
        )

    def read(self, name: str) -> torch.Tensor:
        path = self._folder / self._files.get(name, "optimizer.safetensors")
        try:
            with safe_open(path, framework="pt") as file:
                return torch.as_tensor(file.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path}",
                got=error,
                wanted=f"a tensor {name}",
                way_out="What trains has changed since: go on from its weights with another"
                f" run.dir and model.path={self._folder}.",
            ) from error


def versions() -> dict[str, str]:
    """Versions of the code and the packages that decide a run's numbers."""
    found = {name: importlib.metadata.version(name) for name in _VERSIONS}
    return {"longpretrain": longpretrain.__version__, **code_version(), **found}
