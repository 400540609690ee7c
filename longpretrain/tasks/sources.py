"""What a run trains on: the one corpus of data.train, or the sources of data.mix, as one list of
samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

from longpretrain.config import Config
from longpretrain.data.blocks import Blocks
from longpretrain.data.mix import Mix, Source
from longpretrain.data.selection import Selection
from longpretrain.data.shards import Corpus
from longpretrain.data.tokenizer import Tokenizer
from longpretrain.errors import InputError
from longpretrain.mix_config import MixSource
from longpretrain.tasks.past import Record, identity_of


@dataclass(frozen=True, kw_only=True)
class _Opened:
    """A source with its blocks; ``weight`` is its share of samples relative to the others'."""

    name: str
    blocks: Blocks
    weight: Fraction
    from_sample: int = 0

    @property
    def identity(self) -> int:
        """Of the corpus and the documents chosen of it."""
        return self.blocks.sample_id(0)

    def record(self, unit: Fraction) -> Record:
        """What decides which samples a run sees; weights in ``unit``."""
        return Record(
            corpus=self.blocks.corpus.fingerprint,
            selection=(self.blocks.selection or Selection()).identity,
            from_sample=self.from_sample,
            weight=self.weight / unit,
        )


class Sources:
    """The numbered samples of a recipe's data.

    Args:
        config: the recipe.
        split: "train", which may be a mix, or "valid".
        tokenizer: the model's.
        owner: whose tokenizer it is, for messages.

    Raises:
        InputError: a corpus is missing, broken or of another tokenizer; a source has no document
            left; two are the same documents.
    """

    def __init__(self, config: Config, split: str, tokenizer: Tokenizer, *, owner: str) -> None:
        self._is_mix = split == "train" and bool(config.data.mix)
        entries: Sequence[MixSource | None] = config.data.mix if self._is_mix else (None,)
        corpora = open_mix(config) if self._is_mix else [open_corpus(config, split)]
        self._sources: list[_Opened] = []
        for entry, corpus in zip(entries, corpora, strict=True):
            corpus.require_tokenizer(tokenizer.fingerprint, owner=owner)
            name = entry.name if entry else f"data.{split}"
            self._sources.append(_open(name, corpus, config, entry, tokenizer))
        _refuse_twins(self._sources)
        self._unit = sum((s.weight for s in self._sources if s.from_sample == 0), Fraction(0))
        self.mix = Mix(
            [
                Source(
                    identity=source.identity,
                    num_samples=len(source.blocks),
                    weight=source.weight,
                    from_sample=source.from_sample,
                )
                for source in self._sources
            ],
            seed=config.run.seed,
        )

    @property
    def only(self) -> Blocks:
        """The blocks of a run that has one source."""
        assert len(self._sources) == 1, [source.name for source in self._sources]
        return self._sources[0].blocks

    def locate(self, number: int) -> tuple[Blocks, int, int]:
        """(blocks of its source, pass over that source, block) of sample 0, 1, 2, ..."""
        place = self.mix.locate(number)
        return self._sources[place.source].blocks, place.epoch, place.block

    def describe(self, number: int) -> dict[str, str | int]:
        """Where sample ``number`` is from, for a person: source, folder, pass and block."""
        place = self.mix.locate(number)
        source = self._sources[place.source]
        return {
            "source": source.name,
            "folder": str(source.blocks.corpus.folder),
            "epoch": place.epoch,
            "block": place.block,
        }

    def epoch(self, number: int) -> int:
        """The pass, from 0, that sample ``number`` is in over the source that was repeated most."""
        counts = self.mix.counts(number + 1)
        passes = zip(counts, self._sources, strict=True)
        return max((count - 1) // len(source.blocks) for count, source in passes)

    def identity(self) -> dict[str, str]:
        """What a checkpoint keeps of the data, as texts by name."""
        if not self._is_mix:
            return {"corpus": self.only.corpus.fingerprint}
        return identity_of({source.name: source.record(self._unit) for source in self._sources})

    @property
    def summary(self) -> str:
        """How much data there is, in words."""
        blocks = [source.blocks for source in self._sources]
        what = f"mix of {len(blocks)} sources," if self._is_mix else "corpus"
        is_packed = blocks[0].policy == "packed"
        filled = sum(each.fill_rate * len(each) for each in blocks) / sum(map(len, blocks))
        return (
            f"{what} {sum(each.num_tokens for each in blocks):,} tokens, "
            f"{sum(map(len, blocks)):,} sequences" + f", {filled:.1%} filled" * is_packed
        )

    def table(self, samples: int) -> list[str]:
        """Aligned lines for people: the sources of a mix, and their parts of a run of so many
        samples. None where there is no mix.
        """
        if not self._is_mix:
            return []
        counts, shares = self.mix.counts(samples), self.mix.shares(samples - 1)
        head = ("source", "documents", "tokens", "from sample", "share", "epochs", "filled")
        rows = [
            (
                source.name,
                f"{source.blocks.num_documents:,}",
                f"{source.blocks.num_tokens:,}",
                f"{source.from_sample:,}",
                f"{float(share):.2%}",
                f"{count / len(source.blocks):.2f}",
                f"{source.blocks.fill_rate:.1%}",
            )
            for source, count, share in zip(self._sources, counts, shares, strict=True)
        ]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        return [
            "  ".join(
                [row[0].ljust(widths[0])]
                + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            )
            for row in (head, *rows)
        ]


def open_mix(config: Config, *, verify: Literal["size", "sha256"] = "size") -> list[Corpus]:
    """The corpora of a recipe's mix, in its order; none if there is no mix."""
    return [Corpus.open(Path(source.path), verify=verify) for source in config.data.mix]


def open_corpus(
    config: Config, split: str, *, verify: Literal["size", "sha256"] = "size"
) -> Corpus:
    """The corpus of a recipe's split, its files checked by size or by sha256."""
    key = f"data.{split}"
    path = config.data.train if split == "train" else config.data.valid
    if not path:
        raise InputError(
            f"recipe key {key}",
            got="nothing",
            wanted="a folder that longpretrain prepare wrote",
            way_out=f"Say {key}=DIR" + (", or give data.mix." if split == "train" else "."),
        )
    return Corpus.open(Path(path), verify=verify)


def _open(
    name: str, corpus: Corpus, config: Config, entry: MixSource | None, tokenizer: Tokenizer
) -> _Opened:
    selection = None
    if entry:
        selection = Selection(min_tokens=entry.min_document_tokens, share=entry.fraction)
    blocks = Blocks(
        corpus,
        policy=config.data.blocks,
        max_tokens=config.data.max_tokens,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        selection=selection,
    )
    if entry is None:
        return _Opened(name=name, blocks=blocks, weight=Fraction(1))
    # Budgets are of tokens, the order counts samples: in most policies some hold more than others.
    if entry.weight is not None:
        weight = entry.weight
    elif entry.tokens is not None:
        weight = Fraction(entry.tokens * len(blocks), blocks.num_tokens)
    else:
        assert entry.epochs is not None
        weight = entry.epochs * len(blocks)
    return _Opened(name=name, blocks=blocks, weight=weight, from_sample=entry.from_sample)


def _refuse_twins(sources: Sequence[_Opened]) -> None:
    names: dict[int, str] = {}
    for source in sources:
        twin = names.setdefault(source.identity, source.name)
        if twin != source.name:
            raise InputError(
                "section data.mix",
                got=f"the same documents as {twin} and as {source.name}",
                wanted="each source once",
                way_out="Give one of them a larger weight, and the other none.",
            )
