"""Weights in files: safetensors, their shards, and `pytorch_model.bin` read without running it.

In memory names begin with ``longformer.`` for every model type; in a file with the type's name.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from longpretrain.errors import InputError
from longpretrain.files import read_json_object, save_tensors
from longpretrain.model.encoder import ModelConfig
from longpretrain.model.lm_head import LongformerForMaskedLM
from longpretrain.model.skeleton import without_values

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLED_NAME = "pytorch_model.bin"
PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"
SHARD_BYTES = 5_000_000_000

POSITIONS = "longformer.embeddings.position_embeddings.weight"
"""The position table, by its name in memory."""

_WORDS = "longformer.embeddings.word_embeddings.weight"
_TIED = {"lm_head.decoder.weight": _WORDS, "lm_head.decoder.bias": "lm_head.bias"}
_AGAIN = "Get the folder again, or save it again from its source."
log = logging.getLogger(__name__)


def stored_names(model: LongformerForMaskedLM | ModelConfig) -> dict[str, str]:
    """What is stored, tied twins left out: name in memory -> name in a file."""
    if isinstance(model, ModelConfig):
        model = _skeleton(model)
    prefix = f"{model.config.model_type}."
    return {
        name: name.replace("longformer.", prefix, 1) if name.startswith("longformer.") else name
        for name, _ in model.named_parameters()
    }


def copy_local_to_global(state: dict[str, Tensor]) -> None:
    """Makes the global projections those of the local attention, in place (paper, section 3.1).

    Args:
        state: tensors by their names in memory. Every ``*_global`` name gets a copy of its local
            twin; names that are not there are not made.
    """
    for name in state:
        if "_global." in name:
            state[name] = state[name.replace("_global.", ".")].clone()


def read_weights(folder: Path | str, config: ModelConfig) -> dict[str, Tensor]:
    """The parameters of a model folder, by their names in memory, in the dtype of the file.

    Complete and of the shapes that the configuration asks for; what is stored beyond that (a
    pooler, position ids) is left out, with a line in the log. Tensors may be mapped from the file.

    Raises:
        InputError: no weights, a damaged file, missing tensors, other shapes, or an untied decoder.
    """
    folder = Path(folder)
    found = {}
    for path, names in _weight_files(folder):
        tensors = _read_file(path)
        if names is not None and not names <= tensors.keys():
            _fail(path, f"no {_some(names - tensors.keys())}", "what the index lists", _AGAIN)
        found.update(tensors)
    found = _untied(folder, found)
    skeleton = _skeleton(config)
    shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters()}
    names_in_file = stored_names(skeleton)
    missing = [stored for stored in names_in_file.values() if stored not in found]
    if missing:
        wanted = f"the {len(shapes)} tensors of {config.model_type} with a masked-LM head"
        _fail(folder, f"no {_some(missing)}", wanted, "Is config.json this model's? " + _AGAIN)
    state = {name: found.pop(stored) for name, stored in names_in_file.items()}
    for name, tensor in state.items():
        if tuple(tensor.shape) != shapes[name]:
            got = f"{name} of shape {tuple(tensor.shape)}"
            _fail(folder, got, f"{shapes[name]} (config.json)", "Is config.json this model's?")
        if not tensor.is_floating_point():
            _fail(folder, f"{name} of {tensor.dtype}", "a floating-point type", _AGAIN)
    if found:
        log.info("%s: left out %s (no part of the masked-LM model)", folder, _some(found))
    return state


def write_weights(
    folder: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `model.safetensors`, or shards and an index; the same bytes for the same values.

    Args:
        folder: an existing folder; not atomic by itself (``fresh_folder`` makes it so).
        config: decides the names.
        state: tensors by their names in memory; tied twins and foreign names are left out.
        shard_bytes: largest size of one file, bytes.
    """
    names = stored_names(config)
    missing = [name for name in names if name not in state]
    assert not missing, f"the state lacks {_some(missing)}"
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, stored in sorted(names.items()):
        tensor = state[name].detach().cpu().contiguous()
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][stored] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_tensors(shards[0], folder / WEIGHTS_NAME)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_tensors(shard, folder / file_name)
        weight_map |= dict.fromkeys(shard, file_name)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


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


