"""A run as plain data: frozen dataclasses, read from a YAML recipe and dotted overrides.

Every number of a run has one home and it is here; the sentence under each field says what it means.
``load_recipe("demo", ["optim.lr=1e-4"])`` reads a packaged recipe (or a YAML file) and applies the
overrides, later ones winning. An unknown key is refused with the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import yaml

from longpretrain.errors import InputError

RECIPES = Path(__file__).parent / "recipes"


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
    """Total window, even, one number for all layers or one per layer (Hugging Face's meaning). None: the folder's."""
    dilation: tuple[int, ...] | None = None
    """Dilation per head, or one number for all heads. None: the folder's. Not expressible in Hugging Face's format."""
    causal: bool | None = None
    """Keys after the query are out of reach. None: the folder's."""
    dropout: float | None = None
    """Hidden dropout. None: the folder's."""
    attention_dropout: float | None = None
    """Dropout of attention weights. None: the folder's."""
    attention_backend: Literal["auto", "fused", "portable", "reference"] = "auto"
    """Which implementation runs attention. auto: the fastest that can."""
    global_tokens: str = "none"
    """Which tokens are global: none, first, every_K (every K-th position) or ids_A_B (these token ids).
    With none the global projections are frozen and exports copy the local ones into them."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpora, as `longpretrain prepare` wrote them, and how they are cut into sequences."""

    train: str = ""
    """Folder of training shards. Required."""
    valid: str = ""
    """Folder of held-out shards. Empty: no evaluation during training."""
    max_tokens: int = 4096
    """Tokens per sequence, special tokens included."""
    blocks: Literal["full_sentences", "document"] = "full_sentences"
    """full_sentences: a stream across documents (RoBERTa's recipe); document: never mixes two documents."""


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Which tokens the model must guess."""

    probability: float = 0.15
    """Share of the maskable tokens that is chosen; of these 80 % become <mask>, 10 % a random token, 10 % stay."""


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
    """Decoupled decay, on all parameters that train (as in fairseq's RoBERTa) but decay_excludes."""
    decay_excludes: tuple[str, ...] = ()
    """Parameters whose name contains one of these are not decayed, such as bias or LayerNorm."""
    clip_norm: float = 0.0
    """Largest norm of the whole gradient; 0 does not clip."""


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
    """A file with the keys that only DeepSpeed owns; a number that a recipe owns is refused there."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When states are written, and how many stay."""

    every_steps: int = 500
    """Updates between checkpoints; the last update always has one. 0: only at the end and at a signal."""
    every_minutes: float = 0.0
    """Minutes between checkpoints, beside every_steps. 0: off."""
    keep: int = 3
    """Newest checkpoints that stay on disk; 0 keeps all."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Scoring of held-out data during training."""

    every_steps: int = 500
    """Updates between evaluations. 0: never."""
    batches: int = 16
    """Held-out sequences scored each time."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run reports."""

    every_steps: int = 10
    """Updates between lines on the console; metrics.jsonl has every update."""
    tensorboard: bool = True
    """Also write TensorBoard events into the run folder."""


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
    """Type of the working weights and of the arithmetic; master weights and moments are fp32. fp16: GPU only."""
    zero: ZeroConfig = field(default_factory=ZeroConfig)
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass: much less memory, about a third more time."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        _check(self)

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return Path(self.run.dir or f"runs/{self.name}")


# Keys that a run may change when it goes on: none of them changes which samples are seen, or in
# what order, nor the curve beyond rounding (design: the checkpoint holds whole fp32 parameters).
MAY_CHANGE = (
    "name", "run.dir", "run.device", "model.path", "model.attention_backend", "data.train", "data.valid",
    "batch.micro_sequences", "precision", "zero.config", "activation_checkpointing",
    "checkpoint.every_steps", "checkpoint.every_minutes", "checkpoint.keep",
    "evaluate.every_steps", "evaluate.batches", "log.every_steps", "log.tensorboard",
)  # fmt: skip


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> Config:
    """Reads a recipe: a YAML file, or the name of a packaged one, with ``key=value`` overrides.

    Raises:
        InputError: no such recipe, not YAML, an unknown key, or a value that does not fit.
    """
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml"):
        path = RECIPES / f"{recipe}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise InputError(
            "recipe", got=recipe, wanted="a .yaml file or a packaged recipe",
            way_out=f"Packaged recipes: {known}.",
        )  # fmt: skip
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(
            f"recipe {path}",
            got=error,
            wanted="YAML in UTF-8",
            way_out="Mend the file at that place.",
        ) from error
    if not isinstance(tree, dict):
        raise InputError(
            f"recipe {path}", got=type(tree).__name__, wanted="sections with keys",
            way_out="See the packaged recipes for the form.",
        )  # fmt: skip
    tree.setdefault("name", path.stem)
    for override in overrides:
        _override(tree, override)
    return from_tree(tree)


def from_tree(tree: dict[str, Any]) -> Config:
    """A Config from nested dictionaries, such as a saved config.yaml."""
    return cast(Config, _build(Config, tree, ""))


def to_tree(config: Config) -> dict[str, Any]:
    """Nested dictionaries and lists: what config.yaml holds."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        return list(value) if isinstance(value, tuple) else value

    return cast(dict[str, Any], plain(dataclasses.asdict(config)))


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values, in order."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """Keys that two runs of one recipe must share and these two do not: (key, old value, new value)."""
    before, after = dict(flat(to_tree(old))), dict(flat(to_tree(new)))
    return [
        (key, before[key], after[key])
        for key in before
        if key not in MAY_CHANGE and before[key] != after[key]
    ]


def _override(tree: dict[str, Any], override: str) -> None:
    dotted, equals, text = override.partition("=")
    if not equals or not dotted:
        raise InputError(
            "override", got=override, wanted="key=value", way_out="For example optim.lr=1e-4."
        )
    *sections, key = dotted.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise InputError(
                f"key {dotted}", got=f"{section} as a section", wanted="a section of a recipe",
                way_out=f"{section} is a single value: write {section}=VALUE.",
            )  # fmt: skip
    try:
        tree[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(
            f"override {override}", got="a value that is not YAML", wanted="a number, word or [list]",
            way_out=f"YAML says: {error}",
        ) from error  # fmt: skip


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, dict):
        raise InputError(
            f"section {prefix.rstrip('.')}", got=repr(tree), wanted="keys and values",
            way_out=f"Write {prefix}KEY=VALUE.",
        )  # fmt: skip
    hints = typing.get_type_hints(cls)
    for key in tree:
        if key not in hints:
            raise _unknown_key(f"{prefix}{key}")
    values = {}
    for key, value in tree.items():
        hint = hints[key]
        is_section = dataclasses.is_dataclass(hint)
        values[key] = (
            _build(cast(type, hint), value, f"{prefix}{key}.")
            if is_section
            else _value(f"{prefix}{key}", hint, value)
        )
    return cls(**values)


def _unknown_key(key: str) -> InputError:
    known = [name for name, _ in flat(to_tree(Config()))]
    # A key in the wrong section (lr, train.lr) is as common a slip as a misspelt one.
    last = {name.rsplit(".", 1)[-1]: name for name in known}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    leaf = difflib.get_close_matches(key.rsplit(".", 1)[-1], list(last), n=1, cutoff=0.8)
    nearest = last[leaf[0]] if leaf else (near[0] if near else None)
    way_out = f"Did you mean {nearest}?" if nearest else f"Known keys: {', '.join(known)}."
    return InputError(
        f"recipe key {key}", got="an unknown key", wanted="a known one", way_out=way_out
    )


def _value(key: str, hint: Any, value: Any) -> Any:
    """The value in the field's type, or an InputError. Integers may be written 1e5, windows as one number."""
    choices = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        if value in choices and isinstance(value, str):
            return value
        raise InputError(
            f"recipe key {key}",
            got=repr(value),
            wanted=f"one of {', '.join(choices)}",
            way_out="Pick one.",
        )
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        return _value(
            key, next(choice for choice in choices if choice is not types.NoneType), value
        )
    if typing.get_origin(hint) is tuple:
        entries = value if isinstance(value, list | tuple) else [value]
        return tuple(_value(key, choices[0], entry) for entry in entries)
    return _scalar(key, hint, value)


def _scalar(key: str, kind: type, value: Any) -> Any:
    if kind is str and isinstance(value, str):
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind in (int, float) and not isinstance(value, bool) and value is not None:
        try:  # YAML 1.1 reads 1e-4 as a string
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
        if kind is float and number == number:
            return number
        if kind is int and number == number and number.is_integer():
            return int(number)
    raise InputError(
        f"recipe key {key}", got=repr(value), wanted=f"a value of type {kind.__name__}",
        way_out=f"Write {key}=VALUE or mend the recipe.",
    )  # fmt: skip


def _check(config: Config) -> None:
    """Ranges that need no file; relations to data, model and ranks are checked where those are known."""
    positive = {
        "data.max_tokens": config.data.max_tokens,
        "batch.global_sequences": config.batch.global_sequences,
        "batch.micro_sequences": config.batch.micro_sequences,
        "schedule.total_steps": config.schedule.total_steps,
        "log.every_steps": config.log.every_steps,
        "optim.eps": config.optim.eps,
        "schedule.power": config.schedule.power,
    }
    for key, value in positive.items():
        if value <= 0:
            raise InputError(
                f"recipe key {key}", got=value, wanted="more than 0", way_out=f"Set {key}."
            )
    at_least_zero = {
        "run.seed": config.run.seed,
        "optim.lr": config.optim.lr,
        "optim.weight_decay": config.optim.weight_decay,
        "optim.clip_norm": config.optim.clip_norm,
        "schedule.warmup_steps": config.schedule.warmup_steps,
        "checkpoint.every_steps": config.checkpoint.every_steps,
        "checkpoint.every_minutes": config.checkpoint.every_minutes,
        "checkpoint.keep": config.checkpoint.keep,
        "evaluate.every_steps": config.evaluate.every_steps,
        "evaluate.batches": config.evaluate.batches,
    }
    for key, value in at_least_zero.items():
        if value < 0 or value == float("inf"):
            raise InputError(
                f"recipe key {key}", got=value, wanted="0 or more", way_out=f"Set {key}."
            )
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
