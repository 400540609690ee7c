"""Ranks that would train different runs together are refused, and the odd one is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ranks_helper import rank_environment

from longpretrain.ranks import free_port


def start(
    recipe: Path, folders: tuple[Path, Path], words: tuple[list[str], list[str]]
) -> list[str]:
    """Two ranks, each in its folder and with its words; returns what each wrote to stderr."""
    environment = rank_environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment["MASTER_PORT"] = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "longpretrain", "train", str(recipe), "run.dir=run", *more],
            cwd=folder,
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (folder, more) in enumerate(zip(folders, words, strict=True))
    ]
    try:
        told = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [2, 2], told
    return told


def test_another_recipe_at_one_rank(small_run: Path, tmp_path: Path) -> None:
    words = ([], ["optim.lr=0.5"])
    told = start(small_run / "recipe.yaml", (tmp_path, tmp_path), words)
    assert "recipe key optim.lr: got 0.5 at rank 1 and 0.001 at rank 0; wanted" in told[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("begun", [False, True], ids=["new run", "checkpoint on one node"])
def test_a_run_folder_of_each_nodes_own(small_run: Path, tmp_path: Path, begun: bool) -> None:
    nodes = (tmp_path / "node-0", tmp_path / "node-1")
    for node in nodes:
        node.mkdir()
    recipe = small_run / "recipe.yaml"
    if begun:
        subprocess.run(
            [sys.executable, "-m", "longpretrain", "train", str(recipe), "run.dir=run"],
            cwd=nodes[0],
            env=rank_environment(),
            check=True,
            capture_output=True,
            timeout=120,
        )
    told = start(recipe, nodes, ([], []))
    if begun:
        assert "checkpoint to go on from: got None at rank 1 and run/checkpoints/step-" in told[0]
    else:
        assert "run folder run: got another folder at rank 1 than at rank 0" in told[0]
    assert not (nodes[1] / "run" / "checkpoints").exists()