def _skeleton(config: ModelConfig) -> LongformerForMaskedLM:
    with without_values():
        return LongformerForMaskedLM(config)


def _weight_files(folder: Path) -> list[tuple[Path, set[str] | None]]:
    """The files that hold the weights, with the names that an index promises in each."""
    for single, index in ((WEIGHTS_NAME, INDEX_NAME), (PICKLED_NAME, PICKLED_INDEX_NAME)):
        if (folder / single).is_file():
            return [(folder / single, None)]
        if (folder / index).is_file():
            return _indexed(folder / index)
    _fail(
        folder, "no weights", f"{WEIGHTS_NAME}, {INDEX_NAME} or {PICKLED_NAME}",
        "Give a folder that save_pretrained or longpretrain wrote.",
    )  # fmt: skip


def _indexed(index: Path) -> list[tuple[Path, set[str] | None]]:
    weight_map = read_json_object(index, way_out=_AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        _fail(index, "none", "a weight_map of tensors and file names", _AGAIN)
    files: dict[str, set[str]] = {}
    for name, file_name in weight_map.items():
        files.setdefault(file_name, set()).add(name)
    for file_name in files:
        if Path(file_name).name != file_name or not (index.parent / file_name).is_file():
            _fail(index, f"no file {file_name} beside it", "every shard that it lists", _AGAIN)
    return [(index.parent / file_name, names) for file_name, names in sorted(files.items())]


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            size = f"{path.stat().st_size:,} bytes that do not read ({error})"
            _fail(path, size, "a whole safetensors file", _AGAIN)
    try:
        # weights_only never runs code of the file; mmap keeps a large file out of memory.
        mapped = zipfile.is_zipfile(path)
        with only_globals():
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        # torch's own text advises to let the file run code; only the name in it is of use.
        named = re.search(r"GLOBAL (\S+)", str(error))
        got = f"more than tensors ({named[1]})" if named else "something else than tensors"
        _fail(path, got, "tensors and nothing else", "Save it again as model.safetensors.")
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        size = f"{path.stat().st_size:,} bytes that do not read ({error})"
        _fail(path, size, "a whole file of torch.save", _AGAIN)
    # Of an OrderedDict, as it may bring its own items().
    tensors = dict(dict.items(loaded)) if isinstance(loaded, dict) else None
    if tensors is None or not all(isinstance(t, Tensor) for t in tensors.values()):
        _fail(path, type(loaded).__name__, "a dictionary of tensors", _AGAIN)
    return tensors


def _untied(folder: Path, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the tied twins, once they are found to be twins; a file may hold either of a pair."""
    prefix = next((n.partition(".")[0] for n in found if ".embeddings.word_" in n), "longformer")
    for twin, name in _TIED.items():
        first = name.replace("longformer.", f"{prefix}.", 1)
        if twin not in found:
            continue
        tensor = found.pop(twin)
        if not _are_twins(found.setdefault(first, tensor), tensor):
            _fail(folder, f"{twin} unlike {first}", "tied weights", "Untied decoders are not read.")
    return found


def _are_twins(one: Tensor, two: Tensor) -> bool:
    """Whether values are equal in the narrower of the two types; NaN equals NaN."""
    if one.shape != two.shape:
        return False
    narrow = min(one.dtype, two.dtype, key=lambda dtype: dtype.itemsize)
    one, two = one.to(narrow), two.to(narrow)
    return torch.equal(one, two) or torch.allclose(one, two, rtol=0, atol=0, equal_nan=True)


def _some(names: Mapping[str, object] | set[str] | list[str]) -> str:
    listed = sorted(names)
    more = f" and {len(listed) - 3} more" if len(listed) > 3 else ""
    return ", ".join(listed[:3]) + more


def _fail(where: Path, got: object, wanted: object, way_out: str) -> NoReturn:
    raise InputError(str(where), got=got, wanted=wanted, way_out=way_out)
