"""Text <-> token ids: byte-level BPE through tiktoken, SentencePiece, the rest through tokenizers.

``load_tokenizer()`` is RoBERTa's BPE, shipped with the package; ``load_tokenizer(folder)`` reads a
Hugging Face folder or a SentencePiece model. The ids are those that transformers gives for the same
folder, with three differences on purpose: no special tokens are added, special tokens written out
in a text are text, and no space is put before the first word. Where a byte-level BPE asks
transformers for that space (``add_prefix_space``), ``encode`` still goes without it, and ``save``
passes the wish on; a SentencePiece model puts it itself (and reads two rarities otherwise than
transformers, which its module names).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longpretrain.data import byte_bpe, text_parts, tokenizer_files
from longpretrain.data.manifest import dtype_for
from longpretrain.errors import InputError

ROBERTA_BPE = Path(__file__).parent / "roberta_bpe"

# Rows that a vocabulary keeps for nothing: fairseq pads its dictionary, BERT reserves room.
_UNUSED = re.compile(r"madeupword\d{4,}|\[unused\d+\]")

_CHECKED_CHARS = 1 << 20


class Tokenizer(ABC):
    """A vocabulary with its special tokens, and the way between text and ids.

    Attributes:
        vocab_size: number of ids, the largest one plus 1.
        bos_id, eos_id: ids of ``<s> </s>``, or of what else stands around a document.
        id_dtype: what ``encode_batch`` gives and shards hold: uint16 if all ids fit, else uint32.
        special_ids: those, ``<pad> <mask> <unk>``, and any other special token.
        real_ids: int32, ascending: ids of real tokens, which masking may draw; neither special
            tokens nor madeupword ones (RoBERTa: 50,257).
        fingerprint: sha256 hex of vocabulary and merges, the same for every file form of one BPE.
    """

    def __init__(
        self, vocab: Mapping[str, int], roles: tokenizer_files.Roles, special: Iterable[str]
    ) -> None:
        self.vocab = dict(vocab)
        self.roles = roles
        self.vocab_size = max(self.vocab.values()) + 1
        self.id_dtype = dtype_for(self.vocab_size)
        self.bos_id = self.vocab[roles.bos]
        self.eos_id = self.vocab[roles.eos]
        self.special_ids = frozenset(
            self.vocab[name] for name in {*roles.names, *special} if name in self.vocab
        )
        self.real_ids = np.array(
            sorted(
                number
                for name, number in self.vocab.items()
                if number not in self.special_ids and not _UNUSED.fullmatch(name)
            ),
            dtype=np.int32,
        )

    @property
    def pad_id(self) -> int:
        """Id of the padding token. Raises InputError if there is none."""
        return self._need("pad", self.roles.pad)

    @property
    def mask_id(self) -> int:
        """Id of the mask token. Raises InputError if there is none."""
        return self._need("mask", self.roles.mask)

    @property
    def unk_id(self) -> int:
        """Id of the token for what has none. Raises InputError if there is none."""
        return self._need("unk", self.roles.unk)

    def need_masking(self, what: str) -> None:
        """Checks that there are the tokens that masked-LM training and evaluation need.

        Args:
            what: the tokenizer, as the user knows it.

        Raises:
            InputError: there is no mask token, or none for padding.
        """
        for role, name in (("mask", self.roles.mask), ("pad", self.roles.pad)):
            self._need(role, name, what)

    def _need(self, role: str, name: str | None, what: str = "tokenizer") -> int:
        if name is not None:
            return self.vocab[name]
        raise InputError(
            what,
            got=f"no {role} token in its vocabulary of {len(self.vocab)}",
            wanted="a tokenizer for masked-LM training, with tokens to mask and to pad with",
            way_out="Take another one, such as RoBERTa's, or add the token to it and the model.",
        )

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """See the class."""

    def encode(self, text: str) -> NDArray[np.int32]:
        """Ids of a text, no special tokens added; ``<s>`` written out in it is text.

        Raises:
            InputError: the text holds a lone surrogate, which is no character.
        """
        return self.encode_batch([text])[0].astype(np.int32)

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        """Ids of each text as ``encode`` has them, in ``id_dtype``; runs on one core.

        Raises:
            InputError: a text holds a lone surrogate.
        """

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, special tokens written out; bytes that are not UTF-8 become U+FFFD."""

    @abstractmethod
    def save(self, folder: Path, max_tokens: int) -> None:
        """Writes the files that transformers loads, with ``model_max_length = max_tokens``.

        Args:
            folder: an existing folder; tokenizer files in it are replaced.
            max_tokens: longest sequence of the model, special tokens included.
        """


