"""Where a number stops being finite is found in real overflows, at every stage and precision, and
looking changes no bit.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from longpretrain.engine import forensics
from longpretrain.engine.nonfinite import Trace, count
from longpretrain.engine.zero import StepResult, ZeroEngine
from longpretrain.recipe import from_tree

STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
ALL = [(p, s) for p in ("fp32", "bf16", "fp16") for s in STAGES if p == "fp32" or s != "zero0"]
PAIRS = [(p, s) for p, s in ALL if "offload" not in s]
SCALE = 256.0
"""Of fp16's losses."""


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.inner(x))


class Small(nn.Module):
    """Two layers and a root, whose derivative is infinite where ``x`` sums up to nothing."""

    def __init__(self, *, recompute: bool = False) -> None:
        super().__init__()
        self.recompute = recompute
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.last = nn.Linear(8, 1, bias=False)

    def forward(self, x_BNC: torch.Tensor) -> torch.Tensor:
        x_BNC = x_BNC.to(self.last.weight.dtype)
        for layer in self.layers:
            x_BNC = (
                checkpoint(layer, x_BNC, use_reentrant=False) if self.recompute else layer(x_BNC)
            )
        return self.last(x_BNC).float().abs().sqrt().sum()


_started: list[ZeroEngine] = []


