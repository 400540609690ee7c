"""fp16's loss scale: overflows skip and halve, clean updates double, a resume goes on with it.

DeepSpeed refuses fp16 on CPUs, though nothing in its way needs a GPU: the tests open that gate, and
what runs behind it is DeepSpeed's own code in fp16.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from longpretrain.cli import main
from longpretrain.engine import zero
from longpretrain.engine.zero import StepResult, ZeroEngine
from longpretrain.errors import InputError
from longpretrain.recipe import from_tree
from longpretrain.report.metrics import deterministic, read_metrics

STAGES = [1, 2, 3]
_started: list[ZeroEngine] = []


@pytest.fixture(autouse=True)
def _fp16_on_the_cpu(process_group: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    monkeypatch.setattr("longpretrain.start.check_precision", lambda *_: None)
    yield
    while _started:  # DeepSpeed's hooks keep an engine alive
        _started.pop()._engine.destroy()


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x.to(self.first.weight.dtype)))).float().sum()


def change_fp16(patch: pytest.MonkeyPatch, **keys: int) -> None:
    """What DeepSpeed is told of fp16; a recipe has no say in it."""
    settings_of = zero.settings_of_recipe
    fp16 = {"fp16": {"enabled": True, **keys}}
    patch.setattr(zero, "settings_of_recipe", lambda *args: settings_of(*args) | fp16)


def start(
    stage: int, *, precision: str = "fp16", scale: float = 256.0, window: int = 1000
) -> ZeroEngine:
    torch.manual_seed(0)
    tree = {"precision": precision, "zero": {"config": f"ds_configs/zero{stage}.json"}}
    config = from_tree(tree | {"optim": {"lr": 0.01}})
    with pytest.MonkeyPatch.context() as patch:
        if precision == "fp16":
            change_fp16(patch, loss_scale_window=window)
        engine = ZeroEngine(Small(), config, accumulation=2)
    _started.append(engine)
    if precision == "fp16":
        engine.loss_scaling = engine.loss_scaling | {"cur_scale": scale}
    return engine


def update(engine: ZeroEngine, factor: float = 1.0) -> StepResult:
    for number in range(2):
        engine.backward(engine(torch.linspace(-1, 1, 16).view(2, 8)) * factor)
        if number == 0:
            engine.micro_step()
    return engine.step()


def state(engine: ZeroEngine) -> dict[str, torch.Tensor]:
    keys = (None, *zero.MOMENTS)
    return {f"{n} {k}": engine.full_state(n, k) for n in engine.trained_names for k in keys}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("stage", STAGES)
def test_an_overflow_skips_the_update_and_halves_the_scale(stage: int) -> None:
    engine = start(stage, scale=2.0**20)
    first = update(engine)
    before = state(engine)
    assert not first.applied and first.loss_scale == 2.0**20 and first.grad_norm == float("inf")
    assert engine.updates_applied == 0
    scales = []
    while not (result := update(engine)).applied:
        assert same(before, state(engine))
        scales.append(result.loss_scale)
    # DeepSpeed lets one overflow pass, and halves at each one after it.
    assert scales == [2.0 ** (20 - n) for n in range(len(scales))] and len(scales) > 2
    assert result.loss_scale == scales[-1] / 2 and engine.updates_applied == 1


@pytest.mark.parametrize("stage", STAGES)
def test_the_scale_is_not_in_the_numbers(stage: int) -> None:
    """Gradient, norm and update are those of fp32, but for fp16's rounding."""
    scaled, plain = start(stage), start(stage, precision="fp32")
    for _ in range(2):
        ours, right = update(scaled), update(plain)
        assert ours.grad_norm == pytest.approx(right.grad_norm, rel=5e-3)
        assert (ours.loss_scale, right.loss_scale) == (256.0, None)
    for name, value in state(plain).items():
        torch.testing.assert_close(state(scaled)[name], value, atol=2e-3, rtol=2e-2)
    assert plain.loss_scaling == {}


