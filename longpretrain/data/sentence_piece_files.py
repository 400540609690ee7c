"""SentencePiece models as files: what transformers needs beside one, and a few fields of it.

A model is a protobuf message (sentencepiece_model.proto). Three fields matter here, and its wire
format is simple enough to find them: a key (field number * 8 + kind) and a value, over and over.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longpretrain.data.sentence_piece_layout import Layout, Vocabulary
from longpretrain.data.tokenizer_files import CONFIG, DERIVED, write_json
from longpretrain.errors import InputError
from longpretrain.files import read_json_object, write_atomically

_SPACE = "\u2581"  # what pieces have for a space

MARK = "longpretrain_sentencepiece"
"""Key of tokenizer_config.json: the model beside a tokenizer.json that was made from it."""

_USUAL_NAME = "sentencepiece.bpe.model"  # where transformers looks for XLM-R's and CamemBERT's
_OTHER_NAME = "spiece.model"
_CLASSES = {"xlm-r": "XLMRobertaTokenizer", "camembert": "CamembertTokenizer"}
NAMES = (_USUAL_NAME, _OTHER_NAME, "tokenizer.model", "spm.model")

_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3  # fields of the model
_PIECE_TEXT, _PIECE_KIND, _CONTROL = 1, 3, 3
_MODEL_TYPE, _UNIGRAM = 3, 1
_BYTE_FALLBACK = 35
_CHARSMAP = 2
_VARINT, _EIGHT_BYTES, _SIZED, _FOUR_BYTES = 0, 1, 2, 5


def find(folder: Path) -> tuple[Path, Layout | None] | None:
    """The SentencePiece model of a folder and its layout, if the folder says; None: it has none.

    Raises:
        InputError: there are several, none under a usual name.
    """
    for name in NAMES:
        if (folder / name).is_file():
            return folder / name, _layout(folder, name)
    found = sorted(folder.glob("*.model"))
    if len(found) > 1:
        raise InputError(
            f"tokenizer {folder}",
            got=" and ".join(path.name for path in found),
            wanted="one SentencePiece model",
            way_out="Name the file instead of the folder.",
        )
    return (found[0], None) if found else None


def marked(folder: Path) -> tuple[Path, Layout] | None:
    """The model that a tokenizer.json of ours was made from."""
    mark = _read_config(folder).get(MARK)
    if not isinstance(mark, dict) or mark.get("layout") not in ("own", *_CLASSES):
        return None
    path = folder / Path(str(mark.get("file"))).name
    return (path, mark["layout"]) if path.is_file() else None


def as_control(proto: bytes, names: Collection[str]) -> bytes:
    """The model with these pieces as control tokens, which are never found in text."""
    wanted = {name.encode() for name in names}
    out = bytearray()
    for number, key_start, start, end in _fields(proto):
        piece = proto[start:end]
        text = _values(piece, _PIECE_TEXT) if number == _PIECE else []
        if text and text[0] in wanted:
            # Of a field that is there twice the last one counts.
            piece += bytes([_PIECE_KIND << 3 | _VARINT, _CONTROL])
            out += bytes([_PIECE << 3 | _SIZED]) + _as_varint(len(piece)) + piece
        else:
            out += proto[key_start:end]
    return bytes(out)


def write(
    folder: Path,
    proto: bytes,
    vocabulary: Vocabulary,
    scores: Sequence[float],
    *,
    max_tokens: int,
    adds_space: bool,
    removes_spaces: bool,
) -> None:
    """Writes a model so that transformers gives its pieces the ids of the vocabulary.

    Its classes for XLM-R and CamemBERT do so from the model itself; for all else there is a
    tokenizer.json, and a mark by which we find the model beside it.
    """
    for name in (*DERIVED, *NAMES):
        (folder / name).unlink(missing_ok=True)
    mask = vocabulary.roles.mask
    config: dict[str, Any] = {
        "model_max_length": max_tokens,
        **vocabulary.roles.config,
        "mask_token": {
            "__type": "AddedToken", "content": mask, "lstrip": True, "rstrip": False,
            "normalized": False, "single_word": False, "special": True,
        },
    }  # fmt: skip
    trainer = _values(proto, _TRAINER)[0]
    is_unigram = _values(trainer, _MODEL_TYPE) in ([], [_UNIGRAM])
    has_bytes = _values(trainer, _BYTE_FALLBACK) == [1]
    if (
        vocabulary.in_transformers
        and is_unigram
        and not has_bytes
        and adds_space
        and removes_spaces
    ):
        _write_bytes(folder / _USUAL_NAME, proto)
        config["tokenizer_class"] = _CLASSES[vocabulary.layout]
    else:
        _write_bytes(folder / _OTHER_NAME, proto)
        tree = _whole(
            proto, vocabulary, scores, is_unigram=is_unigram, has_bytes=has_bytes,
            adds_space=adds_space, removes_spaces=removes_spaces,
        )  # fmt: skip
        write_atomically(folder / "tokenizer.json", tree)
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config[MARK] = {"file": _OTHER_NAME, "layout": vocabulary.layout}
    write_json(folder / CONFIG, config)


def _whole(
    proto: bytes,
    vocabulary: Vocabulary,
    scores: Sequence[float],
    *,
    is_unigram: bool,
    has_bytes: bool,
    adds_space: bool,
    removes_spaces: bool,
) -> str:
    """A tokenizer.json that does what the model does."""
    import tokenizers
    from tokenizers import Regex, decoders, models, normalizers, processors

    ids, roles = vocabulary.ids, vocabulary.roles
    assert roles.unk is not None, "every layout has one"
    score_of = dict.fromkeys(ids.values(), 0.0)
    score_of |= dict(zip(vocabulary.id_of_piece, scores, strict=True))
    names = sorted(ids, key=lambda name: ids[name])
    model = (
        models.Unigram([(n, score_of[ids[n]]) for n in names], ids[roles.unk], has_bytes)
        if is_unigram
        else models.BPE(
            vocab=ids, merges=_merges(names, ids), unk_token=roles.unk, fuse_unk=True,
            byte_fallback=has_bytes,
        )
    )  # fmt: skip
    charsmap = _values(_values(proto, _NORMALIZER)[0], _CHARSMAP)
    steps: list[Any] = [normalizers.Precompiled(value) for value in charsmap if value]
    if removes_spaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " ")]
        steps += [normalizers.Replace(Regex(end), "") for end in (r"\A ", r" \z")]
    steps += [normalizers.Prepend(_SPACE)] if adds_space else []
    whole = tokenizers.Tokenizer(model)
    whole.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    whole.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if adds_space else [])
    )
    bos, eos = roles.bos, roles.eos
    whole.post_processor = processors.TemplateProcessing(
        single=[bos, "$A", eos], pair=[bos, "$A", eos, eos, "$B", eos],
        special_tokens=[(bos, ids[bos]), (eos, ids[eos])],
    )  # fmt: skip
    whole.add_special_tokens(
        [
            tokenizers.AddedToken(name, lstrip=name == roles.mask, normalized=False, special=True)
            for name in names
            if name in vocabulary.special
        ]
    )
    return str(whole.to_str())


def _merges(names: Sequence[str], ids: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two; the pieces are in the order in which they were made."""
    return [
        (name[:cut], name[cut:])
        for name in names
        for cut in range(1, len(name))
        if name[:cut] in ids and name[cut:] in ids
    ]


