"""SentencePiece models (Kudo and Richardson 2018) through their own library, the only user of it.

Text is encoded in parts: the library takes sixteen times its room, and of two tokens that weigh the
same but for rounding it would choose by all that stands before. Where parts could change a token
otherwise, the text stays whole.

The ids are the library's own, with which such models were trained. transformers' port of it (the
tokenizers library) parts company over two rarities: U+0085, white space to it and an unknown
character here, and a combining mark after a character that the normaliser writes otherwise
(U+2465 U+0328), which it drops.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longpretrain.data import sentence_piece_files, tokenizer_files
from longpretrain.data.sentence_piece_layout import Layout, lay_out
from longpretrain.data.text_parts import cut_at
from longpretrain.data.tokenizer import Tokenizer, check_text
from longpretrain.errors import InputError

_TRAINING_THREADS = 16  # sums of scores depend on it: a fixed number, whatever the machine has
_LONGEST_SENTENCE = 1 << 16  # bytes; longer ones are dropped
_SPACE = "\u2581"  # what pieces have for a space
_BEFORE_WORDS, _AFTER_WORDS = re.compile("\u2581*[^\u2581]*"), re.compile("[^\u2581]*\u2581*")

# Of 2.7 million tokens of the speeches none differs from transformers' (scores of 64 bits, word by
# word) at 4,096 characters or at 256; 23 do in whole speeches, 4 at 64.
_PART_CHARS = 1 << 12
# Between letters or digits: there no normaliser makes one character of what is on both sides.
_AT_SPACE = re.compile(r"(?<=\w) (?=\w)")
_AT_SPACE_OR_LINE = re.compile(r"(?<=\w) (?=\w)|\n(?=\w)")


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model.

    Args:
        path: the .model file; what its folder's configs say of special tokens counts.
        layout: how ids follow from the pieces' places. None: as fits the model.

    Raises:
        InputError: the file holds no such model.
    """

    def __init__(self, path: Path, layout: Layout | None = None) -> None:
        self._proto = path.read_bytes()
        pieces = _load(self._proto, path)
        places = list(range(len(pieces)))
        self._names: list[str] = pieces.id_to_piece(places)
        questions = (pieces.is_control, pieces.is_unknown, pieces.is_unused)
        apart = [any(answers) for answers in zip(*(ask(places) for ask in questions), strict=True)]
        roles = tokenizer_files.known_roles(path.parent, self._names)
        self._laid_out = lay_out(self._names, apart, roles, layout)
        super().__init__(self._laid_out.ids, self._laid_out.roles, self._laid_out.special)
        self._id_of_piece = np.array(self._laid_out.id_of_piece, dtype=self.id_dtype)
        self._piece_of_id = np.zeros(self.vocab_size, dtype=np.int64)
        self._piece_of_id[self._id_of_piece] = places
        self._special_ids = sorted(self.special_ids)
        self._name_of_id = {number: name for name, number in self.vocab.items()}
        # A special token that the model finds in text (a "user-defined" mask) would be one there.
        found = {name for name, is_apart in zip(self._names, apart, strict=True) if not is_apart}
        hidden = found & self._laid_out.special
        if hidden:
            pieces = _load(sentence_piece_files.as_control(self._proto, hidden), path)
        self._pieces = pieces
        self._places_to_cut = _places_to_cut(self._pieces, self._names)

    @property
    def layout(self) -> Layout:
        """How ids follow from the pieces' places in the model."""
        return self._laid_out.layout

    @cached_property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"SentencePiece {self.layout} ".encode() + self._proto).hexdigest()

    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.unsignedinteger]]:
        for text in texts:
            check_text(text)
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> NDArray[Any]:
        ids = bytearray()  # grows in place
        for part in cut_at(text, self._places_to_cut, _PART_CHARS):
            ids += np.take(self._id_of_piece, self._pieces.encode_as_numpy(part)).tobytes()
        return np.frombuffer(ids, dtype=self.id_dtype)

    def decode(self, ids: Iterable[int]) -> str:
        ids_N = np.fromiter(ids, dtype=np.int64)
        text = ""
        special_M = np.flatnonzero(np.isin(ids_N, self._special_ids))
        for run_N in np.split(ids_N, np.union1d(special_M, special_M + 1)):
            if len(run_N) == 0:
                continue
            if run_N[0] in self.special_ids:
                text += self._name_of_id[int(run_N[0])]
                continue
            places = self._piece_of_id[run_N].tolist()
            # The library takes the first space away, as at the start of a text.
            inside = text not in ("", self.roles.bos)
            space = " " if inside and self._names[places[0]].startswith(_SPACE) else ""
            text += space + self._pieces.decode(places)
        return text

    def save(self, folder: Path, max_tokens: int) -> None:
        """See the base class. Files: the model, the config, and a tokenizer.json if need be."""
        one = self._pieces.normalize("a")
        if one not in ("a", _SPACE + "a"):
            raise InputError(
                "tokenizer",
                got=f"a SentencePiece model that writes 'a' as {one!r}",
                wanted="a space before words or none, as in transformers",
                way_out="Take another model.",
            )
        scores = self._pieces.get_score(list(range(len(self._names))))
        sentence_piece_files.write(
            folder, self._proto, self._laid_out, scores, max_tokens=max_tokens,
            adds_space=one != "a",
            removes_spaces=self._pieces.normalize("a  b") == self._pieces.normalize("a b"),
        )  # fmt: skip


