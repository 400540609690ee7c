"""What a path means (a run, a checkpoint or a model folder), and whether its files are whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from longpretrain.data import sentence_piece_files
from longpretrain.errors import InputError
from longpretrain.files import read_json_object, sha256
from longpretrain.mapped import all_finite
from longpretrain.model import ModelConfig
from longpretrain.model.listing import listed

RECORD_NAME = "conversion.json"
STATE_NAME = "state.json"
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", *sentence_piece_files.NAMES)


def model_folder(source: Path | str) -> Path:
    """The model folder that a path means: itself, or the newest checkpoint of a run.

    Raises:
        InputError: there is no such folder, or the run has no checkpoint yet.
    """
    source = Path(source)
    if not source.is_dir():
        got = "a file" if source.is_file() else "no such folder"
        raise InputError(
            str(source), got=got, wanted="a run, a checkpoint or a model folder",
            way_out="Give the folder's name, such as runs/demo.",
        )  # fmt: skip
    if (source / "config.json").is_file():
        return source
    for checkpoints in (source / "checkpoints", source):
        pointer = checkpoints / "latest"
        if pointer.is_file():
            folder = checkpoints / pointer.read_text(encoding="utf-8", errors="replace").strip()
        elif pointer.is_symlink() or pointer.is_dir():
            folder = pointer.resolve()
        else:
            continue
        if folder.parent.resolve() == checkpoints.resolve() and (folder / "config.json").is_file():
            return folder
        raise InputError(
            str(pointer), got=folder, wanted="a checkpoint beside it",
            way_out="Write the name of a whole checkpoint folder into it.",
        )  # fmt: skip
    raise InputError(
        str(source), got="neither config.json nor checkpoints/latest",
        wanted="a run with a checkpoint, or a model folder",
        way_out="A run writes its first checkpoint after checkpoint.every_steps updates.",
    )  # fmt: skip


def run_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint, once the files that make the model have the hashes it names.

    Returns:
        The state, or an empty dictionary for a folder that is no checkpoint.

    Raises:
        InputError: a file is missing or was altered.
    """
    path = folder / STATE_NAME
    if not path.is_file():
        return {}
    way_out = "The checkpoint is damaged: take an older one."
    state = read_json_object(path, way_out=way_out)
    files = state.get("files", {})
    if not isinstance(files, dict) or not all(isinstance(wanted, str) for wanted in files.values()):
        raise InputError(str(path), got=f"files {files}", wanted="hashes by name", way_out=way_out)
    for name, wanted in files.items():
        if name.startswith("optimizer"):
            continue
        got = sha256(folder / name) if (folder / name).is_file() else "no file"
        if got != wanted:
            raise InputError(
                str(folder / name), got=f"sha256 {got[:16]}", wanted=f"sha256 {wanted[:16]}",
                way_out="The file was altered or cut: take an older checkpoint.",
            )  # fmt: skip
    return state


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Which tensors hold NaN or infinity, and how many, in words."""
    found = []
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            count = tensor.numel() - int(tensor.isfinite().sum())
            found.append(f"NaN or infinity in {name} ({count:,} of {tensor.numel():,})")
    return found


def need_finite(where: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuses weights that are not all numbers.

    Raises:
        InputError: names every tensor with NaN or infinity, and how many it has.
    """
    if found := nonfinite(tensors):
        raise InputError(
            str(where), got=listed(found), wanted="finite weights",
            way_out="Its training diverged, or the file is damaged: take an older one. "
            "longpretrain convert --allow-nonfinite takes them as they are.",
        )  # fmt: skip


def need_expressible(folder: Path, config: ModelConfig) -> None:
    """Refuses a model that transformers' code for its format would compute otherwise.

    Raises:
        InputError: names all that is beyond it.
    """
    if config.beyond_hugging_face:
        raise InputError(
            f"model {folder}", got=" and ".join(config.beyond_hugging_face),
            wanted="a model that Hugging Face's Longformer computes alike",
            way_out="Its code cannot run this; use the folder with longpretrain.",
        )  # fmt: skip


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder holds a tokenizer's files."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file of a folder but the record of its conversion, by name."""
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name != RECORD_NAME]
    return {path.name: sha256(path) for path in files}
