"""The example of every verb's --help runs as it stands; running it twice does nothing twice; the
documents' commands parse.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from small_run import make_roberta, write_text

from longpretrain.cli import _parser, main
from longpretrain.recipe import load_recipe

pytestmark = pytest.mark.usefixtures("process_group")
ROOT = Path(__file__).resolve().parents[1]
# In the order of the main job: each works on what those before it made.
VERBS = ("convert", "prepare", "train", "evaluate", "report", "export", "verify")
KEEP_EVEN_TIMES = ("convert", "prepare", "train")
"""These find their work done; the others do it again and come to the same bytes."""


def examples(verb: str) -> list[list[str]]:
    """The commands under "example:" in a verb's help, as words."""
    verbs = next(action for action in _parser()._actions if action.dest == "verb")
    assert isinstance(verbs.choices, dict)
    assert set(verbs.choices) == set(VERBS)
    head, *lines = str(verbs.choices[verb].epilog).splitlines()
    assert head == "example:"
    return [shlex.split(line) for line in lines]


@dataclass(frozen=True)
class Ran:
    """One example, run twice."""

    codes: tuple[int, int]
    first: dict[str, tuple[bytes, int]]
    second: dict[str, tuple[bytes, int]]
    made: set[str]


@pytest.fixture(scope="module")
def ran(process_group: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Ran]]:
    """Runs every example twice in one folder that holds what the examples name."""
    place = tmp_path_factory.mktemp("examples")
    found: dict[str, list[Ran]] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        furnish(place)
        for verb in VERBS:
            found[verb] = [run_twice(place, words) for words in examples(verb)]
            if verb == "train":
                (place / "runs" / "demo").symlink_to("mine")
    return found


def furnish(place: Path) -> None:
    make_roberta(place / "models" / "roberta-base")
    write_text(place / "books", documents=30, seed=1)
    write_text(place / "held-out", documents=20, seed=2)
    (place / "news.jsonl").write_text(json.dumps({"text": "peace and trade"}) + "\n")
    assert main(["prepare", "held-out", "--out", "data/valid"]) == 0
    tree = {
        "model": {"path": "models/long"},
        "data": {"train": "data/train", "valid": "data/valid", "max_tokens": 128},
        "batch": {"global_sequences": 2},
        "schedule": {"total_steps": 2, "warmup_steps": 0},
        "evaluate": {"every_steps": 2, "batches": 2},
        "precision": "fp32",
    }
    (place / "recipe.yaml").write_text(yaml.safe_dump(tree))


def run_twice(place: Path, words: list[str]) -> Ran:
    assert words[0] == "longpretrain"
    before, codes, trees = files(place), [], []
    for _ in range(2):
        codes.append(main(words[1:]))
        trees.append(files(place))
    made = {name for name, entry in trees[0].items() if before.get(name) != entry}
    return Ran((codes[0], codes[1]), trees[0], trees[1], made)


def files(place: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and time of change of every file."""
    return {
        path.relative_to(place).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in place.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("verb", VERBS)
def test_example_runs(ran: dict[str, list[Ran]], verb: str) -> None:
    assert ran[verb]
    assert all(example.codes == (0, 0) for example in ran[verb])


@pytest.mark.parametrize("verb", VERBS)
def test_second_run_changes_nothing(ran: dict[str, list[Ran]], verb: str) -> None:
    for example in ran[verb]:
        first, second = example.first, example.second
        assert first.keys() == second.keys()
        assert [name for name in first if first[name][0] != second[name][0]] == []
        if verb in KEEP_EVEN_TIMES:
            assert [name for name in first if first[name][1] != second[name][1]] == []


def test_examples_make_what_they_say(ran: dict[str, list[Ran]]) -> None:
    made = {verb: set().union(*(example.made for example in ran[verb])) for verb in VERBS}
    assert "models/long/model.safetensors" in made["convert"]
    assert "data/train/manifest.json" in made["prepare"]
    assert "runs/mine/checkpoints/step-000002/model.safetensors" in made["train"]
    assert made["evaluate"] == {"runs/mine/evaluation.json"}
    assert made["report"] == {"runs/mine/report.html"}
    assert "exported/model.safetensors" in made["export"]
    assert made["verify"] == {"report.json"}


def commands() -> list[str]:
    """Shell commands of ours in the documents: indented lines, ``&&`` taken apart."""
    found = []
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for line in document.read_text(encoding="utf-8").splitlines():
            if line.startswith("    "):
                parts = re.sub(r"\s#.*", "", line).split("&&")
                found += [part.strip() for part in parts]
    return [line for line in found if re.match(r"(longpretrain|\./launch\.sh) ", line)]


@pytest.mark.parametrize("line", commands())
def test_documented_command_parses(line: str) -> None:
    program, *words = shlex.split(line)
    if program == "./launch.sh":
        words = ["train", *words]
    options = _parser().parse_args(words)
    if options.verb == "train" and options.recipe != "RECIPE":
        load_recipe(options.recipe, options.overrides)


def test_documents_show_every_verb() -> None:
    shown = {line.split()[1] for line in commands() if line.startswith("longpretrain")}
    assert shown | {"train"} == set(VERBS)
