"""A vocabulary of one's own: byte-level BPE as RoBERTa's, or SentencePiece as XLM-R's."""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longpretrain.data.byte_bpe import byte_symbols, is_exact
from longpretrain.data.sentence_piece import SentencePieceTokenizer, train_model
from longpretrain.data.tokenizer import ByteLevelBPE, Tokenizer
from longpretrain.data.tokenizer_files import Roles
from longpretrain.errors import InputError
from longpretrain.files import fresh_folder, read_json_object, write_atomically
from longpretrain.prepare.sample import Sample, take_sample

Kind = Literal["bpe", "sentencepiece"]

RECORD = "tokenizer_training.json"
"""What a tokenizer was trained from, beside it."""

# What training holds in memory is several times this, of SentencePiece more than of BPE.
SAMPLE_MEGABYTES: dict[Kind, int] = {"bpe": 256, "sentencepiece": 64}
_MODEL_MAX_TOKENS = 4096  # what the files say until a model folder has its own

_FRONT = ("<s>", "<pad>", "</s>", "<unk>")
_MASK = "<mask>"
_ROLES = Roles(bos="<s>", eos="</s>", pad="<pad>", mask=_MASK, unk="<unk>")
_BPE_LEAST = len(_FRONT) + 256 + 1
_SENTENCE_PIECE_LEAST = len(_FRONT) + 1 + 1


@dataclass(frozen=True, kw_only=True)
class TrainedTokenizer:
    """A tokenizer's folder, and what it was trained from."""

    folder: Path
    vocab_size: int
    sample_documents: int
    sample_bytes: int


def train_tokenizer(
    documents: Iterable[str],
    kind: Kind,
    vocab_size: int,
    out: Path | str,
    *,
    sample_megabytes: int | None = None,
    seed: int = 1,
) -> TrainedTokenizer:
    """Trains a tokenizer with RoBERTa's special tokens and writes it as a folder.

    The same documents and settings give the same bytes, so that a second run leaves ``out`` as it
    is; it holds what ``load_tokenizer`` and transformers read, and a record of the training.

    Args:
        documents: texts; they are read once.
        kind: bpe, byte-level BPE (ids as RoBERTa's: special tokens, bytes, merges, <mask>); or
            sentencepiece, a unigram model (ids as XLM-R's).
        vocab_size: ids in all, special tokens included.
        out: the folder to make.
        sample_megabytes: at most so much text is trained on, drawn from all of it. None: what
            SAMPLE_MEGABYTES says.
        seed: of the sample.

    Raises:
        InputError: a vocabulary that the text is too small for, or that is itself too small; no
            text; an ``out`` that holds something else. Nothing is left behind.
    """
    out = Path(out)
    megabytes = SAMPLE_MEGABYTES[kind] if sample_megabytes is None else sample_megabytes
    least = _BPE_LEAST if kind == "bpe" else _SENTENCE_PIECE_LEAST
    for flag, got, smallest in (("vocab-size", vocab_size, least), ("sample", megabytes, 1)):
        if got < smallest:
            raise InputError(
                f"--{flag}", got=got, wanted=f"{smallest} or more", way_out="Ask for more."
            )
    wanted: dict[str, Any] = {
        "kind": kind, "vocab_size": vocab_size, "sample_megabytes": megabytes, "seed": seed,
    }  # fmt: skip
    before = _record_in(out, wanted)  # before hours of reading
    sample = take_sample(documents, megabytes << 20, seed)
    if not any(piece.strip() for piece in sample.pieces):
        raise InputError(
            "text to train on",
            got="none",
            wanted="documents with text",
            way_out="Check the inputs.",
        )
    wanted |= {"sample_sha256": sample.sha256, "library": _library(kind)}
    result = TrainedTokenizer(
        folder=out, vocab_size=vocab_size, sample_documents=sample.documents,
        sample_bytes=sample.bytes,
    )  # fmt: skip
    if before is not None:
        if before != wanted:
            raise _other_training(out)
        return result
    with fresh_folder(out, belongs=lambda _: False) as folder:
        train = _train_bpe if kind == "bpe" else _train_sentence_piece
        tokenizer = train(sample, vocab_size, folder, seed)
        assert tokenizer.vocab_size == vocab_size
        tokenizer.save(folder, _MODEL_MAX_TOKENS)
        write_atomically(folder / RECORD, json.dumps(wanted, indent=2) + "\n")
    return result


