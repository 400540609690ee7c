"""Global-token policies: what a recipe may say and which positions it means."""

from __future__ import annotations

import numpy as np
import pytest

from longpretrain.data import global_positions, parse_global_tokens
from longpretrain.data.global_tokens import global_tokens_of
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.errors import InputError

TOKENS = np.array([0, 5, 9, 5, 7, 9, 2])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("none", []),
        ("first", [0]),
        ("every_1", [0, 1, 2, 3, 4, 5, 6]),
        ("every_3", [0, 3, 6]),
        ("every_100", [0]),
        ("ids_5", [1, 3]),
        ("ids_9_5_9", [1, 2, 3, 5]),
        ("ids_50264", []),
    ],
)
def test_positions(text, expected):
    policy = parse_global_tokens(text)
    positions = global_positions(TOKENS, policy)
    assert positions.dtype == np.int32
    assert positions.tolist() == expected


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("none", [0, 0, 0, 0, 0, 0]),
        ("first", [0, 1, 1, 1, 1, 1]),
        ("every_1", [0, 1, 63, 64, 65, 4096]),
        ("every_64", [0, 1, 1, 1, 2, 64]),
        ("ids_0", [0, 1, 63, 64, 65, 4096]),
    ],
)
def test_counts_at_the_borders(text, counts):
    policy = parse_global_tokens(text)
    lengths = [0, 1, 63, 64, 65, 4096]
    found = [len(global_positions(np.zeros(length, np.int64), policy)) for length in lengths]
    assert found == counts


@pytest.mark.parametrize(
    "text",
    ["", "all", "every", "every_", "every_0", "every_-1", "every_1.5", "ids", "ids_", "ids_a",
     "ids_1,2", "first ", "FIRST", "every_²", "sentence_ends_1", "sentence"],
)  # fmt: skip
def test_anything_else_is_refused(text):
    with pytest.raises(
        InputError, match=r"model\.global_tokens: got .* wanted none, first"
    ) as info:
        parse_global_tokens(text)
    assert info.value.got == repr(text)


@pytest.mark.parametrize(
    ("policy", "right"),
    [("none", []), ("first", [0, 3, 7]), ("every_2", [0, 2, 3, 5, 7]), ("ids_5_7", [1, 4, 7])],
)
def test_packed_documents_have_each_their_own(policy: str, right: list[int]) -> None:
    tokens = np.array([0, 5, 2, 0, 7, 9, 2, 5])
    position = np.array([0, 1, 2, 0, 1, 2, 3, 0])
    found = global_positions(tokens, parse_global_tokens(policy), position)
    assert found.dtype == np.int32
    assert found.tolist() == right


@pytest.mark.parametrize(("text", "says"), [("ids_5_50265", "[50265]"), ("ids_50264", "the mask")])
def test_ids_that_no_text_has_are_refused(text: str, says: str) -> None:
    with pytest.raises(InputError) as error:
        global_tokens_of(text, load_tokenizer())
    assert says in str(error.value)
