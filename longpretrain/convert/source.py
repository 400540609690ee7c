"""Where a model comes from: a model folder, a checkpoint or run of ours, or a fairseq `.pt`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from longpretrain.convert.fairseq_dictionary import DICTIONARY_NAME, read_dictionary
from longpretrain.convert.fairseq_file import read_checkpoint
from longpretrain.convert.fairseq_model import from_checkpoint
from longpretrain.convert.read import (
    has_tokenizer,
    hashes,
    model_folder,
    need_finite,
    nonfinite,
    run_state,
)
from longpretrain.convert.shown import shown
from longpretrain.data.tokenizer import Tokenizer, load_tokenizer
from longpretrain.errors import InputError
from longpretrain.files import sha256
from longpretrain.model import ModelConfig, config_json, copy_local_to_global, read_config
from longpretrain.model.listing import listed
from longpretrain.model.weight_files import PICKLED_NAME, WEIGHTS_NAME
from longpretrain.model.weights import StoredWeights, open_weights

# What a checkpoint holds beside its model.
_RUN_FILES = ("optimizer", "state.json")
_LONGEST_PATH = 400
# A folder with one of these is a model folder or a run, whatever else is in it.
_OURS = ("config.json", "checkpoints", "latest")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """How a source is read."""

    tokenizer: Path | None = None
    """A folder with the tokenizer to take instead of the source's own."""
    with_tokenizer: bool = True
    """Whether a tokenizer is looked for at all."""
    allow_nonfinite: bool = False
    """Whether weights may be NaN or infinite."""
    need_whole: bool = True
    """Whether a folder's tensors have to be complete, known and tied as soon as it is opened."""


