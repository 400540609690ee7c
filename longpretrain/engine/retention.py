"""Which checkpoints of a run go, once a newer one is whole.

A folder is renamed to a hidden name before it is removed: a kill in the middle leaves no half of a
checkpoint under a whole one's name.
"""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from longpretrain.engine import checkpoint, names

LEFT_OVERS = (".step-*.part", f".{names.LATEST}.*.part")
"""What a killed save, or a killed removal, leaves."""


def remove_old(run_dir: Path, current: int, *, keep: int, keep_every_steps: int) -> list[str]:
    """Leaves the newest ``keep`` checkpoints up to ``current``, which is the latest.

    Those of later steps are of a time line that was left (someone pointed ``latest`` back, or one
    was damaged): they go, too. Those that were to stay for good stay under another name.

    Args:
        run_dir: the run folder.
        current: the step of the checkpoint that is now the latest.
        keep: newest checkpoints that stay; 0 keeps all.
        keep_every_steps: steps that are a multiple of this stay for good; 0: none do.

    Returns:
        What could not be removed, and why: no reason to end a run.
    """
    found = checkpoint.folders(run_dir)
    kept = sorted({step for step, _ in found if step <= current})
    kept = kept[-keep:] if keep else kept
    problems = []
    for step, path in found:
        if step in kept or path.is_symlink():  # a link is somebody's own
            continue
        is_for_good = bool(keep_every_steps) and step % keep_every_steps == 0
        if is_for_good and step <= current:
            continue
        try:
            if is_for_good:
                path.rename(_free_name(path))
            else:
                _remove(path)
        except OSError as error:
            problems.append(f"{path}: {error.strerror or error}")
    return problems


def make_room(run_dir: Path, newest: int, *, keep: int, keep_every_steps: int) -> list[str]:
    """Removes, on a full disk, what would go after the next save: no such save would succeed else
    on a disk with room for ``keep`` checkpoints and no more.

    Args:
        run_dir: the run folder.
        newest: the step of the newest checkpoint that is whole, which stays whatever happens.
        keep: see ``remove_old``; of 1, or of all, none can go.
        keep_every_steps: see ``remove_old``.

    Returns:
        The names of those that went.
    """
    own = [path for step, path in checkpoint.folders(run_dir) if step <= newest]
    going = own[: -(keep - 1)] if keep > 1 else []
    removed = []
    for path in going:
        step = names.step_of(path) or 0
        is_for_good = keep_every_steps and step % keep_every_steps == 0
        if step == newest or is_for_good or path.is_symlink():
            continue
        with contextlib.suppress(OSError):
            _remove(path)
            removed.append(path.name)
    return removed


def remove_left_overs(run_dir: Path) -> None:
    """Removes what killed saves left. Nothing may be under way."""
    for pattern in LEFT_OVERS:
        for part in (run_dir / "checkpoints").glob(pattern):
            shutil.rmtree(part, ignore_errors=True)
            with contextlib.suppress(OSError):
                part.unlink()


def hidden(path: Path) -> Path:
    """The name of a checkpoint on its way out."""
    return path.with_name(f".{path.name}.old.part")


def _remove(path: Path) -> None:
    old = hidden(path)
    shutil.rmtree(old, ignore_errors=True)
    path.rename(old)
    shutil.rmtree(old)


def _free_name(path: Path) -> Path:
    number = 1
    while (name := path.with_name(f"{path.name}-left-{number}")).exists():
        number += 1
    return name
