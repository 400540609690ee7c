"""Kills a save at each of its steps on the disk, one after another, and looks what a resume finds.

``save_driver.py PLACE``: a run with a checkpoint of step 3, and one of step 6 from a time line that
was left; a save of step 6 in a process that kills itself before its step number n. Prints, for each
n, which checkpoint a resume would take. Processes are forked, so each takes a fraction of a second.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from crash_driver import is_step

from longpretrain.engine import candidates, checkpoint, retention
from longpretrain.engine.complete import Written, complete, file_name
from longpretrain.engine.tensor_file import write_tensors

TENSORS = {"model": {"w": torch.ones(1000)}, "optimizer": {"w.exp_avg": torch.zeros(1000)}}


class ModelFiles:
    """What a task does for a checkpoint."""

    def write_model_files(self, folder: Path) -> None:
        (folder / "config.json").write_text("{}", encoding="utf-8")


def save(run_dir: Path, step: int, *, time_line: str = "") -> None:
    """One rank's part and rank 0's, one after the other, as the threads of a saver do it."""
    state = {"step": step, "samples_done": 8 * step, "skipped": 0, "updates_applied": step}
    final = run_dir / "checkpoints" / f"step-{step:06d}"
    part = final.with_name(f".{final.name}.0123abcd.part")
    part.mkdir(parents=True)
    paths = {kind: part / file_name(kind, 0, 1) for kind in TENSORS}
    hashes = {
        path.name: write_tensors(path, TENSORS[kind], lambda size: None)
        for kind, path in paths.items()
    }
    sizes = {path.name: path.stat().st_size for path in paths.values()}
    tensors = {paths[kind].name: sorted(TENSORS[kind]) for kind in TENSORS}
    written = Written(hashes=hashes, sizes=sizes, tensors=tensors)
    whole = {**state, "task": {"time line": time_line}}
    complete(part, final, ModelFiles(), [written], whole)  # type: ignore[arg-type]
    assert retention.remove_old(run_dir, step, keep=1, keep_every_steps=0) == []


def run(run_dir: Path, *, die_at: int = -1) -> bool:
    """Saves in a process of its own, which dies before its step number die_at; True: it did."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, values: tuple[Any, ...]) -> None:
            nonlocal seen
            if is_step(event, values):
                if seen == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen += 1

        sys.addaudithook(count)
        save(run_dir, 6, time_line="new")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def main(place: Path) -> None:
    step = 0
    while True:
        run_dir = place / str(step)
        save(run_dir, 6, time_line="left")
        save(run_dir, 3)  # removes that of step 6 ...
        save(run_dir / "more", 6, time_line="left")
        (run_dir / "more/checkpoints/step-000006").rename(run_dir / "checkpoints/step-000006")
        checkpoint.point_at(run_dir, run_dir / "checkpoints/step-000003")
        died = run(run_dir, die_at=step)
        choice = candidates.look(run_dir)
        assert choice.folder is not None
        state = checkpoint.read_state(choice.folder)
        checkpoint.verify_files(choice.folder)
        for _, folder in checkpoint.folders(run_dir):  # nothing half-done under a whole one's name
            checkpoint.verify_files(folder)
        print(choice.folder.name, state["task"]["time line"] or "-", len(choice.notes))
        retention.remove_left_overs(run_dir)
        if state["step"] == 3:
            save(run_dir, 6, time_line="new")
            assert checkpoint.latest(run_dir) == run_dir / "checkpoints/step-000006"
        left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        assert set(left) - {"step-000003"} == {"latest", "step-000006"}, (step, left)
        shutil.rmtree(run_dir)
        if not died:
            break
        step += 1
    print("steps", step)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
