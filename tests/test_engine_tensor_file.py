"""Tensors on the disk: the library reads back every bit, and the hash is that of the file."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from longpretrain.engine import tensor_file
from longpretrain.engine.tensor_file import write_tensors
from longpretrain.files import sha256
from longpretrain.safetensors_file import write_all


def silent(size: int) -> None:
    del size


def test_every_bit_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    odd = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45])
    shared = torch.randn(3, 5)
    tensors = {
        "weight": torch.randn(7, 11),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "odd": odd,
        "one": shared,
        "twin of one": shared,
        'a "name"\n with ünicode': torch.ones(1, 1, 2),
    }
    path = tmp_path / "model.safetensors"
    told: list[int] = []
    assert write_tensors(path, tensors, told.append) == sha256(path)
    assert sum(told) == path.stat().st_size
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without


def test_large_tensors_go_out_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "_PIECE", 1000)
    monkeypatch.setattr(tensor_file, "_UNSYNCED", 3000)
    tensors = {"a": torch.arange(2001.0), "b": torch.arange(250.0)}
    path = tmp_path / "x.safetensors"
    told: list[int] = []
    assert write_tensors(path, tensors, told.append) == sha256(path)
    assert len(told) == 11
    assert torch.equal(load_file(path)["a"], tensors["a"])


def test_what_hears_of_the_bytes_may_end_it(tmp_path: Path) -> None:
    def enough(size: int) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(3)}, enough)


def test_a_full_disk_is_an_error_and_not_a_short_file() -> None:
    path = Path("/dev/full")
    if not path.exists():
        pytest.skip("this system has no /dev/full")
    full = path.open("wb", buffering=0)
    with full, pytest.raises(OSError, match="No space left") as caught:
        write_all(full.fileno(), memoryview(b"abc"))
    assert caught.value.errno == errno.ENOSPC


def test_a_disk_that_takes_a_part_first(tmp_path: Path) -> None:
    """As one does that is nearly full: here the process's own limit on the size of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(5000)}, silent)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "x.safetensors").stat().st_size == 5000


def test_an_old_file_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_text("somebody's")
    with pytest.raises(FileExistsError):
        write_tensors(path, {"a": torch.ones(3)}, silent)
    assert path.read_text() == "somebody's"


def test_readable_by_whom_the_umask_lets(tmp_path: Path) -> None:
    path, other = tmp_path / "x.safetensors", tmp_path / "other"
    write_tensors(path, {"a": torch.ones(3)}, silent)
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
