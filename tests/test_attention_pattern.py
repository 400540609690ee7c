from __future__ import annotations

import numpy as np
import pytest

from longpretrain.attention import AttentionPattern


def test_window_row_of_the_facts() -> None:
    # Hugging Face's attention_window 8 reaches 4 tokens on each side: row 16 sees 12 to 20.
    seen = np.flatnonzero(AttentionPattern(4).reaches(16, np.arange(64), 1))
    assert seen.tolist() == list(range(12, 21))


def test_dilated_and_causal_window() -> None:
    keys = np.arange(64)
    assert np.flatnonzero(AttentionPattern(2, 3).reaches(16, keys, 3)).tolist() == [
        10,
        13,
        16,
        19,
        22,
    ]
    causal = AttentionPattern(2, 3, causal=True)
    assert np.flatnonzero(causal.reaches(16, keys, 3)).tolist() == [10, 13, 16]


@pytest.mark.parametrize("causal", [False, True], ids=["both_sides", "causal"])
@pytest.mark.parametrize("dilation", [1, 2, 5, 40])
@pytest.mark.parametrize("window", [0, 1, 6, 30, 100])
@pytest.mark.parametrize("tokens", [1, 2, 13, 37])
def test_num_pairs_counts_the_window(tokens: int, window: int, dilation: int, causal: bool) -> None:
    pattern = AttentionPattern(window, dilation, causal)
    position = np.arange(tokens)
    dense = pattern.reaches(position[:, None], position, dilation)
    assert pattern.num_pairs(tokens, dilation) == dense.sum()


def test_dilation_of_heads() -> None:
    assert AttentionPattern(4, 2).dilation_of_heads(3) == (2, 2, 2)
    assert AttentionPattern(4, (1, 2)).dilation_of_heads(2) == (1, 2)
    with pytest.raises(ValueError, match="2 numbers for 3 heads"):
        AttentionPattern(4, (1, 2)).dilation_of_heads(3)


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ((-1,), "one_sided_window: got -1"),
        ((2.0,), "one_sided_window: got 2.0"),
        ((True,), "one_sided_window: got True"),
        ((10**30,), r"one_sided_window: got 10+; wanted a whole number from 0 to 2147483647"),
        ((4, 2**31), "dilation: got 2147483648; wanted a whole number from 1 to 2147483647"),
        ((4, 0), "dilation: got 0"),
        ((4, ()), r"dilation: got \(\)"),
        ((4, (1, 0)), r"dilation: got \(1, 0\)"),
        ((4, [1, 2]), r"dilation: got \[1, 2\]"),
        ((4, 1, 1), "causal: got 1"),
    ],
    ids=str,
)
def test_bad_numbers_are_refused(arguments: tuple[object, ...], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        AttentionPattern(*arguments)  # type: ignore[arg-type]


def test_patterns_are_values() -> None:
    assert hash(AttentionPattern(4, (1, 2))) == hash(AttentionPattern(4, (1, 2)))
    assert AttentionPattern(4) != AttentionPattern(4, causal=True)
