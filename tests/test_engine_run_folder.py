"""The run folder and its checkpoints: what is kept, refused, moved aside, and said at the end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ranks_helper import ROOT
from small_disk import fill, small_disk
from told import check_form, disk, exit_code

from longpretrain.config import Config
from longpretrain.convert.lengthen import convert
from longpretrain.engine import checkpoint, run_folder, signals
from longpretrain.engine.signals import StopRequest
from longpretrain.errors import InputError
from longpretrain.files import write_atomically
from longpretrain.ranks import Ranks
from longpretrain.recipe import from_tree
from longpretrain.schedule import hidden_dropout_seed


def config(run_dir: Path, **sections: dict[str, object]) -> Config:
    return from_tree({"run": {"dir": str(run_dir)}, **sections})


def open_run(config: Config, *, fresh: bool) -> Path | None:
    with run_folder.opened(config, fresh=fresh) as moved:
        return moved


def test_foreign_folders_are_neither_written_nor_moved(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for fresh in (False, True):
        for place in (tmp_path, tmp_path / "file"):
            with pytest.raises(InputError, match="something that is no run"):
                run_folder.check_run_dir(config(place), fresh=fresh)
    run_folder.check_run_dir(config(tmp_path / "new"), fresh=True)


def test_fresh_does_not_move_its_own_inputs(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    inside = config(run_dir, data={"train": str(run_dir / "data")})
    open_run(inside, fresh=False)
    with pytest.raises(InputError, match="inside the run folder that --fresh would move"):
        run_folder.check_run_dir(inside, fresh=True)


def test_another_recipe_is_refused_once_there_is_work_to_lose(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    open_run(config(run_dir), fresh=False)
    other = config(run_dir, optim={"lr": 1.0})
    run_folder.check_run_dir(other, fresh=False)  # no checkpoint yet: a mended start
    (run_dir / "checkpoints" / "step-000003").mkdir(parents=True)
    (run_dir / "checkpoints" / "step-000003" / "state.json").write_text("{}")
    with pytest.raises(InputError, match=r"optim\.lr was 3e-05 and is now 1\.0"):
        run_folder.check_run_dir(other, fresh=False)
    run_folder.check_run_dir(other, fresh=True)
    assert open_run(other, fresh=True) == tmp_path / "run.old-1"
    assert (tmp_path / "run.old-1" / "checkpoints" / "step-000003").is_dir()
    assert checkpoint.latest(run_dir) is None
    for damaged in ("a: [", "", "unknown: 1"):
        (tmp_path / "run.old-1" / "config.yaml").write_text(damaged)
        with pytest.raises(InputError, match=r"config\.yaml: got .*wanted the recipe of the run"):
            run_folder.check_run_dir(config(tmp_path / "run.old-1"), fresh=False)


@pytest.mark.parametrize(
    ("status", "event", "step"),
    [
        ('{"state": "done", "step": 12}', "", 12),
        (
            '{"state": "running", "step": 0}',
            '{"kind": "event", "step": 8, "checkpoint": "step-000008"}',
            8,
        ),
        ("damaged", '{"kind": "event", "step": 8, "checkpoint": "step-000008"}', 8),
        (
            '{"state": "failed", "step": 0}',
            '{"kind": "event", "step": 8, "checkpoint_failed": "x"}',
            None,
        ),
        ('{"step": "odd"}', "damaged\n{}", None),
    ],
    ids=["status", "journal", "damaged status", "none written", "all damaged"],
)
def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(
    tmp_path: Path, status: str, event: str, step: int | None
) -> None:
    run = config(tmp_path / "run")
    open_run(run, fresh=False)
    (run.run_dir / "status.json").write_text(status)
    (run.run_dir / "metrics.jsonl").write_text(f"{event}\n")
    refused = contextlib.nullcontext()
    if step:
        refused = pytest.raises(InputError, match=f"no checkpoint, though that of step {step} was")
    with refused:
        run_folder.check_run_dir(run, fresh=False)
    run_folder.check_run_dir(run, fresh=True)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    refused = pytest.raises(InputError, match="a run that is going on")
    with run_folder.only_writer(tmp_path), refused:
        run_folder.check_is_free(tmp_path)
    run_folder.check_is_free(tmp_path)
    run_folder.check_is_free(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with run_folder.only_writer(tmp_path), refused, run_folder.only_writer(tmp_path):
        pass
    with run_folder.only_writer(tmp_path):
        pass


def is_locked(run_dir: Path) -> bool:
    with contextlib.suppress(InputError), run_folder.only_writer(run_dir):
        return False
    return True


def test_nothing_is_written_or_moved_before_the_lock(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for fresh in (False, True):
        refused = pytest.raises(InputError, match="a run that is going on")
        with run_folder.only_writer(run_dir), refused:
            open_run(config(run_dir), fresh=fresh)
    assert sorted(disk(tmp_path)) == ["run", "run/.lock"]
    run_folder.check_run_dir(config(run_dir), fresh=False)  # a start that came no further
    assert open_run(config(run_dir), fresh=True) is None
    with run_folder.opened(config(run_dir), fresh=True) as moved:
        assert moved == tmp_path / "run.old-1"
        assert is_locked(run_dir)
        assert is_locked(moved)
    assert not is_locked(run_dir)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_file_systems_without_locks_are_told_of_once(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(fcntl, "flock", flock)
    told = f"run folder {tmp_path / 'run'}: no locks on this file system; start one run at a time\n"
    for moved in (None, tmp_path / "run.old-1"):
        assert open_run(config(tmp_path / "run"), fresh=True) == moved
        assert capsys.readouterr().out == told


# A real kill, between the bytes and the name.
KILLED = """
import os, signal, sys
from pathlib import Path
from longpretrain.files import write_atomically

