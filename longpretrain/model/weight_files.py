"""Tensors out of the files of a folder: safetensors, their shards, and pickles that never run.

Names are the files' own. Tensors are mapped from the file where its form allows it, so that opening
a large model takes neither time nor memory.
"""

from __future__ import annotations

import contextlib
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longpretrain.errors import InputError
from longpretrain.files import read_json_object
from longpretrain.model.listing import listed, printable

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLED_NAME = "pytorch_model.bin"
PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"

_AGAIN = "Get the folder again, or save it again from its source."


def read_files(folder: Path) -> dict[str, Tensor]:
    """All tensors of a model folder.

    Raises:
        InputError: no weights, a damaged file, or one that holds something else.
    """
    files = _weight_files(folder)
    if files is None:
        _fail(
            folder, "no weights", f"{WEIGHTS_NAME}, {INDEX_NAME} or {PICKLED_NAME}",
            "Give a folder that save_pretrained or longpretrain wrote.",
        )  # fmt: skip
    found = {}
    promised = set().union(*(names or () for _, names in files))
    for path, names in files:
        tensors = _read_file(path)
        if names is not None and not names <= tensors.keys():
            lacking = listed([f"no {name}" for name in sorted(names - tensors.keys())], ", ")
            _fail(path, lacking, "what the index lists", _AGAIN)
        # A shard may hold, from an earlier save, what the index says is in another one.
        own = tensors.keys() - (promised - names if names is not None else set())
        found.update({name: tensors[name] for name in tensors if name in own})
    return found


def names_in_files(folder: Path) -> set[str] | None:
    """The names of all tensors of a model folder; None where it has no weights.

    Raises:
        InputError: as ``read_files``.
    """
    files = _weight_files(folder)
    if files is None:
        return None
    names: set[str] = set()
    for path, promised in files:
        names |= promised if promised is not None else set(_names(path))
    return names


@contextlib.contextmanager
def only_globals(allowed: Sequence[tuple[Callable[..., Any], str]] = ()) -> Iterator[None]:
    """Beside tensors, ``weights_only`` makes these and nothing else, whatever a caller allowed.

    torch keeps one list for the whole process, so that a name in a file could otherwise mean what
    another library put there. The list is as before afterwards.

    Args:
        allowed: (what is called, the name in the file that it stands for).
    """
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.serialization.add_safe_globals(list(allowed))
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _weight_files(folder: Path) -> list[tuple[Path, set[str] | None]] | None:
    """The files that hold the weights, with the names that an index promises in each."""
    for single, index in ((WEIGHTS_NAME, INDEX_NAME), (PICKLED_NAME, PICKLED_INDEX_NAME)):
        if (folder / single).is_file():
            return [(folder / single, None)]
        if (folder / index).is_file():
            return _indexed(folder / index)
    return None


def _indexed(index: Path) -> list[tuple[Path, set[str] | None]]:
    weight_map = read_json_object(index, way_out=_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        _fail(index, "none", "a weight_map of tensors and file names", _AGAIN)
    files: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        files.setdefault(file_name, set()).add(name)
    absent = [
        file_name
        for file_name in sorted(files)
        if Path(file_name).name != file_name or not (index.parent / file_name).is_file()
    ]
    if absent:
        got = listed([f"no file {file_name}" for file_name in absent], ", ") + " beside it"
        _fail(index, got, "every shard that it lists", _AGAIN)
    return [(index.parent / file_name, names) for file_name, names in sorted(files.items())]


def _names(path: Path) -> Iterable[str]:
    if path.suffix != ".safetensors":
        return _read_file(path)
    with _open_safetensors(path) as file:
        return list(file.keys())


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        with _open_safetensors(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    loaded = _unpickled(path)
    # Of an OrderedDict, as it may bring its own items().
    tensors = dict(dict.items(loaded)) if isinstance(loaded, dict) else None
    if tensors is None or not all(isinstance(t, Tensor) for t in tensors.values()):
        _fail(path, type(loaded).__name__, "a dictionary of tensors", _AGAIN)
    if not all(isinstance(name, str) for name in tensors):
        _fail(path, "tensors without names", "a dictionary of tensors", _AGAIN)
    empty = [name for name, tensor in tensors.items() if not _has_plain_numbers(tensor)]
    if empty:
        got = f"no plain numbers (sparse, nested or on no device) in {listed(empty, ', ')}"
        _fail(path, got, "the numbers of every tensor, one after another", _AGAIN)
    return tensors


def _has_plain_numbers(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_nested


@contextlib.contextmanager
def _open_safetensors(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError, ValueError) as error:
        size = f"{path.stat().st_size:,} bytes that do not read ({error})"
        _fail(path, size, "a whole safetensors file", _AGAIN)


def _unpickled(path: Path) -> Any:
    try:
        # weights_only never runs code of the file; mmap keeps a large file out of memory.
        mapped = zipfile.is_zipfile(path)
        with only_globals():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # torch's own text advises to let the file run code; only the name in it is of use.
        named = re.search(r"GLOBAL (\S+)", str(error))
        found = f"more than tensors ({printable(named[1])})" if named else None
        got = found or "something else than tensors"
        way_out = "It was not made and nothing ran. Save it again as model.safetensors."
        _fail(path, got, "tensors and nothing else", way_out)
    except Exception as error:  # a damaged pickle may fail in any way
        first = printable(" ".join(str(error).split()).partition(". ")[0])
        size = f"{path.stat().st_size:,} bytes that do not read ({first})"
        _fail(path, size, "a whole file of torch.save", _AGAIN)


def _fail(where: Path, got: object, wanted: object, way_out: str) -> NoReturn:
    raise InputError(str(where), got=got, wanted=wanted, way_out=way_out)