@pytest.fixture(autouse=True)
def _no_engine_stays(process_group: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """And DeepSpeed's gate is open: it refuses fp16 on CPUs, though nothing needs a GPU there."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)
    yield
    while _started:
        _started.pop()._engine.destroy()


def start(precision: str, stage: str, *, huge: str = "", recompute: bool = False) -> ZeroEngine:
    """An engine of fixed weights; those named ``huge`` overflow when multiplied with anything."""
    tree = {"precision": precision, "zero": {"config": f"ds_configs/{stage}.json"}}
    torch.manual_seed(0)
    model = Small(recompute=recompute)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == huge:
                parameter.fill_(3e38 if precision != "fp16" else 6e4)
    config = from_tree(tree | {"optim": {"lr": 0.1, "clip_norm": 1.0}})
    _started.append(ZeroEngine(model, config, accumulation=2))
    if precision == "fp16":
        _started[-1].loss_scaling |= {"cur_scale": SCALE}
    return _started[-1]


ONES = torch.ones(3, 2, 8)
ZERO_IN_THE_MIDDLE = ONES * torch.tensor([1.0, 0.0, 1.0])[:, None, None]


def update(engine: ZeroEngine, batches: list[torch.Tensor], trace: Trace | None) -> StepResult:
    for number, x_BNC in enumerate(batches):
        if trace:
            trace.start(len(x_BNC))
        loss = engine(x_BNC)
        if trace:
            trace.end(loss)
        engine.backward(loss)
        if number + 1 < len(batches):
            engine.micro_step()
    if trace:
        trace.read_tables()
    return engine.step()


def weights(engine: ZeroEngine) -> dict[str, torch.Tensor]:
    return {name: engine.full_state(name) for name in engine.trained_names}


@pytest.mark.parametrize(("precision", "stage"), ALL)
def test_a_trace_changes_no_bit_and_its_tables_are_true(precision: str, stage: str) -> None:
    """Finite updates, so that the weights move; the gradients are plain torch's."""
    batches = [ONES, 0.5 * ONES]
    bare, watched = start(precision, stage), start(precision, stage)
    torch.manual_seed(0)
    plain = Small()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(watched.full_state(name))
    sum(plain(x) for x in batches).backward()
    with Trace(watched) as trace:
        result = update(watched, batches, trace)
    assert result == update(bare, batches, None)
    assert result.applied
    assert update(watched, batches, None) == update(bare, batches, None)
    after, wanted = weights(watched), weights(bare)
    assert all(torch.equal(after[name], wanted[name]) for name in wanted)

    assert [seen.is_finite for seen in trace.micro_batches] == [True, True]
    tolerance = 1e-5 if precision == "fp32" else 2e-2
    for row, (name, parameter) in zip(trace.gradients, plain.named_parameters(), strict=True):
        assert (row["name"], row["nan"], row["inf"]) == (name, 0, 0)
        assert parameter.grad is not None
        largest = float(parameter.grad.abs().max()) * (SCALE if precision == "fp16" else 1.0)
        assert row["largest"] == pytest.approx(largest, rel=tolerance)
    for row, parameter in zip(trace.weights, plain.parameters(), strict=True):
        assert row["largest"] == float(parameter.detach().abs().max())


@pytest.mark.parametrize(("precision", "stage"), PAIRS)
def test_the_first_output_is_that_of_the_layer_that_overflows(precision: str, stage: str) -> None:
    """The second layer's weights overflow where its input is not zero: in two sequences of three,
    and not in the first micro-batch.
    """
    engine = start(precision, stage, huge="layers.1.inner.weight")
    with Trace(engine) as trace:
        result = update(engine, [0 * ONES + 0.0, ZERO_IN_THE_MIDDLE], trace)
    assert not result.applied
    first, second = trace.micro_batches
    assert first.output is None
    assert second.output is not None
    kind = {"module": "layers.1.inner", "kind": "Linear", "shape": [3, 2, 8], "input": "finite"}
    assert {key: second.output[key] for key in kind} == kind
    assert second.output["inf"] + second.output["nan"] == 2 * 2 * 8
    assert second.output["sequences"] == [0, 2]
    assert not second.is_finite


@pytest.mark.parametrize(("precision", "stage"), PAIRS)
def test_a_gradient_may_overflow_where_the_loss_does_not(precision: str, stage: str) -> None:
    """The root at 0: the derivative is infinite, and times nothing it is NaN."""
    engine = start(precision, stage)
    before = weights(engine)
    with Trace(engine) as trace:
        result = update(engine, [ONES, ZERO_IN_THE_MIDDLE], trace)
    assert not result.applied
    first, second = trace.micro_batches
    assert first.is_finite
    assert second.output is None
    assert second.loss == pytest.approx(2 / 3 * first.loss, rel=1e-2)
    assert second.gradient is not None
    assert second.gradient["output_of"] == "last"
    assert second.gradient["finite_until"] == "the whole model"
    names = {row["name"] for row in second.parameters}
    assert names == {"last.weight", "layers.1.inner.weight", "layers.0.inner.weight"}
    assert {row["name"] for row in trace.gradients if row["nan"] or row["inf"]} == names
    after = weights(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("precision", "stage"),
    [("fp32", "zero0"), ("fp32", "zero1"), ("fp32", "zero3"), ("bf16", "zero2")],
)
@pytest.mark.parametrize(("size", "what"), [(2e38, "sum"), (1e30, "norm")])
def test_a_sum_may_overflow_where_its_parts_do_not(
    precision: str, stage: str, size: float, what: str
) -> None:
    """The gradient of a product is the other factor: two of 2e38 are too large for fp32, and so is
    the square of 1e30.
    """
    tree = {"precision": precision, "zero": {"config": f"ds_configs/{stage}.json"}}
    model = nn.Sequential(nn.Linear(8, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(1e-3)
    _started.append(ZeroEngine(model, from_tree(tree), accumulation=2))
    x = torch.full((1, 8), size).to(next(model.parameters()).dtype)
    with Trace(_started[-1]) as trace:
        for number in range(2):
            trace.start(1)
            loss = _started[-1](x).float().sum()
            trace.end(loss)
            _started[-1].backward(loss)
            if number == 0:
                _started[-1].micro_step()
        trace.read_tables()
        result = _started[-1].step()
    assert [seen.is_finite for seen in trace.micro_batches] == [True, True]
    [row] = trace.gradients
    assert (row["inf"], row["nan"]) == ((8, 0) if what == "sum" else (0, 0))
    # At stage 3 DeepSpeed adds the squares up in fp64.
    assert result.applied == (what == "norm" and stage == "zero3")
    seen = {"finite": True}
    told = forensics._what(
        {
            "ranks": [{"rank": 0, "micro_batches": [seen, seen]}],
            "gradients_not_finite": forensics._bad(trace.gradients),
            "largest_gradients": forensics._largest(trace.gradients),
        }
    )
    if what == "sum":
        assert told == "gradient not finite once summed over micro-batches and ranks: 0.weight"
    else:
        assert told.startswith("norm of the gradient not finite, though each of its numbers is; ")
        assert told.endswith("the largest, 2e+30, is in 0.weight")


@pytest.mark.parametrize("stage", ["zero1", "zero3"])
def test_layers_may_be_recomputed(stage: str) -> None:
    """Activation checkpointing compares what a layer keeps for its backward pass, hooks included,
    with what it kept the first time.
    """
    engine = start("fp32", stage, huge="layers.0.inner.weight", recompute=True)
    with Trace(engine) as trace:
        update(engine, [ONES, 0 * ONES], trace)
    first, second = trace.micro_batches
    assert first.output is not None
    assert first.output["module"] == "layers.0.inner"
    assert second.output is None


def test_hooks_go() -> None:
    engine = start("fp32", "zero1")

    def hooks() -> int:
        of_modules = sum(len(module._forward_hooks) for module in engine.module.modules())
        return of_modules + sum(len(p._backward_hooks or ()) for p in engine.module.parameters())

    before = hooks()  # DeepSpeed's
    with Trace(engine) as trace:
        assert hooks() > before
        update(engine, [ONES, ONES], trace)
    assert hooks() == before
    told = [*trace.micro_batches]
    update(engine, [ZERO_IN_THE_MIDDLE, ONES], None)
    assert trace.micro_batches == told
    assert all(seen.is_finite for seen in told)


def test_count() -> None:
    nan, inf = float("nan"), float("inf")
    assert count(torch.tensor([1.0, nan, inf, -inf, nan])) == {"nan": 2, "inf": 2}
    assert count(torch.tensor([1.0, 3e38])) == {}
    assert count(torch.tensor([1, 2])) == {}
