"""An accelerated Longformer of transformers is still theirs: files, copies, hooks, probabilities.

Also what cannot be accelerated, and how it is told.
"""

from __future__ import annotations

import copy
import io
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerated_models import floats, largest_difference, make_inputs, make_pair, make_plain
from torch import nn
from transformers import LongformerForMaskedLM

import longpretrain
from longpretrain import accelerated
from longpretrain.errors import InputError

pytestmark = pytest.mark.usefixtures("library")

HAS_HEAD_MASK = transformers.__version__.startswith("4.")


def conversion(checked: str) -> pytest.MarkDecorator:
    return pytest.mark.conversion(
        family="Longformer (transformers)", direction="longpretrain.accelerate", checked=checked
    )


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    accelerated._announce_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="longpretrain"):
        yield lambda: [r.message for r in caplog.records if r.name == accelerated.__name__]


@conversion("attention probabilities are theirs, bit for bit, and this is said once")
def test_attention_probabilities_come_from_theirs(said: Callable[[], list[str]]) -> None:
    plain, ours = make_pair()
    inputs = make_inputs(45)
    with torch.no_grad():
        ours(**inputs)
        assert not said()
        wanted = plain(**inputs, output_attentions=True)
        for _ in range(2):
            found = ours(**inputs, output_attentions=True)
    assert found.keys() == wanted.keys() >= {"attentions", "global_attentions"}
    assert all(torch.equal(x, y) for x, y in zip(floats(found), floats(wanted), strict=True))
    (message,) = said()
    assert "output_attentions=True" in message


@pytest.mark.skipif(not HAS_HEAD_MASK, reason="transformers 5 has no head mask")
def test_a_head_mask_runs_on_theirs(said: Callable[[], list[str]]) -> None:
    plain, ours = make_pair()
    inputs = make_inputs(45) | {"head_mask": torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 1]])}
    with torch.no_grad():
        assert torch.equal(floats(ours(**inputs))[0], floats(plain(**inputs))[0])
    assert len(said()) == 1


