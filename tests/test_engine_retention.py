"""Which checkpoints go once a newer one is whole, and which never do."""

from __future__ import annotations

from pathlib import Path

from checkpoint_files import make_checkpoint, names

from longpretrain.engine import retention


def remove(run_dir: Path, current: int, keep: int, every: int = 0) -> list[str]:
    return retention.remove_old(run_dir, current, keep=keep, keep_every_steps=every)


def test_by_number_and_left_time_lines_too(tmp_path: Path) -> None:
    for step in (999_000, 999_500, 1_000_000, 1_000_500):
        make_checkpoint(tmp_path, f"step-{step:06d}")
    assert remove(tmp_path, 1_000_000, 2) == []
    assert names(tmp_path) == ["step-1000000", "step-999500"]


def test_zero_keeps_all(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        make_checkpoint(tmp_path, f"step-{step:06d}")
    remove(tmp_path, 3, 0)
    assert names(tmp_path) == ["step-000001", "step-000002", "step-000003"]


def test_what_the_run_did_not_write_is_left_alone(tmp_path: Path) -> None:
    foreign = ["step-", "step-000100-best", "step-000900 (copy)", "step--00100", "step-foo"]
    for name in (*foreign, "step-000100", "step-000200"):
        make_checkpoint(tmp_path, name)
    (tmp_path / "checkpoints" / "step-000050").write_text("a file")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints" / "step-000060").symlink_to(tmp_path / "elsewhere")
    remove(tmp_path, 200, 1)
    assert names(tmp_path) == sorted([*foreign, "step-000050", "step-000060", "step-000200"])


def test_two_names_of_one_step_never_cost_the_latest(tmp_path: Path) -> None:
    for name in ("step-000200", "step-200", "step-000100"):
        make_checkpoint(tmp_path, name)
    remove(tmp_path, 200, 1)
    assert names(tmp_path) == ["step-000200", "step-200"]


def test_every_so_many_steps_one_stays_for_good(tmp_path: Path) -> None:
    for step in range(10, 101, 10):
        make_checkpoint(tmp_path, f"step-{step:06d}")
        remove(tmp_path, step, 2, every=30)
    kept = ["step-000030", "step-000060", "step-000090", "step-000100"]
    assert names(tmp_path) == kept
    # The run goes on from step 30: what was to stay does, under a name that is not the run's.
    for step in (40, 90):
        make_checkpoint(tmp_path / "again", f"step-{step:06d}")
    (tmp_path / "again/checkpoints/step-000040").rename(tmp_path / "checkpoints/step-000040")
    remove(tmp_path, 40, 2, every=30)
    kept = ["step-000030", "step-000040", "step-000060-left-1", "step-000090-left-1"]
    assert names(tmp_path) == kept
    (tmp_path / "again/checkpoints/step-000090").rename(tmp_path / "checkpoints/step-000090")
    remove(tmp_path, 40, 2, every=30)
    assert names(tmp_path) == [*kept, "step-000090-left-2"]


def test_room_is_made_but_never_of_the_newest(tmp_path: Path) -> None:
    def room(keep: int, every: int = 0) -> list[str]:
        return retention.make_room(tmp_path, 40, keep=keep, keep_every_steps=every)

    for step in (10, 20, 30, 40, 50):
        make_checkpoint(tmp_path, f"step-{step:06d}")
    before = names(tmp_path)
    assert [room(0), room(1), room(5), names(tmp_path)] == [[], [], [], before]
    assert room(4) == ["step-000010"]
    assert room(2, every=20) == ["step-000030"]
    assert room(2) == ["step-000020"]
    assert room(2) == []
    assert names(tmp_path) == ["step-000040", "step-000050"], "what is newer is not its business"


def test_left_overs_of_killed_saves_go_and_nothing_else(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "step-000001", latest=True)
    before = names(tmp_path)
    for name in (".step-000002.0123abcd.part", ".step-000001.old.part"):
        make_checkpoint(tmp_path, name)
    (tmp_path / "checkpoints" / ".step-000002.latest.part").write_text("step-000002\n")
    (tmp_path / "checkpoints" / ".latest.0123.part").write_text("step-000002\n")
    retention.remove_left_overs(tmp_path)
    assert names(tmp_path) == before
    retention.remove_left_overs(tmp_path / "nowhere")
