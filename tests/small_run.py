"""A small corpus, a small RoBERTa and its long version, and a recipe to train them: real
components."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import yaml

from longpretrain.convert.lengthen import convert
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.model.encoder import ModelConfig
from longpretrain.model.folder import save_model
from longpretrain.model.lm_head import LongformerForMaskedLM
from longpretrain.prepare import prepare

WORDS = """
the nation and its people shall have peace work trade law union states congress war gold silver
labor land water public service year duty power free great common good revenue treaty
""".split()  # noqa: SIM905


def make_small_run(folder: Path) -> Path:
    """Writes corpus, models and recipe.yaml into a folder; paths in the recipe are absolute."""
    write_text(folder / "text" / "train", documents=40, seed=1)
    write_text(folder / "text" / "valid", documents=6, seed=2)
    for split in ("train", "valid"):
        prepare([folder / "text" / split], folder / "data" / split)
    make_roberta(folder / "models" / "short")
    convert(
        folder / "models" / "short", folder / "models" / "long", positions=128, attention_window=16
    )
    recipe = {
        "model": {
            "path": str(folder / "models" / "long"),
            "dropout": 0.1,
            "attention_dropout": 0.1,
        },
        "data": {
            "train": str(folder / "data" / "train"),
            "valid": str(folder / "data" / "valid"),
            "max_tokens": 128,
        },
        "batch": {"global_sequences": 4, "micro_sequences": 1},
        "optim": {"lr": 1e-3, "clip_norm": 1.0},
        "schedule": {"total_steps": 6, "warmup_steps": 2},
        "precision": "fp32",
        "checkpoint": {"every_steps": 3},
        "evaluate": {"every_steps": 3, "batches": 3},
        "log": {"every_steps": 1, "tensorboard": False},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return folder


def write_text(folder: Path, *, documents: int, seed: int) -> None:
    """Text files of common words, each a document of 50 to 400 words."""
    folder.mkdir(parents=True)
    draw = random.Random(seed)
    for number in range(documents):
        words = draw.choices(WORDS, k=draw.randint(50, 400))
        (folder / f"{number:03d}.txt").write_text(" ".join(words) + ".", encoding="utf-8")


def make_roberta(folder: Path, *, positions: int = 64, seed: int = 1) -> None:
    """A RoBERTa of 2 layers with RoBERTa's own vocabulary and random weights."""
    tokenizer = load_tokenizer(None)
    config = ModelConfig(
        model_type="roberta",
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_layers=2,
        num_heads=2,
        intermediate_size=64,
        max_position_embeddings=positions + 2,
        attention_window=(),
    )
    torch.manual_seed(seed)
    save_model(LongformerForMaskedLM(config), folder)
    tokenizer.save(folder, config.max_tokens)


def tiny_longformer() -> LongformerForMaskedLM:
    """64 words and 16 positions, of which 8 are learnt, behind two position rows of padding."""
    config = ModelConfig(
        vocab_size=64, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32,
        max_position_embeddings=18, attention_window=(4, 4), learnt_positions=8,
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    return LongformerForMaskedLM(config)
