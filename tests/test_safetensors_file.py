"""Tensors on the disk one after another: the bytes are those of the library's own writer."""

from __future__ import annotations

import errno
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_disk import small_disk
from torch import Tensor

from longpretrain import safetensors_file
from longpretrain.safetensors_file import save_tensors

INTEGERS = (
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16,
    torch.uint8, torch.bool,
)  # fmt: skip
REALS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def every_kind() -> dict[str, Tensor]:
    """A tensor of every type, sizes of every alignment, and values that comparisons get wrong."""
    torch.manual_seed(0)
    tensors = {f"r.{kind}": torch.randn(3, 7).to(kind) for kind in REALS}
    tensors |= {f"i.{kind}": torch.arange(11).to(kind) for kind in INTEGERS}
    return tensors | {
        "odd": torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "a view": torch.randn(4, 6).t(),
        'a "name"\n with ünicode': torch.ones(1, 1, 2),
        "complex": torch.randn(2, dtype=torch.complex64),
    }


def test_the_bytes_are_the_librarys(tmp_path: Path) -> None:
    tensors = every_kind()
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, tmp_path / "theirs", metadata={"format": "pt"})
    save_tensors(tensors, tmp_path / "ours")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    save_tensors(dict(reversed(tensors.items())), tmp_path / "ours")  # also over an old one
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    """The library refuses that; here each name gets its own bytes."""
    shared = torch.randn(9)
    save_tensors({"a": shared, "b": shared, "part": shared[2:5]}, tmp_path / "x")
    found = load_file(tmp_path / "x")
    assert found["a"].equal(shared)
    assert found["b"].equal(shared)
    assert found["part"].equal(shared[2:5])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_rounded_on_the_way(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "_PIECE", 64)  # several pieces
    tensors = {"a": torch.randn(33, 5), "b": torch.randn(()), "c": torch.randn(7).half()}
    save_tensors(tensors, tmp_path / "ours", dtype=dtype)
    rounded = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    save_file(rounded, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_readable_by_whom_the_umask_lets(tmp_path: Path) -> None:
    save_tensors({"a": torch.ones(3)}, tmp_path / "x")
    (tmp_path / "other").touch()
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_full_disk_is_the_systems_error_and_names_the_file(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=64) as disk:
        with pytest.raises(OSError, match="No space left") as caught:
            save_tensors({"a": torch.ones(100_000)}, disk / "x")
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(disk / "x"))


def test_a_disk_that_takes_a_part_first(tmp_path: Path) -> None:
    """As one does that is nearly full: here the process's own limit on the size of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_tensors({"a": torch.ones(5000)}, tmp_path / "x")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.filename == str(tmp_path / "x")
    assert (tmp_path / "x").stat().st_size == 5000
