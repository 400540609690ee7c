"""Hugging Face tokenizer files: read as plain data, written so that transformers agrees on ids."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longpretrain.data import word_piece
from longpretrain.errors import InputError
from longpretrain.files import read_json_object, write_atomically

# Every file that a Hugging Face tokenizer may keep beside its config.
DERIVED = (
    "tokenizer.json", "vocab.json", "merges.txt", "vocab.txt", "special_tokens_map.json",
    "added_tokens.json",
)  # fmt: skip
_MODELS = ("sentencepiece.bpe.model", "spiece.model", "tokenizer.model")
ALL = (*DERIVED, *_MODELS)
"""Whatever may stand beside tokenizer_config.json."""
# The same vocabulary in its family's own format: other tools look for it.
_VOCABULARIES = ("vocab.json", "merges.txt", "vocab.txt", *_MODELS)
CONFIG = "tokenizer_config.json"
_MAX_IDS = 1 << 31  # ids are int32
# transformers' classes that take tokenizer.json as it is, by their old and their new name.
_AS_IT_IS = ("PreTrainedTokenizerFast", "TokenizersBackend")

# Role: keys of tokenizer_config.json that name it, then the usual names.
_ROLES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "bos": (("bos_token", "cls_token"), ("<s>", "[CLS]", "<|endoftext|>")),
    "eos": (("eos_token", "sep_token"), ("</s>", "[SEP]", "<|endoftext|>")),
    "pad": (("pad_token",), ("<pad>", "[PAD]")),
    "mask": (("mask_token",), ("<mask>", "[MASK]")),
    "unk": (("unk_token",), ("<unk>", "[UNK]")),
}


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The names of the special tokens; masked-LM pretraining needs all of them."""

    bos: str
    eos: str
    pad: str | None = None
    mask: str | None = None
    unk: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Those that there are."""
        every = (self.bos, self.eos, self.pad, self.mask, self.unk)
        return tuple(name for name in every if name is not None)

    @property
    def is_complete(self) -> bool:
        """There is one for each role."""
        return None not in (self.pad, self.mask, self.unk)

    @property
    def config(self) -> dict[str, str]:
        """The keys of tokenizer_config.json."""
        every = {
            "bos_token": self.bos,
            "eos_token": self.eos,
            "sep_token": self.eos,
            "cls_token": self.bos,
            "unk_token": self.unk,
            "pad_token": self.pad,
            "mask_token": self.mask,
        }
        return {key: name for key, name in every.items() if name is not None}


@dataclass(frozen=True, kw_only=True)
class TokenizerFiles:
    """What a folder says about its tokenizer."""

    vocab: dict[str, int]
    """Token -> id, added tokens included."""
    merges: list[tuple[str, str]] | None
    """Merges of a plain byte-level BPE; None for any other tokenizer."""
    special: tuple[str, ...]
    """Added tokens marked special."""
    tree: dict[str, Any] | None
    """The tokenizer.json that the library can load, as transformers takes it; None: there is
    none."""
    add_prefix_space: bool = False
    """transformers puts a space before a text that has none (byte-level BPE only)."""


def has_files(folder: Path) -> bool:
    """Whether there is what transformers takes before a SentencePiece model."""
    names = {name for name in DERIVED if (folder / name).is_file()}
    return "tokenizer.json" in names or names >= {"vocab.json", "merges.txt"}


def read(folder: Path) -> TokenizerFiles:
    """Reads tokenizer.json, else vocab.json and merges.txt, else BERT's vocab.txt.

    Raises:
        InputError: there are none, or they do not parse.
    """
    try:
        found = _read(folder)
        if found is not None:
            _need_ids(folder, found.vocab)
            return found
    except InputError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise InputError(
            f"tokenizer {folder}",
            got=f"{type(error).__name__} {error}",
            wanted="tokenizer files in Hugging Face's format",
            way_out="Save the tokenizer again with transformers' save_pretrained().",
        ) from error
    nothing = "neither tokenizer.json nor vocab.json with merges.txt nor vocab.txt nor a"
    raise InputError(
        f"tokenizer {folder}",
        got=f"{nothing} SentencePiece .model" if folder.is_dir() else "no such folder",
        wanted="a folder with a Hugging Face tokenizer",
        way_out="Write one with transformers' save_pretrained(), or take RoBERTa's by naming none.",
    )


def _read(folder: Path) -> TokenizerFiles | None:
    if (folder / "tokenizer.json").is_file():
        return _read_tokenizer_json(folder)
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        return _read_vocab_and_merges(folder)
    return _read_tokenizer_json(folder) if (folder / word_piece.VOCAB).is_file() else None


def _need_ids(folder: Path, vocab: Mapping[str, int]) -> None:
    odd = [f"{name!r}: {number}" for name, number in vocab.items() if not 0 <= number < _MAX_IDS]
    if odd:
        raise InputError(
            f"tokenizer {folder}",
            got=f"the id of {', '.join(odd[:5])}",
            wanted=f"ids from 0 to {_MAX_IDS - 1}",
            way_out="The file is damaged: get it again from where it came.",
        )


def find_roles(folder: Path, files: TokenizerFiles) -> Roles:
    """The special tokens, as the configs name them, else by their usual names.

    Raises:
        InputError: the vocabulary has none to begin or to end a document with.
    """
    found = known_roles(folder, files.vocab)
    for role in ("bos", "eos"):
        if role not in found:
            keys, usual = _ROLES[role]
            raise InputError(
                f"tokenizer {folder}",
                got=f"no {role} token in its vocabulary of {len(files.vocab)}",
                wanted=f"{' or '.join(usual)}, or what tokenizer_config.json names as {keys[0]}",
                way_out="Documents begin and end with one: add it, or name it there.",
            )
    return Roles(**found)


def known_roles(folder: Path, vocab: Container[str]) -> dict[str, str]:
    """Role -> special token, of those that the vocabulary has."""
    config = {
        key: value.get("content") if isinstance(value, dict) else value
        for name in ("special_tokens_map.json", CONFIG)
        for key, value in _read_optional(folder / name).items()
    }
    found = {}
    for role, (keys, usual) in _ROLES.items():
        names = [*(config.get(key) for key in keys), *usual]
        known = [name for name in names if isinstance(name, str) and name in vocab]
        if known:
            found[role] = known[0]
    return found


def write_byte_bpe(
    folder: Path,
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    roles: Roles,
    *,
    special: Sequence[str],
    max_tokens: int,
    add_prefix_space: bool,
) -> None:
    """Writes a byte-level BPE as RoBERTa's tokenizer: transformers has it for Longformer too.

    One without RoBERTa's special tokens (GPT-2's) is written as no model's: RoBERTa's class would
    add them to the vocabulary.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors

    plain = {"single_word": False, "rstrip": False, "normalized": False, "special": True}
    added: dict[str, dict[str, Any]] = {
        # The mask takes the space before it, as in RoBERTa: "a <mask>" is two tokens.
        name: {"content": name, "lstrip": name == roles.mask, **plain}
        for name in sorted(special, key=lambda name: vocab[name])
    }
    whole = tokenizers.Tokenizer(models.BPE(vocab=dict(vocab), merges=list(merges)))
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    whole.decoder = decoders.ByteLevel()
    if roles.is_complete:
        whole.post_processor = processors.RobertaProcessing(
            (roles.eos, vocab[roles.eos]), (roles.bos, vocab[roles.bos]), True, add_prefix_space
        )
    whole.add_special_tokens([tokenizers.AddedToken(**entry) for entry in added.values()])
    mask = {} if roles.mask is None else {"mask_token": added[roles.mask]}
    typed = {key: {"__type": "AddedToken", **entry} for key, entry in mask.items()}
    extra = [name for name in added if name not in roles.names]
    config = {
        "tokenizer_class": "RobertaTokenizer" if roles.is_complete else _AS_IT_IS[0],
        "model_max_length": max_tokens,
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "errors": "replace",
        **roles.config,
        **typed,
        **({"additional_special_tokens": extra} if extra else {}),
    }
    write_atomically(folder / "vocab.json", json.dumps(vocab, ensure_ascii=False))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges), ""]
    write_atomically(folder / "merges.txt", "\n".join(lines))
    write_atomically(folder / "tokenizer.json", whole.to_str())
    write_json(folder / "special_tokens_map.json", {**roles.config, **mask})
    write_json(folder / CONFIG, config)


