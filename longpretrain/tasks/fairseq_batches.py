"""The numbered samples of a task, dealt to fairseq's trainer in the order of our own engine
(``schedule.update_numbers``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.data import FairseqDataset
from fairseq.data.iterators import CountingIterator, EpochBatchIterating
from torch.utils.data import DataLoader

from longpretrain.errors import InputError
from longpretrain.schedule import update_numbers
from longpretrain.tasks.masked_lm import MaskedLMTask, Sample


class NumberedSamples(FairseqDataset):  # type: ignore[misc]
    """Samples 0, 1, 2, ... without end; the length is that of one pass over the corpus."""

    def __init__(self, task: MaskedLMTask) -> None:
        self.task = task

    def __getitem__(self, number: int) -> Sample:
        return self.task.sample(number)

    def __len__(self) -> int:
        return len(self.task.blocks)

    def collater(self, samples: list[Sample]) -> dict[str, Any]:
        """A micro-batch: the model's inputs and targets, and the sizes that fairseq logs.

        No samples give {}, which fairseq takes for "this rank has nothing to do".
        """
        if not samples:
            return {}
        inputs = self.task.collate(samples)
        return {
            "inputs": inputs,
            "ntokens": self.task.tokens(inputs),
            "nsentences": len(samples),
        }

    def load(self, plan: Iterable[list[int]], num_workers: int) -> DataLoader[Any]:
        """Micro-batches of these numbers, made by worker processes (0: by this one)."""
        return DataLoader(
            self,
            batch_sampler=plan,
            collate_fn=self.collater,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
        )


@dataclass(frozen=True, kw_only=True)
class UpdatePlan:
    """Which samples one rank takes in the updates ``first`` (from 0) to ``last`` (excluded)."""

    first: int
    last: int
    accumulation: int
    """Micro-batches per rank and update."""
    micro_sequences: int
    num_ranks: int
    rank: int

    @property
    def global_sequences(self) -> int:
        """Samples of one update over all ranks."""
        return self.num_ranks * self.accumulation * self.micro_sequences

    def __len__(self) -> int:
        return (self.last - self.first) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for update in range(self.first, self.last):
            groups = update_numbers(
                update + 1,
                global_sequences=self.global_sequences,
                micro_sequences=self.micro_sequences,
                accumulation=self.accumulation,
                world_size=self.num_ranks,
                rank=self.rank,
            )
            yield from (list(group) for group in groups)


class TrainIterator(EpochBatchIterating):  # type: ignore[misc]
    """fairseq's view of an endless list of samples, with a cursor that its checkpoints keep.

    An epoch of fairseq is ceil(samples of a pass / S) updates, so every epoch is whole updates; the
    samples themselves go from pass to pass without a seam.

    Args:
        samples: the training samples.
        epoch: the epoch to start at, from 1.
        accumulation: micro-batches per rank and update.
        micro_sequences: sequences per micro-batch.
        num_ranks: ranks that share an update.
        rank: this one.
        num_workers: processes that make micro-batches.
    """

    def __init__(
        self,
        samples: NumberedSamples,
        *,
        epoch: int,
        accumulation: int,
        micro_sequences: int,
        num_ranks: int,
        rank: int,
        num_workers: int,
    ) -> None:
        self._samples = samples
        self._accumulation = accumulation
        self._micro_sequences = micro_sequences
        self._num_ranks = num_ranks
        self._rank = rank
        self._num_workers = num_workers
        self.global_sequences = accumulation * micro_sequences * num_ranks
        self._epoch_updates = -(-len(samples) // self.global_sequences)
        self._current: CountingIterator | None = None
        self._skip_updates = 0
        self.epoch = epoch

    def __len__(self) -> int:
        return self._epoch_updates * self._accumulation

    @property
    def next_epoch_idx(self) -> int:
        """The epoch that next_epoch_itr will give."""
        return self.epoch + (self._current is not None and self.end_of_epoch())

    def next_epoch_itr(
        self,
        shuffle: bool = True,
        fix_batches_to_gpus: bool = False,
        set_dataset_epoch: bool = True,
    ) -> CountingIterator:
        """This rank's micro-batches of the next epoch, or of the rest of a resumed one.

        fairseq's arguments have no effect: the run's seed decides the order.
        """
        self.epoch = self.next_epoch_idx
        start = (self.epoch - 1) * self._epoch_updates
        plan = UpdatePlan(
            first=start + self._skip_updates,
            last=start + self._epoch_updates,
            accumulation=self._accumulation,
            micro_sequences=self._micro_sequences,
            num_ranks=self._num_ranks,
            rank=self._rank,
        )
        self._current = CountingIterator(
            self._samples.load(plan, self._num_workers),
            start=self._skip_updates * self._accumulation,
            total=len(self),
        )
        self._skip_updates = 0
        return self._current

    def end_of_epoch(self) -> bool:
        """Whether the iterator given last is exhausted."""
        return self._current is not None and not self._current.has_next()

    @property
    def iterations_in_epoch(self) -> int:
        """Micro-batches of this rank that the current epoch has given."""
        if self._current is None:
            return self._skip_updates * self._accumulation
        return int(self._current.n)

    def state_dict(self) -> dict[str, Any]:
        """The cursor, and what it is a cursor of; the first three keys are those fairseq reads."""
        in_epoch = self.iterations_in_epoch // self._accumulation
        updates = (self.epoch - 1) * self._epoch_updates + in_epoch
        epoch, in_epoch = divmod(updates, self._epoch_updates)
        return {
            "version": 2,
            "epoch": epoch + 1,
            "iterations_in_epoch": in_epoch * self._accumulation,
            "samples_done": updates * self.global_sequences,
            "samples": self._identity(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on at the sample after the last one of a checkpoint.

        Raises:
            InputError: the checkpoint is of another order of samples.
        """
        saved = state_dict.get("samples", {})
        for key, value in self._identity().items():
            if saved.get(key) != value:
                raise InputError(
                    f"{key} of the run in the checkpoint", got=value,
                    wanted=f"{saved.get(key, 'nothing (another task wrote it)')}, as it was",
                    way_out="Give the old value, or --reset-dataloader to begin at sample 0.",
                )  # fmt: skip
        updates = state_dict["samples_done"] // self.global_sequences
        epoch, self._skip_updates = divmod(updates, self._epoch_updates)
        self.epoch = epoch + 1
        self._current = None

    def _identity(self) -> dict[str, Any]:
        """What makes sample number n the sample that it is; ranks and micro-batches do not."""
        config = self._samples.task.config
        return {
            "sequences per update (--batch-size x --update-freq x ranks)": self.global_sequences,
            "corpus fingerprint": self._samples.task.corpus.fingerprint,
            "--tokens-per-sample": config.data.max_tokens,
            "--blocks": config.data.blocks,
            "--mask-prob": config.masking.probability,
            "--seed": config.run.seed,
        }


