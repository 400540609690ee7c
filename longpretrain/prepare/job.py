"""Text of any size and state -> a corpus: plan, make parts, assemble them, rename.

The result depends on the inputs and settings alone, byte for byte: not on the number of workers or
ranks, nor on how often the work was interrupted. It is made in a hidden folder beside the output
and renamed at the end, so the output is whole or not there.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from longpretrain.data.manifest import SHARD_BYTES, Manifest
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.errors import InputError
from longpretrain.prepare import rank_crew
from longpretrain.prepare.assemble import assemble
from longpretrain.prepare.corpora import Corpora, need_text, write_corpora
from longpretrain.prepare.documents import OnError, ReadOptions
from longpretrain.prepare.filters import Filters
from longpretrain.prepare.finished import find_finished, is_corpus
from longpretrain.prepare.inputs import (
    MAX_DOCUMENT_BYTES,
    STDIN,
    Documents,
    InputFile,
    Kind,
    find_inputs,
)
from longpretrain.prepare.parts import (
    UNITS,
    PartRecord,
    Work,
    find_part,
    make_part,
    need_unchanged,
    unit_entry,
)
from longpretrain.prepare.settings import FACTS, Settings
from longpretrain.prepare.split import Split
from longpretrain.prepare.spool import spool
from longpretrain.prepare.task_list import write_tasks
from longpretrain.prepare.units import UNIT_BYTES, plan_units
from longpretrain.prepare.work_folder import WorkFolder, open_work, refuse_foreign, work_path
from longpretrain.prepare.workers import Crew
from longpretrain.ranks import Ranks

Progress = Callable[[int, int], None]
"""Called with (bytes of input done, bytes in all)."""


def prepare(
    inputs: Sequence[Path | str],
    out: Path | str,
    *,
    tokenizer_folder: Path | str | None = None,
    workers: int = 1,
    documents: Documents = "auto",
    field: str = "text",
    filters: Sequence[str] = (),
    valid: str | float | Fraction | None = None,
    on_error: OnError = "stop",
    max_document_bytes: int = MAX_DOCUMENT_BYTES,
    stdin: BinaryIO | None = None,
    stdin_format: Kind = "txt",
    restart: bool = False,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda text: None,
    place: Ranks | None = None,
    shard_bytes: int = SHARD_BYTES,
    unit_bytes: int = UNIT_BYTES,
) -> Manifest:
    """Tokenizes documents into a corpus folder, or into one of training and one of validation.

    Safe to run twice: the same inputs, settings and tokenizer leave a whole ``out`` as it is and
    write one with damaged shards anew; a run that was interrupted goes on where it was. With more
    than one worker a script needs the usual ``if __name__ == "__main__"`` guard, for workers are
    spawned. Under mpirun or srun every rank calls it, and all take part.

    Args:
        inputs: files, folders, glob patterns, and "-" for standard input (see inputs.py).
        out: the folder to make.
        tokenizer_folder: a tokenizer's folder or file. None: RoBERTa's BPE.
        workers: processes.
        documents: how a .txt is divided: file, one document a file; blank-line, documents separated
            by blank lines; auto, as file, but a very large .txt is refused.
        field: key of the text in a line of .jsonl, or column of .parquet.
        filters: cleaning, by name (see filters.py).
        valid: share of the documents that go to ``out/valid``, the others to ``out/train``.
        on_error: what to do about text that cannot be read (see documents.py).
        max_document_bytes: of a document, or a line; a larger one is an error.
        stdin: what "-" reads; None: standard input.
        stdin_format: what it holds.
        restart: throw away what an interrupted run of other settings left.
        progress: is told how far it is.
        say: is told what a user should know.
        place: this process's place among the ranks (see ``find_place``); None: to be found.
        shard_bytes: a new shard starts before this size is passed.
        unit_bytes: input that is worked through as one task.

    Returns:
        The manifest of ``out``, or of ``out/train``.

    Raises:
        InputError: see documents.py for the inputs; nothing but empty documents; an ``out`` that
            holds something else or a damaged manifest; another process that writes it. Finished
            parts are kept, and a second run takes them up; without any, nothing is left behind.
        ElsewhereError: at a rank other than 0, which tells the error.
    """
    place = place or rank_crew.find_place(workers)
    if not place.is_first:
        return rank_crew.serve()  # type: ignore[no-any-return]  # what rank 0's crew is given below
    read = ReadOptions(documents, field, max_document_bytes, on_error)
    with rank_crew.crew(workers, place) as crew:
        job = _Job(
            out=Path(out).resolve(), crew=crew, workers=workers, read=read, progress=progress,
            say=say, unit_bytes=unit_bytes,
        )  # fmt: skip
        given = [Path(name) for name in inputs]
        files = None if Path(STDIN) in given else job.find(given)
        tokenizer = load_tokenizer(tokenizer_folder)
        settings = Settings(
            read=read,
            filters=Filters.parse(filters),
            split=Split(valid),
            tokenizer_folder=None if tokenizer_folder is None else Path(tokenizer_folder),
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            shard_bytes=shard_bytes,
        )
        done = files and job.finished(files, settings)
        if not done or work_path(job.out).exists():
            with open_work(job.out, restart=restart, say=say) as folder:
                if files is None:
                    source = stdin or sys.stdin.buffer
                    files = job.find(given, spool(source, folder.path, stdin_format))
                done = job.run(folder, files, settings)
        crew.result = done
    return done


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One preparation, at rank 0."""

    out: Path
    crew: Crew
    workers: int
    read: ReadOptions
    progress: Progress | None
    say: Callable[[str], None]
    unit_bytes: int

    def find(self, inputs: Sequence[Path], stdin: InputFile | None = None) -> list[InputFile]:
        """The files to read."""
        return find_inputs(
            inputs,
            documents=self.read.documents,
            max_document_bytes=self.read.max_document_bytes,
            stdin=stdin,
            warn=self.say,
        )

    def finished(self, files: Sequence[InputFile], settings: Settings) -> Manifest | None:
        """The manifest of an output that is up to date already."""
        return find_finished(self.out, files, settings, self.workers)

    def run(self, folder: WorkFolder, files: Sequence[InputFile], settings: Settings) -> Manifest:
        """Makes the corpus, or what is missing of it, in a folder that is ours alone."""
        done = self.finished(files, settings)  # perhaps since we last looked, by another process
        if done:
            folder.remove()
            return done
        refuse_foreign(self.out, is_corpus)
        folder.agree(settings.facts, FACTS)
        work = Work(folder.path, settings)
        units = _Units(work, files, self.unit_bytes)
        try:
            parts = self._make_parts(work, units)
            try:
                need_text(work, parts, files)
            except InputError:
                folder.remove()  # no other run could use such parts
                raise
            parts, corpora = self._assemble(work, units, parts)
        except BaseException:
            kept = len(set(units.keys) & work.finished_parts())
            if kept:
                self.say(
                    f"{kept} of {len(units.keys)} parts are finished and kept in {folder.path}: "
                    "run the same command again to go on from there"
                )
            raise
        manifest = write_corpora(work, files, units.units, parts, corpora)
        folder.become(self.out, is_corpus)
        return manifest

    def _make_parts(self, work: Work, units: _Units) -> list[PartRecord]:
        """The first phase, but for what an earlier run has done."""
        there = work.finished_parts()
        found = {
            number: part
            for number, key in enumerate(units.keys)
            if key in there and (part := find_part(work.part(key), work.settings))
        }
        missing = [number for number in range(len(units.keys)) if number not in found]
        count = _Count(self.progress, units.bytes)
        count(sum(end - start for part in found.values() for start, end, _ in part.pieces))
        made = self.crew.run(make_part, work, missing, count)
        count.end()
        found |= dict(zip(missing, made, strict=True))
        return [found[number] for number in range(len(units.keys))]

    def _assemble(
        self, work: Work, units: _Units, parts: list[PartRecord]
    ) -> tuple[list[PartRecord], Corpora]:
        """The second phase; a part that is damaged is made once more."""
        for _ in range(2):
            found = assemble(work, parts, self.crew)
            if isinstance(found, Corpora):
                return parts, found
            self.say(f"{len(found)} damaged parts are made again")
            numbers = [number for number, key in enumerate(units.keys) if key in found]
            made = self.crew.run(make_part, work, numbers, _ignore)
            for number, part in zip(numbers, made, strict=True):
                parts[number] = part
        raise InputError(
            f"folder {work.folder}",
            got="files that are altered as soon as they are written",
            wanted="a disk that keeps them",
            way_out="Choose an --out on another disk.",
        )


class _Units:
    """The work as it is planned, in the list of tasks and in short.

    Attributes:
        units: in corpus order.
        keys: the name of each one's part.
        bytes: of all inputs.
    """

    def __init__(self, work: Work, files: Sequence[InputFile], unit_bytes: int) -> None:
        self.bytes = sum(file.bytes for file in files)
        changed = [file.path.stat().st_mtime_ns for file in files]
        for file, time in zip(files, changed, strict=True):
            need_unchanged(file, time)
        self.units = plan_units(files, work.settings.read, unit_bytes)
        self.keys: list[str] = []

        def entries() -> Iterator[Any]:
            for unit in self.units:
                numbers = {piece.file for piece in unit.pieces}
                used = {number: (files[number], changed[number]) for number in numbers}
                entry = unit_entry(unit, used, work.settings)
                self.keys.append(entry["key"])
                yield entry

        write_tasks(work.folder, UNITS, entries())


class _Count:
    """Tells how much of the input is done."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def __call__(self, done: int) -> None:
        self._done += done
        if self._progress and done:
            self._progress(min(self._done, self._total), self._total)

    def end(self) -> None:
        if self._progress:
            self._progress(self._total, self._total)


def _ignore(done: int) -> None:
    pass