class Source(ABC):
    """A model to convert or to export.

    Attributes:
        path: the folder, or the file.
        config: the model's sizes and arithmetic.
        state: what a checkpoint of ours says of its training; empty for anything else.
        notes: what was left out, in words.
        model_path: a folder that parts of the model come from, if it is not all in ``path``.
    """

    path: Path
    config: ModelConfig
    state: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    model_path: Path | None = None

    def __init__(self, how: Choices) -> None:
        self._given, self._how = how.tokenizer, how
        self._tokenizer: Tokenizer | None = None

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by their names in memory; the dictionary is the caller's to change, not
        the tensors, which may be mapped from a file.

        Raises:
            InputError: weights that are not finite, unless they are allowed: then a note says so.
        """
        tensors = self._stored_tensors()
        if not self._how.allow_nonfinite:
            need_finite(self.path, tensors)
        elif found := nonfinite(tensors):
            note = f"kept as they are: {listed(found)}"
            self.notes = (*(other for other in self.notes if other != note), note)
        return tensors

    @property
    def names(self) -> Collection[str]:
        """Of ``tensors``."""
        return self._stored_tensors().keys()

    @abstractmethod
    def _stored_tensors(self) -> dict[str, Tensor]:
        """The parameters as they are."""

    @property
    def has_own_globals(self) -> bool:
        """Whether its global projections, if any, are as good as the local ones: they learnt, which
        takes global tokens, or neither did.
        """
        moved_on = self.state.get("train_only", "all") == "all"
        return self.state.get("global_tokens") != "none" or not moved_on

    def weights(self) -> dict[str, Tensor]:
        """``tensors``, with the local projections for global ones that are not the model's own."""
        tensors = self.tensors()
        if not self.has_own_globals:
            copy_local_to_global(tensors)
        return tensors

    @abstractmethod
    def own_hashes(self) -> dict[str, str]:
        """sha256 of every file of the source that decides the model, by name."""

    @property
    @abstractmethod
    def has_own_tokenizer(self) -> bool:
        """Whether the source brings a tokenizer."""

    @abstractmethod
    def _own_tokenizer(self) -> Tokenizer:
        """The tokenizer that it brings."""

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is one: given, or the source's own, unless none is wanted."""
        return self._how.with_tokenizer and (self._given is not None or self.has_own_tokenizer)

    def hashes(self) -> dict[str, str]:
        """``own_hashes``, and the fingerprint of a tokenizer that was given."""
        if self._given is None:
            return self.own_hashes()
        return self.own_hashes() | {"--tokenizer": load_tokenizer(self._given).fingerprint}

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer: the one that was given, else the source's own.

        Raises:
            InputError: it has more ids than the model has word embeddings, or another padding.
        """
        if self._tokenizer is not None or not self.has_tokenizer:
            return self._tokenizer
        own = self._given is None
        tokenizer = self._own_tokenizer() if own else load_tokenizer(self._given)
        if tokenizer.vocab_size > self.config.vocab_size:
            raise InputError(
                f"tokenizer of {self.path}" if own else f"tokenizer {self._given}",
                got=f"{tokenizer.vocab_size} ids",
                wanted=f"at most {self.config.vocab_size}, the word embeddings of the model",
                way_out="Put the tokenizer's files there that the model was trained with.",
            )
        if tokenizer.pad_id != self.config.pad_id:
            raise InputError(
                f"tokenizer of {self.path}" if own else f"tokenizer {self._given}",
                got=f"id {tokenizer.pad_id} for padding",
                wanted=f"{self.config.pad_id}, pad_token_id of the model: positions depend on it",
                way_out="Give the tokenizer that the model was trained with, or set pad_token_id "
                "in config.json right.",
            )
        self._tokenizer = tokenizer
        return tokenizer

    def carry_tokenizer(self, target: Path, max_tokens: int) -> None:
        """Writes the tokenizer, if there is one, into a folder of a model of this length."""
        if tokenizer := self.tokenizer():
            tokenizer.save(target, max_tokens=max_tokens)


class FolderSource(Source):
    """A model folder, a checkpoint of ours, or a run's newest one; a checkpoint's files are whole.

    Raises:
        InputError: there is none, or files of a checkpoint are not as they were written.
    """

    def __init__(self, path: Path, how: Choices) -> None:
        super().__init__(how)
        self.path = model_folder(path)
        self.state = run_state(self.path)
        config = read_config(self.path)
        # Rows that a training went through count as learnt, all of them.
        self.config = dataclasses.replace(config, learnt_positions=0) if self.state else config
        if how.need_whole and (left_out := self._stored.left_out):
            kind = "masked-LM model" if config.has_lm_head else "model without a head"
            self.notes = (f"left out, no part of a {kind}: {listed(left_out, ', ')}",)

    @cached_property
    def _stored(self) -> StoredWeights:
        return open_weights(self.path, self.config)

    def _stored_tensors(self) -> dict[str, Tensor]:
        return dict(self._stored.tensors)

    def own_hashes(self) -> dict[str, str]:
        found = hashes(self.path)
        return {name: code for name, code in found.items() if not name.startswith(_RUN_FILES)}

    @property
    def has_own_tokenizer(self) -> bool:
        return has_tokenizer(self.path)

    def _own_tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path)


class FairseqSource(Source):
    """A checkpoint of fairseq's RoBERTa, with dict.txt beside it, or of our plugin.

    Of our plugin no dictionary is needed: its training had the tokenizer of the folder that it
    started from, else RoBERTa's.

    Raises:
        InputError: it does not read, is another model, or its tokenizer is missing or another's.
    """

    def __init__(self, path: Path, how: Choices) -> None:
        super().__init__(how)
        self.path = path
        model = from_checkpoint(read_checkpoint(path))
        self.config = dataclasses.replace(model.config, learnt_positions=0)  # as of a training
        self.state, self.notes, self._tensors = {}, model.notes, model.tensors
        if model.is_plugin:
            self.state = {"global_tokens": model.global_tokens, "train_only": model.train_only}
        self.model_path, self._is_plugin = model.model_path, model.is_plugin
        self._dictionary = path.parent / DICTIONARY_NAME
        if how.with_tokenizer and not model.is_plugin:
            self._need_tokenizer()
        if self.model_path is not None:
            own = self._given is None and self.has_tokenizer and self.has_own_tokenizer
            what = "sizes and tokenizer" if own else "sizes"
            folder = shown(self.model_path.absolute(), _LONGEST_PATH)
            self.notes = (f"{what} from model_path {folder}", *self.notes)

    def _stored_tensors(self) -> dict[str, Tensor]:
        return dict(self._tensors)

    def own_hashes(self) -> dict[str, str]:
        found = {self.path.name: sha256(self.path)}
        own = self._given is None and self.has_tokenizer and self.has_own_tokenizer
        if not self._is_plugin:
            return found | ({DICTIONARY_NAME: sha256(self._dictionary)} if own else {})
        if self.model_path is not None and own:
            found["tokenizer of model_path"] = load_tokenizer(self.model_path).fingerprint
        sizes = json.dumps(config_json(self.config), sort_keys=True)  # a folder's, maybe
        return found | {"config": hashlib.sha256(sizes.encode()).hexdigest()}

    @property
    def has_own_tokenizer(self) -> bool:
        if self._is_plugin:
            return self.model_path is None or has_tokenizer(self.model_path)
        return self._dictionary.is_file()

    def _own_tokenizer(self) -> Tokenizer:
        if self._is_plugin:
            return load_tokenizer(self.model_path)
        return read_dictionary(self._dictionary, rows=self.config.vocab_size)

    def _need_tokenizer(self) -> None:
        """A model without its tokenizer would be of no use, and with another's it would lie."""
        if not self.has_tokenizer:
            raise InputError(
                str(self.path), got=f"no {DICTIONARY_NAME} beside it",
                wanted="the dictionary that its ids come from",
                way_out=f"Put {DICTIONARY_NAME} there, or say --tokenizer DIR.",
            )  # fmt: skip
        tokenizer = self.tokenizer()
        if tokenizer is not None and tokenizer.vocab_size != self.config.vocab_size:
            raise InputError(
                f"tokenizer {self._given}", got=f"{tokenizer.vocab_size} ids",
                wanted=f"{self.config.vocab_size}, the word embeddings of {self.path}",
                way_out="Give the tokenizer that the model was trained with.",
            )  # fmt: skip
        if self._given is None or tokenizer is None or not self._dictionary.is_file():
            return
        try:
            theirs = read_dictionary(self._dictionary, rows=self.config.vocab_size)
        except InputError:  # of another kind: the reason to give a tokenizer
            return
        if theirs.fingerprint != tokenizer.fingerprint:
            raise InputError(
                f"tokenizer {self._given}", got="other ids than those of the dictionary",
                wanted=f"what {self._dictionary} says",
                way_out=f"Leave --tokenizer out, or move {DICTIONARY_NAME} away if it is not the"
                " model's.",
            )  # fmt: skip


