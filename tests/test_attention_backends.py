"""Which backend runs, and why another cannot."""

from __future__ import annotations

import logging

import pytest
import torch
from test_attention_fused import good

from longpretrain.attention import backends, sliding_attention, why_not


def test_why_not_knows_the_backends() -> None:
    assert [why_not(backend) for backend in ("auto", "portable", "reference")] == [None] * 3
    with pytest.raises(ValueError, match="backend: got 'quick'"):
        why_not("quick")
    for device in ("tpu-1", "cuda:256", "cuda:999"):  # torch takes the last two for other GPUs
        with pytest.raises(ValueError, match=rf"device: got '{device}'; wanted a torch\.device or"):
            why_not("fused", device)


@pytest.mark.usefixtures("library")
def test_why_not_knows_the_devices() -> None:
    assert why_not("fused") is why_not("fused", "cpu") is why_not("portable", "cuda") is None
    reason = why_not("fused", torch.device("xpu"))
    assert reason == "the compiled kernels run on the CPU and on CUDA, not on xpu"
    reason = why_not("fused", "cuda:99")
    assert reason is not None
    assert "no CUDA kernels" in reason or "cuda:99 cannot be asked: " in reason
    with pytest.raises(ValueError, match="backend: got 'fused', but"):
        backends.choose("fused", torch.empty(1, 2, 1, 4, device="meta", dtype=torch.float64))


@pytest.mark.usefixtures("library")
def test_what_may_pass_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU whose memory another process had, and which can run the kernels later."""
    answers = ["the CUDA kernels do not run on this GPU: out of memory", ""]
    asked: list[int] = []

    def answer(index: int) -> str:
        asked.append(index)
        return answers.pop(0)

    monkeypatch.setattr(torch.ops.longpretrain, "cuda_why_not", answer)
    monkeypatch.setattr(backends, "_able_gpus", set())
    assert why_not("fused", "cuda:3") == "the CUDA kernels do not run on this GPU: out of memory"
    assert why_not("fused", "cuda:3") is None
    assert why_not("fused", "cuda:3") is None  # for good
    assert asked == [3, 3]


def test_without_library_auto_is_portable_and_says_so_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "why_no_library", lambda: "there is no library today")
    backends._announce_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="longpretrain.attention"):
        for _ in range(3):
            found = sliding_attention(**good())
    assert [record.message for record in caplog.records] == [
        "attention runs on the portable backend: there is no library today"
    ]
    assert torch.equal(found, sliding_attention(**good(), backend="portable"))
    with pytest.raises(ValueError, match="backend: got 'fused', but there is no library today"):
        sliding_attention(**good(), backend="fused")
