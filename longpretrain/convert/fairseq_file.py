"""fairseq's `.pt` files: read as data whatever they hold, written so that torch reads them back.

A pickle names the classes that it wants made. torch's ``weights_only`` makes those it is told of
and no others; we tell it of nothing but one class of our own, which holds what the file says and
does nothing. So reading needs neither fairseq nor omegaconf, and runs no code of the file's choice.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from torch import Tensor

from longpretrain.convert.shown import shown
from longpretrain.errors import InputError
from longpretrain.model.weights import only_globals

# Packages whose objects may stand in a checkpoint: options and meters of a training.
_PACKAGES = ("fairseq.", "omegaconf.")
# Others that come with them: option values, types named in omegaconf's metadata, numpy's numbers.
_NAMES = (
    "argparse.Namespace",
    "typing.Any", "typing.Dict", "typing.List", "typing.Optional", "typing.Tuple", "typing.Union",
    "_operator.getitem", "enum.Enum",
    "builtins.bool", "builtins.dict", "builtins.float", "builtins.int", "builtins.list",
    "builtins.object", "builtins.str", "builtins.tuple",
    "numpy.dtype", "numpy.ndarray", "numpy.float64", "numpy.float32", "numpy.int64",
    "numpy.core.multiarray.scalar", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct",
)  # fmt: skip
_MOST_NAMES = 200
_AGAIN = "Get the file again from where it came."
_WHOLE = "a whole fairseq checkpoint"


class Held:
    """Stands for any object of a file: keeps what the file made it of, and does nothing."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def __new__(cls, *args: Any) -> Held:
        """Takes any arguments; some pickles give theirs here and never call ``__init__``."""
        held = super().__new__(cls)
        held.args = args
        return held

    def __init__(self, *args: Any) -> None:
        """Nothing more to do."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __repr__(self) -> str:
        return "an object that does not read"


def _new_dict(*unused: Any) -> dict[Any, Any]:
    """Stands for collections.defaultdict, whose entries a pickle puts in one by one."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What of a fairseq checkpoint decides the model."""

    path: Path
    """The file."""
    tensors: Mapping[str, Tensor]
    """``model``, under the file's own names; mapped from the file where it can be.

    Plain, dense and on the CPU, of any dtype; two names may share their memory.
    """
    model_options: Mapping[str, Any]
    """``args``, or ``cfg.model``, as plain data; what could not be opened is ``Held``."""
    task_options: Mapping[str, Any]
    """``args``, or ``cfg.task``, as plain data."""


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint of fairseq 0.6 to today, zip or legacy form; nothing in it is run.

    Raises:
        InputError: no such file, a damaged one, no checkpoint, or one that wants an object made
            which has no place in a checkpoint; it is named.
    """
    if not path.is_file():
        _fail(path, "no such file", "a fairseq checkpoint", "Give the name of a model.pt.")
    loaded = _load(path)
    if not isinstance(loaded, dict):
        _fail(path, f"a {type(loaded).__name__}", "a fairseq checkpoint", _AGAIN)
    # An OrderedDict of a file may bring its own items() and get(): dict's are taken.
    loaded = dict(dict.items(loaded))
    model = loaded.get("model")
    if not isinstance(model, dict) or not model:
        held = sorted(shown(key, 40) for key in loaded if isinstance(key, str))
        got = f"no model in {', '.join(held[:6]) or 'an empty file'}"
        _fail(path, got, "model, and args or cfg", "Give a checkpoint that fairseq-train wrote.")
    tensors = {key: _plain_tensor(key, value) for key, value in dict.items(model)}
    odd = [key for key, tensor in tensors.items() if tensor is None]
    if odd:
        _fail(path, f"'{shown(odd[0])}' in model", "named, dense tensors and nothing else", _AGAIN)
    try:
        args, cfg = plain(loaded.get("args")), plain(loaded.get("cfg"))
    except RecursionError:
        _fail(path, "options that hold themselves", "args or cfg of fairseq-train", _AGAIN)
    if args is not None:  # as in fairseq, args go first
        options, task = args, args
    elif isinstance(cfg, dict):
        options, task = resolved(cfg.get("model"), cfg), resolved(cfg.get("task") or {}, cfg)
    else:
        options = task = None
    if not isinstance(options, dict) or not isinstance(task, dict):
        _fail(
            path, "neither args nor cfg.model", "the options of the training beside the tensors",
            "Give a checkpoint as fairseq-train wrote it: sizes and heads stand there.",
        )  # fmt: skip
    kept = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    return Checkpoint(path=path, tensors=kept, model_options=options, task_options=task)


def write_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], model: Mapping[str, Any], task: Mapping[str, Any]
) -> None:
    """Writes a checkpoint of plain data: stock fairseq reads it under torch's ``weights_only``.

    Args:
        path: the file, in a folder that ``fresh_folder`` makes whole.
        tensors: by the names of fairseq's model.
        model: ``cfg.model``.
        task: ``cfg.task``.
    """
    # The groups that fairseq looks into when it loads a model, trains on, or asks for a tokenizer.
    cfg = {"common": {"seed": 1}, "bpe": None, "tokenizer": None, "task": task, "model": model}
    history = {
        "criterion_name": "none: exported by longpretrain",
        "optimizer_name": "none: exported by longpretrain",
        "lr_scheduler_state": {"best": None},
        "num_updates": 0,
    }
    whole = {
        "args": None,
        "cfg": {name: dict(g) if isinstance(g, Mapping) else g for name, g in cfg.items()},
        "model": dict(tensors),
        "criterion": None,
        "optimizer_history": [history],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}, "val_loss": None},
        "last_optimizer_state": None,
    }
    torch.save(whole, path)


def plain(value: Any, done: dict[int, Any] | None = None) -> Any:
    """Options as plain data: omegaconf's containers and nodes, namespaces and enums opened.

    An object that does not open, such as a number of numpy's, stays ``Held``.

    Args:
        value: as loaded.
        done: what was opened already, by id: a file may name one list many times over.
    """
    done = {} if done is None else done
    if id(value) not in done:
        done[id(value)] = _opened(value, done)
    return done[id(value)]


def _opened(value: Any, done: dict[int, Any]) -> Any:
    if isinstance(value, Held):
        state = value.state
        if state is None:  # an enum member is made of its value
            return plain(value.args[0], done) if len(value.args) == 1 else value
        if not isinstance(state, dict):
            return value
        inside = next((key for key in ("_content", "_val") if key in state), None)
        return plain(state if inside is None else state[inside], done)
    if isinstance(value, dict):
        entries = dict.items(value)
        return {key: plain(entry, done) for key, entry in entries if isinstance(key, str)}
    if isinstance(value, list | tuple):
        return [plain(entry, done) for entry in value]
    return value


def resolved(options: Any, cfg: Mapping[str, Any]) -> Any:
    """Options in which a reference such as ``${task.tokens_per_sample}`` is what it points to."""
    if not isinstance(options, dict):
        return options

    def follow(value: Any, steps: int = 8) -> Any:
        match = re.fullmatch(r"\$\{([\w.]+)\}", value) if isinstance(value, str) else None
        if match is None or not steps:
            return value
        target: Any = cfg
        for part in match[1].split("."):
            target = target.get(part) if isinstance(target, dict) else None
        return follow(target, steps - 1)

    return {key: follow(value) for key, value in options.items()}


def _load(path: Path) -> Any:
    """The file's content; classes of the packages that we know become ``Held`` as they turn up."""
    stand_ins: list[Any] = [(Held, name) for name in _NAMES]
    stand_ins.append((_new_dict, "collections.defaultdict"))
    mapped = zipfile.is_zipfile(path)
    for _ in range(_MOST_NAMES):
        try:
            with only_globals(stand_ins):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            # torch's own text advises to let the file run code; only the name in it is of use.
            named = re.search(r"GLOBAL (.+?) (?:was not|whose module)", str(error))
            if named is None:
                _fail(path, "something that does not read as data", _WHOLE, _AGAIN)
            is_known = any(name == named[1] for _, name in stand_ins)
            if is_known or not named[1].startswith(_PACKAGES):
                _fail(
                    path, f"the object {shown(named[1])}", "tensors, and options of fairseq's",
                    "It was not made and nothing ran. Take the file from another source.",
                )  # fmt: skip
            stand_ins.append((Held, named[1]))
        except Exception as error:  # a damaged pickle may fail in any way
            first = shown(" ".join(str(error).split()).partition(". ")[0])
            size = f"{path.stat().st_size:,} bytes that do not read ({first})"
            _fail(path, size, _WHOLE, _AGAIN)
    _fail(path, f"more than {_MOST_NAMES} kinds of objects", _WHOLE, _AGAIN)


def _plain_tensor(key: object, value: object) -> Tensor | None:
    """A tensor without what a file may hang on it; None for what is no dense tensor with a name."""
    if not isinstance(key, str) or type(value) not in (Tensor, torch.nn.Parameter):
        return None
    tensor = Tensor.detach(cast(Tensor, value))  # a Parameter may bring its own detach()
    if tensor.is_quantized or tensor.is_nested or tensor.layout != torch.strided:
        return None
    # A view may repeat one number without end: it would fill the memory once it is written out.
    is_whole = tensor.device.type == "cpu" and tensor.nbytes <= tensor.untyped_storage().nbytes()
    return tensor if is_whole else None


def _fail(path: Path, got: object, wanted: object, way_out: str) -> NoReturn:
    raise InputError(str(path), got=got, wanted=wanted, way_out=way_out)