def find(source: Path) -> tuple[Path, Layout | None] | None:
    """The model that a file or a folder means, and its layout if that is told.

    A tokenizer.json and vocab.json with merges.txt come first: they are what transformers takes.

    Raises:
        InputError: a file of another kind, or several models in one folder.
    """
    if source.is_file():
        if source.suffix in (".json", ".txt"):
            raise InputError(
                f"tokenizer {source}", got=f"a {source.suffix} file",
                wanted="a folder, or a SentencePiece .model file",
                way_out="Name the folder that it is in.",
            )  # fmt: skip
        return source, None
    if not source.is_dir():
        return None
    marked = sentence_piece_files.marked(source)
    if marked or tokenizer_files.has_files(source):
        return marked
    return sentence_piece_files.find(source)


def train_model(sentences: Iterator[str], pieces: int, seed: int) -> bytes:
    """A unigram model as XLM-R's, with <unk>, <s> and </s> among its pieces; the same every time.

    Sentences above 64 KiB are left out.

    Raises:
        RuntimeError: what the library says against it.
    """
    import sentencepiece

    sentencepiece.set_random_generator_seed(seed)
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=sentences, model_writer=written, vocab_size=pieces, model_type="unigram",
        num_threads=_TRAINING_THREADS, max_sentence_length=_LONGEST_SENTENCE, minloglevel=2,
        train_extremely_large_corpus=False,
    )  # fmt: skip
    return written.getvalue()


def _load(proto: bytes, path: Path) -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise InputError(
            f"tokenizer {path}",
            got=f"a SentencePiece model, but no sentencepiece library ({error})",
            wanted="the Python package sentencepiece",
            way_out="Install it: pip install sentencepiece.",
        ) from error
    try:
        pieces = sentencepiece.SentencePieceProcessor()
        pieces.load_from_serialized_proto(proto)
        return pieces
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"tokenizer {path}",
            got=f"{len(proto)} bytes that are no model ({error})",
            wanted="a SentencePiece model",
            way_out="The file is damaged or of another kind: get it again from where it came.",
        ) from error


def _places_to_cut(pieces: Any, names: Sequence[str]) -> re.Pattern[str] | None:
    """Where a text may be cut, the space being dropped, with the same tokens; None: nowhere.

    A model puts a space before every text, so that a part reads as it would after the one it lost;
    and no piece goes on beyond a space.
    """
    if pieces.normalize("a b") != pieces.normalize("a") + pieces.normalize("b"):
        return None
    if pieces.is_unknown(pieces.piece_to_id(_SPACE)) or not any(
        all(shape.fullmatch(name) for name in names) for shape in (_BEFORE_WORDS, _AFTER_WORDS)
    ):
        return None
    if pieces.normalize(" a \n b\n\n") == pieces.normalize("a b"):
        return _AT_SPACE_OR_LINE
    return _AT_SPACE
