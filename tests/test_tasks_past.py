"""What a run may change of its data when it goes on: whatever left the samples so far alone."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import pytest

from longpretrain.errors import InputError
from longpretrain.tasks.past import Record, check_past, identity_of

SEEN = 400
CHECKPOINT = Path("run/checkpoints/step-000100")


def record(corpus: str, weight: str = "1/2", from_sample: int = 0, **given: object) -> Record:
    entries = {"corpus": corpus * 16, "selection": (0, 1, 1, 0), **given}
    return Record(weight=Fraction(weight), from_sample=from_sample, **entries)  # type: ignore[arg-type]


BEFORE = {"books": record("b"), "wiki": record("w"), "late": record("l", "1", SEEN)}


def check(now: Mapping[str, Record], before: Mapping[str, Record] = BEFORE) -> None:
    check_past(identity_of(before), identity_of(now), SEEN, CHECKPOINT)


class TestMayChange:
    @pytest.mark.parametrize(
        "now",
        [
            BEFORE,
            {"wiki": BEFORE["wiki"], "books": BEFORE["books"]},
            {"prose": BEFORE["books"], "wiki": BEFORE["wiki"]},
            BEFORE | {"late": record("l", "7", SEEN + 1)},
            BEFORE | {"news": record("n", "9", SEEN)},
        ],
        ids=[
            "nothing",
            "order, and what has not begun",
            "a name",
            "what has not begun",
            "one more",
        ],
    )
    def test_the_future_and_names(self, now: dict[str, Record]) -> None:
        check(now)

    def test_one_corpus_becomes_a_mix(self) -> None:
        """And back; old checkpoints have the fingerprint alone."""
        plain = {"corpus": "b" * 16, "tokenizer": "t"}
        mix = identity_of({"x": record("b", "1"), "news": record("n", "2", SEEN)})
        check_past(plain, {**mix, "tokenizer": "t"}, SEEN, CHECKPOINT)
        check_past({**mix, "tokenizer": "t"}, plain, SEEN, CHECKPOINT)
        check_past(plain, plain, SEEN, CHECKPOINT)


class TestMayNot:
    @pytest.mark.parametrize(
        ("now", "named"),
        [
            (
                BEFORE | {"news": record("n", "9", SEEN - 1)},
                "news from sample 399, which has passed",
            ),
            (BEFORE | {"late": record("l", "1", 8)}, "late from sample 8, which has passed"),
            ({"books": record("b")}, "wiki not there"),
            (BEFORE | {"wiki": record("w", from_sample=3)}, "wiki from sample 3, not 0"),
            (BEFORE | {"wiki": record("w", "1/3")}, "wiki with relative weight 1/3, not 1/2"),
            (BEFORE | {"wiki": record("x")}, "wiki with other documents"),
            (
                BEFORE | {"wiki": record("w", selection=(9, 1, 1, 0))},
                "wiki with other documents",
            ),
            (
                {"books": record("b", "0.50000001"), "wiki": record("w", "0.49999999")},
                "books with relative weight 0.50000001, not 1/2; "
                "wiki with relative weight 0.49999999, not 1/2",
            ),
        ],
    )
    def test_the_past(self, now: dict[str, Record], named: str) -> None:
        with pytest.raises(InputError) as refused:
            check(now)
        told = str(refused.value)
        assert told.startswith(f"data.mix of the run: got {named}; wanted what the 400 samples ")
        assert "A new source may join with from_sample=400 or more." in told

    def test_another_corpus(self) -> None:
        with pytest.raises(InputError, match=r"corpus of the run: got data\.train with fing"):
            check_past({"corpus": "b"}, {"corpus": "c"}, SEEN, CHECKPOINT)
        with pytest.raises(InputError, match=r"got data\.train not there; x from sample 0, which"):
            check_past({"corpus": "b"}, identity_of({"x": record("n", "1")}), SEEN, CHECKPOINT)

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"corpus": "a"}', "nonsense"])
    def test_damaged_checkpoints(self, text: str) -> None:
        with pytest.raises(InputError, match=r"state\.json, key task, source books: got .*damaged"):
            check_past({"source books": text}, identity_of(BEFORE), SEEN, CHECKPOINT)
