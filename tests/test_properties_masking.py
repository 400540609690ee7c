"""Masking as properties, for any vocabulary, probability and sequence; and global tokens.

Statistics are bounded at six standard deviations, twelve for chi-square's long tail: far beyond
what the examples of a thorough search reach by chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from longpretrain.data import global_positions, hash64, mask_tokens, parse_global_tokens
from longpretrain.errors import InputError

KEYS = st.integers(0, 2**64 - 1)
PROBABILITIES = st.floats(0, 1, exclude_min=True, exclude_max=True)
COMMON = st.floats(0.05, 0.95)


@dataclass(frozen=True)
class Vocabulary:
    """Ids 0 to size - 1: special ones (the mask is one), unused ones, and real ones with gaps."""

    special: tuple[int, ...]
    real: tuple[int, ...]
    unused: tuple[int, ...]
    mask_id: int

    def mask(
        self, tokens: list[int] | NDArray[np.int64], key: int, probability: float
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        return mask_tokens(
            np.array(tokens, np.int64), key=key, probability=probability,
            special_ids=frozenset(self.special), real_ids=np.array(self.real, np.int32),
            mask_id=self.mask_id,
        )  # fmt: skip


@st.composite
def vocabularies(draw: st.DrawFn, min_real: int = 1) -> Vocabulary:
    size = draw(st.integers(min_real + 1, 60))
    ids = draw(st.permutations(range(size)))
    special = draw(st.integers(1, size - min_real))
    real = draw(st.integers(min_real, size - special))
    return Vocabulary(
        special=tuple(ids[:special]),
        real=tuple(sorted(ids[special : special + real])),
        unused=tuple(ids[special + real :]),
        mask_id=ids[0],
    )


@st.composite
def sequences(draw: st.DrawFn, vocabulary: Vocabulary, max_size: int = 120) -> list[int]:
    """Any ids, often none or one that may be masked."""
    special = st.sampled_from(vocabulary.special)
    maskable = st.sampled_from(vocabulary.real + vocabulary.unused)
    match draw(st.sampled_from(["all special", "one maskable", "mixed"])):
        case "all special":
            return draw(st.lists(special, max_size=max_size))
        case "one maskable":
            return [*draw(st.lists(special)), draw(maskable), *draw(st.lists(special))]
    return draw(st.lists(special | maskable, max_size=max_size))


@settings(max_examples=200)
@given(vocabulary=vocabularies(), key=KEYS, probability=PROBABILITIES, data=st.data())
def test_what_any_mask_promises(
    vocabulary: Vocabulary, key: int, probability: float, data: st.DataObject
) -> None:
    tokens = data.draw(sequences(vocabulary))
    inputs, positions = vocabulary.mask(tokens, key, probability)
    maskable = [i for i, token in enumerate(tokens) if token not in vocabulary.special]
    # How many: the share, rounded up or down by a draw of the key, and one at the least.
    share = probability * len(maskable)
    budget = math.floor(share + (hash64(key, 1) >> 11) / 2**53)
    assert len(positions) == min(max(budget, 1), len(maskable))
    assert len(positions) in {0, 1, math.floor(share), math.floor(share) + 1}
    # Where: never a special token; those with the smallest draws of the key.
    smallest = sorted(maskable, key=lambda position: hash64(key, 2, position))
    assert positions.tolist() == sorted(smallest[: len(positions)])
    # What: the mask, a real id, or what stood there.
    for position in positions.tolist():
        assert inputs[position] in {vocabulary.mask_id, *vocabulary.real, tokens[position]}
    # Nothing is lost: the targets put back give the sequence.
    targets = np.array(tokens, np.int64)[positions]
    assert not set(targets.tolist()) & set(vocabulary.special)
    restored = inputs.copy()
    restored[positions] = targets
    assert restored.tolist() == tokens


@settings(max_examples=100)
@given(vocabulary=vocabularies(), key=KEYS, probability=PROBABILITIES, data=st.data())
def test_surroundings_do_not_matter(
    vocabulary: Vocabulary, key: int, probability: float, data: st.DataObject
) -> None:
    """A mask depends on its key and on which positions are maskable: on no other mask, not on
    padding at the end, not on the ids themselves.
    """
    tokens = data.draw(sequences(vocabulary))
    inputs, positions = vocabulary.mask(tokens, key, probability)
    vocabulary.mask(tokens, key + 1, 0.5)
    padded = tokens + data.draw(st.lists(st.sampled_from(vocabulary.special), max_size=30))
    longer, again = vocabulary.mask(padded, key, probability)
    assert again.tolist() == positions.tolist()
    assert longer.tolist() == inputs.tolist() + padded[len(tokens) :]
    # Another text of the same shape: masked alike, drawn alike, kept alike.
    maskable = vocabulary.real + vocabulary.unused
    other = [t if t in vocabulary.special else data.draw(st.sampled_from(maskable)) for t in tokens]
    its_inputs, its_positions = vocabulary.mask(other, key, probability)
    assert its_positions.tolist() == positions.tolist()
    for position in positions.tolist():
        kept = {other[position]} if inputs[position] == tokens[position] else set()
        assert its_inputs[position] in {inputs[position]} | kept


@settings(max_examples=60)
@given(keys=st.sets(KEYS, min_size=2, max_size=20), probability=COMMON)
def test_another_key_is_another_mask(keys: set[int], probability: float) -> None:
    """300 tokens at 5 % or more: two equal sets of positions once in 10^25."""
    vocabulary = Vocabulary(special=(0,), real=(1, 2, 3), unused=(), mask_id=0)
    tokens = [1] * 300
    masks = {vocabulary.mask(tokens, key, probability)[1].tobytes() for key in keys}
    assert len(masks) == len(keys)
    again = {vocabulary.mask(tokens, key, probability)[1].tobytes() for key in keys}
    assert again == masks


@settings(max_examples=15)
@given(key=KEYS, probability=COMMON, word=st.integers(1, 300))
def test_eighty_ten_ten_at_any_probability(key: int, probability: float, word: int) -> None:
    """Of 40,000 tokens of one id; a draw gives that id back once in 300."""
    vocabulary = Vocabulary(special=(0,), real=tuple(range(1, 301)), unused=(), mask_id=0)
    inputs, positions = vocabulary.mask(np.full(40_000, word), key, probability)
    now, count = inputs[positions], len(positions)
    for what, rate in (
        (now == 0, 0.8),
        (now == word, 0.1 + 0.1 / 300),
        ((now != 0) & (now != word), 0.1 - 0.1 / 300),
    ):
        deviation = math.sqrt(rate * (1 - rate) / count)
        assert abs(what.mean() - rate) < 6 * deviation


@settings(max_examples=15)
@given(vocabulary=vocabularies(min_real=2), key=KEYS)
def test_draws_are_uniform_over_real_ids_alone(vocabulary: Vocabulary, key: int) -> None:
    """Whatever gaps special and unused ids leave; told apart by a token that is never drawn."""
    word = 60
    inputs, positions = vocabulary.mask(np.full(60_000, word), key, 1 - 2**-53)
    assert len(positions) == 60_000
    drawn = inputs[(inputs != vocabulary.mask_id) & (inputs != word)]
    counts = np.bincount(drawn, minlength=word)
    real = list(vocabulary.real)
    assert counts.sum() == counts[real].sum()
    expected, freedom = len(drawn) / len(real), len(real) - 1
    chi_square = ((counts[real] - expected) ** 2 / expected).sum()
    assert chi_square < freedom + 12 * math.sqrt(2 * freedom)
    # Positions do not decide what is drawn: the first half is like the second.
    half = np.bincount(drawn[: len(drawn) // 2], minlength=word)[real]
    assert np.abs(half - counts[real] / 2).max() < 6 * math.sqrt(expected / 4) + 1


@settings(max_examples=15)
@given(key=KEYS, probability=COMMON, stride=st.integers(2, 9))
def test_every_place_is_as_likely(key: int, probability: float, stride: int) -> None:
    """Each residue class and each half of 30,000 tokens gets its share of the chosen ones."""
    vocabulary = Vocabulary(special=(0,), real=(1, 2), unused=(), mask_id=0)
    _, positions = vocabulary.mask(np.full(30_000, 1), key, probability)
    parts = [(positions % stride == r, len(range(r, 30_000, stride))) for r in range(stride)]
    for inside, size in [*parts, (positions < 15_000, 15_000)]:
        deviation = math.sqrt(size * probability * (1 - probability))
        assert abs(inside.sum() - size * probability) < 6 * deviation + 1


@settings(max_examples=100)
@given(
    tokens=st.lists(st.integers(0, 12), max_size=70),
    text=st.sampled_from(["none", "first"])
    | st.integers(1, 80).map("every_{}".format)
    | st.lists(st.integers(0, 14), min_size=1, max_size=4).map(
        lambda ids: "_".join(map(str, ["ids", *ids]))
    ),
)
def test_global_positions_one_by_one(tokens: list[int], text: str) -> None:
    kind, *numbers = text.split("_")
    expected = []
    for position, token in enumerate(tokens):
        match kind:
            case "first":
                chosen = position == 0
            case "every":
                chosen = position % int(numbers[0]) == 0
            case _:
                chosen = str(token) in numbers
        if chosen:
            expected.append(position)
    found = global_positions(np.array(tokens, np.int64), parse_global_tokens(text))
    assert found.dtype == np.int32
    assert found.tolist() == expected


@settings(max_examples=100)
@given(text=st.from_regex(r"(none|first|every|ids)(_[0-9a ]{0,3}){0,3}", fullmatch=True))
def test_a_policy_is_understood_or_refused(text: str) -> None:
    try:
        policy = parse_global_tokens(text)
    except InputError:
        return
    kind, *numbers = text.split("_")
    assert policy.kind == kind
    if kind == "every":
        assert [policy.every] == [int(number) for number in numbers]
    assert policy.ids == (tuple(sorted({int(n) for n in numbers})) if kind == "ids" else ())
