"""Global-token policies: what a recipe may say, which positions it means, and how many at most."""

from __future__ import annotations

import numpy as np
import pytest

from longpretrain.data import global_positions, parse_global_tokens
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
    assert len(positions) <= policy.max_slots(len(TOKENS))


@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65, 4096])
@pytest.mark.parametrize("text", ["none", "first", "every_1", "every_64"])
def test_static_policies_fill_their_slots_at_the_longest_length(text, length):
    policy = parse_global_tokens(text)
    assert policy.is_static
    found = len(global_positions(np.zeros(length, np.int64), policy))
    assert found == (policy.max_slots(length) if length else 0)


def test_ids_may_be_every_token():
    policy = parse_global_tokens("ids_3")
    assert not policy.is_static
    assert policy.max_slots(17) == 17


@pytest.mark.parametrize(
    "text",
    ["", "all", "every", "every_", "every_0", "every_-1", "every_1.5", "ids", "ids_", "ids_a",
     "ids_1,2", "first ", "FIRST", "every_²"],
)  # fmt: skip
def test_anything_else_is_refused(text):
    with pytest.raises(
        InputError, match=r"model\.global_tokens: got .* wanted none, first"
    ) as info:
        parse_global_tokens(text)
    assert info.value.got == repr(text)
