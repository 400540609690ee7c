"""Mapped memory given back: gone from the process, there again when it is read, and only that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from longpretrain import mapped
from longpretrain.mapped import all_finite, release

MIB = 1 << 20


def of_files() -> int:
    """Bytes of mapped files in this process's memory."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssFile:"):
            return int(line.split()[1]) * 1024
    pytest.skip("this system does not tell what of a process's memory is mapped files")


@pytest.fixture(params=["safetensors", "torch"])
def opened(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tensor, Tensor]:
    """A tensor of 32 MiB out of a file, and what it should be."""
    wanted = torch.arange(8 * MIB, dtype=torch.float32)
    tensors = {"first": torch.ones(3), "wanted": wanted}
    if request.param == "safetensors":
        save_file(tensors, tmp_path / "x")
        return load_file(tmp_path / "x")["wanted"], wanted
    torch.save(tensors, tmp_path / "x")
    return torch.load(tmp_path / "x", weights_only=True, mmap=True)["wanted"], wanted


def test_pages_go_and_come_back(opened: tuple[Tensor, Tensor]) -> None:
    tensor, wanted = opened
    before = of_files()
    assert tensor.equal(wanted)
    assert of_files() - before > 31 * MIB
    release(tensor)
    assert of_files() - before < 12 * MIB  # code that runs is mapped, too
    assert tensor.equal(wanted)


def test_a_look_at_all_numbers_keeps_nothing(opened: tuple[Tensor, Tensor]) -> None:
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
