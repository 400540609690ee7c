"""Tokenizer folders: those without RoBERTa's special tokens, and those that do not load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from family_models import write_tokenizer

from longpretrain.data import Blocks, Corpus, byte_bpe, load_tokenizer, tokenizer_files
from longpretrain.data.tokenizer import ROBERTA_BPE, ByteLevelBPE, Tokenizer
from longpretrain.errors import InputError
from longpretrain.evaluate.held_out import HeldOut
from longpretrain.prepare import prepare
from longpretrain.prepare.train_tokenizer import train_tokenizer
from longpretrain.recipe import load_recipe
from longpretrain.tasks.masked_lm import MaskedLMTask

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
END = "<|endoftext|>"
TEXT = "Hello world, it's  1776.\n\n Naïve 👍 <|endoftext|> <s>"


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """GPT-2's vocab.json and merges.txt: RoBERTa has its merges, in another order of ids."""
    merges = tokenizer_files.read(ROBERTA_BPE).merges
    assert merges
    tokens = [*byte_bpe.byte_symbols(), *(left + right for left, right in merges), END]
    folder = tmp_path / "gpt2"
    folder.mkdir()
    shutil.copy(ROBERTA_BPE / "merges.txt", folder)
    vocab = {token: number for number, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    return folder


class TestGpt2:
    def test_published_ids(self, gpt2):
        tokenizer = load_tokenizer(gpt2)
        assert isinstance(tokenizer, ByteLevelBPE)
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (50_257,) + (
            50_256,
        ) * 2
        assert tokenizer.encode("Hello world").tolist() == [15496, 995]
        assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
        assert tokenizer.special_ids == {50_256}
        assert len(tokenizer.real_ids) == 50_256
        assert 50_256 not in tokenizer.encode(END)

    def test_there_is_nothing_to_mask_or_pad_with(self, gpt2):
        tokenizer = load_tokenizer(gpt2)
        for role in ("mask", "pad", "unk"):
            with pytest.raises(InputError, match=f"tokenizer: got no {role} token in its vocab"):
                getattr(tokenizer, f"{role}_id")
        with pytest.raises(InputError, match=r"^mine: got no mask token .* of 50257; wanted a tok"):
            tokenizer.need_masking("mine")
        load_tokenizer().need_masking("RoBERTa's")

    def test_a_corpus_can_be_prepared_but_not_masked(self, gpt2, tmp_path):
        (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
        prepare([tmp_path / "a.txt"], tmp_path / "out", tokenizer_folder=gpt2)
        tokenizer, corpus = load_tokenizer(gpt2), Corpus.open(tmp_path / "out")
        blocks = Blocks(
            corpus, policy="document", max_tokens=64,
            bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
        )  # fmt: skip
        assert blocks[0].tolist() == [50_256, *tokenizer.encode(TEXT).tolist(), 50_256]
        with pytest.raises(InputError, match="the model's tokenizer: got no mask token"):
            HeldOut(corpus, tokenizer, max_tokens=64)

    @pytest.mark.parametrize("model_type", ["gpt2", "longformer", None])
    def test_transformers_gives_the_same_ids_as_saved(self, gpt2, tmp_path, model_type):
        from transformers import AutoTokenizer

        tokenizer, saved = load_tokenizer(gpt2), tmp_path / "saved"
        saved.mkdir()
        tokenizer.save(saved, max_tokens=1024)
        if model_type:
            (saved / "config.json").write_text(json.dumps({"model_type": model_type}))
        theirs = AutoTokenizer.from_pretrained(saved)
        assert (len(theirs), theirs.model_max_length) == (50_257, 1024)
        assert (theirs.bos_token_id, theirs.eos_token_id) == (50_256, 50_256)
        assert theirs.mask_token is None
        text = TEXT.replace(END, "").replace("<s>", "s")
        assert theirs(text).input_ids == tokenizer.encode(text).tolist()
        again = load_tokenizer(saved)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.roles == tokenizer.roles

    def test_what_transformers_saves_is_the_same_tokenizer(self, gpt2, tmp_path):
        from transformers import GPT2Tokenizer

        GPT2Tokenizer.from_pretrained(gpt2).save_pretrained(tmp_path / "theirs")
        again = load_tokenizer(tmp_path / "theirs")
        assert isinstance(again, ByteLevelBPE)
        assert again.fingerprint == load_tokenizer(gpt2).fingerprint
        assert again.unk_id == again.bos_id == 50_256  # as its config says
        assert np.array_equal(again.encode(TEXT), load_tokenizer(gpt2).encode(TEXT))


def task_with(tokenizer: Tokenizer, small_run: Path, folder: Path) -> MaskedLMTask:
    """The small run, its model and its text, with another tokenizer."""
    model = folder / "model"
    shutil.copytree(small_run / "models" / "long", model)
    for name in tokenizer_files.ALL:
        (model / name).unlink(missing_ok=True)
    tokenizer.save(model, max_tokens=128)
    prepare([small_run / "text" / "train"], folder / "corpus", tokenizer_folder=model)
    changes = [f"model.path={model}", f"data.train={folder / 'corpus'}"]
    return MaskedLMTask(load_recipe(str(small_run / "recipe.yaml"), changes), model)


class TestTraining:
    def test_without_a_mask_token_it_is_refused_at_the_start(self, gpt2, small_run, tmp_path):
        with pytest.raises(InputError, match=r"tokenizer of .*model: got no mask token"):
            task_with(load_tokenizer(gpt2), small_run, tmp_path)

    @pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
    def test_with_a_tokenizer_of_ones_own(self, small_run, tmp_path, kind):
        texts = [p.read_text() for p in sorted((small_run / "text" / "train").glob("*.txt"))]
        size = 300 if kind == "bpe" else 60
        trained = train_tokenizer(texts, kind, size, tmp_path / "trained")
        tokenizer = load_tokenizer(trained.folder)
        task = task_with(tokenizer, small_run, tmp_path)
        assert task.tokenizer.fingerprint == tokenizer.fingerprint
        sample = task.sample(3)
        whole = sample.tokens_N.copy()
        assert (whole[sample.positions_M] == tokenizer.mask_id).sum() > 5
        whole[sample.positions_M] = sample.targets_M
        text = tokenizer.decode(whole).removeprefix("<s>").split("</s>")[0].strip()
        assert len(text) > 100
        assert any(text in document for document in texts)


class TestBadFolders:
    @pytest.mark.parametrize(
        ("name", "text", "message"),
        [
            ("tokenizer.json", "{", "file .*tokenizer.json: got"),
            ("tokenizer.json", "[]", "got a list; wanted a JSON object"),
            ("tokenizer.json", "{}", "got KeyError 'model'"),
            ("tokenizer.json", '{"model": {"vocab": 3}}', "got TypeError"),
            ("merges.txt", "a b c\n", "got ValueError"),
            ("vocab.json", '{"a": "x"}', "got ValueError"),
            ("vocab.json", '{"<s>": 0, "a": 1}', "got no eos token"),
            ("tokenizer_config.json", "nonsense", "tokenizer_config.json: got"),
        ],
    )
    def test_damaged_files(self, tmp_path, name, text, message):
        for file in ("vocab.json", "merges.txt"):
            shutil.copy(ROBERTA_BPE / file, tmp_path)
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=message):
            load_tokenizer(tmp_path)

    def test_no_tokenizer(self, tmp_path):
        with pytest.raises(InputError, match=r"got neither tokenizer.json nor vocab.json"):
            load_tokenizer(tmp_path)
        with pytest.raises(InputError, match="got no such folder"):
            load_tokenizer(tmp_path / "absent")

    def test_a_bpe_without_all_bytes_needs_a_tokenizer_json(self, tmp_path):
        vocab = {name: i for i, name in enumerate([*SPECIAL, "a", "b", "ab"])}
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        (tmp_path / "merges.txt").write_text("#version: 0.2\na b\n")
        with pytest.raises(InputError, match="wanted a byte-level BPE, or a"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        ("number", "got"),
        [
            (None, "TypeError"),
            (0.5, "a tokenizer.json that the tokenizers library refuses"),
            (1 << 31, "the id of 'the': 2147483648; wanted ids from 0 to 2147483647"),
            (-1, "the id of 'the': -1; wanted ids from 0 to 2147483647"),
        ],
    )
    def test_an_id_that_cannot_be(self, tmp_path, number, got):
        self.change(tmp_path, "bert", lambda tree: tree["model"]["vocab"].update(the=number))
        with pytest.raises(InputError, match=f"^tokenizer {tmp_path}: got {got}"):
            load_tokenizer(tmp_path)

    def test_a_tokenizer_json_that_the_library_panics_at(self, tmp_path):
        def damage(tree):
            tree["normalizer"]["normalizers"][0]["precompiled_charsmap"] = "AAAA"

        self.change(tmp_path, "xlm-roberta", damage)
        with pytest.raises(InputError, match=r"library refuses \(Precompiled.*\); wanted one that"):
            load_tokenizer(tmp_path)

    @staticmethod
    def change(folder, family, change):
        write_tokenizer(folder, family, form="json")
        tree = json.loads((folder / "tokenizer.json").read_text())
        change(tree)
        (folder / "tokenizer.json").write_text(json.dumps(tree))
