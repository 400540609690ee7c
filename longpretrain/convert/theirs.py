"""Models and tokenizers as transformers loads them: the only file that imports it (4.57 or 5)."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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
        problems: what it did not find, or found too much, in words; empty: nothing.
    """

    def __init__(self, model: Any, problems: Mapping[str, list[str]]) -> None:
        self._model = model.eval()
        self.kind = type(model).__name__
        self.problems = {kind: names for kind, names in problems.items() if names}

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
        except (RuntimeError, AssertionError, IndexError) as error:
            return f"transformers fails: {' '.join(str(error).split())[:60]}"
        out: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
        return out


def load(folder: Path, *, masked_lm: bool, is_known: Callable[[str], bool]) -> TheirModel:
    """The model of a folder.

    Args:
        folder: as transformers loads it.
        masked_lm: with its masked-LM head, or the encoder alone.
        is_known: of a tensor's name in the file, whether it may be left out or drawn anew.
    """
    import transformers

    auto = transformers.AutoModelForMaskedLM if masked_lm else transformers.AutoModel
    with _quiet():
        model, info = auto.from_pretrained(
            folder, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    problems = {
        kind: sorted(str(name) for name in found if not is_known(str(name)))
        for kind, found in info.items()
    }
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
    return TheirModel(model, {"unexpected_keys": sorted(found.unexpected_keys)})


class TheirTokenizer:
    """The tokenizer that transformers makes of a folder."""

    def __init__(self, folder: Path) -> None:
        import transformers

        with _quiet():
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True
            )

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