def copy(source: Path, folder: Path, roles: Roles, max_tokens: int) -> None:
    """Writes a folder's tokenizer.json, as transformers took it there, and its vocabulary's files.

    It is no model's tokenizer: any transformers takes it as it is. The class of the family would
    build its own in transformers 5, and is not the Longformer's.
    """
    tree = read_tree(source)
    assert tree is not None, "what the library has loaded"
    # Not the source's: a tool that loads the bare file would go on to cut texts there.
    tree |= {"truncation": None, "padding": None}
    write_atomically(folder / "tokenizer.json", json.dumps(tree, ensure_ascii=False))
    for name in _VOCABULARIES:
        if (source / name).is_file():
            write_atomically(folder / name, (source / name).read_bytes())
    settings = _read_optional(source / CONFIG)
    kept = ("clean_up_tokenization_spaces", "padding_side", "truncation_side", "model_input_names")
    special = [entry["content"] for entry in tree.get("added_tokens") or [] if entry["special"]]
    extra = [name for name in special if name not in roles.names]
    space = (tree.get("pre_tokenizer") or {}).get("add_prefix_space")
    has_types = tree["model"].get("type") == "WordPiece"  # as only BERT gives a pair of texts
    config = {
        "tokenizer_class": _AS_IT_IS[0],
        "model_max_length": max_tokens,
        "clean_up_tokenization_spaces": False,
        "model_input_names": [
            "input_ids", *(["token_type_ids"] if has_types else []), "attention_mask"
        ],
        **{key: settings[key] for key in kept if settings.get(key) is not None},
        **roles.config,
        **({} if space is None else {"add_prefix_space": space}),
        **({"additional_special_tokens": extra} if extra else {}),
    }  # fmt: skip
    write_json(folder / CONFIG, config)


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def read_tree(folder: Path) -> dict[str, Any] | None:
    """A folder's tokenizer.json, its own or made from vocab.txt, as transformers takes it."""
    settings, config = (_read_optional(folder / name) for name in (CONFIG, "config.json"))
    if (folder / "tokenizer.json").is_file():
        return word_piece.as_set(read_json_object(folder / "tokenizer.json"), settings, config)
    if not (folder / word_piece.VOCAB).is_file():
        return None
    word_piece.need_berts(folder, settings, config)
    vocab = word_piece.read_vocab(folder / word_piece.VOCAB)
    added = _added_tokens(folder)
    beyond = {number: entry for number, entry in added.items() if entry["content"] not in vocab}
    return word_piece.tree_of(folder, vocab, beyond, known_roles(folder, vocab), settings)


