"""Mapped memory given back: gone from the process, there again when it is read, and only that."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longpretrain import mapped
from longpretrain.mapped import all_finite, release

MIB = 1 << 20
TMPFS = Path("/dev/shm")


def of_files() -> int:
    """Bytes of mapped files in this process's memory; those of a tmpfs count as shared."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    found = [line.split()[1] for line in lines if line.startswith(("RssFile:", "RssShmem:"))]
    if not found:
        pytest.skip("this system does not tell what of a process's memory is mapped files")
    return sum(map(int, found)) * 1024


def need_page_flags() -> None:
    """Where they are not told, release leaves all as it is."""
    try:
        mapped._PAGE_FLAGS.open("rb").close()
    except OSError as error:
        pytest.skip(f"this system does not tell which pages were written to: {error}")


@pytest.fixture(params=["safetensors", "torch", "tmpfs"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """A tensor of 32 MiB out of a file, and what it should be."""
    if request.param != "tmpfs":
        yield make_opened(tmp_path, request.param)
        return
    if not os.access(TMPFS, os.W_OK):
        pytest.skip(f"this system has no {TMPFS} to write to")
    with tempfile.TemporaryDirectory(dir=TMPFS) as folder:
        yield make_opened(Path(folder), "safetensors")


def make_opened(folder: Path, form: str) -> tuple[Tensor, Tensor]:
    wanted = torch.arange(8 * MIB, dtype=torch.float32)
    tensors = {"first": torch.ones(3), "wanted": wanted}
    if form == "safetensors":
        save_file(tensors, folder / "x")
        return load_file(folder / "x")["wanted"], wanted
    torch.save(tensors, folder / "x")
    return torch.load(folder / "x", weights_only=True, mmap=True)["wanted"], wanted


def test_pages_go_and_come_back(opened: tuple[Tensor, Tensor]) -> None:
    need_page_flags()
    tensor, wanted = opened
    before = of_files()
    assert tensor.equal(wanted)
    assert of_files() - before > 31 * MIB
    release(tensor)
    assert of_files() - before < 12 * MIB  # code that runs is mapped, too
    assert tensor.equal(wanted)


def test_a_look_at_all_numbers_keeps_nothing(opened: tuple[Tensor, Tensor]) -> None:
    need_page_flags()
    tensor, wanted = opened
    before = of_files()
    assert all_finite(tensor)
    assert of_files() - before < 12 * MIB  # code that runs is mapped, too
    assert tensor.equal(wanted)


def test_what_was_written_stays(opened: tuple[Tensor, Tensor]) -> None:
    """Else it would be the file's numbers again."""
    tensor, wanted = opened
    tensor[5 * MIB] = -1.0
    release(tensor)
    assert tensor[5 * MIB] == -1.0
    assert tensor[-1] == wanted[-1]


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(3 * MIB), torch.ones(2 * MIB).view(2, MIB).t(), torch.ones(()), torch.empty(0)],
    ids=["own", "turned", "scalar", "empty"],
)
def test_memory_of_its_own_is_left_alone(tensor: Tensor) -> None:
    release(tensor)
    assert bool((tensor == 1).all())


def test_where_the_system_tells_nothing_all_stays(
    opened: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tensor, wanted = opened
    for name in ("_MAPS", "_PAGE_FLAGS"):
        monkeypatch.setattr(mapped, name, tmp_path / "none")
        release(tensor)
        assert tensor.equal(wanted)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, MIB - 1, MIB, 3 * MIB - 1])
def test_one_number_that_is_none_is_found(value: float, place: int) -> None:
    tensor = torch.zeros(3, MIB)
    assert all_finite(tensor)
    tensor.view(-1)[place] = value
    assert not all_finite(tensor)
    assert not all_finite(tensor.t())