def _layout(folder: Path, name: str) -> Layout | None:
    """What the configs tell of a model under a usual name."""
    if name != _USUAL_NAME:
        return None
    said = str(_read_config(folder).get("tokenizer_class"))
    config = read_json_object(folder / "config.json") if (folder / "config.json").exists() else {}
    is_camembert = said.startswith("Camembert") or (
        said == "None" and config.get("model_type") == "camembert"
    )
    return "camembert" if is_camembert else "xlm-r"


def _read_config(folder: Path) -> dict[str, Any]:
    return read_json_object(folder / CONFIG) if (folder / CONFIG).is_file() else {}


def _write_bytes(path: Path, data: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    part.replace(path)


def _fields(message: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Of each field: its number, where its key begins, where its value begins and ends."""
    end = 0
    while end < len(message):
        key_start = end
        key, start = _varint(message, key_start)
        kind = key & 7
        if kind == _VARINT:
            _, end = _varint(message, start)
        elif kind == _SIZED:
            size, start = _varint(message, start)
            end = start + size
        else:
            assert kind in (_FOUR_BYTES, _EIGHT_BYTES), "the library has read this message"
            end = start + (4 if kind == _FOUR_BYTES else 8)
        yield key >> 3, key_start, start, end


def _values(message: bytes, wanted: int) -> list[Any]:
    """The values of a field: bytes, or a number."""
    found: list[Any] = []
    for number, key_start, start, end in _fields(message):
        if number == wanted:
            is_number = message[key_start:start][0] & 7 == _VARINT
            found.append(_varint(message, start)[0] if is_number else message[start:end])
    return found


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number in groups of seven bits, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _as_varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
