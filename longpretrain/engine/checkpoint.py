"""Checkpoints that are model folders, hold whole fp32 parameters, and never look whole when they
are not.

``checkpoints/step-000500/`` holds the master weights as ``model*.safetensors`` (transformers
loads the
folder as it is), both moments as ``optimizer*.safetensors``, and ``state.json``. Each parameter is
written once, whole, by one rank; so world size, ZeRO stage and precision may change at a resume.
The folder is written under another name, synced, and renamed; then ``checkpoints/latest`` moves.
Only names of ``step-`` and digits are the run's; any other, such as a copy, is left alone.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

import longpretrain
from longpretrain.engine.task import Task
from longpretrain.engine.zero import MOMENTS, ZeroEngine
from longpretrain.errors import InputError
from longpretrain.files import read_json_object, save_tensors, sha256, sync, write_atomically

FORMAT = 1
STATE = "state.json"
LATEST = "latest"
_DAMAGED = "The checkpoint is damaged: point checkpoints/latest at an older step folder."
_COUNTS = ("step", "samples_done", "skipped", "updates_applied")
_VERSIONS = ("torch", "deepspeed", "numpy", "safetensors")


def save(
    run_dir: Path, engine: ZeroEngine, task: Task, state: Mapping[str, Any], keep: int
) -> Path:
    """Writes one checkpoint with all ranks and returns its folder. All ranks must call it.

    Args:
        run_dir: the run folder, seen by every rank.
        engine: holds weights and moments, sharded or not.
        task: names the tensors and writes config and tokenizer.
        state: what ``state.json`` holds beside hashes and versions; ``step`` names the folder.
        keep: newest checkpoints that stay; 0 keeps all.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    final = run_dir / "checkpoints" / f"step-{state['step']:06d}"
    part = final.with_name(f".{final.name}.part")
    if rank == 0:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    dist.barrier()
    mine = _gather_mine(engine, task, rank, ranks)
    hashes: dict[str, str] = {}
    names: dict[str, list[str]] = {}
    for kind, tensors in mine.items():
        name = _file_name(kind, rank, ranks)
        save_tensors(tensors, part / name)
        hashes[name], names[name] = sha256(part / name), sorted(tensors)
    everyone: list[Any] = [None] * ranks
    dist.all_gather_object(everyone, (hashes, names))
    if rank == 0:
        _write_small_files(part, task, everyone, state)
        old = final.with_name(f".{final.name}.old.part")
        if final.exists():  # of a time line that was left: someone pointed `latest` back
            final.rename(old)
        part.rename(final)
        sync(final.parent)
        shutil.rmtree(old, ignore_errors=True)
        write_atomically(final.parent / LATEST, final.name + "\n")
        _remove_old(final.parent, state["step"], keep)
    dist.barrier()
    return final


def latest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None.

    A crash between the first checkpoint's rename and the pointer leaves one folder and no
    ``latest``: that folder is whole, and it is taken.

    Raises:
        InputError: ``latest`` names no checkpoint, or is gone where it is needed: a run that began
            anew would write over the folders that are there.
    """
    pointer = run_dir / "checkpoints" / LATEST
    if not pointer.is_file():
        return _without_pointer(pointer)
    folder = pointer.parent / pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not (folder / STATE).is_file():
        raise InputError(
            f"{pointer}",
            got=f"{folder.name}, which is no checkpoint",
            wanted="a step-... folder beside it",
            way_out="Write the name of a whole checkpoint folder into it, or use --fresh.",
        )
    return folder


def _without_pointer(pointer: Path) -> Path | None:
    wanted = "the name of one in a file"
    if pointer.is_dir():
        raise InputError(
            f"{pointer}",
            got="a folder",
            wanted=wanted,
            way_out="Move it away and write the newest step folder's name into a file, "
            "or use --fresh.",
        )
    found = [path for _, path in _step_folders(pointer.parent)]
    whole = [path for path in found if (path / STATE).is_file()]
    if not whole or len(found) == 1:
        return whole[0] if whole else None
    raise InputError(
        f"{pointer}",
        got="no such file, but step-... folders",
        wanted=wanted,
        way_out="Write the newest name into it, or use --fresh.",
    )


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint, with the keys and types that a resume needs.

    Raises:
        InputError: it is damaged or of another format, or the folder was given another's name.
    """
    path = folder / STATE
    state = read_json_object(path, way_out=_DAMAGED)
    found = state.get("format")
    if found != FORMAT:
        raise InputError(
            f"{path}",
            got=f"format {found}",
            wanted=f"format {FORMAT}",
            way_out="It was written by another version of longpretrain: use that one.",
        )
    for key in _COUNTS:
        if type(state.get(key)) is not int or state[key] < 0:  # a bool is an int, too
            raise _damaged(path, state, key, "a whole number from 0")
    for key in ("task", "files"):
        texts = state.get(key)
        if not isinstance(texts, dict) or not all(isinstance(v, str) for v in texts.values()):
            raise _damaged(path, state, key, "texts by name")
    named = _step_of(folder)
    if named not in (None, state["step"]):
        raise InputError(
            f"{path}",
            got=f"step {state['step']}",
            wanted=f"step {named}, as the folder's name says",
            way_out="Give the folder its own name back, or point checkpoints/latest at another.",
        )
    return state


def _damaged(path: Path, state: Mapping[str, Any], key: str, wanted: str) -> InputError:
    got = repr(state[key])[:80] if key in state else "nothing"
    return InputError(f"{path}, key {key}", got=got, wanted=wanted, way_out=_DAMAGED)


