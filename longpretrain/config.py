"""A run as plain data: frozen dataclasses, each number with one home.

The sentence under each field says what it means; recipe.py reads them from YAML.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, cast

from longpretrain.errors import InputError
from longpretrain.mix_config import MixSource, check_mix


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and what seeds it."""

    dir: str = ""
    """The run folder. Empty: runs/ and the recipe's name."""
    seed: int = 1
    """Seeds the order, the masking, dropout and new weights."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is a GPU."""


@dataclass(frozen=True, kw_only=True)
class ModelConfigOverrides:
    """The model folder to start from, and what of its config.json this run changes."""

    path: str = ""
    """A Hugging Face RoBERTa or Longformer folder, or a checkpoint of ours. Required."""
    attention_window: tuple[int, ...] | None = None
    """Total window, even, one number for all layers or one per layer (Hugging Face's meaning).
    None: the folder's."""
    dilation: tuple[int, ...] | None = None
    """Dilation per head, or one number for all heads. None: the folder's. Not expressible in
    Hugging Face's format."""
    causal: bool | None = None
    """Keys after the query are out of reach. None: the folder's."""
    dropout: float | None = None
    """Hidden dropout. None: the folder's."""
    attention_dropout: float | None = None
    """Dropout of attention weights. None: the folder's."""
    attention_backend: Literal["auto", "fused", "portable", "reference"] = "auto"
    """Which implementation runs attention. auto: the fastest that can."""
    global_tokens: str = "none"
    """Which tokens are global: none, first, every_K (every K-th position), ids_A_B (these token
    ids) or sentence_ends (</s>, and the tokenizer's tokens like . ! ?).
    With none the global projections are frozen and exports copy the local ones into them."""
    train_only: Literal["all", "new_positions"] = "all"
    """new_positions: only the position rows beyond the learnt ones train; all else keeps its bits
    and has no optimizer state."""
    learnt_positions: int = 0
    """Positions whose rows are learnt, of a model that was lengthened since. 0: the folder's own
    number, which longpretrain convert writes."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpora, as `longpretrain prepare` wrote them, and how they are cut into sequences."""

    train: str = ""
    """Folder of training shards. Required, unless there is a mix."""
    mix: tuple[MixSource, ...] = ()
    """Several folders of training shards, instead of train: by name, each with its amount."""
    valid: str = ""
    """Folder of held-out shards. Empty: no evaluation during training."""
    max_tokens: int = 4096
    """Tokens per sequence, special tokens included."""
    blocks: Literal["full_sentences", "document", "packed"] = "full_sentences"
    """full_sentences: a stream across documents (RoBERTa's recipe); document: never mixes two
    documents; packed: pieces of documents side by side, each framed and attending to itself."""
    loader_workers: int = 0
    """Processes that make batches beside each rank. 0: a background thread of the rank."""


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Which tokens the model must guess."""

    probability: float = 0.15
    """Share of the maskable tokens that is chosen; of these 80 % become <mask>, 10 % a random
    token, 10 % stay."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Sequences per update. Accumulation follows from the world size and must divide exactly."""

    global_sequences: int = 64
    """Sequences per update over all ranks."""
    micro_sequences: int = 1
    """Sequences that one rank holds in memory at a time."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW in torch's arithmetic."""

    lr: float = 3e-5
    """Peak learning rate."""
    betas: tuple[float, ...] = (0.9, 0.98)
    """Decay rates of the two moments."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    weight_decay: float = 0.01
    """Decoupled decay, on all parameters that train (as in fairseq's RoBERTa) but
    decay_excludes."""
    decay_excludes: tuple[str, ...] = ()
    """Parameters whose name contains one of these are not decayed, such as bias or LayerNorm."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient; 0 does not clip."""
    max_skipped: int = 20
    """Updates in a row with a non-finite loss or gradient, all skipped, that stop the run."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate by update: linear warm-up, then decay to zero at the end."""

    total_steps: int = 65_000
    """Updates of the run."""
    warmup_steps: int = 500
    """Updates until the peak; update n of them uses peak * n / warmup_steps."""
    decay: Literal["polynomial", "constant"] = "polynomial"
    """After warm-up: polynomial to 0 at total_steps, or constant."""
    power: float = 3.0
    """Power of the polynomial; no effect with constant."""


@dataclass(frozen=True, kw_only=True)
class ZeroConfig:
    """How DeepSpeed shards the states."""

    config: str = "ds_configs/zero1.json"
    """A file with the keys that only DeepSpeed owns; a number that a recipe owns is refused
    there."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When states are written, and how many stay."""

    every_steps: int = 500
    """Updates between checkpoints; the last update always has one. 0: only at the end and at a
    signal."""
    every_minutes: float = 0.0
    """Minutes between checkpoints, beside every_steps. 0: off."""
    keep: int = 3
    """Newest checkpoints that stay on disk; 0 keeps all. On a full disk the oldest of them goes
    before the next is written, never the newest."""
    keep_every_steps: int = 0
    """Checkpoints of steps that are a multiple of this stay for good, beside keep. 0: none."""
    asynchronous: bool = True
    """Write checkpoints while training goes on; it needs host memory for a copy of this rank's
    share (of ZeRO 3 on CPUs, for two). false: the ranks wait until one is written."""


@dataclass(frozen=True, kw_only=True)
class WatchdogConfig:
    """When a run that lost a rank, or stands still, is ended."""

    dead_after_s: float = 10.0
    """Seconds without a sign of life after which a rank counts as dead."""
    hung_after_s: float = 1800.0
    """Seconds without progress after which the run ends with the stacks of all ranks. 0: never."""


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Which implementation runs where there are several; attention has its own key in model."""

    layer_norm: Literal["auto", "torch", "apex"] = "auto"
    """auto: NVIDIA apex's fused layer norm on a GPU if it is installed, else torch's."""
    adam: Literal["auto", "torch", "apex"] = "auto"
    """auto: torch's AdamW, whose bits are the same after a resume."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Scoring of held-out data during training."""

    every_steps: int = 500
    """Updates between evaluations. 0: never."""
    batches: int = 16
    """Held-out stretches of 4,096 tokens scored each time, evenly spaced over the corpus."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run reports."""

    every_steps: int = 10
    """Updates between lines on the console; metrics.jsonl has every update."""
    tensorboard: bool = True
    """Also write TensorBoard events into the run folder."""
    sample_ids: bool = False
    """Also write into metrics.jsonl which sequences each update took, by identity and in order."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """A whole run, resolved. Saved as config.yaml in the run folder."""

    name: str = "run"
    """The recipe's name: the run folder's by default."""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfigOverrides = field(default_factory=ModelConfigOverrides)
    data: DataConfig = field(default_factory=DataConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Type of the working weights and of the arithmetic; master weights and moments are fp32.
    fp16: GPU only."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass: much less memory, about a third more time."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    log: LogConfig = field(default_factory=LogConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.run.dir or f"runs/{self.name}")


# Keys that a run may change when it goes on: none of them changes which samples are seen, or in
# what order, nor the curve beyond rounding (design: the checkpoint holds whole fp32 parameters).
# data.train and data.mix: any part that leaves the samples so far as they were (tasks/sources.py).
MAY_CHANGE = (
    "name",
    "run.dir",
    "run.device",
    "model.path",
    "model.attention_backend",
    "data.train",
    "data.mix",
    "data.valid",
    "data.loader_workers",
    "batch.micro_sequences",
    "precision",
    "zero.config",
    "activation_checkpointing",
    "checkpoint.every_steps",
    "checkpoint.every_minutes",
    "checkpoint.keep",
    "checkpoint.keep_every_steps",
    "checkpoint.asynchronous",
    "optim.max_skipped",
    "watchdog.dead_after_s",
    "watchdog.hung_after_s",
    "kernels.layer_norm",
    "kernels.adam",
    "evaluate.every_steps",
    "evaluate.batches",
    "log.every_steps",
    "log.tensorboard",
    "log.sample_ids",
)


def to_tree(config: Config) -> dict[str, Any]:
    """Nested dictionaries and lists: what config.yaml holds."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, Fraction):
            return value.numerator if value.denominator == 1 else str(value)
        return list(value) if isinstance(value, tuple) else value

    tree = dataclasses.asdict(config)
    tree["data"]["mix"] = {
        source.pop("name"): {key: value for key, value in source.items() if value is not None}
        for source in tree["data"]["mix"]
    }
    return cast(dict[str, Any], plain(tree))


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values, in order."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """Keys that two runs of one recipe must share and these two do not: (key, old value, new
    value).
    """
    before, after = dict(flat(to_tree(old))), dict(flat(to_tree(new)))
    return [
        (key, before[key], after[key])
        for key in before
        if key not in MAY_CHANGE and not key.startswith("data.mix.") and before[key] != after[key]
    ]


def _check(config: Config) -> None:
    """Ranges that need no file; relations to data, model and ranks are checked where those are
    known.
    """
    _check_signs(config)
    _check_shares(config)
    check_mix(config.data.mix, config.data.train)
    if (
        config.schedule.warmup_steps >= config.schedule.total_steps
        and config.schedule.decay == "polynomial"
    ):
        raise InputError(
            "recipe key schedule.warmup_steps",
            got=config.schedule.warmup_steps,
            wanted=f"less than schedule.total_steps = {config.schedule.total_steps}",
            way_out="Shorten the warm-up or lengthen the run.",
        )
    if config.data.max_tokens < 4:
        raise InputError(
            "recipe key data.max_tokens",
            got=config.data.max_tokens,
            wanted="4 or more (two are <s> and </s>)",
            way_out="4096 is the published value.",
        )


_POSITIVE = (
    "data.max_tokens", "batch.global_sequences", "batch.micro_sequences", "schedule.total_steps",
    "log.every_steps", "optim.eps", "optim.max_skipped", "watchdog.dead_after_s", "schedule.power",
)  # fmt: skip
_AT_LEAST_ZERO = (
    "run.seed", "model.learnt_positions", "data.loader_workers", "optim.lr", "optim.weight_decay",
    "optim.clip_norm", "schedule.warmup_steps", "checkpoint.every_steps",
    "checkpoint.every_minutes", "checkpoint.keep", "checkpoint.keep_every_steps",
    "watchdog.hung_after_s", "evaluate.every_steps", "evaluate.batches",
)  # fmt: skip


def _check_signs(config: Config) -> None:
    for key in _POSITIVE:
        value = attrgetter(key)(config)
        if value <= 0:
            raise InputError(
                f"recipe key {key}", got=value, wanted="more than 0", way_out=f"Set {key}."
            )
    for key in _AT_LEAST_ZERO:
        value = attrgetter(key)(config)
        if value < 0 or value == float("inf"):
            raise InputError(
                f"recipe key {key}", got=value, wanted="0 or more", way_out=f"Set {key}."
            )


def _check_shares(config: Config) -> None:
    shares = {
        "masking.probability": config.masking.probability,
        "model.dropout": config.model.dropout or 0.0,
        "model.attention_dropout": config.model.attention_dropout or 0.0,
    }
    for key, share in shares.items():
        if not 0 <= share < 1:
            raise InputError(
                f"recipe key {key}", got=share, wanted="0 <= x < 1", way_out=f"Set {key}."
            )
    if round(256 * shares["model.attention_dropout"]) == 256:  # attention counts in 256ths
        raise InputError(
            "recipe key model.attention_dropout",
            got=config.model.attention_dropout,
            wanted="at most 255/256 when rounded to 256ths",
            way_out="0.1 is the published value.",
        )
    if config.masking.probability == 0:
        raise InputError(
            "recipe key masking.probability",
            got=0,
            wanted="more than 0",
            way_out="0.15 is the published value.",
        )
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        raise InputError(
            "recipe key optim.betas",
            got=list(config.optim.betas),
            wanted="two numbers, 0 <= x < 1",
            way_out="[0.9, 0.98] is the published value.",
        )
