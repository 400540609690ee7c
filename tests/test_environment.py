"""Odd surroundings: names with spaces and of any script, locales, no HOME, read-only places, closed
or broken standard streams. Everything works there, or is refused in one line.

Many verbs share a process, as each start costs seconds.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from ranks_helper import ROOT
from told import check_form

from longpretrain.report.metrics import read_metrics

# Runs several commands and marks where each one's messages begin.
DRIVER = """
import json, sys
from longpretrain.cli import main
from longpretrain.engine import zero
zero.stop_ranks = lambda: None
codes = []
for words in json.loads(sys.argv[1]):
    print("next command", file=sys.stderr)
    codes.append(main(words))
print(f"exit codes {codes}")
"""
LATIN_1 = b"caf\xe9.txt"
"""A file name that is not UTF-8, as old archives have them."""


@dataclass(frozen=True)
class Finished:
    """What the commands of one process left."""

    codes: list[int]
    errors: list[str]
    """Of each command, what it printed on stderr."""
    output: str


def environment(**more: str) -> dict[str, str]:
    """A bare one: no HOME, no TERM, no locale, no XDG directories."""
    return {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        **more,
    }


def run(
    place: Path, commands: Sequence[Sequence[str]], *, bound: bool = False, **more: str
) -> Finished:
    """Runs commands in a fresh process in ``place``, with stdin closed.

    ``bound``: permissions hold for root as well.
    """
    finished = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-c", DRIVER, json.dumps(commands)],
        cwd=place,
        env=environment(**more),
        check=False,
        capture_output=True,
        timeout=300,
        preexec_fn=_bind if bound else None,
    )
    output, errors = finished.stdout.decode(), finished.stderr.decode()
    assert "exit codes [" in output, output + errors
    codes = json.loads(output.rsplit("exit codes ", 1)[1])
    return Finished(codes, errors.split("next command\n")[1:], output)


def _bind() -> None:
    """Gives up, for good, root's right to read and write everything."""
    drop_from_bounding_set, override, read_search = 24, 1, 2
    for right in (override, read_search):
        ctypes.CDLL(None).prctl(drop_from_bounding_set, right, 0, 0, 0)


MODEL, CORPUS, RUN, EXPORT = "длинная модель", "корпус №1", "прогон 🐙 & co", "вывод 'один'"
RECIPE = "рецепт мой.yaml"
SCORE = ["--data", CORPUS, "--max-tokens", "64", "--sequences", "1"]
MAIN_JOB = [
    ["convert", "short model", MODEL, "--positions", "128", "--attention-window", "16"],
    ["prepare", "тексты", "--out", CORPUS, "--workers", "2"],
    ["train", RECIPE, "--check"],
    ["train", RECIPE],
    ["evaluate", RUN, *SCORE],
    ["report", RUN],
    ["export", RUN, EXPORT],
    ["verify", EXPORT],
]


