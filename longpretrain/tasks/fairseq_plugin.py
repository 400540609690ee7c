"""The plugin for fairseq's own trainer. DATA is a folder that ``longpretrain prepare`` wrote.

    fairseq-train DATA --user-dir longpretrain --task long_masked_lm --criterion long_masked_lm \
        --arch longformer --model-path MODEL --tokens-per-sample 4096 --batch-size 1 \
        --update-freq 64 --optimizer longpretrain_adamw --lr-scheduler longpretrain_polynomial \
        --lr 3e-5 --warmup-updates 500 --max-update 65000 --disable-validation --save-dir DIR

Samples, masking, order and loss are those of
masked_lm.py, so this trainer and our own see the same numbers. Importing this module registers the
task and the criterion ``long_masked_lm``, and through its two neighbours the model, the optimizer
``longpretrain_adamw`` and the schedule ``longpretrain_polynomial``.

fairseq's own checkpoints hold tensors and plain data only, as every part here has a dataclass for
its options: torch reads them back with ``weights_only=True``.
"""
# No `from __future__ import annotations` here: fairseq reads the types of option fields, in
# typing's own forms.
# ruff: noqa: UP006, UP035, UP045, RUF009

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, List, Optional

import torch
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.tasks import FairseqTask, register_task
from omegaconf import II, MISSING

from longpretrain.config import Config, DataConfig, MaskingConfig
from longpretrain.errors import InputError
from longpretrain.recipe import from_tree
from longpretrain.schedule import hidden_dropout_seed
from longpretrain.tasks import fairseq_model, fairseq_optim
from longpretrain.tasks.fairseq_batches import HeldOutIterator, NumberedSamples, TrainIterator
from longpretrain.tasks.masked_lm import MaskedLMTask

__all__ = ["LongMaskedLMCriterion", "LongMaskedLMTask", "fairseq_model", "fairseq_optim"]

_DATA, _MASKING = DataConfig(), MaskingConfig()


@dataclass
class LongMaskedLMConfig(FairseqDataclass):  # type: ignore[misc]
    """Options of ``--task long_masked_lm``."""

    data: str = field(
        default=MISSING, metadata={"help": "training shards: a folder of `longpretrain prepare`"}
    )
    valid_data: str = field(
        default="", metadata={"help": "held-out shards; without them say --disable-validation"}
    )
    model_path: str = field(
        default="",
        metadata={
            "help": "Hugging Face RoBERTa or Longformer folder to start from; without it the "
            "weights are new and the tokenizer is RoBERTa's"
        },
    )
    tokens_per_sample: int = field(
        default=_DATA.max_tokens, metadata={"help": "tokens per sequence, special tokens included"}
    )
    blocks: str = field(
        default=_DATA.blocks,
        metadata={
            "help": "full_sentences: a stream across documents; document: never mixes two; packed: "
            "pieces of several side by side, each attending to itself"
        },
    )
    mask_prob: float = field(
        default=_MASKING.probability, metadata={"help": "share of the tokens that is chosen"}
    )
    global_tokens: str = field(
        default="none", metadata={"help": "none, first, every_K, ids_A_B or sentence_ends"}
    )
    train_only: str = field(
        default="all",
        metadata={
            "help": "all, or new_positions: only the position rows beyond the learnt ones train"
        },
    )
    seed: int = II("common.seed")
    batch_size: Optional[int] = II("dataset.batch_size")
    update_freq: List[int] = II("optimization.update_freq")


