"""An accelerated Longformer of transformers is the plain one: outputs, gradients, files, copies.

`make matrix` runs these under transformers 4.57 as well: other forward methods, other masks.
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
from torch import Tensor, nn
from transformers import LongformerConfig, LongformerForMaskedLM

import longpretrain
from longpretrain import accelerated
from longpretrain.errors import InputError

Report = Callable[[str, object], None]

pytestmark = pytest.mark.usefixtures("library")

HAS_HEAD_MASK = transformers.__version__.startswith("4.")
WINDOWS = {"even": (16, 16), "mixed": (8, 16), "wide_first": (16, 4)}
KINDS = {
    "LongformerModel": {},
    "LongformerForMaskedLM": {},
    "LongformerForSequenceClassification": {},
    "LongformerForQuestionAnswering": {},
    "LongformerForTokenClassification": {},
    "LongformerForMultipleChoice": {},
}


def conversion(checked: str) -> pytest.MarkDecorator:
    return pytest.mark.conversion(
        family="Longformer (transformers)", direction="longpretrain.accelerate", checked=checked
    )


def make_plain(kind: str = "LongformerForMaskedLM", **changes: Any) -> nn.Module:
    """Small, with attention that is far from even, and a chosen dropout."""
    torch.manual_seed(5)
    chosen: dict[str, Any] = {
        "attention_window": (8, 16), "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0, "initializer_range": 0.15,
    }  # fmt: skip
    chosen |= changes
    chosen["attention_window"] = list(chosen["attention_window"])
    config = LongformerConfig(
        vocab_size=67, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=130, pad_token_id=1, bos_token_id=0,
        eos_token_id=2, sep_token_id=2, type_vocab_size=1, **chosen,
    )  # fmt: skip
    model: nn.Module = getattr(transformers, kind)(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def make_pair(kind: str = "LongformerForMaskedLM", **changes: Any) -> tuple[nn.Module, nn.Module]:
    plain = make_plain(kind, **changes)
    return plain, longpretrain.accelerate(copy.deepcopy(plain))


def make_inputs(tokens: int = 45, *, padding: bool = True, slots: bool = True) -> dict[str, Tensor]:
    """Three rows: of padding inside and at the end, and with different numbers of global tokens."""
    generator = torch.Generator().manual_seed(tokens)
    ids = torch.randint(4, 67, (3, tokens), generator=generator)
    mask, is_global = torch.ones_like(ids), torch.zeros_like(ids)
    if padding:
        mask[1, tokens // 2 :] = 0
        mask[2, tokens // 3 : tokens // 2] = 0
        ids[mask == 0] = 1
    if slots:
        is_global[0, :3] = 1
        is_global[2, [0, tokens - 1]] = 1
        is_global[1, tokens - 1] = 1  # where there is padding, that wins
    return {"input_ids": ids, "attention_mask": mask, "global_attention_mask": is_global}


def floats(output: Any) -> list[Tensor]:
    """All tensors of an output of transformers, in its order."""
    values = [value if isinstance(value, tuple) else (value,) for value in output.values()]
    return [x for value in values for x in value if isinstance(x, Tensor)]


def largest_difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    assert len(found) == len(wanted) > 0
    for x, y in zip(found, wanted, strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
    return max(float((x - y).abs().max()) for x, y in zip(found, wanted, strict=True))


def gradients(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """Of every parameter, for a fixed gradient of the outputs; and the outputs' own sum."""
    model.train()
    model.zero_grad()
    out = floats(model(**inputs))[0]
    generator = torch.Generator().manual_seed(3)
    out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@conversion("outputs within 1e-5 at 1 to 128 tokens, padding, ragged global tokens, mixed windows")
@pytest.mark.parametrize("windows", WINDOWS.values(), ids=WINDOWS)
def test_outputs_are_theirs(windows: tuple[int, ...], conversion_report: Report) -> None:
    plain, ours = make_pair(attention_window=windows)
    largest = 0.0
    for tokens in (1, 7, 16, 45, 64, 128):
        for padding, slots in ((False, False), (True, False), (True, True), (False, True)):
            inputs = make_inputs(tokens, padding=padding, slots=slots)
            with torch.no_grad():
                wanted = floats(plain(**inputs, output_hidden_states=True))
                found = floats(ours(**inputs, output_hidden_states=True))
            largest = max(largest, largest_difference(found, wanted))
    assert largest <= 1e-5
    conversion_report("largest difference", largest)