class ByteLevelBPE(Tokenizer):
    """GPT-2's scheme (Radford et al. 2019, section 2.2): bytes, merged by rank inside words.

    Attributes:
        add_prefix_space: what ``save`` writes under this name; ``encode`` puts no space there.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        roles: tokenizer_files.Roles,
        special: Iterable[str],
        *,
        add_prefix_space: bool = False,
    ) -> None:
        super().__init__(vocab, roles, special)
        self.merges = list(merges)
        self.add_prefix_space = add_prefix_space
        self._codec = byte_bpe.ByteBPE(self.vocab, self.merges, self.id_dtype)

    @cached_property
    def fingerprint(self) -> str:
        by_id = sorted(self.vocab.items(), key=lambda item: (item[1], item[0]))
        return _sha256(["byte-level BPE", by_id, self.merges])

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        for text in texts:
            check_text(text)
        return [self._codec.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return self._codec.decode(ids)

    def save(self, folder: Path, max_tokens: int) -> None:
        """See the base class. Files: vocab.json, merges.txt, tokenizer.json and the two configs."""
        special = sorted(name for name, number in self.vocab.items() if number in self.special_ids)
        tokenizer_files.write_byte_bpe(
            folder, self.vocab, self.merges, self.roles, special=special, max_tokens=max_tokens,
            add_prefix_space=self.add_prefix_space,
        )  # fmt: skip


class LibraryTokenizer(Tokenizer):
    """Any tokenizer.json, through the tokenizers library (WordPiece, Unigram, ...)."""

    def __init__(
        self,
        folder: Path,
        tree: Mapping[str, Any],
        roles: tokenizer_files.Roles,
        special: Iterable[str],
    ) -> None:
        self._folder = folder
        self._tokenizer = _library_tokenizer(folder, tree)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._places_to_cut = text_parts.places_to_cut(tree)
        super().__init__(self._tokenizer.get_vocab(with_added_tokens=True), roles, special)

    @cached_property
    def fingerprint(self) -> str:
        tree = tokenizer_files.read_tree(self._folder)
        assert tree is not None, "it was read from there"
        keys = ("model", "normalizer", "pre_tokenizer", "added_tokens")
        return _sha256([tree.get(key) for key in keys])

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        for text in texts:
            check_text(text)
        with _one_core():
            return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> NDArray[Any]:
        ids = bytearray()  # grows in place
        for part in text_parts.cut_at(text, self._places_to_cut, text_parts.PART_CHARS):
            # In a batch, though of one: alone, a text is given offsets as well, which take longer.
            (found,) = self._tokenizer.encode_batch_fast([part], add_special_tokens=False)
            ids += np.array(found.ids, dtype=self.id_dtype).tobytes()
        return np.frombuffer(ids, dtype=self.id_dtype)

    def decode(self, ids: Iterable[int]) -> str:
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False))

    def save(self, folder: Path, max_tokens: int) -> None:
        """See the base class. Files: tokenizer.json, the config, the source's vocabulary files."""
        tokenizer_files.copy(self._folder, folder, self.roles, max_tokens)


def load_tokenizer(source: Path | str | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder or a SentencePiece model, or RoBERTa's BPE as shipped.

    Args:
        source: a folder with tokenizer.json, vocab.json with merges.txt, a SentencePiece model or
            BERT's vocab.txt; or such a .model file. None: RoBERTa's BPE.

    Raises:
        InputError: no such files, files that do not parse, or a special token that is missing.
    """
    return _roberta() if source is None else _load(Path(source))


@cache
def _roberta() -> Tokenizer:
    return _load(ROBERTA_BPE)


def _load(source: Path) -> Tokenizer:
    from longpretrain.data import sentence_piece  # it builds on this module

    found = sentence_piece.find(source)
    if found:
        return sentence_piece.SentencePieceTokenizer(*found)
    files = tokenizer_files.read(source)
    roles = tokenizer_files.find_roles(source, files)
    if files.merges is None or not byte_bpe.is_exact(files.vocab, files.merges):
        if files.tree is None:
            raise InputError(
                f"tokenizer {source}",
                got="vocab.json and merges.txt of a BPE without all 256 bytes or with odd merges",
                wanted="a byte-level BPE, or a tokenizer.json",
                way_out="Load it in transformers and save_pretrained() it: that writes one.",
            )
        return LibraryTokenizer(source, files.tree, roles, files.special)
    return ByteLevelBPE(
        files.vocab, files.merges, roles, files.special, add_prefix_space=files.add_prefix_space
    )


def _library_tokenizer(folder: Path, tree: Mapping[str, Any]) -> Any:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps(tree))
    except BaseException as error:  # the library's are of no class of its own, or of Rust
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(
            f"tokenizer {folder}",
            got=f"a tokenizer.json that the tokenizers library refuses ({error})",
            wanted=f"one that tokenizers {tokenizers.__version__} reads",
            way_out="Load it in the transformers that wrote it, and save it anew.",
        ) from error


def check_text(text: str) -> None:
    """Checks that a text can be written as UTF-8.

    Raises:
        InputError: it holds a lone surrogate.
    """
    if text.isascii():  # which Python knows of a text without looking
        return
    for start in range(0, len(text), _CHECKED_CHARS):  # in parts: each is copied to be checked
        try:
            text[start : start + _CHECKED_CHARS].encode("utf-8")
        except UnicodeEncodeError as error:
            place = start + error.start
            raise InputError(
                "text",
                got=f"lone surrogate U+{ord(text[place]):04X} at character {place}",
                wanted="Unicode characters",
                way_out="Take it out of the text, or replace it by U+FFFD.",
            ) from error


@contextlib.contextmanager
def _one_core() -> Iterator[None]:
    """The tokenizers library in one thread, as long as this lasts: each worker has one core."""
    name = "TOKENIZERS_PARALLELISM"  # read by the library at every call
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _sha256(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
