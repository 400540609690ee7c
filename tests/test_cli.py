"""The command line: exit codes, one-line errors, help with an example, and what bad input leaves
behind."""

from __future__ import annotations

import errno
import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from told import check_form, exit_code

from longpretrain.cli import main

pytestmark = pytest.mark.usefixtures("process_group")
VERBS = ("convert", "prepare", "train", "evaluate", "export", "verify", "report")
Refused = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs a verb that must end with code 2 and one line on stderr; returns the line."""

    def run(*words: object) -> str:
        assert exit_code(*words) == 2
        return check_form(capsys.readouterr().err, str(words[0]))

    return run


@pytest.fixture
def recipe(small_run: Path, tmp_path: Path) -> Path:
    """A recipe whose run folder is in tmp_path."""
    tree = yaml.safe_load((small_run / "recipe.yaml").read_text())
    tree["run"] = {"dir": str(tmp_path / "run")}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  longpretrain {verb} " in text


def test_example_recipes_exist(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "roberta-base-4096", "model.path=models/long", "optim.lr=1e-5", "--dry-run"]
    assert main(words) == 0
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert (resolved["model"]["path"], resolved["optim"]["lr"]) == ("models/long", 1e-5)


def test_overrides_may_follow_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "demo", "--dry-run", "optim.lr=1"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["optim"]["lr"] == 1.0
    with pytest.raises(SystemExit) as ended:
        main(["train", "demo", "--no-such-flag"])
    assert ended.value.code == 2


def test_missing_and_empty_corpus(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n")
    before = contents(tmp_path)
    assert "no-such" in refused("prepare", tmp_path / "no-such", "--out", tmp_path / "out")
    assert "empty" in refused("prepare", tmp_path / "empty", "--out", tmp_path / "out")
    refused("prepare", tmp_path / "blank.txt", "--out", tmp_path / "out")
    assert contents(tmp_path) == before


def test_text_that_is_not_utf8(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"good \xff bad")
    line = refused("prepare", tmp_path / "bad.txt", "--out", tmp_path / "out")
    assert "bad.txt" in line
    assert "5" in line  # the offset of the bad byte
    assert contents(tmp_path) == ["bad.txt"]


def test_shards_of_another_tokenizer(
    refused: Refused, recipe: Path, small_run: Path, tmp_path: Path
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(small_run / "data" / "train", corpus)
    manifest = json.loads((corpus / "manifest.json").read_text())
    manifest["tokenizer_fingerprint"] = "0" * 64
    (corpus / "manifest.json").write_text(json.dumps(manifest))
    assert "tokenizer" in refused("train", recipe, f"data.train={corpus}", "--check")
    assert "tokenizer" in refused(
        "evaluate", small_run / "models" / "long", "--data", corpus, "--max-tokens", 64
    )


@pytest.mark.parametrize("damage", ["truncated", "altered", "gone"])
def test_damaged_shard(
    refused: Refused, recipe: Path, small_run: Path, tmp_path: Path, damage: str
) -> None:
    corpus = tmp_path / "corpus"
    shutil.copytree(small_run / "data" / "train", corpus)
    shard = next(corpus.glob("*.bin"))
    data = bytearray(shard.read_bytes())
    if damage == "gone":
        shard.unlink()
    elif damage == "truncated":
        shard.write_bytes(data[:-2])
    else:
        data[10] ^= 1
        shard.write_bytes(data)
    line = refused("train", recipe, f"data.train={corpus}")
    assert shard.name in line
    assert "prepare" in line
    assert "run" not in contents(tmp_path)


def test_max_tokens_above_the_positions(refused: Refused, recipe: Path, small_run: Path) -> None:
    line = refused("train", recipe, "data.max_tokens=129", "--check")
    assert "got 129; wanted at most 128" in line
    assert "longpretrain convert" in line
    refused("evaluate", small_run / "models" / "long", "--data", small_run / "data" / "valid",
            "--max-tokens", "64,129")  # fmt: skip


@pytest.mark.parametrize("window", ["[15, 15]", "[0, 0]", "[16, 16, 16]", "-2"])
def test_windows_that_do_not_fit(refused: Refused, recipe: Path, window: str) -> None:
    assert "window" in refused("train", recipe, f"model.attention_window={window}", "--check")


@pytest.mark.parametrize("window", ["15", "0", "16,16,16"])
def test_conversion_windows(refused: Refused, small_run: Path, tmp_path: Path, window: str) -> None:
    source = small_run / "models" / "short"
    target = tmp_path / "long"
    assert "window" in refused("convert", source, target, "--attention-window", window)
    assert contents(tmp_path) == []


def test_batch_that_ranks_cannot_make(
    refused: Refused, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LONGPRETRAIN_WORLD_SIZE", "3")
    line = refused(
        "train", recipe, "batch.global_sequences=32", "batch.micro_sequences=4", "--check"
    )
    assert "got 32; wanted a multiple of 3 ranks x 4 = 12" in line
    assert "24, 36, 48" in line


def test_ds_config_that_sets_a_number_of_ours(
    refused: Refused, recipe: Path, tmp_path: Path
) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 1}, "gradient_clipping": 1.0}')
    line = refused("train", recipe, f"zero.config={path}", "--check")
    assert "gradient_clipping" in line
    assert "optim.clip_norm" in line


def test_unknown_key(refused: Refused, recipe: Path) -> None:
    assert "Did you mean optim.lr?" in refused("train", recipe, "optim.learning_rate=1")


def test_truncated_weights(refused: Refused, recipe: Path, small_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small_run / "models" / "long", folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for words in (["train", recipe, f"model.path={folder}", "--check"],
                  ["evaluate", folder, "--data", small_run / "data" / "valid", "--max-tokens", 64],
                  ["convert", folder, tmp_path / "longer"]):  # fmt: skip
        assert "model.safetensors" in refused(*words)
    assert "longer" not in contents(tmp_path)


def test_an_evaluation_may_be_replaced(small_run: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    scores.touch()  # as mktemp does
    words = ["evaluate", small_run / "models" / "long", "--data", small_run / "data" / "valid",
             "--max-tokens", 64, "--sequences", 1, "--json", scores]  # fmt: skip
    assert exit_code(*words) == 0
    first = scores.read_bytes()
    assert exit_code(*words) == 0
    assert scores.read_bytes() == first


@pytest.mark.parametrize("wish", ["", "1"])
def test_a_traceback_on_request(
    wish: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For what the system refuses, as its path may be a library's; not for our own errors."""

    def look_for_a_program(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "nvcc")

    monkeypatch.setenv("LONGPRETRAIN_TRACEBACK", wish)
    assert exit_code("prepare", "no-such", "--out", "out") == 2
    assert "LONGPRETRAIN" not in check_form(capsys.readouterr().err, "prepare")
    monkeypatch.setattr(
        importlib.import_module("longpretrain.prepare.job"), "find_inputs", look_for_a_program
    )
    assert exit_code("prepare", "texts", "--out", "out") == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert "path nvcc: got no such file" in check_form(line, "prepare")
    assert line.endswith(" LONGPRETRAIN_TRACEBACK=1 shows where.")
    assert any("in look_for_a_program" in part for part in before) == bool(before) == bool(wish)