@conversion("outputs of every model class within 1e-5")
@pytest.mark.parametrize("kind", KINDS)
def test_every_class_of_theirs(kind: str) -> None:
    plain, ours = make_pair(kind)
    inputs = make_inputs(40)
    if kind == "LongformerForQuestionAnswering":
        inputs["input_ids"][:, [5, 6, 39]] = 2  # </s></s> after the question, </s> at the end
        del inputs["global_attention_mask"]
    if kind == "LongformerForSequenceClassification":
        del inputs["global_attention_mask"]
    if kind == "LongformerForMultipleChoice":
        inputs = {name: x[None] for name, x in inputs.items()}
        inputs["input_ids"][..., [5, 6, 39]] = 2
        del inputs["global_attention_mask"]
    with torch.no_grad():
        assert largest_difference(floats(ours(**inputs)), floats(plain(**inputs))) <= 1e-5
    assert type(ours) is type(plain)


@conversion("gradients of all parameters within 1e-5, also checkpointed, in training")
@pytest.mark.parametrize("slots", [True, False], ids=["global", "local"])
@pytest.mark.parametrize("recompute", [True, False], ids=["checkpointed", "stored"])
def test_gradients_are_theirs(slots: bool, recompute: bool, conversion_report: Report) -> None:
    plain, ours = make_pair()
    if recompute:
        ours.gradient_checkpointing_enable()
    inputs = make_inputs(45, slots=slots)
    wanted, found = gradients(plain, inputs), gradients(ours, inputs)
    without = {name for name, gradient in wanted.items() if gradient is None}
    assert without == {name for name, gradient in found.items() if gradient is None}
    assert any("_global" in name for name in without) is not slots
    largest = 0.0
    for name, right in wanted.items():
        if right is not None:
            here = found[name]
            assert here is not None
            # Relative to the largest number of the tensor: sums over all tokens reach hundreds.
            largest = max(largest, float((here - right).abs().max() / right.abs().max().clamp(1)))
    assert largest <= 1e-5
    conversion_report("largest difference", largest)


@conversion("bf16 and fp16: no further from float64 than twice their own distance")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_is_as_near_as_theirs(dtype: torch.dtype) -> None:
    plain, ours = make_pair()
    for slots in (True, False):
        inputs = make_inputs(45, slots=slots)
        with torch.no_grad():
            right = floats(copy.deepcopy(plain).double()(**inputs))[0]
            theirs = floats(copy.deepcopy(plain).to(dtype)(**inputs))[0]
            found = floats(copy.deepcopy(ours).to(dtype)(**inputs))[0]
        assert found.dtype == theirs.dtype == dtype
        assert (found - right).abs().max() <= 2 * (theirs - right).abs().max()


def test_autocast_gives_their_types() -> None:
    plain, ours = make_pair()
    inputs = make_inputs(45)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        theirs, found = floats(plain(**inputs))[0], floats(ours(**inputs))[0]
    assert found.dtype == theirs.dtype
    assert (found - theirs).abs().max() <= 0.1 * theirs.abs().max()


@conversion("fp16 gradients are finite where a whole window is padding (theirs are NaN)")
def test_a_window_of_padding_has_finite_gradients_in_fp16() -> None:
    def is_finite(model: nn.Module) -> bool:
        found = gradients(model.half(), make_inputs(64))
        return all(bool(grad.isfinite().all()) for grad in found.values() if grad is not None)

    plain, ours = make_pair()
    assert is_finite(ours)
    assert not is_finite(plain)