def die(event, values):
    if event == "os.rename":
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(die)
write_atomically(Path(sys.argv[1]), "half a")
"""


def test_what_a_killed_write_left_is_no_strangers_and_goes(tmp_path: Path) -> None:
    """Also where it was the first of a run. What others may just be writing stays."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in ("config.yaml", "attempts.json", "status.json", "report.html"):
        if name == "status.json":
            run_folder.check_run_dir(config(run_dir), fresh=False)
            open_run(config(run_dir), fresh=False)
        killed = subprocess.run(
            [sys.executable, "-c", KILLED, str(run_dir / name)], check=False, cwd=ROOT
        )
        assert killed.returncode == -signal.SIGKILL
        assert len(list(run_dir.glob(f".{name}.*.part"))) == 1
    open_run(config(run_dir), fresh=False)
    left = [path.name for path in run_dir.iterdir()]
    assert sorted(re.sub("[0-9a-f]{32}", "HEX", name) for name in left) == [
        ".attempts.json.HEX.part",
        ".lock",
        ".report.html.HEX.part",
        "config.yaml",
    ]


def test_other_errors_of_a_lock_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"), run_folder.only_writer(tmp_path):
        pass


def test_a_full_disk_does_not_keep_an_old_status(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=64) as run_dir:
        run_folder.write_status(run_dir, "running", reason="torchrun " + "x" * 500, step=3)
        ballast = fill(run_dir)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(run_dir / "another", "text")
        run_folder.write_status(run_dir, "failed", reason="no room", step=4)
        told = run_folder.read_status(run_dir)
        assert (told["state"], told["reason"], told["step"]) == ("failed", "no room", 4)
        (run_dir / "status.json").unlink()
        with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(b"x"):
                pass
        with pytest.raises(OSError, match="No space left"):  # there is none to write over
            run_folder.write_status(run_dir, "failed", reason="no room", step=4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, None),
        ('{"state": "preempted", "reason": "SIGUSR1"}', "preempted: SIGUSR1"),
        ('{"state": "running", "reason": "srun"}', "ended without a word: killed, or its machine"),
        ("{", None),
    ],
    ids=["first", "preempted", "killed", "damaged"],
)
def test_how_the_attempt_before_ended(tmp_path: Path, text: str | None, said: str | None) -> None:
    if text is not None:
        (tmp_path / "status.json").write_text(text)
    assert (run_folder.how_it_ended(tmp_path) or "None").startswith(said or "None")


