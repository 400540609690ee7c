"""What the loop knows of a task: this Protocol and nothing else (no fairseq, no model, no data)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

Batch = dict[str, torch.Tensor]
"""Tensors of one micro-batch, moved to the device by the loop."""


class Task(Protocol):
    """A training objective over an endless, numbered list of samples.

    Everything about sample ``number`` follows from the number and the run's seed: never from the
    rank, the worker or the place in the batch. So the cursor of a run is one integer.
    """

    def sample(self, number: int) -> Any:
        """Sample ``number`` = 0, 1, 2, ... without end."""
        ...

    def collate(self, samples: list[Any]) -> Batch:
        """One micro-batch."""
        ...

    def count(self, batch: Batch) -> int:
        """How many predictions the batch's loss sums over."""
        ...

    def tokens(self, batch: Batch) -> int:
        """Input tokens in the batch, padding excluded."""
        ...

    def sample_ids(self, batch: Batch) -> list[int]:
        """Which samples a batch holds: 64-bit identities that no rank or order changes."""
        ...

    def describe(self, number: int) -> dict[str, Any]:
        """Where sample ``number`` is from, as plain data: for a person who looks for it."""
        ...

    def loss(self, model: Any, batch: Batch) -> torch.Tensor:
        """The loss in nats, summed over the batch's predictions, fp32."""
        ...

    def epoch(self, number: int) -> int:
        """The pass over the corpus that sample ``number`` belongs to, from 0."""
        ...

    def version(self, number: int) -> int:
        """The version of the data that sample ``number`` belongs to, from 0; it grows where
        sources join.
        """
        ...

    def identity(self) -> dict[str, str]:
        """What the samples of a run follow from, such as its corpora; kept in checkpoints."""
        ...

    def stored_names(self, parameter: str) -> tuple[str, ...]:
        """Names under which a checkpoint stores a parameter; none for one that does not train and
        is stored as part, or as a copy, of another.
        """
        ...

    def stored(self, parameter: str, value: torch.Tensor) -> Mapping[str, torch.Tensor]:
        """What a checkpoint stores of a trained parameter, by those names. A thread calls it while
        training goes on.
        """
        ...

    def write_model_files(self, folder: Path) -> None:
        """Writes what makes a folder of weights a model folder: config.json and the tokenizer."""
        ...
