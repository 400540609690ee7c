"""Documents whose text an earlier one has: found among the parts, and told as what a filter did."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np

from longpretrain.data.manifest import dtype_for
from longpretrain.prepare.deduplicate import Duplicates, find_duplicates
from longpretrain.prepare.filters import (
    EXAMPLE_CHARS,
    EXAMPLES,
    Example,
    FilterReport,
    merge_reports,
)
from longpretrain.prepare.parts import PartRecord, Work, file_of


def find_repeats(work: Work, parts: Sequence[PartRecord]) -> dict[str, Duplicates]:
    """The duplicates of each split, for equal texts are in one; empty where they stay."""
    found = {}
    for split in work.settings.split.names if work.settings.filters.deduplicate else ():
        folder = work.folder / f"duplicates-{split}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        hashes = [file_of(work.part(part.key), split, "hash") for part in parts]
        found[split] = find_duplicates(hashes, folder)
    return found


def merged_reports(
    work: Work, parts: Sequence[PartRecord], duplicates: Mapping[str, Duplicates]
) -> list[FilterReport]:
    """What the filters did; the last of them, deduplicate, does it only now."""
    merged = merge_reports(
        [FilterReport.from_json(dict(report)) for report in part.filters] for part in parts
    )
    for number, part in enumerate(parts):
        for split, found in duplicates.items():
            drop = found.of(number)
            if drop.any():
                report = merged[-1]
                offsets = np.fromfile(file_of(work.part(part.key), split, "idx"), "<i8")
                report.dropped += int(drop.sum())
                report.tokens_dropped += int(np.diff(offsets)[drop].sum())
                for document in np.flatnonzero(drop)[: EXAMPLES - len(report.examples)].tolist():
                    ids = slice(*offsets[document : document + 2].tolist())
                    report.examples.append(_example(work, part, split, document, ids))
    return merged


def _example(work: Work, part: PartRecord, split: str, document: int, ids: slice) -> Example:
    folder = work.part(part.key)
    with file_of(folder, split, "places").open(encoding="utf-8", newline="\n") as places:
        place = next(islice(places, document, None)).rstrip("\n")
    tokens = np.memmap(file_of(folder, split, "bin"), dtype_for(work.settings.vocab_size), "r")
    # A character takes no more than a few tokens; most tokens are several.
    text = work.settings.tokenizer().decode(tokens[ids][: 4 * EXAMPLE_CHARS])
    return Example(place, text[:EXAMPLE_CHARS])
