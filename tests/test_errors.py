"""Every error that a user can meet says what, got, wanted and the way out, and leaves nothing."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import pickle
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from told import check_form, disk, exit_code

from longpretrain import errors, start, terminal
from longpretrain.engine import run_folder, saver
from longpretrain.prepare.inputs import InputFile, find_inputs

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.fixture(scope="session")
def bad_place(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good inputs and many kinds of bad ones."""
    place = tmp_path_factory.mktemp("bad inputs")
    for name in ("short", "long"):
        shutil.copytree(small_run / "models" / name, place / name)
    shutil.copytree(small_run / "data" / "valid", place / "corpus")
    shutil.copytree(small_run / "text" / "valid", place / "texts")
    recipe = yaml.safe_load((small_run / "recipe.yaml").read_text())
    recipe["model"]["path"], recipe["data"] = "long", {"train": "corpus", "max_tokens": 128}
    (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    make_bad_files(place)
    make_bad_folders(place)
    return place


def make_bad_files(place: Path) -> None:
    files = {
        "file": "text",
        "empty.txt": "",
        "list.jsonl": "[1]\n",
        "cut.jsonl": '{"text": "a"}\n{"text"',
        "number.jsonl": '{"text": 1}\n',
        "broken.yaml": "a: [",
        "list.yaml": "- 1\n",
        "empty.yaml": "",
        "section.yaml": "optim: 3\n",
        "nul.yaml": 'run: {dir: "a\\0b"}\n',
    }
    for name, text in files.items():
        (place / name).write_text(text)
    (place / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    (place / "folder.yaml").mkdir()
    (place / "spoilt-run" / "checkpoints").mkdir(parents=True)
    (place / "spoilt-run" / "checkpoints" / "latest").write_bytes(b"\xff")
    (place / "spoilt-run" / "config.yaml").write_bytes(b"\xff")
    (place / "loop.txt").symlink_to("loop.txt")


def make_bad_folders(place: Path) -> None:
    (place / "empty").mkdir()
    (place / "foreign").mkdir()
    (place / "foreign" / "thesis.odt").write_text("years of work")
    for name, file, text in (
        ("no-json", "config.json", "{"),
        ("bert", "config.json", '{"model_type": "bert"}'),
        ("no-weights", "config.json", (place / "long" / "config.json").read_text()),
        ("young-run", "config.yaml", "name: young\n"),
        ("bad-run", "metrics.jsonl", "no json\n{}\n"),
        ("lost-run", "checkpoints/latest", "step-000007\n"),
        ("no-manifest", "manifest.json", "[]"),
    ):
        (place / name / file).parent.mkdir(parents=True)
        (place / name / file).write_text(text)


REFUSED = """
convert short
convert no-such out
convert file out
convert corpus out
convert empty out
convert no-json out
convert bert out
convert no-weights out
convert short file
convert short file/out
convert short foreign
convert short out --positions 0
convert short out --positions -1
convert short out --positions 99999999999
convert short out --init random --seed 99999999999999999999999
convert short out --init random --seed -1
convert "" out
convert short ""
convert short out --tokenizer ""
convert short out --positions many
convert short out --attention-window 15
convert short out --attention-window 16,
convert short out --init zeros
convert short out extra
convert short out --tokenizer no-such
prepare
prepare texts
prepare no-such --out out
prepare no-such*.txt --out out
prepare empty --out out
prepare empty.txt --out out
prepare file --out out
prepare loop.txt --out out
prepare texts texts --out out
prepare list.jsonl --out out
prepare cut.jsonl --out out
prepare number.jsonl --out out
prepare number.jsonl --out out --field body
prepare "" --out out
prepare texts "" --out out
prepare texts --out ""
prepare texts --out file
prepare texts --out file/out
prepare texts --out foreign
prepare texts --out no-manifest
prepare texts --out corpus
prepare texts --out out --workers 0
prepare texts --out out --workers two
prepare texts --out out --documents page
prepare texts --out out --tokenizer no-such
prepare texts --out out --tokenizer empty
train
train no-such
train no-such.yaml
train folder.yaml
train broken.yaml
train list.yaml
train empty.yaml
train section.yaml
train latin.yaml
train nul.yaml
train recipe.yaml optim.lr
train recipe.yaml =3
train recipe.yaml optim.lr=fast
train recipe.yaml optim.lr=[1
train recipe.yaml optim.lr.peak=3
train recipe.yaml optim=3
train recipe.yaml optim.rate=3
train recipe.yaml precision=fp8
train ""
train recipe.yaml run.dir=
train recipe.yaml run.dir=~no-such-user/run
train recipe.yaml model.path=
train recipe.yaml data.train=
train recipe.yaml data.valid=
train recipe.yaml zero.config=
train recipe.yaml model.attention_dropout=0.9999 --check
train recipe.yaml run.dir=file
train recipe.yaml run.dir=file/run
train recipe.yaml run.dir=foreign
train recipe.yaml run.dir=spoilt-run
train recipe.yaml run.device=cuda
train recipe.yaml model.path=no-such
train recipe.yaml model.path=bert
train recipe.yaml model.path=no-weights
train recipe.yaml data.train=no-such
train recipe.yaml data.train=no-manifest
train recipe.yaml data.valid=empty
train recipe.yaml data.max_tokens=3
train recipe.yaml data.max_tokens=129
train recipe.yaml zero.config=no-such.json
train recipe.yaml zero.config=file
train recipe.yaml model.global_tokens=some
train recipe.yaml model.dilation=[1,2,3]
train recipe.yaml --frsh
train recipe.yaml --check --dry-run
evaluate
evaluate long
evaluate "" --data corpus
evaluate long --data ""
evaluate long --data corpus --json ""
evaluate long --data corpus --json bad-run/metrics.jsonl
evaluate long --data corpus --json long/config.json
evaluate no-such --data corpus
evaluate file --data corpus
evaluate young-run --data corpus
evaluate lost-run --data corpus
evaluate spoilt-run --data corpus
evaluate no-weights --data corpus
evaluate long --data no-such
evaluate long --data long
evaluate long --data no-manifest
evaluate long --data corpus --max-tokens 0
evaluate long --data corpus --max-tokens 64,129
evaluate long --data corpus --max-tokens 64,x
evaluate long --data corpus --max-tokens 64 --sequences 0
evaluate long --data corpus --max-tokens 64 --sequences 1 --json file/out.json
evaluate long --data corpus --max-tokens 64 --sequences 1 --json empty
evaluate long --data corpus --device cuda
evaluate long --data corpus --device tpu
export
export "" out
export long ""
export no-such out
export file out
export corpus out
export young-run out
export lost-run out
export bert out
export no-weights out
export long file
export long file/out
export long foreign
export long out --format gguf
verify
verify ""
verify long ""
verify no-such
verify file
verify corpus
verify no-json
verify no-weights
verify long no-such
report
report ""
report no-such
report file
report empty
report bad-run
exprt long out
""".strip().splitlines()


@pytest.mark.parametrize("line", REFUSED)
def test_bad_input(
    line: str, bad_place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(bad_place)
    before = disk(bad_place)
    assert exit_code(*shlex.split(line)) == 2
    err = capsys.readouterr().err
    check_form(err, line.split(maxsplit=1)[0])
    assert disk(bad_place) == before


@contextlib.contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """Stands for a full disk: the system refuses to make a file longer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("line", "limit", "name"),
    [
        ("convert short out --positions 128 --attention-window 16", 100_000, "out"),
        ("prepare texts --out out", 100, "out"),
        ("evaluate long --data corpus --max-tokens 64 --sequences 1 --json o.json", 100, "o.json"),
        ("export long out", 100_000, "out"),
        ("report young-run", 100, "young-run/report.html"),
    ],
    ids=lambda value: str(value).split()[0],
)
def test_no_room(
    line: str,
    limit: int,
    name: str,
    bad_place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(bad_place)
    before = disk(bad_place)
    verb = line.split(maxsplit=1)[0]
    with largest_file(limit):
        # Who makes a folder can choose another place for it: their words are at fault.
        assert exit_code(*line.split()) == (2 if verb in ("convert", "export") else 1)
    told = check_form(capsys.readouterr().err, verb)
    assert f"{name}: got file too large;" in told or f"{name}/" in told
    assert disk(bad_place) == before


def test_no_room_for_a_checkpoint(
    bad_place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run fails and says so in status.json too; with room again it goes on to the end."""
    monkeypatch.chdir(bad_place)
    monkeypatch.setattr(saver, "_PAUSE_S", 0.0)
    words = ["train", "recipe.yaml", f"run.dir={tmp_path / 'run'}", "schedule.total_steps=3"]
    with largest_file(1_000_000):
        assert exit_code(*words) == 1
    told = check_form(capsys.readouterr().err, "train")
    assert "checkpoint of step 3: got file too large: " in told
    status = run_folder.read_status(tmp_path / "run")
    assert (status["state"], status["step"]) == ("failed", 0)
    assert exit_code(*words) == 0
    assert run_folder.read_status(tmp_path / "run")["state"] == "done"


def test_standard_output_is_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:  # noqa: PTH123
        monkeypatch.setattr(sys, "stdout", full)
        assert exit_code("train", "demo", "--dry-run") == 1
    assert "standard output: got no space" in check_form(capsys.readouterr().err, "train")


def test_an_input_vanishes(
    bad_place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bad_place / "texts", tmp_path / "texts")

    def find_then_lose(inputs: list[Path], **options: Any) -> list[InputFile]:
        found = find_inputs(inputs, **options)
        found[-1].path.unlink()
        return found

    module = importlib.import_module("longpretrain.prepare.job")
    monkeypatch.setattr(module, "find_inputs", find_then_lose)
    assert exit_code("prepare", "texts", "--out", "out") == 2
    told = check_form(capsys.readouterr().err, "prepare")
    assert "path texts/005.txt: got no such file" in told
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]


def test_what_the_system_says_to_one_rank_stops_all(
    bad_place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Ranks agree on it at the start, so that none waits for one that is gone."""

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "corpus/tokens-00000.bin")

    monkeypatch.chdir(bad_place)
    monkeypatch.setattr(start, "open_corpus", denied)
    assert exit_code("train", "recipe.yaml", f"run.dir={tmp_path / 'run'}") == 2
    assert "tokens-00000.bin: got permission denied" in check_form(capsys.readouterr().err, "train")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("number", sorted(errors._OF_THE_PATH | errors._OF_THE_MACHINE))
@pytest.mark.parametrize("names", [(), ("a b",), ("a", None, "b")], ids=["none", "one", "two"])
def test_what_the_system_says(number: int, names: tuple[str | None, ...]) -> None:
    found = errors.from_system(OSError(number, os.strerror(number), *names))
    assert found is not None
    told, is_path = found
    check_form(f"longpretrain verify: {told}", "verify")
    assert is_path == (number in errors._OF_THE_PATH)
    assert all(name in told.what for name in names if name)


def test_what_says_nothing_to_a_user_is_no_input_error() -> None:
    assert errors.from_system(OSError("odd")) is None
    assert errors.from_system(OSError(errno.EBADF, "bad file descriptor")) is None


@pytest.mark.parametrize("verb", ["", "convert", "prepare", "train"])
def test_every_word_of_argparse(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever argparse says, also in another version, comes out in our form."""
    parser = terminal.Parser(prog=f"longpretrain {verb}".strip())
    for message in ("argument --a: ignored explicit argument '3'", "x", "a: b\nc"):
        with pytest.raises(SystemExit) as left:
            parser.error(message)
        assert left.value.code == 2
        line = capsys.readouterr().err
        assert ": got " in line
        assert line.count("\n") == 1


def test_a_line_is_one_write() -> None:
    """Ranks are started as ``python -u``, where the newline of ``print`` is a write of its own."""
    reader, writer = os.pipe2(os.O_DIRECT)  # of packets: a read gets one write
    code = "from longpretrain.errors import tell; tell('ours'); print('theirs')"
    try:
        subprocess.run([sys.executable, "-u", "-c", code], stdout=writer, stderr=writer, check=True)
        os.close(writer)
        packets = list(iter(lambda: os.read(reader, 4096), b""))
    finally:
        os.close(reader)
    assert packets == [b"ours\n", b"theirs", b"\n"]


def test_an_error_travels_out_of_a_worker_process() -> None:
    error = errors.InputError("shard X", got="", wanted=3, way_out="Make it  again.")
    error.add_note("in worker 1")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is errors.InputError
    assert str(again) == str(error)
    assert vars(again) == vars(error)