def _train_bpe(sample: Sample, vocab_size: int, _folder: Path, _seed: int) -> Tokenizer:
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, special_tokens=list(_FRONT), show_progress=False,
        initial_alphabet=list(byte_symbols()),
    )  # fmt: skip
    trained.train_from_iterator(sample.pieces, trainer)
    model = json.loads(trained.to_str())["model"]
    vocab, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    if len(vocab) < vocab_size - 1:
        raise _too_large(vocab_size, len(vocab) + 1)
    vocab[_MASK] = vocab_size - 1
    assert is_exact(vocab, merges), "each token has one merge, as training makes them"
    return ByteLevelBPE(vocab, merges, _ROLES, _ROLES.names)


def _train_sentence_piece(
    sample: Sample, vocab_size: int, folder: Path, seed: int
) -> SentencePieceTokenizer:
    # The model's own <unk>, <s> and </s> are left out of XLM-R's ids, which have four and <mask>.
    added = len(_FRONT) + 1 - 3
    try:
        proto = train_model(_sentences(sample), vocab_size - added, seed)
    except RuntimeError as error:
        raise _told(error, vocab_size, added) from error
    path = folder / "trained.model"
    path.write_bytes(proto)
    try:
        return SentencePieceTokenizer(path, "xlm-r")
    finally:
        path.unlink()


def _sentences(sample: Sample) -> Iterator[str]:
    """Lines: none is longer than a piece, and so none above the trainer's limit is dropped."""
    for piece in sample.pieces:
        yield from (line for line in piece.split("\n") if line.strip())


def _told(error: RuntimeError, vocab_size: int, added: int) -> InputError:
    """What SentencePiece says, in our form."""
    if found := re.search(r"size too high .* a value <= (\d+)", str(error)):
        return _too_large(vocab_size, int(found[1]) + added)
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return InputError(
            "--vocab-size", got=vocab_size,
            wanted=f"{int(found[1]) + added} or more, for the characters of this text",
            way_out="Ask for more.",
        )  # fmt: skip
    return InputError(
        "training of the SentencePiece model", got=f"its library's error: {error}",
        wanted="text that it can be trained on", way_out="Check the inputs and --vocab-size.",
    )  # fmt: skip


def _too_large(vocab_size: int, most: int) -> InputError:
    return InputError(
        "--vocab-size", got=vocab_size, wanted=f"at most {most}, all that this text gives",
        way_out="Ask for fewer, or train on more text.",
    )  # fmt: skip


def _record_in(out: Path, wanted: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a training with these settings that ``out`` holds; None: nothing is there."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / RECORD).is_file():
        raise InputError(
            f"out {out}", got="something that is no tokenizer of ours",
            wanted="a new or empty folder", way_out="Choose another --out.",
        )  # fmt: skip
    record = read_json_object(out / RECORD)
    if any(record.get(key) != value for key, value in wanted.items()):
        raise _other_training(out)
    return record


def _other_training(out: Path) -> InputError:
    return InputError(
        f"out {out}", got="a tokenizer of other inputs, settings or library",
        wanted="a new or empty folder",
        way_out="Choose another --out, or remove this folder first.",
    )  # fmt: skip


def _library(kind: Kind) -> str:
    name = "tokenizers" if kind == "bpe" else "sentencepiece"
    return f"{name} {importlib.metadata.version(name)}"
