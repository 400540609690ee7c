"""Ranks that would train different runs together are refused, and the odd one is named."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from ranks_helper import ROOT, rank_environment

from longpretrain.agreement import Fact, Told, mismatches
from longpretrain.ranks import free_port


def start(
    recipe: Path,
    folders: Sequence[Path],
    words: Sequence[list[str]],
    packages: Sequence[Path] = (),
) -> list[str]:
    """Ranks, each in its folder, with its words and its code; what each wrote to stderr."""
    environment = rank_environment() | {"WORLD_SIZE": str(len(folders))}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    codes = packages or [ROOT] * len(folders)
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "longpretrain", "train", str(recipe), "run.dir=run", *more],
            cwd=folder,
            env=environment | {"RANK": str(rank), "PYTHONPATH": str(code)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, (folder, more, code) in enumerate(zip(folders, words, codes, strict=True))
    ]
    try:
        told = [process.communicate(timeout=240)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [2] * len(folders), told
    return told


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
        assert "checkpoints of the run: got none at rank 1 (process" in told[0]
        assert " and step-" in told[0]
    else:
        assert "run folder run: got another folder at rank 1 than at rank 0" in told[0]
    assert not (nodes[1] / "run" / "checkpoints").exists()


def test_other_code_at_rank_0_is_the_odd_one_of_three(small_run: Path, tmp_path: Path) -> None:
    """And all that differs is told, not only the first of it."""
    package = tmp_path / "other" / "longpretrain"
    shutil.copytree(ROOT / "longpretrain", package)
    (package.parent / "ds_configs").symlink_to(ROOT / "ds_configs")
    with (package / "schedule.py").open("a", encoding="utf-8") as source:
        source.write("# another day\n")
    words: list[list[str]] = [[], [], ["optim.lr=0.5"]]
    codes = (package.parent, ROOT, ROOT)
    told = start(small_run / "recipe.yaml", [tmp_path] * 3, words, codes)
    lines = told[0].strip().splitlines()
    assert len(lines) == 2, lines
    odd = r"code of longpretrain: got \w{12} at rank 0 \(.*\) and \w{12} at the other 2 ranks; "
    assert re.search(odd, lines[0])
    odd = r"recipe key optim.lr: got 0.5 at rank 2 \(.*\) and 0.001 at the other 2 ranks; "
    assert re.search(odd, lines[1])
    assert not told[1] + told[2], "told once"
    assert not (tmp_path / "run").exists()


def test_weights_and_data_as_each_node_sees_them(small_run: Path, tmp_path: Path) -> None:
    """The same names everywhere: rank 1's copy of the model has one bit flipped."""
    nodes = [tmp_path / f"node-{rank}" for rank in range(3)]
    for rank, node in enumerate(nodes):
        node.mkdir()
        shutil.copytree(small_run / "models" / "long", node / "model")
        held_out = "train" if rank == 2 else "valid"
        (node / "valid").symlink_to(small_run / "data" / held_out)
    weights = nodes[1] / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1
    weights.write_bytes(content)
    words = [["model.path=model", "data.valid=valid", "batch.global_sequences=3"]] * 3
    lines = start(small_run / "recipe.yaml", nodes, words)[0].strip().splitlines()
    assert len(lines) == 2, lines
    assert re.search(r"held-out corpus: got \w+ at rank 2 \(.*\) and \w+ at the other 2", lines[0])
    assert re.search(r"initial weights: got \w+ at rank 1 \(.*\) and \w+ at the other 2", lines[1])
    assert not any((node / "run").exists() for node in nodes)


@pytest.mark.parametrize(
    ("values", "got"),
    [
        ("aa", None),
        ("ab", "b at rank 1 (n1) and a at rank 0 (n0)"),
        ("baa", "b at rank 0 (n0) and a at the other 2 ranks"),
        ("aab", "b at rank 2 (n2) and a at the other 2 ranks"),
        ("abc", "b at rank 1 (n1), c at rank 2 (n2) and a at rank 0 (n0)"),
        ("aabb", "b at rank 2 (n2), rank 3 (n3) and a at rank 0 (n0), rank 1 (n1)"),
        ("aa.", "nothing at rank 2 (n2) and a at the other 2 ranks"),
        ("..a", "a at rank 2 (n2) and nothing at the other 2 ranks"),
        (
            "a" * 12 + "b" * 6,
            "b at rank 12 (n12), rank 13 (n13), rank 14 (n14), rank 15 (n15) and 2 more "
            "and a at the other 12 ranks",
        ),
    ],
    ids=lambda value: value if value and len(value) < 5 else "",
)
def test_who_is_odd(values: str, got: str | None) -> None:
    """Each letter is what a rank has; a dot: it knows no such fact."""
    everyone = [
        Told(
            place=f"n{rank}",
            facts={"it": Fact(value=value, way_out="Mend it.")} if value != "." else {},
        )
        for rank, value in enumerate(values)
    ]
    assert [error.got for error in mismatches(everyone)] == [got] * (got is not None)
