"""LayerNorm of the model: torch's parameters and numbers, whoever computes it.

NVIDIA's apex cannot be built without CUDA: here a stand-in with its interface runs in its place.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from apex_helper import STAND_IN, found_anew

from longpretrain import nvidia_apex
from longpretrain.errors import InputError
from longpretrain.model.layer_norm import LayerNorm


@pytest.fixture
def stand_in_apex() -> Iterator[None]:
    with found_anew(STAND_IN):
        yield


def test_layer_norm_has_torchs_parameters_and_numbers() -> None:
    ours, torchs = LayerNorm(16, eps=1e-5), torch.nn.LayerNorm(16, eps=1e-5)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    x = torch.randn(3, 5, 16)
    assert torch.equal(ours(x), torchs(x))
    with pytest.raises(InputError, match="layer_norm_backend: got cudnn; wanted auto or torch or"):
        LayerNorm(16, eps=1e-5, backend="cudnn")
    with pytest.raises(InputError, match="layer norm by apex: got"):
        LayerNorm(16, eps=1e-5, backend="apex")(x)


def test_layer_norm_hands_rows_to_apex(
    stand_in_apex: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apex.normalization.fused_layer_norm import calls

    monkeypatch.setattr("longpretrain.model.layer_norm.why_not", lambda *_: None)  # as on a GPU
    layer = LayerNorm(16, eps=0.5)
    with torch.no_grad():
        layer.weight.normal_()
        layer.bias.normal_()
    x = torch.randn(3, 16)
    plain = torch.nn.functional.layer_norm(x, (16,), layer.weight, layer.bias, 0.5)
    assert torch.equal(layer(x), plain) and calls == [3]
    assert layer(x[:0]).shape == (0, 16) and calls == [3]  # no rows, no kernel
    LayerNorm(16, eps=0.5, backend="torch")(x)
    assert calls == [3]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layer_norm_by_apex_on_a_gpu(dtype: torch.dtype) -> None:
    if reason := nvidia_apex.why_not("layer_norm", "cuda"):
        pytest.skip(reason)
    errors = {}
    for backend in ("torch", "apex"):
        torch.manual_seed(0)
        layer = LayerNorm(768, eps=1e-5, backend=backend).to("cuda", dtype)
        x = torch.randn(300, 768, device="cuda", dtype=dtype, requires_grad=True)
        weight = torch.randn(300, 768, device="cuda", dtype=dtype)
        exact_layer = torch.nn.LayerNorm(768, eps=1e-5).to("cuda", torch.float64)
        exact_x = x.detach().double().requires_grad_()
        (layer(x) * weight).sum().backward()
        (exact_layer(exact_x) * weight.double()).sum().backward()
        pairs = [(x.grad, exact_x.grad), (layer.weight.grad, exact_layer.weight.grad)]
        errors[backend] = [float((a.double() - b).abs().max()) for a, b in pairs]
    for by_apex, by_torch in zip(errors["apex"], errors["torch"], strict=True):
        assert by_apex <= 3 * by_torch + 1e-6
