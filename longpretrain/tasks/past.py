"""What decided the samples that a run has seen, and what of its data it may change when it goes on.

A checkpoint keeps a record of each source: which documents of which corpus, from which sample of
the run on, in which proportion to the others. Whatever leaves the samples so far as they were may
change: a folder moves, a source gets another name, another source joins at a sample that is yet to
come. A run on data.train alone is a mix of one source, so it may go on as a mix, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from longpretrain.data.selection import Selection
from longpretrain.errors import InputError

_TRAIN = "data.train"
_SOURCE = "source "


@dataclass(frozen=True, kw_only=True)
class Record:
    """A source, as far as it decides samples."""

    corpus: str
    """The corpus' fingerprint."""
    selection: tuple[int, ...]
    """``Selection.identity``."""
    from_sample: int
    """The sample of the run at which it joins."""
    weight: Fraction
    """Samples of it for one of all the sources together that were there from sample 0."""

    @property
    def documents(self) -> tuple[str, tuple[int, ...]]:
        """Which documents it is: no two sources of a mix have the same."""
        return self.corpus, self.selection

    def text(self) -> str:
        return json.dumps(
            {
                "corpus": self.corpus,
                "selection": list(self.selection),
                "from_sample": self.from_sample,
                "weight": str(self.weight),
            }
        )


def identity_of(sources: Mapping[str, Record]) -> dict[str, str]:
    """Records by the names of their sources, as texts for a checkpoint."""
    return {f"{_SOURCE}{name}": record.text() for name, record in sources.items()}


def check_past(
    stored: Mapping[str, str], now: Mapping[str, str], samples: int, checkpoint: Path
) -> None:
    """Refuses data that would have made other samples so far than the run has seen.

    Args:
        stored: what the checkpoint kept: ``identity_of`` a mix, or the fingerprint of its corpus.
        now: the same of the run that wants to go on.
        samples: how many it has seen.
        checkpoint: for the message.

    Raises:
        InputError: names what differs, and from which sample on a source may join.
    """
    before, after = _past(stored, samples, checkpoint), _past(now, samples, checkpoint)
    if set(before.values()) == set(after.values()):
        return
    if _TRAIN in before and _TRAIN in after:
        raise InputError(
            "corpus of the run",
            got=f"data.train with fingerprint {after[_TRAIN].corpus[:16]}",
            wanted=f"{before[_TRAIN].corpus[:16]}, the one that {checkpoint} was trained on",
            way_out="Give data.train=DIR of that corpus, or start anew with --fresh.",
        )
    raise InputError(
        "data.mix of the run",
        got="; ".join(_differences(before, after)),
        wanted=f"what the {samples:,} samples of {checkpoint} came from",
        way_out=f"A new source may join with from_sample={samples} or more. "
        "Otherwise give another run.dir, or --fresh to start anew.",
    )


def _past(identity: Mapping[str, str], samples: int, checkpoint: Path) -> dict[str, Record]:
    """The sources that a run's first samples are from, by name."""
    found: dict[str, Record] = {}
    for key, text in identity.items():
        if key == "corpus":
            found[_TRAIN] = Record(
                corpus=text, selection=Selection().identity, from_sample=0, weight=Fraction(1)
            )
        elif key.startswith(_SOURCE):
            record = _read(key, text, checkpoint)
            if record.from_sample < samples:
                found[key.removeprefix(_SOURCE)] = record
    return found


def _read(key: str, text: str, checkpoint: Path) -> Record:
    try:
        entries = json.loads(text)
        return Record(
            corpus=str(entries["corpus"]),
            selection=tuple(map(int, entries["selection"])),
            from_sample=int(entries["from_sample"]),
            weight=Fraction(entries["weight"]),
        )
    except (ValueError, TypeError, KeyError, ZeroDivisionError) as error:
        raise InputError(
            f"{checkpoint / 'state.json'}, key task, {key}",
            got=text[:80],
            wanted="what a source of data.mix was",
            way_out="The checkpoint is damaged: point checkpoints/latest at an older step folder.",
        ) from error


def _differences(before: Mapping[str, Record], after: Mapping[str, Record]) -> list[str]:
    """What differs between two pasts, for people, by the names of the recipe at hand."""
    names = {record.documents: name for name, record in after.items()}
    known = {old.documents for old in before.values()}
    found, weights = [], []
    for name, old in before.items():
        here = names.get(old.documents)
        if here is None:
            found.append(f"{name} {'with other documents' if name in after else 'not there'}")
            continue
        new = after[here]
        if new.from_sample != old.from_sample:
            found.append(f"{here} from sample {new.from_sample:,}, not {old.from_sample:,}")
        if new.weight != old.weight:
            weights.append(
                f"{here} with relative weight {_short(new.weight)}, not {_short(old.weight)}"
            )
    for name, new in after.items():
        if new.documents not in known and name not in before:
            found.append(f"{name} from sample {new.from_sample:,}, which has passed")
    return found or weights  # with other sources at the start all weights are other ones


def _short(weight: Fraction) -> str:
    """A weight for people: budgets of tokens make long fractions."""
    return str(weight) if weight.denominator < 1000 else f"{float(weight):.10g}"
