"""The model as fairseq builds it: --arch longformer_base, longformer_large or longformer.

The first two are the published ones (Beltagy et al. 2020, section 5: RoBERTa's sizes, 4,096
positions, window 512); the command line may change any size. ``longformer`` has no sizes of its own
and takes those of the folder of ``--model-path``.
"""
# No `from __future__ import annotations` here: fairseq reads the types of option fields, in
# typing's own forms.
# ruff: noqa: UP006, UP035, UP045

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, List, Optional

from fairseq.dataclass import FairseqDataclass
from fairseq.models import BaseFairseqModel, register_model, register_model_architecture
from torch import Tensor

from longpretrain.config import Config, ModelConfigOverrides
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.errors import InputError
from longpretrain.model.encoder import ModelConfig
from longpretrain.model.folder import changed, load_model, read_config
from longpretrain.model.lm_head import LongformerForMaskedLM
from longpretrain.tasks.masked_lm import model_changes

# fairseq's names of the sizes -> ours
_SIZES = {
    "encoder_layers": "num_layers",
    "encoder_embed_dim": "hidden_size",
    "encoder_attention_heads": "num_heads",
    "encoder_ffn_embed_dim": "intermediate_size",
    "max_positions": "max_tokens",
}
_WINDOW = 512


@dataclass
class LongformerConfig(FairseqDataclass):  # type: ignore[misc]
    """Options of ``--arch longformer*``; the sizes have RoBERTa's names."""

    encoder_layers: int = field(default=0, metadata={"help": "transformer layers"})
    encoder_embed_dim: int = field(default=0, metadata={"help": "channels of a token"})
    encoder_attention_heads: int = field(default=0, metadata={"help": "attention heads per layer"})
    encoder_ffn_embed_dim: int = field(
        default=0, metadata={"help": "channels inside the feed-forward part"}
    )
    max_positions: int = field(
        default=0, metadata={"help": "tokens that the position table can place, such as 4096"}
    )
    attention_window: List[int] = field(
        default_factory=list,
        metadata={"help": "total window, even: one number, or one per layer (new model: 512)"},
    )
    dilation: List[int] = field(
        default_factory=list, metadata={"help": "dilation: one number, or one per head"}
    )
    dropout: Optional[float] = field(
        default=None, metadata={"help": "hidden dropout (new model: 0.1)"}
    )
    attention_dropout: Optional[float] = field(
        default=None, metadata={"help": "dropout of attention weights (new model: 0.1)"}
    )
    attention_backend: str = field(
        default="auto", metadata={"help": "auto, fused, portable or reference"}
    )
    learnt_positions: int = field(
        default=0,
        metadata={
            "help": "with --train-only new_positions: positions whose rows are learnt (default: "
            "what the folder of --model-path says)"
        },
    )
    checkpoint_activations: bool = field(
        default=False, metadata={"help": "recompute each layer in the backward pass"}
    )


@register_model("longformer", dataclass=LongformerConfig)
class LongformerModel(BaseFairseqModel):  # type: ignore[misc]
    """Our model under fairseq's interface; its parameters are named ``model.`` + Hugging Face's."""

    def __init__(self, model: LongformerForMaskedLM) -> None:
        super().__init__()
        self.model = model

    @classmethod
    def build_model(cls, args: Any, task: Any) -> "LongformerModel":
        """New weights, or those of the task's ``--model-path``.

        Raises:
            InputError: sizes that are missing, do not fit together, or are not the folder's.
        """
        recipe = Config(
            model=ModelConfigOverrides(
                attention_window=tuple(args.attention_window) or None,
                dilation=tuple(args.dilation) or None,
                dropout=args.dropout,
                attention_dropout=args.attention_dropout,
                attention_backend=args.attention_backend,
                learnt_positions=args.learnt_positions,
            )
        )
        recompute = args.checkpoint_activations
        if task.cfg.model_path:
            folder = Path(task.cfg.model_path)
            stored = read_config(folder)
            _check_sizes(args, stored, folder)
            changes = model_changes(recipe)
            model = load_model(folder, changes=changes, activation_checkpointing=recompute)
        else:
            model = LongformerForMaskedLM(
                _new_config(args, recipe), activation_checkpointing=recompute
            )
        if task.cfg.train_only == "new_positions":
            model.train_new_positions_only()
        elif task.cfg.global_tokens == "none":
            model.freeze_global_projections()
        return cls(model)

    def forward(self, tokens_BN: Tensor, **inputs: Tensor | None) -> Tensor:
        """As LongformerForMaskedLM.forward."""
        out: Tensor = self.model(tokens_BN, **inputs)
        return out


def _new_config(args: Any, recipe: Config) -> ModelConfig:
    missing = [name for name in _SIZES if not getattr(args, name)]
    if missing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        raise InputError(
            "--arch longformer without --model-path", got=f"no {flags}", wanted="all sizes",
            way_out="Say --arch longformer_base or longformer_large, or --model-path FOLDER.",
        )  # fmt: skip
    sizes = {ours: getattr(args, name) for name, ours in _SIZES.items()}
    tokenizer = load_tokenizer()
    plain = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        pad_id=tokenizer.pad_id,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        max_position_embeddings=sizes.pop("max_tokens") + tokenizer.pad_id + 1,
        attention_window=(_WINDOW,) * sizes["num_layers"],
        **sizes,
    )
    return changed(plain, model_changes(recipe))


def _check_sizes(args: Any, stored: ModelConfig, folder: Path) -> None:
    """Refuses a size, given by itself or by --arch, that is not the folder's."""
    for name, ours in _SIZES.items():
        asked, has = getattr(args, name), getattr(stored, ours)
        if asked and asked != has:
            raise InputError(
                f"--{name.replace('_', '-')} (by itself or by --arch)", got=asked,
                wanted=f"{has}, that of {folder}",
                way_out="Say --arch longformer: it takes every size from the folder.",
            )  # fmt: skip


def _fill_in(args: Any, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        if not getattr(args, name, 0):
            setattr(args, name, size)


@register_model_architecture("longformer", "longformer_base")  # type: ignore[untyped-decorator]
def longformer_base(args: Any) -> None:
    """12 layers of 768: 148,711,257 parameters."""
    _fill_in(
        args,
        {
            "encoder_layers": 12,
            "encoder_embed_dim": 768,
            "encoder_attention_heads": 12,
            "encoder_ffn_embed_dim": 3072,
            "max_positions": 4096,
        },
    )


@register_model_architecture("longformer", "longformer_large")  # type: ignore[untyped-decorator]
def longformer_large(args: Any) -> None:
    """24 layers of 1,024: 434,653,273 parameters."""
    _fill_in(
        args,
        {
            "encoder_layers": 24,
            "encoder_embed_dim": 1024,
            "encoder_attention_heads": 16,
            "encoder_ffn_embed_dim": 4096,
            "max_positions": 4096,
        },
    )