@pytest.mark.parametrize("stage", STAGES)
def test_the_scale_grows_after_an_update_not_within(stage: int) -> None:
    """A scale is a power of two: an update is the same whether the scale doubles after it."""
    growing, still = start(stage, window=2), start(stage)
    scales = []
    for _ in range(3):
        grown, right = update(growing), update(still)
        assert grown.grad_norm == right.grad_norm
        assert same(state(growing), state(still))
        scales.append(grown.loss_scale)
    assert scales == [256.0, 256.0, 256.0]
    assert [update(growing).loss_scale for _ in range(3)] == [512.0, 512.0, 1024.0]


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_alone_divides_by_the_scale_of_the_next_update(stage: int) -> None:
    """The reason for the correction: when this fails, LossScale.after_update can go."""
    alone, still = start(stage), start(stage)
    scaler = alone._engine.optimizer.loss_scaler
    for number in range(3):
        scaler.scale_window = 2 if number == 2 else 10**9
        update(alone)
        update(still)
    assert scaler.cur_scale == 512.0
    assert not same(state(alone), state(still))


def test_at_the_smallest_scale_an_overflow_is_an_overflow() -> None:
    engine = start(1, scale=1.0)
    for _ in range(25):  # DeepSpeed alone raises a plain exception at the third
        assert not update(engine, float("inf")).applied
    assert engine.loss_scaling["cur_scale"] == 1.0
    assert update(engine).applied


@pytest.mark.parametrize("stage", [1, 3])
def test_what_moves_is_restored(stage: int) -> None:
    engine = start(stage, scale=1024.0, window=3)
    for factor in (1.0, float("nan"), float("nan"), 1.0, 1.0):
        update(engine, factor)
    kept = json.loads(json.dumps(engine.loss_scaling))
    assert kept["cur_scale"] == 512.0 and kept["cur_iter"] == 5 and kept["last_overflow_iter"] == 2
    wanted = [update(engine, factor).loss_scale for factor in (1, 1, 1, float("nan"), 1)]
    assert len(set(wanted)) > 1
    again = start(stage, window=3)
    again.loss_scaling = kept
    assert [update(again, factor).loss_scale for factor in (1, 1, 1, float("nan"), 1)] == wanted


@pytest.mark.parametrize("state", [{"cur_scale": 2.0}, "big", {"cur_scale": "2"}])
def test_a_state_that_is_none_is_refused(state: object) -> None:
    with pytest.raises(InputError, match=r"loss_scaling of the checkpoint: got .*; wanted numbers"):
        start(1).loss_scaling = state  # type: ignore[assignment]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def test_a_run_in_fp16_and_its_resume(
    small_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way: overflows from the first scale on are counted, and a run that goes on from a
    checkpoint in the middle ends with the bits and the scales of one that never stopped.
    """
    change_fp16(monkeypatch, initial_scale_power=20)  # so small a model needs it
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    words = ["train", str(small_run / "recipe.yaml"), "precision=fp16", "evaluate.every_steps=0"]
    words += ["schedule.total_steps=8", "checkpoint.every_steps=4"]
    assert main([*words, f"run.dir={whole}"]) == 0
    lines = deterministic(read_metrics(whole / "metrics.jsonl"))
    skipped = [line["skipped"] for line in lines]
    scales = [line["loss_scale"] for line in lines]
    assert 0 < skipped[3] < 4 and scales[0] == 2.0**20 > scales[-1]
    assert lines[-1]["loss"] < lines[0]["loss"]
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-000008")
    (resumed / "checkpoints" / "latest").write_text("step-000004\n", encoding="utf-8")
    assert main([*words, f"run.dir={resumed}"]) == 0
    assert deterministic(read_metrics(resumed / "metrics.jsonl")) == lines
    ends = [run / "checkpoints" / "step-000008" for run in (whole, resumed)]
    first, second = map(tensors, ends)
    assert first.keys() == second.keys() and same(first, second)
    states = [json.loads((end / "state.json").read_text())["loss_scaling"] for end in ends]
    assert states[0] == states[1] and states[0]["cur_iter"] == 8