@pytest.mark.parametrize("key", ["model.path", "data.train"])
def test_required_keys_are_named(refused: Refused, recipe: Path, key: str) -> None:
    for value in ("", "null"):
        line = refused("train", recipe, f"{key}={value}", "--check")
        assert f"recipe key {key}: got nothing" in line


def test_check_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    assert main(["train", str(recipe), "--check"]) == 0
    assert contents(tmp_path) == ["recipe.yaml"]


def test_one_rank_alone_then_another_recipe_then_fresh(
    recipe: Path,
    tmp_path: Path,
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = tmp_path / "run"
    assert main(["train", str(recipe)]) == 0
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    capsys.readouterr()
    assert main(["train", str(recipe)]) == 0
    assert "is done" in capsys.readouterr().out
    line = refused("train", recipe, "optim.lr=9")
    assert "optim.lr was 0.001 and is now 9.0" in line
    assert "--fresh" in line
    short = ["schedule.total_steps=1", "schedule.warmup_steps=0"]
    assert main(["train", str(recipe), "--fresh", *short]) == 0
    assert (tmp_path / "run.old-1" / "status.json").is_file()
    assert json.loads((run / "status.json").read_text())["step"] == 1


@pytest.mark.parametrize(("module", "winds_down"), [("deepspeed", False), ("json", True)])
def test_a_rank_ends_at_once(module: str, winds_down: bool) -> None:
    """What it printed is out and its code is right, and no native thread meets a dying Python."""
    code = f"""
import atexit, sys, types
from longpretrain.terminal import leave
sys.modules.setdefault({module!r}, types.ModuleType({module!r}))
atexit.register(print, "wound down")
print("through")
leave(75)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 75
    assert ended.stdout == "through\n" + "wound down\n" * winds_down