@pytest.mark.usefixtures("process_group")
class TestStatus:
    def test_the_first_failure_is_kept(self, tmp_path: Path) -> None:
        settings = config(tmp_path)
        with pytest.raises(OSError, match="on fire"), run_folder.status(settings, Ranks()):
            raise OSError("the disk is on fire")
        told = run_folder.read_status(tmp_path)
        assert (told["state"], told["step"]) == ("failed", 0)
        assert told["reason"] == "rank 0: OSError: the disk is on fire"
        second = Ranks(rank=1, world_size=2)
        with pytest.raises(RuntimeError), run_folder.status(settings, second):
            run_folder.write_status(tmp_path, "failed", reason="rank 0: the cause", step=0)
            raise RuntimeError("connection closed by peer")
        assert run_folder.read_status(tmp_path)["reason"] == "rank 0: the cause"

    def test_an_end_is_not_overwritten(self, tmp_path: Path) -> None:
        with pytest.raises(SystemExit), run_folder.status(config(tmp_path), Ranks()) as end:
            end("preempted", "SIGTERM", 5)
            raise SystemExit(143)
        assert run_folder.read_status(tmp_path)["state"] == "preempted"


@pytest.mark.parametrize("seed", [0, 20_250_101, 2**62])
def test_any_seed_seeds_dropout(seed: int) -> None:
    import torch

    draws = set()
    for step, rank in ((1, 0), (1, 1), (2, 0)):
        torch.manual_seed(hidden_dropout_seed(seed, step, rank))
        draws.add(float(torch.rand(())))
    assert len(draws) == 3