def verify_files(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Compares the sha256 of every ``parts``-th file with state.json.

    Raises:
        InputError: a file is missing, truncated or altered; names it. Or weights or moments are not
            even listed.
    """
    files = read_state(folder)["files"]
    for kind in ("model", "optimizer"):
        if not any(name.startswith(kind) and name.endswith(".safetensors") for name in files):
            raise InputError(
                f"{folder / STATE}, key files",
                got=f"no {kind} file",
                wanted=f"the hash of {kind}*.safetensors",
                way_out=_DAMAGED,
            )
    for name, wanted in sorted(files.items())[part::parts]:
        path = folder / name
        got = sha256(path) if path.is_file() else "no file"
        if got != wanted:
            raise InputError(
                f"checkpoint file {path}",
                got=f"sha256 {got[:16]}",
                wanted=f"sha256 {wanted[:16]}",
                way_out="The file was altered: point checkpoints/latest at an older step folder.",
            )


def restore_moments(engine: ZeroEngine, folder: Path) -> None:
    """Sets both moments of every parameter from a checkpoint. All ranks must call it."""
    moments = _MomentFiles(folder)
    engine.set_moments(
        lambda name, key: moments.read(f"{name}.{key}"), read_state(folder)["updates_applied"]
    )


def _gather_mine(
    engine: ZeroEngine, task: Task, rank: int, ranks: int
) -> dict[str, dict[str, torch.Tensor]]:
    """This rank's share of whole tensors: {"model": ..., "optimizer": ...}. Gathered one by one."""
    mine: dict[str, dict[str, torch.Tensor]] = {"model": {}, "optimizer": {}}
    held = [0] * ranks
    for name in engine.trained_names:
        weight = engine.full_state(name)
        owner = held.index(min(held))
        held[owner] += weight.numel()
        for key in MOMENTS:
            moment = engine.full_state(name, key)
            if owner == rank:
                mine["optimizer"][f"{name}.{key}"] = moment.contiguous().clone()
        if owner == rank:
            for stored in task.stored_names(name):
                mine["model"][stored] = weight.contiguous().clone()
    return mine


def _write_small_files(
    part: Path, task: Task, everyone: Sequence[Any], state: Mapping[str, Any]
) -> None:
    files: dict[str, str] = {}
    owners: dict[str, str] = {}
    for hashes, names in everyone:
        files |= hashes
        owners |= {tensor: file for file, tensors in names.items() for tensor in tensors}
    for kind in ("model", "optimizer"):
        if len(everyone) > 1:
            total = sum((part / f).stat().st_size for f in files if f.startswith(kind))
            index = {
                "metadata": {"total_size": total},
                "weight_map": {t: f for t, f in sorted(owners.items()) if f.startswith(kind)},
            }
            write_atomically(part / f"{kind}.safetensors.index.json", json.dumps(index, indent=1))
    task.write_model_files(part)
    for path in sorted(part.iterdir()):
        if path.is_file() and path.name not in files:
            files[path.name] = sha256(path)
            sync(path)
    whole = {"format": FORMAT, **state, "versions": versions(), "files": files}
    write_atomically(part / STATE, json.dumps(whole, indent=1))


def _file_name(kind: str, rank: int, ranks: int) -> str:
    """Hugging Face's names for one file or for shards."""
    shard = f"-{rank + 1:05d}-of-{ranks:05d}" if ranks > 1 else ""
    return f"{kind}{shard}.safetensors"


def _step_of(folder: Path) -> int | None:
    """The step that a folder of this run is named after; None for any other name."""
    found = re.fullmatch(r"step-([0-9]+)", folder.name)
    return int(found[1]) if found else None


def _step_folders(checkpoints: Path) -> list[tuple[int, Path]]:
    """The run's own checkpoint folders, whole or not, by step."""
    return sorted(
        (step, path)
        for path in checkpoints.glob("step-*")
        if (step := _step_of(path)) is not None and path.is_dir()
    )


def _remove_old(checkpoints: Path, current: int, keep: int) -> None:
    """Leaves the newest ``keep`` checkpoints up to ``current``, which is the latest.

    Those of later steps are of a time line that was left (someone pointed ``latest`` back, or a
    crash came before it moved), and what a killed save left goes too.
    """
    found = _step_folders(checkpoints)
    kept = sorted({step for step, _ in found if step <= current})
    if keep:
        kept = kept[-keep:]
    for step, path in found:
        if step not in kept and not path.is_symlink():  # a link is somebody's own
            shutil.rmtree(path)
    for part in checkpoints.glob(".step-*.part"):
        shutil.rmtree(part)


class _MomentFiles:
    """Reads moments by name, from one file or from shards with an index."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = folder / "optimizer.safetensors.index.json"
        self._files: dict[str, str] = (
            json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
        )

    def read(self, name: str) -> torch.Tensor:
        path = self._folder / self._files.get(name, "optimizer.safetensors")
        try:
            with safe_open(path, framework="pt") as file:
                return torch.as_tensor(file.get_tensor(name))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path}",
                got=error,
                wanted=f"a tensor {name}",
                way_out="The model's trained parameters changed since: start anew with --fresh.",
            ) from error


def versions() -> dict[str, str]:
    """Versions of the packages that decide a run's numbers."""
    found = {name: importlib.metadata.version(name) for name in _VERSIONS}
    return {"longpretrain": longpretrain.__version__, **found}