@pytest.fixture(scope="module")
def place(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an odd name, in it a model, texts and a recipe with odd names."""
    place = tmp_path_factory.mktemp("place") / "мои данные 🐙 $HOME"
    shutil.copytree(small_run / "models" / "short", place / "short model")
    shutil.copytree(small_run / "text" / "train", place / "тексты")
    (place / "тексты" / "ещё файл 🐙.txt").write_text("peace and trade " * 40)
    (place / "тексты" / os.fsdecode(LATIN_1)).write_text("gold and silver " * 40)
    (place / "tmp dir ж").mkdir()
    tree = {
        "run": {"dir": RUN},
        "model": {"path": MODEL},
        "data": {"train": CORPUS, "valid": CORPUS, "max_tokens": 128},
        "batch": {"global_sequences": 2},
        "schedule": {"total_steps": 2, "warmup_steps": 0},
        "evaluate": {"every_steps": 2, "batches": 1},
        "precision": "fp32",
    }
    text = yaml.safe_dump(tree, allow_unicode=True)
    (place / RECIPE).write_text(text, encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def main_job(place: Path) -> Finished:
    """The main job without HOME and stdin, in the C locale, temporary files in an odd folder."""
    return run(place, MAIN_JOB, LC_ALL="C", TMPDIR=str(place / "tmp dir ж"))


def test_odd_names_in_bare_surroundings(main_job: Finished, place: Path) -> None:
    assert main_job.codes == [0] * len(MAIN_JOB), "".join(main_job.errors)
    assert "".join(main_job.errors) == ""
    assert "FAIL" not in main_job.output
    assert json.loads((place / RUN / "status.json").read_text())["state"] == "done"
    assert [line["step"] for line in read_metrics(place / RUN / "metrics.jsonl")][-1] == 2
    assert RUN.replace("&", "&amp;") in (place / RUN / "report.html").read_text(encoding="utf-8")
    assert not [path for path in (place / "tmp dir ж").iterdir() if "longpretrain" in path.name]


def test_a_name_that_is_not_utf8_is_read_and_shown(main_job: Finished, place: Path) -> None:
    manifest = json.loads((place / CORPUS / "manifest.json").read_text(encoding="utf-8"))
    assert r"тексты/caf\udce9.txt" in [source["name"] for source in manifest["sources"]]
    assert manifest["documents"] == 42


def test_read_only_places_are_refused(main_job: Finished, place: Path, tmp_path: Path) -> None:
    """Also before ranks start; nothing is left there. HOME may not be written to either."""
    closed = tmp_path / "read only"
    shutil.copytree(place / RUN, closed / "run")
    secret = closed / "тексты" / "secret"
    secret.mkdir(parents=True)
    (secret / "a.txt").write_text("text")
    (closed / "secret.txt").write_text("text")
    trash = closed / "texts" / ".Trash-0"
    trash.mkdir(parents=True)
    (closed / "texts" / "a.txt").write_text("text")
    refused = [
        ["train", RECIPE, f"run.dir={closed}/new/run", "--check"],
        ["train", RECIPE, f"run.dir={closed}/new/run"],
        ["train", RECIPE, f"run.dir={closed}/run", "--check"],
        ["train", RECIPE, f"run.dir={closed}/run", "--fresh"],
        ["report", f"{closed}/run"],
        ["evaluate", f"{closed}/run", *SCORE],
        ["export", f"{closed}/run", f"{closed}/out"],
        ["prepare", "тексты", "--out", f"{closed}/out"],
        ["convert", "short model", f"{closed}/out"],
        ["prepare", f"{closed}/secret.txt", "--out", "out"],
        ["prepare", f"{closed}/тексты", "--out", "out"],
        ["verify", f"{secret}/model"],
    ]
    works = [
        ["evaluate", f"{closed}/run", *SCORE, "--json", str(tmp_path / "scores.json")],
        ["prepare", f"{closed}/texts", "--out", str(tmp_path / "corpus")],
    ]
    modes = {path: path.stat().st_mode for path in (closed, *closed.rglob("*"))}
    before = sorted(modes)
    for path in modes:
        path.chmod(0o555 if path.is_dir() else 0o444)
    for path in (secret, closed / "secret.txt", trash):
        path.chmod(0)
    try:
        finished = run(place, [*refused, *works], bound=True, HOME=str(closed))
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
    assert finished.codes == [2] * len(refused) + [0, 0], "".join(finished.errors)
    for command, error in zip(refused, finished.errors, strict=False):
        # Before ours matplotlib may say that its cache is not in HOME.
        assert ": got permission denied" in check_form(error.splitlines()[-1], command[0])
    assert sorted([closed, *closed.rglob("*")]) == before
    assert not (place / "out").exists()


def test_a_locale_without_utf8_is_refused(place: Path) -> None:
    """torch itself cannot be imported whole there; only who asks for such a locale has it."""
    commands = [["train", RECIPE], ["convert", "short model", "out"]]
    finished = run(place, commands, LC_ALL="C", PYTHONUTF8="0")
    assert finished.codes == [2, 2]
    for command, error in zip(commands, finished.errors, strict=True):
        assert "locale: got the encoding ascii" in check_form(error, command[0])


def test_a_word_that_is_not_utf8_is_refused(place: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "longpretrain", "prepare", LATIN_1, "--out", "out"],
        cwd=place / "тексты",
        env=environment(LC_ALL="C.UTF-8"),
        check=False,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 2
    assert r"name 'caf\udce9.txt': got bytes that" in check_form(finished.stderr, "prepare")


@pytest.mark.parametrize("redirection", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams(main_job: Finished, place: Path, redirection: str) -> None:
    """A file that is opened next must not become the standard output."""
    page = place / RUN / "report.html"
    before = page.read_bytes()
    page.unlink()
    shell = f'exec "$@" {redirection}'
    words = ["sh", "-c", shell, "sh", sys.executable, "-m", "longpretrain", "report", RUN]
    finished = subprocess.run(
        words, cwd=place, env=environment(), check=False, capture_output=True, text=True
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")
    assert page.read_bytes() == before


def test_streams_that_were_closed_reach_our_children() -> None:
    code = "import os; from longpretrain.terminal import open_streams; open_streams(); "
    code += "raise SystemExit(not all(map(os.get_inheritable, range(3))))"
    words = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", code]
    assert subprocess.run(words, env=environment(), check=False).returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "words", [["train", "demo", "--dry-run"], ["report", RUN]], ids=["train", "report"]
)
def test_the_reader_leaves(
    main_job: Finished, place: Path, words: list[str], unbuffered: str
) -> None:
    """As in ``longpretrain report RUN | head -0``: no traceback, no noise."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        finished = subprocess.run(
            [sys.executable, "-m", "longpretrain", *words],
            cwd=place,
            env=environment(PYTHONUNBUFFERED=unbuffered),
            check=False,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writer)
    assert finished.stderr == ""
    assert finished.returncode in (0, 1)


def test_launch_script_under_an_odd_name(main_job: Finished, place: Path) -> None:
    """launch.sh reached through a link, its arguments with spaces and quotes, without HOME."""
    link = place / "project link"
    link.symlink_to(ROOT, target_is_directory=True)
    finished = subprocess.run(
        [f"{link}/launch.sh", RECIPE, "run.dir=launched 🐙 'run'", "evaluate.every_steps=0"],
        cwd=place,
        env=environment(RANKS="1", LC_ALL="C.UTF-8"),
        check=False,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    status = json.loads((place / "launched 🐙 'run'" / "status.json").read_text())
    assert status["state"] == "done"