@register_task("long_masked_lm", dataclass=LongMaskedLMConfig)
class LongMaskedLMTask(FairseqTask):  # type: ignore[misc]
    """Masked language modelling on long documents, for fairseq's trainer."""

    def __init__(self, cfg: Any, **kwargs: Any) -> None:
        super().__init__(cfg, **kwargs)
        self._model: fairseq_model.LongformerModel | None = None
        self._seeded_update: int | None = None
        self._rank = 0

    def build_model(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        """The model of ``--arch`` (fairseq builds it before it loads data).

        Raises:
            InputError: see LongformerModel.build_model; or its positions are too few.
        """
        arch = getattr(cfg, "_name", None)
        if ARCH_MODEL_REGISTRY.get(arch) is not fairseq_model.LongformerModel:
            raise InputError(
                "--arch", got=arch, wanted="a model of this task",
                way_out="Say --arch longformer_base, longformer_large or longformer.",
            )  # fmt: skip
        model = super().build_model(cfg, from_checkpoint)
        places = model.model.config.max_tokens
        if self.cfg.tokens_per_sample > places:
            raise InputError(
                "--tokens-per-sample", got=self.cfg.tokens_per_sample,
                wanted=f"at most {places}, the positions of the model",
                way_out="Shorten it, or lengthen the model: --max-positions, longpretrain convert.",
            )  # fmt: skip
        self._model = model
        return model

    def build_criterion(self, cfg: Any, from_checkpoint: bool = False) -> Any:
        """The task's own criterion; fairseq would take cross_entropy where none is named."""
        if cfg._name != "long_masked_lm":
            raise InputError(
                "--criterion", got=cfg._name, wanted="long_masked_lm",
                way_out="Say --criterion long_masked_lm.",
            )  # fmt: skip
        return super().build_criterion(cfg, from_checkpoint)

    def load_dataset(self, split: str, *args: Any, **kwargs: Any) -> None:
        """Opens the shards of "train" (DATA) or "valid" (``--valid-data``).

        Raises:
            InputError: no such shards, or another tokenizer than the model's.
        """
        if split not in ("train", "valid"):
            raise InputError(
                "--train-subset or --valid-subset", got=split, wanted="train or valid",
                way_out="Leave it out; name the folders by DATA and --valid-data.",
            )  # fmt: skip
        if split == "valid" and not self.cfg.valid_data:
            raise InputError(
                "--valid-data", got="nothing", wanted="a folder that longpretrain prepare wrote",
                way_out="Say --valid-data DIR, or --disable-validation.",
            )  # fmt: skip
        recipe = self._recipe()
        assert self._model is not None
        folder = Path(self.cfg.model_path) if self.cfg.model_path else None
        task = MaskedLMTask(
            recipe,
            folder,
            split=split,
            new_model=None if folder else self._model.model.config,
        )
        self.datasets[split] = NumberedSamples(task)

    def get_batch_iterator(
        self,
        dataset: NumberedSamples,
        *,
        max_sentences: int | None = None,
        num_shards: int = 1,
        shard_id: int = 0,
        num_workers: int = 0,
        epoch: int = 1,
        **unused: Any,
    ) -> TrainIterator | HeldOutIterator:
        """The samples of a split in our order.

        fairseq's other arguments (its seed, filters by length, shuffling, buffers) have no effect.
        """
        if dataset is not self.datasets.get("train"):
            return HeldOutIterator(
                dataset,
                micro_sequences=max_sentences or self._micro_sequences(),
                num_ranks=num_shards,
                rank=shard_id,
                num_workers=num_workers,
            )
        self._rank = shard_id
        iterator = TrainIterator(
            dataset,
            epoch=epoch,
            accumulation=self._accumulation(),
            micro_sequences=self._micro_sequences(),
            num_ranks=num_shards,
            rank=shard_id,
            num_workers=num_workers,
        )
        # The task keys attention dropout by the update that a sample belongs to.
        assert iterator.global_sequences == dataset.task.config.batch.global_sequences
        return iterator

    def train_step(
        self, sample: Any, model: Any, criterion: Any, optimizer: Any, update_num: int, *rest: Any,
        **named: Any,
    ) -> Any:  # fmt: skip
        """Forward and backward of one micro-batch, hidden dropout seeded as in our engine.

        fairseq seeds torch's generator with ``seed + updates done`` at the start of every update,
        alike on all ranks; this replaces it before the update's first micro-batch.
        """
        if update_num != self._seeded_update:
            self._seeded_update = update_num
            torch.manual_seed(hidden_dropout_seed(self.cfg.seed, update_num + 1, self._rank))
        return super().train_step(sample, model, criterion, optimizer, update_num, *rest, **named)

    def has_sharded_data(self, split: str) -> bool:
        """DATA is one folder, whatever characters its name has."""
        return False

    def _recipe(self) -> Config:
        assert self._model is not None, "the model comes before the data"
        cfg = self.cfg
        micro = self._micro_sequences()
        ranks = distributed_utils.get_data_parallel_world_size()
        return from_tree(
            {
                "run": {"seed": cfg.seed},
                "model": {
                    "path": cfg.model_path,
                    "global_tokens": cfg.global_tokens,
                    "train_only": cfg.train_only,
                    "learnt_positions": self._model.model.config.learnt_positions,
                },
                "data": {
                    "train": cfg.data,
                    "valid": cfg.valid_data,
                    "max_tokens": cfg.tokens_per_sample,
                    "blocks": cfg.blocks,
                },
                "masking": {"probability": cfg.mask_prob},
                "batch": {
                    "micro_sequences": micro,
                    "global_sequences": micro * self._accumulation() * ranks,
                },
            }
        )

    def _micro_sequences(self) -> int:
        size: int | None = self.cfg.batch_size
        if not size:
            raise InputError(
                "--batch-size", got="nothing", wanted="sequences per micro-batch",
                way_out="Say --batch-size N (--max-tokens cannot hold sequences of one length).",
            )  # fmt: skip
        return size

    def _accumulation(self) -> int:
        found = list(self.cfg.update_freq)
        if len(set(found)) != 1:
            raise InputError(
                "--update-freq", got=found, wanted="one number for the whole run",
                way_out="Say --update-freq N.",
            )  # fmt: skip
        return int(found[0])


@dataclass
class LongMaskedLMCriterionConfig(FairseqDataclass):  # type: ignore[misc]
    """No options; without a dataclass fairseq would store all of argparse's in its checkpoints."""


@register_criterion("long_masked_lm", dataclass=LongMaskedLMCriterionConfig)
class LongMaskedLMCriterion(FairseqCriterion):  # type: ignore[misc]
    """The task's loss in nats, summed: fairseq divides by the masked tokens of the update."""

    def __init__(self, cfg: Any, task: LongMaskedLMTask) -> None:
        super().__init__(task)

    def forward(
        self, model: Any, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[torch.Tensor, int, dict[str, Any]]:
        """(summed loss, masked tokens, what to log)."""
        loss = MaskedLMTask.loss(model, sample["inputs"])
        count = MaskedLMTask.count(sample["inputs"])
        logged = {
            "loss": loss.detach(),
            "ntokens": sample["ntokens"],
            "nsentences": sample["nsentences"],
            "sample_size": count,
        }
        return loss, count, logged

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict[str, Any]]) -> None:
        """Logs the loss in bits per masked token, and its perplexity."""
        loss_sum = sum(log.get("loss", 0) for log in logging_outputs)
        count = sum(log.get("sample_size", 0) for log in logging_outputs)
        metrics.log_scalar("loss", loss_sum / max(count, 1) / math.log(2), count, round=5)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["loss"].avg))

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """All of them are sums."""
        return True
