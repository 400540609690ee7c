"""Which checkpoint a run goes on from when some are damaged: never a wrong one, never a silent
choice, never a new beginning.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoint_files import flip, make_checkpoint

from longpretrain.engine import candidates, checkpoint
from longpretrain.engine.candidates import Choice
from longpretrain.errors import InputError

LOOKS = [candidates.look, candidates.choose]
pytestmark = [
    pytest.mark.usefixtures("process_group"),
    pytest.mark.parametrize("look", LOOKS, ids=["alone", "together"]),
]
Look = Callable[[Path], Choice]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Steps 3, 6 and 9; 9 is the latest."""
    for step in (3, 6, 9):
        make_checkpoint(tmp_path, f"step-{step:06d}", latest=True)
    return tmp_path


def point(run_dir: Path, text: str) -> None:
    (run_dir / "checkpoints" / "latest").write_text(text)


def name(choice: Choice) -> str:
    assert choice.folder is not None
    return choice.folder.name


def test_of_a_new_run_there_is_none(look: Look, tmp_path: Path) -> None:
    assert look(tmp_path / "run") == Choice(seen="none")
    make_checkpoint(tmp_path, ".step-000002.part")
    make_checkpoint(tmp_path, "step-foo")  # somebody's copy says nothing of the run
    assert look(tmp_path) == Choice(seen="none")


def test_whole_one_is_taken_without_a_word(look: Look, three: Path) -> None:
    choice = look(three)
    assert (name(choice), choice.notes) == ("step-000009", ())
    assert choice.seen == candidates.seen(three)


def test_a_pointer_that_was_set_back_is_respected_and_told(look: Look, three: Path) -> None:
    point(three, "step-000003\n")
    choice = look(three)
    assert name(choice) == "step-000003"
    assert choice.notes == (
        "checkpoints/latest names step-000003, though there is step-000009, step-000006: going on "
        "from step-000003; what is newer goes when the next checkpoint is written",
    )


def test_a_copy_under_a_name_of_ones_own(look: Look, three: Path) -> None:
    shutil.copytree(three / "checkpoints/step-000006", three / "checkpoints/best")
    point(three, "best")
    assert name(look(three)) == "best"
    flip(three / "checkpoints/best/config.json", 1)
    assert name(look(three)) == "step-000009"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder: flip(folder / "config.json", 0),
        lambda folder: flip(folder / "state.json", 99),
        lambda folder: (folder / "state.json").write_text(""),
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / "model.safetensors").unlink(),
        shutil.rmtree,
        lambda folder: [path.unlink() for path in folder.iterdir()],
    ],
    ids=["flip", "state", "empty", "no state", "no file", "no folder", "bare"],
)
def test_damaged_latest_costs_one_checkpoint(
    look: Look, three: Path, spoil: Callable[[Path], object]
) -> None:
    spoil(three / "checkpoints/step-000009")
    choice = look(three)
    assert name(choice) == "step-000006"
    told = "; ".join(choice.notes)
    what = "checkpoint step-000009 is damaged, "
    if not (three / "checkpoints/step-000009").exists():
        what = "latest names 'step-000009', which is not there: "
    assert what in told
    assert told.endswith("; going on from step-000006")


def test_a_file_that_the_disk_does_not_read_is_named(look: Look, three: Path) -> None:
    place = three / "checkpoints/step-000009/config.json"
    place.unlink()
    place.symlink_to("/proc/self/mem")  # its first page gives an input/output error
    choice = look(three)
    assert name(choice) == "step-000006"
    assert f"damaged, {place}: Input/output error" in "; ".join(choice.notes)


def test_two_damaged_ones_are_both_told(look: Look, three: Path) -> None:
    for step in (6, 9):
        flip(three / f"checkpoints/step-{step:06d}/config.json", 2)
    choice = look(three)
    assert name(choice) == "step-000003"
    assert [note.split(",")[0] for note in choice.notes] == [
        "checkpoint step-000009 is damaged",
        "checkpoint step-000006 is damaged",
        "going on from step-000003",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "garbage",
        "step-0000",
        "step-000001",
        "step-000012",
        "../checkpoints/step-000003",
        "/",
        "..",
        "a" * 5000,
        "a\0b",
        "step-",
    ],
    ids=lambda text: repr(text[:9]),
)
def test_garbage_in_the_pointer_costs_nothing(look: Look, three: Path, text: str) -> None:
    point(three, text)
    choice = look(three)
    assert name(choice) == "step-000009"
    assert "the newest whole checkpoint is taken" in choice.notes[0]
    assert len(choice.notes[0]) < 300 + len(str(three))


