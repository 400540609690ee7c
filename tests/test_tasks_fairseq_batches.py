"""Who takes which sample under fairseq's trainer, and where a checkpoint goes on."""

from __future__ import annotations

import itertools
import json
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longpretrain.config import BatchConfig, Config
from longpretrain.data import Order
from longpretrain.errors import InputError
from longpretrain.schedule import update_numbers
from longpretrain.tasks.fairseq_batches import NumberedSamples, TrainIterator, UpdatePlan


class NumbersOnly:
    """A task whose samples are their numbers."""

    def __init__(self, samples_per_epoch: int, config: Config) -> None:
        self.blocks = range(samples_per_epoch)
        self.config = config
        self.corpus = SimpleNamespace(fingerprint="corpus")

    def sample(self, number: int) -> int:
        return number

    def collate(self, samples: list[int]) -> list[int]:
        return samples

    def tokens(self, batch: list[int]) -> int:
        return len(batch)


def iterators(
    samples: int, micro: int, accumulation: int, ranks: int, workers: int = 0
) -> list[TrainIterator]:
    config = Config(batch=BatchConfig(global_sequences=micro * accumulation * ranks))
    numbered = NumberedSamples(NumbersOnly(samples, config))
    return [
        TrainIterator(
            numbered, epoch=1, accumulation=accumulation, micro_sequences=micro,
            num_ranks=ranks, rank=rank, num_workers=workers,
        )
        for rank in range(ranks)
    ]  # fmt: skip


def take(iterator: TrainIterator, updates: int, accumulation: int) -> list[list[list[int]]]:
    """Numbers by update and micro-batch, from as many epochs as it takes, as fairseq goes on."""
    taken: list[list[list[int]]] = []
    epoch = iterator.next_epoch_itr()
    while len(taken) < updates:
        if not epoch.has_next():
            assert iterator.end_of_epoch()
            epoch = iterator.next_epoch_itr()
        taken.append([next(epoch)["inputs"] for _ in range(accumulation)])
    return taken


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    samples=st.integers(1, 30),
    micro=st.integers(1, 3),
    before=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stop=st.integers(1, 12),
)
def test_cursor(samples: int, micro: int, before: tuple[int, int], stop: int) -> None:
    """Update by update the next S numbers; a checkpoint goes on there, ranks and accumulation
    exchanged."""
    accumulation, ranks = before
    size = micro * accumulation * ranks
    started = iterators(samples, micro, accumulation, ranks)
    for update, parts in enumerate(
        zip(*(take(it, stop, accumulation) for it in started), strict=True)
    ):
        # Over ranks first, then over micro-batches: the numbers run on.
        in_order = [numbers for turn in zip(*parts, strict=True) for numbers in turn]
        assert list(itertools.chain(*in_order)) == list(range(update * size, (update + 1) * size))
    state = started[0].state_dict()
    assert state["samples_done"] == stop * size
    assert all(it.state_dict() == state for it in started)

    resumed = iterators(samples, micro, ranks, accumulation)[0]  # exchanged
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert resumed.state_dict()["samples_done"] == stop * size
    assert take(resumed, 1, ranks)[0][0] == list(range(stop * size, stop * size + micro))
    assert resumed.state_dict()["samples_done"] == (stop + 1) * size


@st.composite
def splits(draw: st.DrawFn, sequences: int) -> tuple[int, int, int]:
    """micro x accumulation x ranks = sequences."""
    micro = draw(st.sampled_from([n for n in range(1, sequences + 1) if sequences % n == 0]))
    left = sequences // micro
    ranks = draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0]))
    return micro, left // ranks, ranks


@settings(max_examples=60)
@given(samples=st.integers(1, 30), size=st.integers(1, 16), data=st.data())
def test_any_chain_of_restarts(samples: int, size: int, data: Any) -> None:
    """Each part of a run on other ranks, micro-batches and accumulation than the one before, cut at
    any update: all ranks together take the engine's numbers, and every epoch every sample once.
    """
    state: dict[str, Any] | None = None
    done, taken, order = 0, [], Order(samples, 7)
    for part in range(data.draw(st.integers(1, 4))):
        micro, accumulation, ranks = data.draw(splits(size), label=f"split of part {part}")
        updates = data.draw(st.integers(1, 2 + 2 * samples // size))
        started = iterators(samples, micro, accumulation, ranks)
        for rank, iterator in enumerate(started):
            if state is not None:
                iterator.load_state_dict(json.loads(json.dumps(state)))
            for update, found in enumerate(take(iterator, updates, accumulation), start=done + 1):
                right = update_numbers(
                    update, global_sequences=size, micro_sequences=micro,
                    accumulation=accumulation, world_size=ranks, rank=rank,
                )  # fmt: skip
                assert found == [list(group) for group in right]
                taken += itertools.chain(*found)
        done += updates
        state = started[0].state_dict()
        assert state["samples_done"] == done * size
        assert all(iterator.state_dict() == state for iterator in started)
    assert sorted(taken) == list(range(done * size))
    epochs = done * size // samples
    places = sorted(order.locate(number) for number in taken if number < epochs * samples)
    assert places == [(epoch, block) for epoch in range(epochs) for block in range(samples)]


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(workers: int) -> None:
    """Nor does where they start."""
    micro, accumulation, ranks = 2, 3, 2
    alone = iterators(29, micro, accumulation, ranks)
    helped = iterators(29, micro, accumulation, ranks, workers)
    for one, other in zip(alone, helped, strict=True):
        assert take(one, 4, accumulation) == take(other, 4, accumulation)
        assert one.state_dict() == other.state_dict()
        resumed = iterators(29, micro, accumulation, ranks, workers)[1]
        resumed.load_state_dict(one.state_dict())
        straight = iterators(29, micro, accumulation, ranks)[1]
        assert take(resumed, 2, accumulation) == take(straight, 6, accumulation)[4:]


def test_cursor_of_another_run() -> None:
    (old,), (new,) = iterators(10, 2, 2, 1), iterators(10, 2, 3, 1)
    with pytest.raises(InputError, match=r"sequences per update .* got 6; wanted 4"):
        new.load_state_dict(old.state_dict())
    with pytest.raises(InputError, match="another task wrote it"):
        new.load_state_dict({"epoch": 1, "iterations_in_epoch": 3})


def test_plan_length() -> None:
    plan = UpdatePlan(first=3, last=5, accumulation=2, micro_sequences=2, num_ranks=3, rank=1)
    assert list(plan) == [[38, 39], [44, 45], [50, 51], [56, 57]]
    assert len(plan) == 4
