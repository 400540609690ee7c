"""Models and tokenizers as transformers loads them: the only file that imports it (4.57 or 5)."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longpretrain.convert.shown import shown

# What its code raises where a folder is not as it likes it; none of it is ours to mend.
_FAILURES = (
    RuntimeError, AssertionError, ValueError, LookupError, TypeError, AttributeError, OSError,
    ImportError,
)  # fmt: skip
_SHOWN = 100


def why_no_transformers() -> str | None:
    """Why checks against transformers cannot run; None if they can."""
    if importlib.util.find_spec("transformers") is None:
        return "the package transformers is not installed"
    return None


def version() -> str:
    """Of transformers."""
    import transformers

    return str(transformers.__version__)


class TheirModel:
    """A model of transformers in fp32, in eval mode.

    Attributes:
        kind: the name of its class.
        problems: what it did not find, or found too much, in words.
    """

    def __init__(self, model: Any, problems: Sequence[str]) -> None:
        self._model = model.eval()
        self.kind = type(model).__name__
        self.problems = problems

    @property
    def ties(self) -> tuple[bool, bool]:
        """Whether the decoder's weight is the word embeddings, and its bias the head's."""
        output, words = self._model.get_output_embeddings(), self._model.get_input_embeddings()
        head = self._model.cls.predictions if hasattr(self._model, "cls") else self._model.lm_head
        return output.weight is words.weight, output.bias is head.bias

    def output(
        self, tokens_BN: Tensor, padding_BN: Tensor | None = None, *, global_first: bool = False
    ) -> Tensor | str:
        """Logits, or hidden states of a model without a head; or what it says where it fails."""
        mask_BN = torch.ones_like(tokens_BN) if padding_BN is None else (~padding_BN).long()
        inputs = {"attention_mask": mask_BN}
        if global_first:
            inputs["global_attention_mask"] = torch.zeros_like(tokens_BN)
            inputs["global_attention_mask"][:, 0] = 1
        try:
            with torch.no_grad(), _quiet():
                found = self._model(tokens_BN, **inputs)
        except _FAILURES as error:
            return _told(error)
        out: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
        return out


def load(folder: Path, *, masked_lm: bool, is_known: Callable[[str], bool]) -> TheirModel | str:
    """The model of a folder, or what transformers says where it fails.

    Args:
        folder: as transformers loads it.
        masked_lm: with its masked-LM head, or the encoder alone.
        is_known: of a tensor's name in the file, whether it may be left out or drawn anew.
    """
    import transformers

    auto = transformers.AutoModelForMaskedLM if masked_lm else transformers.AutoModel
    try:
        with _quiet():
            model, info = auto.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
            )
    except _FAILURES as error:
        return _told(error)
    problems = [
        f"{kind} {name}"
        for kind, found in info.items()
        for name in sorted(map(str, found))
        if not is_known(name)
    ]
    return TheirModel(model, problems)


def build(tree: Mapping[str, Any], tensors: Mapping[str, Tensor], *, masked_lm: bool) -> TheirModel:
    """A model of transformers out of memory.

    Args:
        tree: what `config.json` would hold.
        tensors: by their names in a file.
        masked_lm: with a masked-LM head, or the encoder alone.
    """
    import transformers

    auto = transformers.AutoModelForMaskedLM if masked_lm else transformers.AutoModel
    with _quiet():
        config = transformers.AutoConfig.for_model(**tree)
        model = auto.from_config(config)
        own = {name: tensor.float() for name, tensor in tensors.items()}
        found = model.load_state_dict(own, strict=False)
        model.tie_weights()
    return TheirModel(model, [f"unexpected_keys {name}" for name in found.unexpected_keys])


def load_tokenizer(folder: Path) -> TheirTokenizer | str:
    """The tokenizer of a folder, or what transformers says where it fails."""
    import transformers

    try:
        with _quiet():
            loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except _FAILURES as error:
        return _told(error)
    return TheirTokenizer(loaded)


class TheirTokenizer:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text, on request between those of beginning and end."""
        with _quiet():
            return [int(i) for i in self._tokenizer.encode(text, add_special_tokens=special)]

    @property
    def vocab(self) -> dict[str, int]:
        """Tokens and their ids."""
        return dict(self._tokenizer.get_vocab())

    def id_of(self, role: str) -> int | None:
        """Id of a special token: bos, eos, cls, sep, pad, mask or unk."""
        number = getattr(self._tokenizer, f"{role}_token_id", None)
        return None if number is None else int(number)


def _told(error: Exception) -> str:
    return f"transformers fails: {shown(' '.join(str(error).split()), _SHOWN)}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps transformers' progress bars and advice off the console."""
    theirs = logging.getLogger("transformers")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        theirs.setLevel(level)
