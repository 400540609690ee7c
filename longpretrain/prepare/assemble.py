"""Parts -> shards: each shard is a task that copies its stretches of the parts, checking them.

A finished shard has a record in the work folder, written last, so a second run keeps it. A part
that turns out to be damaged is named in the result: the caller makes it again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longpretrain.data.manifest import FileRecord, ShardRecord, dtype_for
from longpretrain.data.shard_writer import ShardFile
from longpretrain.errors import InputError
from longpretrain.files import read_json_object, write_atomically
from longpretrain.prepare.chunked import ChunkedFile, ChunkedReader, DamagedPartError
from longpretrain.prepare.corpora import Corpora
from longpretrain.prepare.deduplicate import Duplicates
from longpretrain.prepare.layout import BLOCK_DOCUMENTS, Slice, lay_out
from longpretrain.prepare.parts import PartRecord, Work, file_of, files_of, read_part
from longpretrain.prepare.repeats import find_repeats, merged_reports
from longpretrain.prepare.settings import digest
from longpretrain.prepare.task_list import read_task, write_tasks
from longpretrain.prepare.workers import Crew, Tick

SHARDS = "shards"
"""Name of the list of tasks, and of the folder of records."""


@dataclass(frozen=True)
class Assembly:
    """What the tasks of this phase share."""

    work: Work
    duplicates: Mapping[str, Duplicates]
    """By split; empty where duplicates stay."""


@dataclass(frozen=True)
class Damaged:
    """The key of a part that is not what was written."""

    key: str


def assemble(work: Work, parts: Sequence[PartRecord], crew: Crew) -> Corpora | set[str]:
    """Makes all shards.

    Returns:
        What was made, or the keys of damaged parts: make them again, and then this.
    """
    # These are read here, and what they say is believed; of the tokens what is copied is checked.
    damaged = {
        part.key
        for part in parts
        for path, file in files_of(work.part(part.key), part)
        if path.suffix != ".bin" and not _is_whole(path, file)
    }
    if damaged:
        return damaged
    duplicates = find_repeats(work, parts)
    splits: list[str] = []

    def entries() -> Iterator[Any]:
        for entry in _entries(work, parts, duplicates):
            splits.append(entry["split"])
            yield entry

    count = write_tasks(work.folder, SHARDS, entries())
    made = crew.run(make_shard, Assembly(work, duplicates), range(count), lambda done: None)
    damaged = {shard.key for shard in made if isinstance(shard, Damaged)}
    if damaged:
        return damaged
    shards = {
        name: [shard for split, shard in zip(splits, made, strict=True) if split == name]
        for name in work.settings.split.names
    }
    return Corpora(shards, merged_reports(work, parts, duplicates))


def _entries(
    work: Work, parts: Sequence[PartRecord], duplicates: Mapping[str, Duplicates]
) -> Iterator[Any]:
    """What each task is to do: shards of all splits, in order."""
    # Any change of any part changes what all records are worth.
    state = digest([part.content for part in parts])
    max_tokens = work.settings.shard_bytes // dtype_for(work.settings.vocab_size).itemsize
    for split in work.settings.split.names:
        indexes = [file_of(work.part(part.key), split, "idx") for part in parts]
        found = duplicates.get(split)

        def kept(part: int, found: Duplicates | None = found) -> NDArray[np.bool_] | None:
            return None if found is None else ~found.of(part)

        for number, layout in enumerate(lay_out(indexes, kept, max_tokens)):
            yield {
                "split": split,
                "name": f"tokens-{number:05d}",
                "documents": layout.documents,
                "tokens": layout.tokens,
                "slices": [[parts[s.part].key, *astuple(s)] for s in layout.slices],
                "state": state,
            }


def make_shard(assembly: Assembly, number: int, tick: Tick) -> ShardRecord | Damaged:
    """Writes one shard, or finds it done: the task of the second phase."""
    work = assembly.work
    entry = read_task(work.folder, SHARDS, number)
    folder = work.folder / "out" / entry["split"]
    record_path = work.folder / SHARDS / f"{entry['split']}-{entry['name']}.json"
    wanted = digest(entry)
    done = _finished(record_path, folder, wanted)
    if done:
        return done
    folder.mkdir(exist_ok=True)
    duplicates = assembly.duplicates.get(entry["split"])
    shard = ShardFile(folder, entry["name"], dtype_for(work.settings.vocab_size))
    try:
        for key, part, start, end in entry["slices"]:
            drop = None if duplicates is None else duplicates.of(part)
            try:
                _copy(shard, work.part(key), entry["split"], Slice(part, start, end), drop)
            except DamagedPartError:
                return Damaged(key)
        record = shard.finish()
    finally:
        shard.close()
    assert (record.documents, record.tokens) == (entry["documents"], entry["tokens"])
    write_atomically(record_path, json.dumps({"of": wanted, **asdict(record)}) + "\n")
    return record


def _is_whole(path: Path, file: ChunkedFile) -> bool:
    """Whether a file of a part is what was written."""
    try:
        reader = ChunkedReader(path, file)
        try:
            reader.read_all()
        finally:
            reader.close()
    except DamagedPartError:
        return False
    return True


def _finished(record_path: Path, folder: Path, wanted: str) -> ShardRecord | None:
    """A shard that an earlier run wrote from the same parts."""
    try:
        tree = read_json_object(record_path)
        if tree.pop("of") != wanted:
            return None
        files = {key: FileRecord(**tree.pop(key)) for key in ("bin", "idx")}
        for file in files.values():
            if (folder / file.name).stat().st_size != file.bytes:
                return None
    except (InputError, KeyError, TypeError, OSError):
        return None
    return ShardRecord(**(tree | files))


def _copy(
    shard: ShardFile, folder: Path, split: str, taken: Slice, drop: NDArray[np.bool_] | None
) -> None:
    """Appends documents of a part, without those to drop."""
    try:
        files = read_part(folder).splits[split].files
    except (InputError, KeyError, TypeError, OSError) as error:
        raise DamagedPartError(f"{folder} has no record") from error
    index = ChunkedReader(file_of(folder, split, "idx"), files["idx"])
    tokens = ChunkedReader(file_of(folder, split, "bin"), files["bin"])
    try:
        for start in range(taken.start, taken.end, BLOCK_DOCUMENTS):
            end = min(start + BLOCK_DOCUMENTS, taken.end)
            data = b"".join(index.read(8 * start, 8 * (end + 1)))
            offsets = np.frombuffer(data, "<i8")
            stays = np.ones(end - start, bool) if drop is None else ~drop[start:end]
            for first, last in _runs(stays):
                size = shard.dtype.itemsize
                stretch = tokens.read(size * int(offsets[first]), size * int(offsets[last]))
                shard.append(stretch, np.diff(offsets[first : last + 1]))
    finally:
        index.close()
        tokens.close()


def _runs(stays: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(first, end) of each run of documents that stay."""
    borders = np.flatnonzero(np.diff(np.concatenate([[False], stays, [False]])))
    yield from zip(borders[::2].tolist(), borders[1::2].tolist(), strict=True)
