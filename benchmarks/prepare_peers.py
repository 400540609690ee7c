"""What people prepare text with today, run as it comes: fairseq's two steps, and datasets.map.

Each gives (tokens, what its programs took), and is held against our ids before it is believed.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prepare_runs import Ran, run_measured
from prepare_texts import write_jsonl, write_lines

from longpretrain.convert.fairseq_dictionary import dictionary_text, gpt2_tokens
from longpretrain.data import load_tokenizer
from longpretrain.data.tokenizer import ByteLevelBPE

HERE = Path(__file__).resolve().parent
PACKAGES = HERE.parent / "build" / "benchmark-peers"
_CHECKED_LINES = 200


class DifferentError(Exception):
    """A peer's ids are not ours, so its time is no comparison."""


@dataclass(frozen=True)
class Done:
    """One run of a peer."""

    tokens: int
    wall_s: float
    cpu_s: float


class Fairseq:
    """multiprocessing_bpe_encoder with one worker, then fairseq-preprocess."""

    name = "fairseq"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir()
        tokenizer = load_tokenizer()
        assert isinstance(tokenizer, ByteLevelBPE)
        self._numbers = {token: number for number, token in enumerate(gpt2_tokens())}
        self._tokens = {number: token for token, number in tokenizer.vocab.items()}
        (folder / "encoder.json").write_text(json.dumps(self._numbers), encoding="utf-8")
        merges = "".join(f"{left} {right}\n" for left, right in tokenizer.merges)
        (folder / "vocab.bpe").write_text("#version: 0.2\n" + merges, encoding="utf-8")
        text = dictionary_text(tokenizer, rows=tokenizer.vocab_size, where=folder)
        (folder / "dict.txt").write_text(text, encoding="utf-8")

    @staticmethod
    def why_not() -> str:
        """Why it cannot run; empty when it can."""
        return "" if importlib.util.find_spec("fairseq") else "fairseq is not installed"

    def run(self, documents: Sequence[str]) -> Done:
        """Text -> what fairseq trains on."""
        folder = self._folder
        text, encoded, made = folder / "in.txt", folder / "in.bpe", folder / "made"
        shutil.rmtree(made, ignore_errors=True)
        write_lines(text, documents)
        package = importlib.util.find_spec("fairseq")
        assert package and package.submodule_search_locations
        program = Path(package.submodule_search_locations[0]) / "examples/roberta"
        one = run_measured(
            [
                sys.executable, program / "multiprocessing_bpe_encoder.py",
                "--encoder-json", folder / "encoder.json", "--vocab-bpe", folder / "vocab.bpe",
                "--inputs", text, "--outputs", encoded, "--keep-empty", "--workers", "1",
            ],
            folder=folder,
        )  # fmt: skip
        two = run_measured(
            [
                sys.executable, "-m", "fairseq_cli.preprocess", "--only-source",
                "--srcdict", folder / "dict.txt", "--trainpref", encoded, "--destdir", made,
                "--workers", "1",
            ],
            folder=folder,
        )  # fmt: skip
        tokens = self._check(text, encoded)
        # .bin holds the tokens and an end mark for each line; as int32, or uint16.
        assert (made / "train.bin").stat().st_size >= 2 * tokens
        return Done(tokens, one.wall_s + two.wall_s, one.cpu_s + two.cpu_s)

    def _check(self, text: Path, encoded: Path) -> int:
        """Counts tokens; the first lines must have ours."""
        tokenizer, tokens = load_tokenizer(), 0
        with text.open(encoding="utf-8") as lines, encoded.open(encoding="ascii") as ids:
            for number, (line, found) in enumerate(zip(lines, ids, strict=True)):
                tokens += len(found.split())
                if number < _CHECKED_LINES:
                    own = tokenizer.encode(line.strip()).tolist()
                    wanted = [self._numbers[self._tokens[one]] for one in own]
                    if list(map(int, found.split())) != wanted:
                        raise DifferentError(f"fairseq's ids of line {number + 1}")
        return tokens


class Datasets:
    """datasets.map in one process; the tokenizer's own threads are off, as we count by core."""

    name = "datasets"

    def __init__(self, folder: Path, packages: Path = PACKAGES) -> None:
        self._folder, self._packages = folder, packages
        folder.mkdir()
        self._tokenizer = folder / "tokenizer"
        self._tokenizer.mkdir()
        load_tokenizer().save(self._tokenizer, 512)

    @staticmethod
    def why_not(packages: Path = PACKAGES) -> str:
        """Why it cannot run; empty when it can."""
        if (packages / "datasets").is_dir():
            return ""
        return f"no datasets in {packages.name}: run `make benchmark-peers`"

    def run(self, documents: Sequence[str]) -> Done:
        """JSONL -> Arrow files with ids."""
        source, cache = self._folder / "in.jsonl", self._folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        write_jsonl(source, documents, 0)
        ran = run_measured(
            [sys.executable, HERE / "prepare_datasets.py", source, self._tokenizer, cache],
            folder=self._folder,
            env={
                "PYTHONPATH": str(self._packages), "TOKENIZERS_PARALLELISM": "false",
                "HF_HUB_OFFLINE": "1", "HF_HOME": str(self._folder / "home"),
            },
        )  # fmt: skip
        return Done(self._check(ran, documents), ran.wall_s, ran.cpu_s)

    @staticmethod
    def _check(ran: Ran, documents: Sequence[str]) -> int:
        found = json.loads(ran.output.splitlines()[-1])
        tokenizer = load_tokenizer()
        wanted = [tokenizer.encode(text).tolist() for text in documents[: len(found["first"])]]
        if found["documents"] != len(documents) or found["first"] != wanted:
            raise DifferentError("the ids of datasets.map")
        return int(found["tokens"])