def open_source(
    path: Path | str,
    *,
    tokenizer: Path | str | None = None,
    with_tokenizer: bool = True,
    allow_nonfinite: bool = False,
    need_whole: bool = True,
) -> Source:
    """The model that a path means: a file is fairseq's, a folder is Hugging Face's or a run.

    Args:
        path: a run, a checkpoint, a model folder, or a fairseq `.pt`.
        tokenizer: a folder with the tokenizer to take instead of the source's own.
        with_tokenizer: whether a tokenizer is looked for at all.
        allow_nonfinite: whether weights may be NaN or infinite.
        need_whole: whether a folder with tensors that are missing, foreign or untied is refused
            here; else ``tensors`` refuses it.

    Raises:
        InputError: see FolderSource and FairseqSource.
    """
    path, given = Path(path), None if tokenizer is None else Path(tokenizer)
    how = Choices(
        tokenizer=given, with_tokenizer=with_tokenizer, allow_nonfinite=allow_nonfinite,
        need_whole=need_whole,
    )  # fmt: skip
    if path.is_file() and (path.suffix == Path(WEIGHTS_NAME).suffix or path.name == PICKLED_NAME):
        raise InputError(
            str(path), got="a file of weights", wanted="its folder, which has config.json too",
            way_out=f"Give {path.parent}.",
        )  # fmt: skip
    if path.is_file():
        return FairseqSource(path, how)
    if not path.exists() and path.suffix == ".pt":
        raise InputError(
            str(path), got="no such file", wanted="a fairseq checkpoint",
            way_out=f"Give its name, such as DIR/model.pt{_beside(path.parent)}.",
        )  # fmt: skip
    if checkpoints := [] if any((path / name).exists() for name in _OURS) else _checkpoints(path):
        raise InputError(
            str(path), got=f"a folder with {_some(checkpoints)}",
            wanted="a model folder, a run, or one fairseq checkpoint by its name",
            way_out=f"Give {path / checkpoints[0]}.",
        )  # fmt: skip
    return FolderSource(path, how)


def _checkpoints(folder: Path) -> list[str]:
    """Names of the `.pt` files of a folder; none if there is no such folder."""
    names = sorted(path.name for path in folder.glob("*.pt") if path.is_file())
    return sorted(names, key=lambda name: name not in ("model.pt", "checkpoint_best.pt"))


def _beside(folder: Path) -> str:
    names = _checkpoints(folder)
    return f"; {folder} has {_some(names)}" if names else ""


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(shown, names[:3])) + more
