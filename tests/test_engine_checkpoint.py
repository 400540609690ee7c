"""Checkpoints on the disk: which one is the latest, which go, and what a damaged one is told.

What they hold is tested by resuming, in test_engine_resume.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from longpretrain.engine import checkpoint
from longpretrain.errors import InputError
from longpretrain.files import sha256

MISSING = object()


def make_checkpoint(run_dir: Path, name: str, *, latest: bool = False, **changes: Any) -> Path:
    """A whole checkpoint of small files; ``changes`` to its state, MISSING takes a key away."""
    folder = run_dir / "checkpoints" / name
    folder.mkdir(parents=True)
    step = int("".join(filter(str.isdecimal, name)) or 500)
    hashes = {}
    for file in ("model.safetensors", "optimizer.safetensors"):
        (folder / file).write_text(f"{file} {step}")
        hashes[file] = sha256(folder / file)
    counts = {"step": step, "samples_done": 8 * step, "skipped": 0, "updates_applied": step}
    state = {"format": 1, **counts, "task": {"corpus": "c0ffee"}, "files": hashes, **changes}
    left = {key: value for key, value in state.items() if value is not MISSING}
    (folder / "state.json").write_text(json.dumps(left))
    if latest:
        (folder.parent / "latest").write_text(folder.name + "\n")
    return folder


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*"))


class TestRemoveOld:
    def test_by_number_and_left_time_lines_too(self, tmp_path: Path) -> None:
        for step in (999_000, 999_500, 1_000_000, 1_000_500):
            make_checkpoint(tmp_path, f"step-{step:06d}")
        (tmp_path / "checkpoints" / ".step-000007.part").mkdir()
        for keep in (2, 0):
            checkpoint._remove_old(tmp_path / "checkpoints", 1_000_000, keep)
            assert names(tmp_path) == ["step-1000000", "step-999500"]

    def test_what_the_run_did_not_write_is_left_alone(self, tmp_path: Path) -> None:
        foreign = ["step-", "step-000100-best", "step-000900 (copy)", "step--00100", "step-foo"]
        for name in (*foreign, "step-000100", "step-000200"):
            make_checkpoint(tmp_path, name)
        (tmp_path / "checkpoints" / "step-000050").write_text("a file")
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "checkpoints" / "step-000060").symlink_to(tmp_path / "elsewhere")
        checkpoint._remove_old(tmp_path / "checkpoints", 200, 1)
        assert names(tmp_path) == sorted([*foreign, "step-000050", "step-000060", "step-000200"])

    def test_two_names_of_one_step_never_cost_the_latest(self, tmp_path: Path) -> None:
        for name in ("step-000200", "step-200", "step-000100"):
            make_checkpoint(tmp_path, name)
        checkpoint._remove_old(tmp_path / "checkpoints", 200, 1)
        assert names(tmp_path) == ["step-000200", "step-200"]


class TestLatest:
    def test_of_a_new_run_there_is_none(self, tmp_path: Path) -> None:
        assert checkpoint.latest(tmp_path / "run") is None
        (tmp_path / "checkpoints" / ".step-000002.part").mkdir(parents=True)
        (tmp_path / "checkpoints" / ".step-000002.part" / "state.json").write_text("{}")
        assert checkpoint.latest(tmp_path) is None

    def test_pointer_decides(self, tmp_path: Path) -> None:
        first = make_checkpoint(tmp_path, "step-000001", latest=True)
        make_checkpoint(tmp_path, "step-000002")
        assert checkpoint.latest(tmp_path) == first
        copy = make_checkpoint(tmp_path, "step-000001-best", latest=True, step=1)
        assert checkpoint.latest(tmp_path) == copy

    def test_pointer_to_nothing_is_refused(self, tmp_path: Path) -> None:
        make_checkpoint(tmp_path, "step-000003")
        (tmp_path / "checkpoints" / "latest").write_text("step-000009\n")
        with pytest.raises(InputError, match="step-000009, which is no checkpoint"):
            checkpoint.latest(tmp_path)

    def test_crash_before_the_first_pointer_loses_nothing(self, tmp_path: Path) -> None:
        only = make_checkpoint(tmp_path, "step-000003")
        make_checkpoint(tmp_path, "step-foo")  # somebody's copy says nothing of the run
        assert checkpoint.latest(tmp_path) == only

    @pytest.mark.parametrize("second_is_whole", [True, False])
    def test_lost_pointer_among_several_is_refused(
        self, tmp_path: Path, second_is_whole: bool
    ) -> None:
        make_checkpoint(tmp_path, "step-000003")
        second = make_checkpoint(tmp_path, "step-000006")
        if not second_is_whole:
            (second / "state.json").unlink()
        with pytest.raises(InputError) as caught:
            checkpoint.latest(tmp_path)
        assert caught.value.what == str(tmp_path / "checkpoints" / "latest")
        assert caught.value.got == "no such file, but step-... folders"
        assert caught.value.way_out == "Write the newest name into it, or use --fresh."

    def test_folder_as_pointer_is_refused(self, tmp_path: Path) -> None:
        make_checkpoint(tmp_path, "step-000003")
        (tmp_path / "checkpoints" / "latest").mkdir()
        with pytest.raises(InputError, match="latest: got a folder; wanted the name of one"):
            checkpoint.latest(tmp_path)


class TestReadState:
    def test_whole_one_is_read(self, tmp_path: Path) -> None:
        for name in ("step-000003", "step-1000003", "step-000003-best"):
            folder = make_checkpoint(tmp_path, name)
            checkpoint.verify_files(folder)
            assert checkpoint.read_state(folder)["task"] == {"corpus": "c0ffee"}

    @pytest.mark.parametrize("state", ["{", "[]", '{"format": 99}', "{}"])
    def test_no_state_of_ours_is_refused(self, tmp_path: Path, state: str) -> None:
        folder = make_checkpoint(tmp_path, "step-000003")
        (folder / "state.json").write_text(state)
        with pytest.raises(InputError, match=r"state\.json: got "):
            checkpoint.read_state(folder)

    @pytest.mark.parametrize(
        ("key", "values"),
        [
            ("step", [MISSING, None, "3", 3.0, -3, True]),
            ("samples_done", [MISSING, "24", [], -1]),
            ("skipped", [MISSING, None, False]),
            ("updates_applied", [MISSING, {}, 0.5]),
            ("task", [MISSING, None, "c0ffee", {"corpus": 1}]),
            ("files", [MISSING, None, ["model.safetensors"], {"model.safetensors": None}]),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_damaged_key_is_named(self, tmp_path: Path, key: str, values: list[Any]) -> None:
        for number, value in enumerate(values):
            folder = make_checkpoint(tmp_path / str(number), "step-000003", **{key: value})
            with pytest.raises(InputError, match=rf"state\.json, key {key}: got ") as caught:
                checkpoint.read_state(folder)
            assert caught.value.way_out.endswith("at an older step folder.")

    def test_folder_under_another_steps_name_is_refused(self, tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path, "step-000002", step=99)
        with pytest.raises(InputError, match="got step 99; wanted step 2, as the folder's name"):
            checkpoint.read_state(folder)
        assert checkpoint.read_state(folder.rename(tmp_path / "step-best"))["step"] == 99


class TestVerifyFiles:
    @pytest.mark.parametrize("kept", [[], ["model"], ["optimizer"]], ids=str)
    def test_weights_and_moments_must_be_listed(self, tmp_path: Path, kept: list[str]) -> None:
        files = {f"{kind}.safetensors": "0" * 64 for kind in kept}
        files["model.safetensors.index.json"] = "0" * 64  # names files, but is none
        folder = make_checkpoint(tmp_path, "step-000002", files=files)
        missing = "optimizer" if "model" in kept else "model"
        for part in (0, 7):
            with pytest.raises(InputError, match=f"key files: got no {missing} file"):
                checkpoint.verify_files(folder, part, 8)

    @pytest.mark.parametrize("spoil", ["gone", "cut", "altered"])
    def test_spoilt_file_is_named(self, tmp_path: Path, spoil: str) -> None:
        folder = make_checkpoint(tmp_path, "step-000002")
        path = folder / "optimizer.safetensors"
        text = path.read_text()
        if spoil == "gone":
            path.unlink()
        else:
            path.write_text(text[:-1] if spoil == "cut" else text.swapcase())
        with pytest.raises(InputError, match=r"checkpoint file .*optimizer\.safetensors: got "):
            checkpoint.verify_files(folder)
