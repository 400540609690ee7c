"""DeepSpeed's hazards: non-finite gradients, rounded masters, keys that a recipe owns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from longpretrain.config import Config
from longpretrain.engine import zero
from longpretrain.engine.zero import ZeroEngine
from longpretrain.recipe import from_tree

pytestmark = pytest.mark.usefixtures("process_group")
PAIRS = [(p, s) for p in ("fp32", "bf16") for s in (0, 1, 2, 3) if (p, s) != ("bf16", 0)]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 1)
        self.unused = nn.Linear(3, 3)
        self.unused.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x.to(self.first.weight.dtype)))).float().sum()


def config(precision: str, stage: int, **optim: float) -> Config:
    tree = {"precision": precision, "zero": {"config": f"ds_configs/zero{stage}.json"}}
    return from_tree(tree | {"optim": {"lr": 0.1, **optim}})


_started: list[ZeroEngine] = []


@pytest.fixture(autouse=True)
def _no_engine_stays() -> Iterator[None]:
    """DeepSpeed's hooks keep an engine alive, and its buckets: memory that a fork would ask for."""
    yield
    while _started:
        _started.pop()._engine.destroy()


def start(precision: str, stage: int, **optim: float) -> ZeroEngine:
    torch.manual_seed(0)
    _started.append(ZeroEngine(Small(), config(precision, stage, **optim), accumulation=2))
    return _started[-1]


def update(engine: ZeroEngine, poison: str = "") -> zero.StepResult:
    for number in range(2):
        loss = engine(torch.ones(2, 8))
        if number == 0 and poison == "loss":
            loss = loss * float("inf")
        if number == 0 and poison == "gradient":
            loss.register_hook(lambda gradient: gradient * float("nan"))
        engine.backward(loss)
        if number == 0:
            engine.micro_step()
    return engine.step()


def weights(engine: ZeroEngine) -> dict[str, torch.Tensor]:
    return {name: engine.full_state(name) for name in engine.trained_names}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
@pytest.mark.parametrize(("precision", "stage"), PAIRS)
def test_non_finite_never_reaches_the_weights(precision: str, stage: int, poison: str) -> None:
    engine = start(precision, stage)
    assert update(engine).applied
    before = weights(engine)
    refused = update(engine, poison)
    assert not refused.applied
    assert same(before, weights(engine))
    assert engine.updates_applied == 1
    good = update(engine)
    assert good.applied
    assert good.grad_norm > 0
    assert not same(before, weights(engine))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_masters_can_be_exact_in_bf16(stage: int) -> None:
    engine = start("bf16", stage)
    torch.manual_seed(0)
    exact = dict(Small().named_parameters())
    rounded = weights(engine)
    assert not torch.equal(rounded["first.weight"], exact["first.weight"])  # DeepSpeed's own start
    engine.set_weights(exact.__getitem__)
    assert same(weights(engine), {name: exact[name] for name in rounded})


@pytest.mark.parametrize(("precision", "stage"), PAIRS)
def test_first_update_is_torch_adamw(precision: str, stage: int) -> None:
    """No hidden step at start, no division by accumulation: the update equals plain torch's."""
    engine = start(precision, stage, weight_decay=0.1)
    torch.manual_seed(0)
    plain = Small()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(engine.full_state(name))
    adam = torch.optim.AdamW(
        [p for p in plain.parameters() if p.requires_grad],
        lr=0.1, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1,
    )  # fmt: skip
    (2 * plain(torch.ones(2, 8))).backward()
    norm = nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
    adam.step()
    result = update(engine)
    # Adam's first update does not know the gradient's scale; its norm does.
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-5 if precision == "fp32" else 1e-2)
    got, wanted = weights(engine), dict(plain.named_parameters())
    # Adam's first update is lr * sign(gradient): bf16 gradients round, their signs do not.
    tolerance = 1e-6 if precision == "fp32" else 2e-3
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name].detach(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_clipping_is_torchs(stage: int) -> None:
    """Two updates, the first one clipped: the moments hold the clipped gradient."""
    engine = start("fp32", stage, clip_norm=0.5, lr=1e-3)
    torch.manual_seed(0)
    plain = Small()
    parameters = [p for p in plain.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.01)
    for _ in range(2):
        adam.zero_grad()
        (2 * plain(torch.ones(2, 8))).backward()
        norm = nn.utils.clip_grad_norm_(parameters, 0.5)
        adam.step()
        assert update(engine).grad_norm == pytest.approx(float(norm), rel=1e-5)
    wanted = dict(plain.named_parameters())
    for name in engine.trained_names:
        moment = adam.state[wanted[name]]["exp_avg"]
        torch.testing.assert_close(engine.full_state(name, "exp_avg"), moment, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("precision", "stage"), PAIRS)
def test_starting_takes_no_hidden_step(precision: str, stage: int) -> None:
    """DeepSpeed in bf16 at stage 0 decays the weights and counts an update before the first one."""
    torch.manual_seed(0)
    exact = {name: p.detach().clone() for name, p in Small().named_parameters()}
    engine = start(precision, stage, weight_decay=0.5)
    if precision == "bf16":  # it starts its masters from the rounded copy: see the test above
        exact = {name: value.bfloat16().float() for name, value in exact.items()}
    assert engine.updates_applied == 0
    assert not any(state["exp_avg"].any() for state in engine._adam.state.values() if state)
    assert same(weights(engine), {name: exact[name] for name in engine.trained_names})
    update(engine)
    assert engine.updates_applied == 1


@pytest.mark.parametrize(("precision", "stage"), PAIRS)
def test_frozen_parameters_are_not_decayed(precision: str, stage: int) -> None:
    engine = start(precision, stage, weight_decay=0.5)
    frozen = dict(engine.module.named_parameters())["unused.weight"]
    assert "unused.weight" not in engine.trained_names

    def whole() -> torch.Tensor:
        # Stage 3 shards what is frozen as well; alone, a rank's shard is all of it.
        return getattr(frozen, "ds_tensor", frozen).detach().clone()

    before = whole()
    assert before.abs().max() > 0
    update(engine)
    assert torch.equal(before, whole())


@pytest.mark.parametrize(("precision", "stage"), PAIRS)
def test_moments_survive_a_restart(precision: str, stage: int) -> None:
    engine = start(precision, stage)
    update(engine)
    kept = {
        key: {n: engine.full_state(n, key) for n in engine.trained_names} for key in zero.MOMENTS
    }
    masters = weights(engine)
    update(engine)
    wanted = weights(engine)
    torch.manual_seed(0)
    model = Small()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(masters.get(name, parameter))
    again = ZeroEngine(model, config(precision, stage), accumulation=2)
    again.set_weights(masters.__getitem__)
    again.set_moments(lambda name, key: kept[key][name], updates=1)
    update(again)
    assert same(weights(again), wanted)