def test_a_step_beyond_all_numbers_is_garbage(look: Look, three: Path) -> None:
    point(three, "step-" + "1" * 5000)
    assert name(look(three)) == "step-000009"


def test_pointer_that_is_missing_or_a_folder_costs_nothing(look: Look, three: Path) -> None:
    pointer = three / "checkpoints/latest"
    pointer.unlink()
    flip(three / "checkpoints/step-000009/config.json", 2)
    choice = look(three)
    assert name(choice) == "step-000006"
    assert choice.notes[0] == f"{pointer} is missing: the newest whole checkpoint is taken"
    pointer.mkdir()
    assert f"{pointer} is no file" in look(three).notes[0]


def test_only_older_ones_follow_a_pointer(look: Look, three: Path) -> None:
    """What is newer was left on purpose, maybe: a person decides."""
    point(three, "step-000003")
    flip(three / "checkpoints/step-000003/config.json", 2)
    with pytest.raises(InputError) as caught:
        look(three)
    assert "checkpoint step-000003 is damaged, config.json: sha256" in caught.value.got
    assert caught.value.way_out.startswith("Write step-000009 or step-000006")


@pytest.mark.parametrize("pointer", ["step-000009", "garbage", None])
def test_no_whole_one_is_never_a_new_beginning(
    look: Look, three: Path, pointer: str | None
) -> None:
    for step in (3, 6, 9):
        flip(three / f"checkpoints/step-{step:06d}/state.json", 20 + step)
    if pointer is None:
        (three / "checkpoints/latest").unlink()
    else:
        point(three, pointer)
    with pytest.raises(InputError) as caught:
        look(three)
    for step in (3, 6, 9):
        assert f"checkpoint step-{step:06d} is damaged, state.json" in caught.value.got
    assert "--fresh" in caught.value.way_out


@pytest.mark.parametrize("text", ["step-000009", "garbage", "", "a/b", "a" * 5000])
def test_pointer_without_any_folder_is_never_a_new_beginning(
    look: Look, tmp_path: Path, text: str
) -> None:
    (tmp_path / "checkpoints").mkdir()
    point(tmp_path, text)
    with pytest.raises(InputError, match="wanted one that is whole"):
        look(tmp_path)


def test_one_of_a_newer_version_is_refused_not_skipped(look: Look, three: Path) -> None:
    """It would be lost: what is newer than the one gone on from is removed."""
    make_checkpoint(three, "step-000012", latest=True, format=99)
    with pytest.raises(InputError, match=r"step-000012/state\.json: got format 99"):
        look(three)


def test_one_of_format_1_is_taken_with_a_word(look: Look, three: Path) -> None:
    import json

    path = three / "checkpoints/step-000009/state.json"
    state = json.loads(path.read_text())
    del state["sha256"]
    path.write_text(json.dumps(state | {"format": 1}))
    choice = look(three)
    assert name(choice) == "step-000009"
    assert choice.notes == ("step-000009 is of format 1: its state.json has no hash of its own",)


@pytest.mark.parametrize("seed", range(30))
def test_random_damage_is_always_found(look: Look, three: Path, seed: int) -> None:
    draw = random.Random(seed)
    folder = three / "checkpoints/step-000009"
    path = draw.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    place = draw.randrange(len(data))
    if draw.random() < 0.3:
        del data[place:]
    else:
        data[place] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    choice = look(three)
    assert name(choice) == "step-000006"
    assert "step-000009 is damaged" in choice.notes[0]


def test_a_check_alone_reads_no_large_file(
    look: Look, three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "_SMALL", 10)
    flip(three / "checkpoints/step-000009/model.safetensors", 1)
    assert name(look(three)) == ("step-000009" if look is candidates.look else "step-000006")


def test_latest_is_read_as_it_is(look: Look, three: Path) -> None:
    assert look(three).folder == checkpoint.latest(three)
