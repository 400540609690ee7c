"""An accelerated Longformer of transformers computes what the plain one does.

`make matrix` runs these under transformers 4.57 as well: other forward methods, other masks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from accelerated_models import floats, gradients, largest_difference, make_inputs, make_pair
from torch import Tensor, nn

Report = Callable[[str, object], None]

pytestmark = pytest.mark.usefixtures("library")

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
        found = gradients(model.half(), make_inputs(64, slots=False))
        return all(bool(grad.isfinite().all()) for grad in found.values() if grad is not None)

    plain, ours = make_pair()
    for model in (plain, ours):
        for layer in model.longformer.encoder.layer:
            layer.attention.self.query.weight.data *= 100  # so that scores reach below -16
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
