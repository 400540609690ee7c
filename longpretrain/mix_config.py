"""A source of ``data.mix`` as plain data, and what can be refused of a mix without its files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from longpretrain.errors import InputError

KINDS = ("weight", "tokens", "epochs")
"""The ways to say how much of a source a run takes; a source has exactly one."""


@dataclass(frozen=True, kw_only=True)
class MixSource:
    """One source of data.mix: a corpus, what to take of it, and how much of the run it is."""

    name: str
    """What a recipe calls it: letters, digits, - and _."""
    path: str = ""
    """Folder of training shards. Required."""
    weight: Fraction | None = None
    """Share of the samples, relative to the other sources' weights; such as 2, 0.3 or 1/3."""
    tokens: int | None = None
    """Tokens to take for each pass over the whole mix: shares in proportion to budgets."""
    epochs: Fraction | None = None
    """Passes over this source for each pass over the whole mix; budgets may stand beside it."""
    min_document_tokens: int = 0
    """Shorter documents are left out. `longer than 1,200` is 1201."""
    fraction: Fraction = Fraction(1)
    """This share of the documents, always the same ones: 1/3, or 0.333."""
    from_sample: int = 0
    """The sample of the run at which the source joins; what a running run adds begins there."""

    def __post_init__(self) -> None:
        key = f"recipe key data.mix.{self.name}"
        if not self.path:
            raise InputError(
                f"{key}.path",
                got="nothing",
                wanted="a folder that longpretrain prepare wrote",
                way_out=f"Say data.mix.{self.name}.path=DIR.",
            )
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise InputError(
                key,
                got=" and ".join(given) or "no amount",
                wanted=f"one of {', '.join(KINDS)}",
                way_out=f"Say how much to take, such as data.mix.{self.name}.weight=1.",
            )
        for name in KINDS:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise _out_of_range(f"{key}.{name}", value, "more than 0", self.name)
        if not 0 < self.fraction <= 1:
            wanted = "more than 0, at most 1"
            raise _out_of_range(f"{key}.fraction", self.fraction, wanted, self.name)
        for name in ("min_document_tokens", "from_sample"):
            value = getattr(self, name)
            if not 0 <= value < 2**62:
                raise _out_of_range(f"{key}.{name}", value, "0 or more", self.name)


def _out_of_range(key: str, got: object, wanted: str, source: str) -> InputError:
    way_out = f"Set it so; data.mix.{source}=null leaves the whole source out."
    return InputError(key, got=got, wanted=wanted, way_out=way_out)


def check_name(name: object) -> str:
    """A source's name, or a refusal: it has to fit into dotted keys."""
    if isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9_-]+", name):
        return name
    raise InputError(
        "section data.mix",
        got=f"a source named {name!r}",
        wanted="a name of letters, digits, - and _",
        way_out="Name it so, such as books; a number goes in quotes.",
    )


def check_mix(sources: Sequence[MixSource], train: str) -> None:
    """What a mix has to be as a whole; nothing is asked of an empty one.

    Raises:
        InputError: weights beside other amounts, nobody at sample 0, or data.train beside it.
    """
    if not sources:
        return
    if train:
        raise InputError(
            "recipe key data.train",
            got=f"{train}, beside data.mix",
            wanted="one of the two",
            way_out="Write data.mix=null to train on one corpus, or data.train=null for the mix.",
        )
    weighted = [source.name for source in sources if source.weight is not None]
    others = [source.name for source in sources if source.weight is None]
    if weighted and others:
        raise InputError(
            "section data.mix",
            got=f"a weight for {', '.join(weighted)} and none for {', '.join(others)}",
            wanted="weights for all sources, or for none",
            way_out="Give all of them weight, or all of them tokens or epochs.",
        )
    if all(source.from_sample > 0 for source in sources):
        raise InputError(
            "section data.mix",
            got=f"no source before sample {min(source.from_sample for source in sources)}",
            wanted="one that is there from the first sample",
            way_out="Leave from_sample out where the run begins.",
        )
