"""One checkpoint on the disk: what is told of a damaged one, and that no byte changes unseen.

What they hold is tested by resuming, in test_engine_resume.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import FILES, MISSING, flip, make_checkpoint

from longpretrain.engine import checkpoint
from longpretrain.errors import InputError


class TestReadState:
    def test_whole_one_is_read(self, tmp_path: Path) -> None:
        for name in ("step-000003", "step-1000003", "step-000003-best"):
            folder = make_checkpoint(tmp_path, name)
            checkpoint.verify_files(folder)
            assert checkpoint.read_state(folder)["task"] == {"corpus": "c0ffee"}

    @pytest.mark.parametrize("state", ["{", "[]", '{"format": 99}', "{}", '{"format": 2}'])
    def test_no_state_of_ours_is_refused(self, tmp_path: Path, state: str) -> None:
        folder = make_checkpoint(tmp_path, "step-000003")
        (folder / "state.json").write_text(state)
        with pytest.raises(InputError, match=r"state\.json(, key sha256)?: got "):
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

    def test_no_byte_changes_unseen(self, tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path, "step-000003")
        path = folder / "state.json"
        text = path.read_bytes()
        for place in range(len(text)):
            flip(path, place, 1 << place % 8)
            with pytest.raises(InputError):
                checkpoint.read_state(folder)
            path.write_bytes(text)
        for cut in range(0, len(text), 7):
            path.write_bytes(text[:cut])
            with pytest.raises(InputError):
                checkpoint.read_state(folder)
        path.write_bytes(text)
        assert checkpoint.read_state(folder)["step"] == 3

    def test_format_1_had_no_hash_of_itself(self, tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path, "step-000003", format=1)
        path = folder / "state.json"
        state = json.loads(path.read_text())
        del state["sha256"]
        path.write_text(json.dumps(state))
        assert checkpoint.read_state(folder)["step"] == 3
        assert not checkpoint.is_foreign(folder)
        path.write_text(json.dumps(state | {"format": 2}))
        with pytest.raises(InputError, match="key sha256: got nothing"):
            checkpoint.read_state(folder)

    def test_another_version_is_told_from_damage(self, tmp_path: Path) -> None:
        newer = make_checkpoint(tmp_path, "step-000003", format=99)
        with pytest.raises(InputError, match="got format 99; wanted format 2"):
            checkpoint.read_state(newer)
        assert checkpoint.is_foreign(newer)
        flip(newer / "state.json", 5)
        assert not checkpoint.is_foreign(newer)
        assert not checkpoint.is_foreign(tmp_path)


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

    @pytest.mark.parametrize("name", FILES)
    def test_each_file_is_somebodys(self, tmp_path: Path, name: str) -> None:
        """Dealt out over any number of ranks, exactly one of them finds an altered file."""
        folder = make_checkpoint(tmp_path, "step-000002")
        flip(folder / name, 3)
        for parts in (1, 2, 3, 8):
            finders = []
            for part in range(parts):
                try:
                    checkpoint.verify_files(folder, part, parts)
                except InputError as error:
                    finders.append((part, error.what))
            assert [what for _, what in finders] == [f"checkpoint file {folder / name}"]

    def test_all_look_whether_files_are_there(self, tmp_path: Path) -> None:
        folder = make_checkpoint(tmp_path, "step-000002")
        (folder / "optimizer.safetensors").unlink()
        for part in range(4):
            with pytest.raises(InputError, match=r"optimizer\.safetensors: got no file"):
                checkpoint.verify_files(folder, part, 4, largest=0)

    def test_a_foreign_weights_file_is_told(self, tmp_path: Path) -> None:
        """Of a sharded checkpoint, say: the loader would take it before the index."""
        folder = make_checkpoint(tmp_path, "step-000002")
        (folder / "README.md").write_text("my best one")
        checkpoint.verify_files(folder)
        (folder / "model-00001-of-00002.safetensors").write_text("older")
        with pytest.raises(InputError, match="got a file that the run did not write"):
            checkpoint.verify_files(folder)


def test_the_step_in_reports(tmp_path: Path) -> None:
    """Never a reason to fail: it stands in what is said of a failure."""
    assert checkpoint.kept_step(tmp_path) == 0
    folder = make_checkpoint(tmp_path, "step-000012", latest=True)
    pointer = tmp_path / "checkpoints" / "latest"
    assert checkpoint.kept_step(tmp_path) == 12
    folder.rename(folder.with_name("best"))
    pointer.write_text("best")
    assert checkpoint.kept_step(tmp_path) == 12
    for text in ("step-000099", "../..", "/", "", "a" * 5000, "step-" + "9" * 5000, "\0"):
        pointer.write_text(text)
        assert checkpoint.kept_step(tmp_path) == 0, text[:20]
    pointer.write_bytes(b"\xff\xfe")
    assert checkpoint.kept_step(tmp_path) == 0
