"""AdamW by torch or by apex: the same updates at every ZeRO stage, counted alike, restored alike.

NVIDIA's apex cannot be built without CUDA: here a stand-in with its interface and its bookkeeping
runs in its place, under the real DeepSpeed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from apex_helper import STAND_IN, found_anew
from torch import nn

from longpretrain.config import Config
from longpretrain.engine import zero
from longpretrain.engine.adam import check_apex, kernels_in_use, make_adam
from longpretrain.engine.zero import ZeroEngine
from longpretrain.errors import InputError
from longpretrain.recipe import from_tree
from longpretrain.run_facts import of_program

has_none = pytest.mark.skipif(importlib.util.find_spec("apex") is not None, reason="has an apex")


@pytest.fixture
def stand_in_apex() -> Iterator[None]:
    with found_anew(STAND_IN):
        yield


def kernels(**keys: str) -> Config:
    return from_tree({"kernels": keys})


@has_none
@pytest.mark.parametrize("part", ["layer_norm", "adam"])
def test_apex_that_is_not_there_is_refused(part: str) -> None:
    with pytest.raises(InputError) as caught:
        check_apex(kernels(**{part: "apex"}), "cuda")
    assert str(caught.value).startswith(
        f"recipe key kernels.{part}: got apex, but no package of that name is installed; wanted "
        "NVIDIA's apex with its CUDA extensions, and a GPU. Build NVIDIA's from https://github.com/"
    )
    check_apex(kernels(), "cuda")
    assert kernels_in_use(kernels(), "cuda") == {"layer_norm": "torch", "adam": "torch"}


def test_what_auto_comes_to(stand_in_apex: None) -> None:
    check_apex(kernels(layer_norm="apex", adam="apex"), "cuda")
    in_use = kernels_in_use(kernels(), "cuda")
    assert in_use["layer_norm"].startswith("apex ") and in_use["adam"] == "torch"
    assert kernels_in_use(kernels(adam="apex"), "cuda")["adam"].startswith("apex ")
    assert kernels_in_use(kernels(layer_norm="torch"), "cuda")["layer_norm"] == "torch"
    assert kernels_in_use(kernels(), "cpu") == {"layer_norm": "torch", "adam": "torch"}
    with pytest.raises(InputError, match="its kernels run on GPUs, and this is the CPU"):
        check_apex(kernels(layer_norm="apex"), "cpu")


@has_none
def test_ranks_with_other_kernels_differ() -> None:
    config = kernels(layer_norm="auto")
    without = of_program(config, "cuda", fresh=False)
    with found_anew(STAND_IN):
        beside = of_program(config, "cuda", fresh=False)
    differs = {name for name in without if without[name].value != beside[name].value}
    assert differs == {"kernels.layer_norm as run"}
    assert without[differs.pop()].value == "torch"


def test_apexs_adam_needs_its_state_on_the_gpu(stand_in_apex: None) -> None:
    tree = {"kernels": {"adam": "apex"}, "zero": {"config": "ds_configs/zero2_offload.json"}}
    with pytest.raises(InputError, match="apex with the optimizer's state in CPU memory"):
        check_apex(from_tree(tree), "cuda")


def test_updates_are_counted_in_the_state(stand_in_apex: None) -> None:
    """Over parts of a group, as ZeRO 3 calls it, and without a gradient, as a skipped update is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    tree = {"kernels": {"adam": "apex"}, "optim": {"decay_excludes": ["bias"]}}
    adam = make_adam(model, from_tree(tree))
    groups = [(group, list(group["params"])) for group in adam.param_groups]
    assert len(groups) == 2
    for update in (1, 2, 3):
        model(torch.randn(2, 4)).square().sum().backward()
        for group, _ in groups:
            group["params"] = []
        for group, parameters in groups:
            for parameter in parameters:
                group["params"] = [parameter]
                adam.step()
            group["params"] = []
        for group, parameters in groups:
            group["params"] = parameters
        adam.zero_grad()
        adam.step()
        assert {int(adam.state[p]["step"]) for p in model.parameters()} == {update}


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.last = nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x.to(self.first.weight.dtype)))).float().sum()


_started: list[ZeroEngine] = []


@pytest.fixture(autouse=True)
def _no_engine_stays() -> Iterator[None]:
    """DeepSpeed's hooks keep an engine alive, and its buckets: memory that a fork would ask for."""
    yield
    while _started:
        _started.pop()._engine.destroy()


def start(stage: int, adam: str, weights: dict[str, torch.Tensor] | None = None) -> ZeroEngine:
    torch.manual_seed(0)
    model = Small()
    if weights:
        model.load_state_dict(weights)
    tree = {
        "precision": "fp32",
        "zero": {"config": f"ds_configs/zero{stage}.json"},
        "optim": {"lr": 0.1, "weight_decay": 0.1},
        "kernels": {"adam": adam},
    }
    _started.append(ZeroEngine(model, from_tree(tree), accumulation=1))
    return _started[-1]


def update(engine: ZeroEngine, factor: float = 1.0) -> bool:
    engine.backward(engine(torch.linspace(0, 1, 16).view(2, 8)) * factor)
    return engine.step().applied


def masters(engine: ZeroEngine) -> dict[str, torch.Tensor]:
    return {name: engine.full_state(name) for name in engine.trained_names}


@pytest.mark.usefixtures("process_group", "stand_in_apex")
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_apexs_adam_is_torchs_under_deepspeed(stage: int) -> None:
    ours, torchs = start(stage, "apex"), start(stage, "torch")
    for factor in (1.0, float("nan"), 0.5):
        assert update(ours, factor) == update(torchs, factor) == (factor == factor)
    assert ours.updates_applied == torchs.updates_applied == 2
    for name, value in masters(torchs).items():
        torch.testing.assert_close(ours.full_state(name), value, atol=1e-5, rtol=1e-5)
        for key in zero.MOMENTS:
            torch.testing.assert_close(
                ours.full_state(name, key), torchs.full_state(name, key), atol=1e-5, rtol=1e-4
            )


@pytest.mark.usefixtures("process_group", "stand_in_apex")
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_apexs_moments_survive_a_restart(stage: int) -> None:
    engine = start(stage, "apex")
    for _ in range(2):
        update(engine)
    names = engine.trained_names
    kept = {key: {name: engine.full_state(name, key) for name in names} for key in zero.MOMENTS}
    again = start(stage, "apex", masters(engine))
    again.set_moments(lambda name, key: kept[key][name], updates=engine.updates_applied)
    assert again.updates_applied == 2
    update(engine)
    update(again)
    for name, value in masters(engine).items():
        assert torch.equal(again.full_state(name), value)
