"""Checkpoints that are model folders, hold whole fp32 parameters, and never look whole when they
are not.

``checkpoints/step-000500/`` holds the master weights as ``model*.safetensors`` (transformers
loads the
folder as it is), both moments as ``optimizer*.safetensors``, and ``state.json``. Each parameter is
written once, whole, by one rank; so world size, ZeRO stage and precision may change at a resume.
The folder is written under another name, synced, and renamed; then ``checkpoints/latest`` moves.
"""

from __future__ import annotations

import importlib.metadata
import json
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
        if final.exists():  # the same step saved again, such as at a signal after a resume
            shutil.rmtree(final)
        part.rename(final)
        sync(final.parent)
        write_atomically(final.parent / LATEST, final.name + "\n")
        _remove_old(final.parent, state["step"], keep)
    dist.barrier()
    return final


def latest(run_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    pointer = run_dir / "checkpoints" / LATEST
    if not pointer.is_file():
        return None
    folder = pointer.parent / pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not (folder / STATE).is_file():
        raise InputError(
            f"{pointer}",
            got=f"{folder.name}, which is no checkpoint",
            wanted="a step-... folder beside it",
            way_out="Write the name of a whole checkpoint folder into it, or use --fresh.",
        )
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    """state.json of a checkpoint."""
    state = read_json_object(
        folder / STATE,
        way_out="The checkpoint is damaged: point checkpoints/latest at an older step folder.",
    )
    found = state.get("format")
    if found != FORMAT:
        raise InputError(
            f"{folder / STATE}",
            got=f"format {found}",
            wanted=f"format {FORMAT}",
            way_out="It was written by another version of longpretrain: use that one.",
        )
    return state


def verify_files(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Compares the sha256 of every ``parts``-th file with state.json.

    Raises:
        InputError: a file is missing, truncated or altered; names it.
    """
    for name, wanted in sorted(read_state(folder)["files"].items())[part::parts]:
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


def _remove_old(folder: Path, current: int, keep: int) -> None:
    """Leaves the newest ``keep`` checkpoints up to ``current``, which is the latest.

    Those of later steps are of a time line that was left (someone pointed ``latest`` back, or a
    crash came before it moved), and what a killed save left goes too.
    """
    steps = {int(path.name.removeprefix("step-")): path for path in folder.glob("step-*")}
    kept = sorted(step for step in steps if step <= current)
    if keep:
        kept = kept[-keep:]
    for leftover in [steps[step] for step in steps if step not in kept]:
        shutil.rmtree(leftover)
    for part in folder.glob(".step-*.part"):
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
