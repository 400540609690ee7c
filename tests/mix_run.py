"""Small corpora to mix, and the overrides that put them into a recipe's data.mix."""

from __future__ import annotations

from pathlib import Path

from small_run import write_text

from longpretrain.prepare import prepare

DOCUMENTS = {"a": 20, "b": 30, "c": 6}


def make_sources(folder: Path) -> Path:
    """Writes the corpora a, b and c into a folder."""
    for seed, (name, documents) in enumerate(DOCUMENTS.items(), start=11):
        write_text(folder / "text" / name, documents=documents, seed=seed)
        prepare([folder / "text" / name], folder / name)
    return folder


def mix_words(folder: Path, **sources: str) -> list[str]:
    """Overrides of a mix: ``a="weight=1"``, or several settings with spaces between them."""
    words = ["data.train=null"]
    for name, settings in sources.items():
        words.append(f"data.mix.{name}.path={folder / name}")
        words += [f"data.mix.{name}.{setting}" for setting in settings.split()]
    return words