def test_second_interrupt_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setattr(signals, "ECHO_S", 0.0)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.asked, stop.signal_name) == (True, "SIGTERM")
        os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def begun(
    small_run: Path, process_group: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A recipe and a run of it; the recipe wants one update more than the run has done."""
    folder = tmp_path_factory.mktemp("begun")
    tree = yaml.safe_load((small_run / "recipe.yaml").read_text())
    tree |= {"schedule": {"total_steps": 2, "warmup_steps": 0}, "evaluate": {"every_steps": 0}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    run_dir = folder / "run"
    assert exit_code("train", folder / "recipe.yaml", f"run.dir={run_dir}") == 0
    for path in (folder / "recipe.yaml", run_dir / "config.yaml"):
        path.write_text(path.read_text().replace("total_steps: 2", "total_steps: 3"))
    return folder / "recipe.yaml", run_dir


def another_model(small_run: Path, folder: Path) -> dict[str, Path]:
    convert(small_run / "models" / "short", folder / "wide", positions=128, attention_window=32)
    shutil.copytree(small_run / "models" / "long", folder / "big")
    path = folder / "big" / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
    return {"wide": folder / "wide", "big": folder / "big"}


class TestResume:
    @pytest.mark.parametrize(
        ("override", "named"),
        [
            ("model.attention_window=32", "model.attention_window was None and is now [32]"),
            ("model.dilation=[1,2]", "model.dilation was None and is now [1, 2]"),
            ("model.causal=true", "model.causal was None and is now True"),
            ("model.global_tokens=first", "model.global_tokens was 'none' and is now 'first'"),
            ("data.max_tokens=64", "data.max_tokens was 128 and is now 64"),
            ("model.path={wide}", "got attention_window (32, 32); wanted attention_window (16,"),
            ("model.path={big}", "got hidden_size 64; wanted hidden_size 32"),
            ("data.train={valid}", "corpus of the run: got data.train with fingerprint"),
        ],
        ids=lambda text: text.split("=")[0] if "=" in text else "",
    )
    def test_another_model_or_corpus_is_refused(
        self,
        begun: tuple[Path, Path],
        small_run: Path,
        tmp_path: Path,
        override: str,
        named: str,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        recipe, run_dir = begun
        others = another_model(small_run, tmp_path) if "{" in override else {}
        word = override.format(valid=small_run / "data" / "valid", **others)
        before = disk(run_dir)
        for check in (["--check"], []):  # before ranks start, and by the ranks
            assert exit_code("train", recipe, f"run.dir={run_dir}", word, *check) == 2
            assert named in check_form(capsys.readouterr().err, "train")
        assert disk(run_dir) == before

    def test_altered_shape_in_the_checkpoint_is_refused(
        self, begun: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        recipe, run_dir = tmp_path / "recipe.yaml", tmp_path / "run"
        shutil.copytree(begun[1], run_dir)
        tree = yaml.safe_load(begun[0].read_text())
        tree["model"]["path"] = str(tmp_path / "moved away")
        recipe.write_text(yaml.safe_dump(tree))
        path = run_dir / "checkpoints" / "step-000002" / "config.json"
        path.write_text(path.read_text().replace('"hidden_size": 32', '"hidden_size": 64'))
        before = disk(run_dir)
        assert exit_code("train", recipe, f"run.dir={run_dir}") == 2
        told = check_form(capsys.readouterr().err, "train")
        assert "checkpoint step-000002 is damaged, config.json: sha256" in told
        assert disk(run_dir) == before

    def test_other_trained_parameters_are_refused(
        self, begun: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Even where config.yaml was edited to agree: the moments are of another model."""
        recipe, run_dir = begun[0], shutil.copytree(begun[1], tmp_path / "run")
        config_path = run_dir / "config.yaml"
        text = config_path.read_text()
        config_path.write_text(text.replace("global_tokens: none", "global_tokens: first"))
        before = disk(run_dir / "checkpoints")
        words = ["train", recipe, f"run.dir={run_dir}", "model.global_tokens=first"]
        assert exit_code(*words) == 2
        line = check_form(capsys.readouterr().err, "train")
        assert "query_global" in line
        assert disk(run_dir / "checkpoints") == before
        assert exit_code(*words, f"run.dir={tmp_path / 'next'}", line[:-1].split(" and ")[-1]) == 0

    def test_lost_latest_never_begins_anew(
        self, begun: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The newest whole one is taken, and latest names it from then on: export needs it."""
        run_dir = tmp_path / "run"
        shutil.copytree(begun[1], run_dir)
        (run_dir / "checkpoints" / "latest").unlink()
        assert exit_code("train", begun[0], f"run.dir={run_dir}") == 0  # the one that is there
        assert "step-000002, step 2 of 3" in (run_dir / "metrics.jsonl").read_text()
        assert "latest is missing: the newest whole" in capsys.readouterr().out
        before = disk(run_dir / "checkpoints")
        (run_dir / "checkpoints" / "latest").write_text("step-0000\n")
        (run_dir / "status.json").write_text("")
        (run_dir / "checkpoints" / ".step-000001.old.part").mkdir()  # killed as it was removed
        assert exit_code("train", begun[0], f"run.dir={run_dir}") == 0
        assert "is done, all 3 updates" in capsys.readouterr().out
        assert run_folder.read_status(run_dir)["state"] == "done", "mended"
        assert disk(run_dir / "checkpoints") == before

    def test_the_first_model_is_needed_no_more(
        self, begun: tuple[Path, Path], tmp_path: Path
    ) -> None:
        """Weights come from the checkpoint: the folder of model.path may move, or go."""
        run_dir = tmp_path / "run"
        shutil.copytree(begun[1], run_dir)
        words = ["train", begun[0], f"run.dir={run_dir}", f"model.path={tmp_path / 'moved'}"]
        assert exit_code(*words, "--check") == 0
        assert exit_code(*words) == 0
        assert run_folder.read_status(run_dir)["step"] == 3