def test_windows_that_do_not_divide_each_other() -> None:
    """Theirs pads to the largest window and then fails; with padding for both it is right."""
    plain, ours = make_pair(attention_window=(6, 8))
    inputs = make_inputs(46, slots=True)  # 48 is a multiple of both
    with pytest.raises(AssertionError), torch.no_grad():
        plain(**make_inputs(30))
    with torch.no_grad():
        assert largest_difference(floats(ours(**inputs)), floats(plain(**inputs))) <= 1e-5
        assert floats(ours(**make_inputs(30)))[0].isfinite().all()


def test_masks_mean_what_they_mean_in_each_version() -> None:
    """2 in attention_mask is global in both; with global_attention_mask it is only in 4.57."""
    plain, ours = make_pair()
    inputs = make_inputs(45, slots=False)
    inputs["attention_mask"][0, 4] = 2
    for is_global in (0, 1):
        inputs["global_attention_mask"][0, 4] = is_global
        with torch.no_grad():
            assert largest_difference(floats(ours(**inputs)), floats(plain(**inputs))) <= 1e-5


def test_embeddings_may_be_given_in_place_of_ids() -> None:
    plain, ours = make_pair("LongformerModel")
    inputs = make_inputs(45)
    embedded = plain.get_input_embeddings()(inputs.pop("input_ids")).detach()
    with torch.no_grad():
        wanted, found = (model(inputs_embeds=embedded, **inputs) for model in (plain, ours))
    assert largest_difference(floats(found), floats(wanted)) <= 1e-5


@pytest.mark.parametrize("tokens", [45, 48])
def test_chunks_of_the_feed_forward_part(tokens: int) -> None:
    """They divide the padded length, and with 45 tokens not the unpadded one."""
    plain, ours = make_pair(chunk_size_feed_forward=16)
    inputs = make_inputs(tokens)
    with torch.no_grad():
        assert largest_difference(floats(ours(**inputs)), floats(plain(**inputs))) <= 1e-5


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


def test_dropout_is_drawn_by_torchs_generator() -> None:
    _plain, ours = make_pair(attention_probs_dropout_prob=0.5)
    inputs = make_inputs(45)
    ours.train()

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return floats(ours(**inputs))[0]

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    ours.eval()
    assert torch.equal(drawn(1), drawn(2))


def test_a_checkpointed_layer_drops_the_same_again() -> None:
    """Otherwise the gradients would be those of another forward pass."""
    _plain, stored = make_pair(attention_probs_dropout_prob=0.3, hidden_dropout_prob=0.2)
    recomputed = copy.deepcopy(stored)
    recomputed.gradient_checkpointing_enable()
    found = []
    for model in (stored, recomputed):
        torch.manual_seed(11)
        found.append(gradients(model, make_inputs(45)))
    assert all(
        gradient is None if found[1][name] is None else torch.equal(gradient, found[1][name])
        for name, gradient in found[0].items()
    )


def test_dropout_keeps_the_mean() -> None:
    """Attention is linear in the weights that are dropped; also in the rows of global tokens."""
    _plain, ours = make_pair("LongformerModel", attention_probs_dropout_prob=0.25)
    module = ours.encoder.layer[0].attention.self
    inputs = make_inputs(24)
    masks = {
        "is_index_masked": inputs["attention_mask"] == 0,
        "is_index_global_attn": (inputs["global_attention_mask"] * inputs["attention_mask"]) > 0,
        "is_global_attn": True,
    }
    x = torch.randn(3, 24, 32, generator=torch.Generator().manual_seed(2))
    draws = 600
    with torch.no_grad():
        wanted = module(x, **masks)[0]
        module.train()
        torch.manual_seed(0)
        found = torch.stack([module(x, **masks)[0] for _ in range(draws)])
    error = (found.mean(0) - wanted) / (found.std(0) / draws**0.5).clamp(1e-6)
    assert found.std(0)[0].min() > 0
    assert error.abs().max() < 6
    assert error.square().mean() < 1.5


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
        found = floats(torch.compile(ours, backend="eager")(**inputs))
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
    assert "got RobertaModel, which has RobertaSelfAttention; wanted" in refusal(roberta)
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
    code = (
        "import sys, longpretrain; print(callable(longpretrain.accelerate), 'torch' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]
