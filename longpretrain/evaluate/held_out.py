"""Held-out text with masks that never change, and the loss of every masked token in it.

The masks follow from (seed, length, block of the corpus) alone, so every model with the same
tokenizer guesses the same tokens of the same text, on every machine and at every batch size.

Letters: B sequences, N tokens, M masked tokens, V vocabulary, G global tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from longpretrain.data.blocks import Blocks, Policy
from longpretrain.data.global_tokens import global_positions, global_tokens_of
from longpretrain.data.hashing import hash64
from longpretrain.data.masking import mask_tokens
from longpretrain.data.shards import Corpus
from longpretrain.data.tokenizer import Tokenizer
from longpretrain.errors import InputError

STRETCH_TOKENS = 4096
"""What ``sequences`` counts, so that a subset is the same text at every length."""

# Keeps evaluation's masks apart from other uses of the same seed.
_EVALUATION = 0x6576616C


@dataclass(frozen=True, kw_only=True)
class MaskedSequence:
    """A sequence of length N with M tokens to guess; all int64, global positions int32."""

    inputs_N: NDArray[np.int64]
    positions_M: NDArray[np.int64]
    targets_M: NDArray[np.int64]
    global_G: NDArray[np.int32] | None


@dataclass(frozen=True)
class TokenLosses:
    """Loss of every masked token of some sequences: block, position in it, nats (float64)."""

    block_M: NDArray[np.int64]
    position_M: NDArray[np.int64]
    nats_M: NDArray[np.float64]


class HeldOut:
    """The blocks of a corpus with masks that never change.

    Args:
        corpus: held-out text.
        tokenizer: the model's; must be the corpus' own.
        max_tokens: length of a sequence.
        blocks: how documents become sequences, as in the recipe's data.blocks.
        seed: seeds the masks.
        probability: share of the maskable tokens to guess.
        global_tokens: which tokens are global, as in the recipe's model.global_tokens.

    Raises:
        InputError: the corpus has another tokenizer, or an argument is out of range.
    """

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        *,
        max_tokens: int,
        blocks: Policy = "full_sentences",
        seed: int = 1,
        probability: float = 0.15,
        global_tokens: str = "none",
    ) -> None:
        tokenizer.need_masking("the model's tokenizer")
        corpus.require_tokenizer(tokenizer.fingerprint, owner="the model")
        if blocks == "packed":
            raise InputError(
                "blocks of held-out text", got=blocks, wanted="full_sentences or document",
                way_out="Say document: it scores each document on its own, as packing does.",
            )  # fmt: skip
        self.corpus, self.tokenizer, self.policy = corpus, tokenizer, blocks
        self.max_tokens, self.seed, self.probability = max_tokens, seed, probability
        self._global_tokens = global_tokens_of(global_tokens, tokenizer)
        self._blocks = Blocks(
            corpus, policy=blocks, max_tokens=max_tokens,
            bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, block: int) -> MaskedSequence:
        tokens_N = self._blocks[block]
        key = hash64(self.seed, _EVALUATION, self.max_tokens, self._blocks.sample_id(block))
        inputs_N, positions_M = mask_tokens(
            tokens_N,
            key=key,
            probability=self.probability,
            special_ids=self.tokenizer.special_ids,
            real_ids=self.tokenizer.real_ids,
            mask_id=self.tokenizer.mask_id,
        )
        has_global = self._global_tokens.kind != "none"
        return MaskedSequence(
            inputs_N=inputs_N,
            positions_M=positions_M,
            targets_M=tokens_N[positions_M],
            global_G=global_positions(inputs_N, self._global_tokens) if has_global else None,
        )

    def numbers(self, sequences: int | None) -> list[int]:
        """Blocks to score: all, or those of ``sequences`` evenly spaced stretches of 4,096 tokens.

        At every length these are about the same text, so that lengths and models compare.
        """
        if sequences is not None and sequences < 1:
            raise InputError(
                "sequences to score", got=sequences, wanted="1 or more",
                way_out="Leave it out to score all.",
            )  # fmt: skip
        texts, chunk = self._text_tokens, self.max_tokens - 2
        stretch_starts = _first_numbers(texts, STRETCH_TOKENS - 2)
        stretches = int(stretch_starts[-1])
        if sequences is None or sequences >= stretches:
            return list(range(len(self)))
        block_starts = _first_numbers(texts, chunk)
        chosen: set[int] = set()
        for place in range(sequences):
            stretch = place * stretches // sequences
            text = int(np.searchsorted(stretch_starts, stretch, side="right")) - 1
            start = (stretch - int(stretch_starts[text])) * (STRETCH_TOKENS - 2)
            end = min(start + STRETCH_TOKENS - 2, int(texts[text]))
            is_last = end == texts[text]
            first, last = start // chunk, -(-end // chunk) if is_last else end // chunk
            numbers = range(first, max(first + 1, last))
            chosen.update(int(block_starts[text]) + number for number in numbers)
        return sorted(chosen)

    def document_tokens(self) -> NDArray[np.int64]:
        """Length of the document of every block, in tokens; with policy ``document`` only."""
        assert self.policy == "document", self.policy
        blocks = -(-self._text_tokens // (self.max_tokens - 2))
        return np.repeat(self._text_tokens, blocks)

    @cached_property
    def _text_tokens(self) -> NDArray[np.int64]:
        """Lengths of the texts that blocks cut into pieces: of each document, or of the stream."""
        if self.policy == "document":
            lengths = np.concatenate([np.diff(shard.offsets) for shard in self.corpus.shards])
        else:  # one </s> stands between two documents
            lengths = np.array([self.corpus.num_tokens + self.corpus.num_documents - 1])
        assert _first_numbers(lengths, self.max_tokens - 2)[-1] == len(self)
        return lengths


def token_losses(
    model: Callable[..., Tensor],
    held_out: HeldOut,
    numbers: Sequence[int],
    *,
    batch: int = 1,
    device: torch.device | str = "cpu",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> Iterator[TokenLosses]:
    """Scores blocks, ``batch`` at a time, with dropout off; one item per batch.

    Args:
        model: on ``device``. A module is put into eval mode and back; any other callable must be
            in it.
        held_out: the masked blocks.
        numbers: which of them, in this order.
        batch: sequences at a time; no effect on the result but rounding.
        device: where the model is.
        precision: bf16 computes under autocast; the loss itself is in fp32.
    """
    assert batch >= 1, batch
    device = torch.device(device)
    was_training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    try:
        for start in range(0, len(numbers), batch):
            chosen = numbers[start : start + batch]
            sequences = [held_out[number] for number in chosen]
            arguments, targets_M = _collate(sequences, held_out.tokenizer.pad_id, device)
            bf16 = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")
            with torch.no_grad(), bf16:
                logits_MV = model(**arguments)
            nats_M = F.cross_entropy(logits_MV.float(), targets_M, reduction="none")
            yield TokenLosses(
                np.repeat(np.asarray(chosen), [len(s.positions_M) for s in sequences]),
                np.concatenate([s.positions_M for s in sequences]),
                nats_M.double().cpu().numpy(),
            )
    finally:
        if isinstance(model, nn.Module):
            model.train(was_training)


def score(
    model: Callable[..., Tensor],
    held_out: HeldOut,
    numbers: Sequence[int],
    *,
    batch: int = 1,
    device: torch.device | str = "cpu",
    precision: Literal["fp32", "bf16"] = "fp32",
) -> tuple[float, int]:
    """(sum of nats, masked tokens) of some blocks; arguments as in ``token_losses``.

    For ranks: give each ``numbers[rank::world_size]`` and add up both over the ranks. Under ZeRO 3
    every rank must score as many batches, so cut ``numbers`` to a multiple of the world size.
    """
    nats, count = 0.0, 0
    for losses in token_losses(
        model, held_out, numbers, batch=batch, device=device, precision=precision
    ):
        nats += float(losses.nats_M.sum())
        count += len(losses.nats_M)
    return nats, count


def _first_numbers(texts: NDArray[np.int64], chunk: int) -> NDArray[np.int64]:
    """The number of the first piece of each text, and that of all pieces at the end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(-(-texts // chunk))])


def _collate(
    sequences: Sequence[MaskedSequence], pad_id: int, device: torch.device
) -> tuple[dict[str, Tensor], Tensor]:
    """The model's arguments and targets_M; padding and global tokens only where there are some."""
    lengths = [len(sequence.inputs_N) for sequence in sequences]
    tokens_BN = np.full((len(sequences), max(lengths)), pad_id, dtype=np.int64)
    for row, sequence in enumerate(sequences):
        tokens_BN[row, : lengths[row]] = sequence.inputs_N
    index_M = [row * max(lengths) + s.positions_M for row, s in enumerate(sequences)]
    arrays: dict[str, NDArray[Any]] = {
        "tokens_BN": tokens_BN,
        "predict_index_M": np.concatenate(index_M),
    }
    if min(lengths) < max(lengths):
        arrays["padding_BN"] = np.arange(max(lengths)) >= np.array(lengths)[:, None]
    found = [sequence.global_G for sequence in sequences if sequence.global_G is not None]
    if found:
        slots = max([1, *map(len, found)])
        arrays["global_index_BG"] = np.full((len(found), slots), -1, dtype=np.int32)
        for row, positions_G in enumerate(found):
            arrays["global_index_BG"][row, : len(positions_G)] = positions_G
    targets_M = np.concatenate([sequence.targets_M for sequence in sequences])
    arguments = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
    return arguments, torch.from_numpy(targets_M).to(device)