def _added_tokens(folder: Path) -> dict[int, dict[str, Any]]:
    """Id -> entry of the tokens that were added to a vocabulary, as the configs tell."""
    plain = {
        int(number): {"content": name}
        for name, number in _read_optional(folder / "added_tokens.json").items()
    }
    decoder = _read_optional(folder / CONFIG).get("added_tokens_decoder") or {}
    return plain | {int(number): dict(entry) for number, entry in decoder.items()}


def _read_tokenizer_json(folder: Path) -> TokenizerFiles:
    tree = read_tree(folder)
    assert tree is not None, "the caller has seen its file"
    model, added = tree["model"], tree.get("added_tokens") or []
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: pieces with scores, in id order
        vocab = {piece: number for number, (piece, _) in enumerate(vocab)}
    vocab = dict(vocab) | {entry["content"]: entry["id"] for entry in added}
    ordinary = [entry for entry in added if not entry["special"]]
    merges = None
    if _is_byte_level_bpe(tree) and not ordinary:
        merges = [_pair(merge) for merge in model["merges"]]
    special = tuple(entry["content"] for entry in added if entry["special"])
    return TokenizerFiles(
        vocab=vocab, merges=merges, special=special, tree=tree,
        add_prefix_space=_adds_prefix_space(folder, tree),
    )  # fmt: skip


def _adds_prefix_space(folder: Path, tree: Mapping[str, Any]) -> bool:
    """Whether transformers would: its own classes ask the config, the plain one tokenizer.json (in
    transformers 4 the config as well: what we write says the same in both).
    """
    config = _read_optional(folder / CONFIG)
    named = config.get("tokenizer_class")
    if tree and (named in _AS_IT_IS or not (named or (folder / "config.json").is_file())):
        return bool((tree.get("pre_tokenizer") or {}).get("add_prefix_space"))
    return bool(config.get("add_prefix_space"))


def _is_byte_level_bpe(tree: Mapping[str, Any]) -> bool:
    model, split = tree["model"], tree.get("pre_tokenizer") or {}
    odd = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    return (
        model.get("type") == "BPE"
        and not any(model.get(key) for key in odd)
        and tree.get("normalizer") is None
        and split.get("type") == "ByteLevel"
        and split.get("use_regex", True)
    )


def _read_vocab_and_merges(folder: Path) -> TokenizerFiles:
    vocab = {
        token: int(number) for token, number in read_json_object(folder / "vocab.json").items()
    }
    added = _added_tokens(folder)
    vocab |= {entry["content"]: number for number, entry in added.items()}
    special = tuple(entry["content"] for entry in added.values() if entry.get("special"))
    # Split at line feeds only: a merge may hold other characters that Python takes for line ends.
    lines = (folder / "merges.txt").read_bytes().decode("utf-8").replace("\r\n", "\n").split("\n")
    merges = [_pair(line) for line in lines if line and not line.startswith("#version")]
    return TokenizerFiles(
        vocab=vocab, merges=merges, special=special, tree=None,
        add_prefix_space=_adds_prefix_space(folder, {}),
    )  # fmt: skip


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def write_json(path: Path, tree: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