@conversion("state dict, save_pretrained and from_pretrained as before")
def test_files_are_as_before(tmp_path: Path) -> None:
    plain, ours = make_pair()
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for name, model in (("plain", plain), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
    for path in sorted((tmp_path / "plain").iterdir()):
        assert path.read_bytes() == (tmp_path / "ours" / path.name).read_bytes(), path.name
    again = LongformerForMaskedLM.from_pretrained(tmp_path / "ours").eval()
    inputs = make_inputs(45)
    with torch.no_grad():
        assert torch.equal(floats(again(**inputs))[0], floats(plain(**inputs))[0])
    plain.load_state_dict(ours.state_dict())
    ours.load_state_dict(plain.state_dict())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_accelerated(way: str) -> None:
    _plain, ours = make_pair()
    if way == "deepcopy":
        found = copy.deepcopy(ours)
    elif way == "pickle":
        found = pickle.loads(pickle.dumps(ours))
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        found = torch.load(file, weights_only=False)
    assert [type(m) for m in found.modules()] == [type(m) for m in ours.modules()]
    inputs = make_inputs(45)
    with torch.no_grad():
        wanted = floats(ours(**inputs))[0]
        assert torch.equal(floats(found(**inputs))[0], wanted)
        next(found.parameters()).fill_(0)  # not shared
        assert torch.equal(floats(ours(**inputs))[0], wanted)


def test_modules_keep_their_identity_hooks_and_names() -> None:
    plain = make_plain()
    layers = [layer.attention.self for layer in plain.longformer.encoder.layer]
    theirs = type(layers[0])
    seen: list[tuple[int, ...]] = []
    layers[0].register_forward_hook(lambda _m, _inputs, out: seen.append(tuple(out[0].shape)))
    assert longpretrain.accelerate(plain) is plain
    assert [layer.attention.self for layer in plain.longformer.encoder.layer] == layers
    assert all(isinstance(layer, theirs) for layer in layers)
    assert type(layers[0]).__name__ == theirs.__name__ == "LongformerSelfAttention"
    plain(**make_inputs(45))
    assert seen == [(3, 45, 32)]  # 48 with their padding
    assert "attention of longpretrain, backend='auto'" in repr(plain)


def test_it_is_idempotent_and_takes_a_backend() -> None:
    plain, ours = make_pair()
    classes = [type(module) for module in ours.modules()]
    inputs = make_inputs(45)
    with torch.no_grad():
        wanted = floats(plain(**inputs))
        for backend in ("fused", "portable", "reference", "auto"):
            assert longpretrain.accelerate(ours, backend=backend) is ours
            assert [type(module) for module in ours.modules()] == classes
            assert f"backend='{backend}'" in repr(ours)
            assert largest_difference(floats(ours(**inputs)), wanted) <= 1e-5


def test_the_operator_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything above would hold if nothing was swapped."""
    calls: list[dict[str, Any]] = []
    operator = accelerated.sliding_attention
    monkeypatch.setattr(
        accelerated,
        "sliding_attention",
        lambda *floats, **named: calls.append(named) or operator(*floats, **named),
    )
    _plain, ours = make_pair()
    inputs = make_inputs(45)
    with torch.no_grad():
        ours(**inputs)
        ours(**inputs | {"global_attention_mask": None})
    slots = [None if c["global_index_BG"] is None else c["global_index_BG"] for c in calls]
    assert slots[0].tolist() == [[0, 1, 2], [-1, -1, -1], [0, 44, -1]]
    assert slots[0] is slots[1]  # counted once for all layers
    assert slots[2:] == [None, None]


def test_torch_compile_takes_it() -> None:
    _plain, ours = make_pair("LongformerModel")
    inputs = make_inputs(45)
    with torch.no_grad():
        wanted = floats(ours(**inputs))
        found = floats(torch.compile(ours, backend="aot_eager")(**inputs))
    torch._dynamo.reset()
    assert largest_difference(found, wanted) <= 1e-6


def refusal(model: object, **named: Any) -> str:
    with pytest.raises(InputError) as caught:
        longpretrain.accelerate(model, **named)  # type: ignore[type-var]
    return str(caught.value)


def test_what_is_no_longformer_is_named() -> None:
    small = {
        "vocab_size": 67, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 40,
    }  # fmt: skip
    roberta = transformers.RobertaModel(transformers.RobertaConfig(**small))
    led = transformers.LEDModel(
        transformers.LEDConfig(
            vocab_size=67, d_model=16, encoder_layers=1, decoder_layers=1,
            encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
            decoder_ffn_dim=16, attention_window=[8],
        )
    )  # fmt: skip
    assert "got RobertaModel, which has Roberta" in refusal(roberta)
    assert "got LEDModel, which has LEDEncoderSelfAttention; wanted" in refusal(led)
    assert "got Linear, which has no attention that is known" in refusal(nn.Linear(2, 2))
    assert "got str 'allenai/longformer'" in refusal("allenai/longformer")
    assert "from_pretrained" in refusal(None)


def test_changed_layers_are_refused_and_left_alone() -> None:
    model = make_plain()
    module = model.longformer.encoder.layer[1].attention.self
    module.__class__ = type("Foreign", (type(module),), {"forward": lambda *_: None})
    assert "Foreign that another program has wrapped" in refusal(model)
    model = make_plain()
    module = model.longformer.encoder.layer[1].attention.self
    module.forward = module.forward  # as the hooks of the package accelerate do
    classes = [type(module) for module in model.modules()]
    assert "before the model is wrapped" in refusal(model)
    assert [type(module) for module in model.modules()] == classes


def test_code_that_is_not_known_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(accelerated.KNOWN, accelerated.ENCODER, {"hidden_states"})
    assert "arguments that are not known: attention_mask" in refusal(make_plain())


def test_a_backend_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_plain()
    assert "backend" in refusal(plain, backend="fast")
    monkeypatch.setattr(accelerated, "why_not", lambda *_: "there is no library")
    assert "'fused', but there is no library" in refusal(plain, backend="fused")
    assert "longpretrain" not in repr(plain)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys; from longpretrain import accelerate; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]