class HeldOutIterator(EpochBatchIterating):  # type: ignore[misc]
    """Every held-out sample once, micro-batches dealt to the ranks in turn.

    A rank without a micro-batch in the last turn gets {}, which fairseq knows.
    """

    def __init__(
        self,
        samples: NumberedSamples,
        *,
        micro_sequences: int,
        num_ranks: int,
        rank: int,
        num_workers: int,
    ) -> None:
        count = len(samples)
        batches = [
            list(range(start, min(start + micro_sequences, count)))
            for start in range(0, count, micro_sequences)
        ]
        batches += [[] for _ in range(-len(batches) % num_ranks)]
        self._samples = samples
        self._batches = batches[rank::num_ranks]
        self._num_workers = num_workers

    def __len__(self) -> int:
        return len(self._batches)

    @property
    def first_batch(self) -> dict[str, Any]:
        """What fairseq runs, with weight 0, on a rank without a micro-batch."""
        return self._samples.collater([self._samples[0]])

    def next_epoch_itr(
        self,
        shuffle: bool = True,
        fix_batches_to_gpus: bool = False,
        set_dataset_epoch: bool = True,
    ) -> CountingIterator:
        """This rank's micro-batches; the same ones each time, masked in the same way."""
        return CountingIterator(self._samples.load(self._batches, self._num_workers))
