"""The portable backend against the dense reference, and the promises of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from attention_cases import Case, assert_equal_to, make_case, output_gradient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longpretrain.attention import AttentionPattern, blocks, softmax
from longpretrain.attention.reference import reference_attention

TINY_LIMITS = blocks.Limits(queries=5, scores=150, counters=300)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    heads = draw(st.integers(1, 3))
    keys = draw(st.integers(1, 90))
    q_offset = draw(st.integers(0, keys - 1) | st.just(0))
    dilation = st.integers(1, 5)
    slots = draw(st.sampled_from([0, 0, 1, 3, 20]))
    return make_case(
        AttentionPattern(
            draw(st.integers(0, 8) | st.integers(0, keys + 1)),
            draw(dilation | st.tuples(*[dilation] * heads)),
            draw(st.booleans()),
        ),
        batch=draw(st.integers(1, 3)),
        heads=heads,
        head_size=draw(st.sampled_from([1, 4, 5])),
        queries=draw(st.integers(1, keys - q_offset) | st.just(keys - q_offset)),
        keys=keys,
        q_offset=q_offset,
        padding=draw(st.booleans()),
        slots=slots,
        own_projections=draw(st.booleans()),
        documents=draw(st.booleans()),
        dropout_p=draw(st.sampled_from([0.0, 0.1, 0.5, 255 / 256])),
        seed=draw(st.integers(0, 2**32)),
    )


def quietly(examples: int) -> settings:
    return settings(
        derandomize=True,
        deadline=None,
        max_examples=examples,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture(params=[None, TINY_LIMITS], ids=["usual_blocks", "tiny_blocks"])
def limits(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny blocks cut small inputs as long ones are cut: many blocks, runs and parts."""
    if request.param is not None:
        monkeypatch.setattr(blocks, "CPU_LIMITS", request.param)
    yield


@quietly(150)
@given(case=cases())
def test_equals_reference_in_float64(limits: None, case: Case) -> None:
    assert_equal_to(case.run("portable"), case.run("reference"), 1e-11)


@quietly(60)
@given(case=cases())
def test_equals_reference_in_float32(limits: None, case: Case) -> None:
    right = case.run("reference")
    assert_equal_to(case.to(torch.float32).run("portable"), right, 1e-5)


@pytest.mark.parametrize("tokens", [1, 7, 255, 513, 4095, 5000])
def test_narrowest_window_that_hugging_face_cannot_do(tokens: int) -> None:
    long = tokens > 600
    case = make_case(
        AttentionPattern(1), batch=1, heads=1, keys=tokens, padding=not long, slots=2, seed=tokens
    ).to(torch.float32)
    assert_equal_to(case.run("portable"), case.run("reference"), 1e-5)


@pytest.mark.parametrize("dilation", [(100, 39), (40, 41), (20, 13), (3, 10**6)], ids=str)
def test_dilation_as_long_as_the_sequence(limits: None, dilation: tuple[int, int]) -> None:
    """Dropout on: its bits are those of the whole dilation, whatever the work is cut by."""
    case = make_case(AttentionPattern(3, dilation), keys=40, slots=2, dropout_p=0.25)
    assert_equal_to(case.run("portable"), case.run("reference"), 1e-11)


def test_the_measure_of_equality_sees_small_gradients() -> None:
    right = {"out": torch.ones(3), "dq": torch.full((3,), 1e-6)}
    assert_equal_to(right, right, 1e-5)
    with pytest.raises(AssertionError, match="dq: off by 1e-06"):
        assert_equal_to(right | {"dq": torch.zeros(3)}, right, 1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_measure_of_equality_sees_what_is_no_number(value: float) -> None:
    sound = {"out": torch.zeros(3), "lse": torch.tensor([0.0, math.inf])}
    spoilt = sound | {"out": torch.tensor([0.0, value, 0.0])}
    assert_equal_to(sound, sound, 1e-5)
    for found, right in ((spoilt, sound), (sound, spoilt)):
        with pytest.raises(AssertionError, match="out: not finite"):
            assert_equal_to(found, right, 1e-5)
    if math.isnan(value):
        with pytest.raises(AssertionError, match="out: not finite"):
            assert_equal_to(spoilt, spoilt, 1e-5)
    with pytest.raises(AssertionError, match="lse: not finite"):
        assert_equal_to(sound | {"lse": torch.tensor([0.0, -math.inf])}, sound, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("tokens", [1, 77, 301])
def test_error_in_low_precision(tokens: int, dtype: torch.dtype) -> None:
    """At most twice (gradients three times) what the dense maths loses in that precision."""
    exact = make_case(
        AttentionPattern(40, (1, 2)), head_size=64, keys=tokens, padding=tokens > 1, slots=3, seed=5
    )
    low = exact.to(dtype)
    right = low.to(torch.float64).run("reference")
    found = low.run("portable")
    arguments = {**low.floats, **low.masks}
    out, _ = reference_attention(
        *(arguments[name] for name in ("q_BNHD", "k_BNHD", "v_BNHD")),
        low.pattern,
        padding_BM=arguments.get("padding_BN"),
        document_BM=None,
        global_index_BG=arguments["global_index_BG"],
        q_global_BGHD=arguments["q_global_BGHD"],
        k_global_BMHD=arguments["k_global_BNHD"],
        v_global_BMHD=arguments["v_global_BNHD"],
        dropout_seed_B=None,
        drop_below=0,
        scale=64**-0.5,
        q_offset=0,
        compute_dtype=dtype,
    )
    plain = {"out": out} | low.gradients(out)
    for name, it in plain.items():
        error, plain_error = (
            (x.double() - right[name]).abs().max().item() for x in (found[name], it)
        )
        times = 2 if name == "out" else 3
        # Both may round every number right: then the last bit of the largest one is the measure.
        last_bit = torch.finfo(dtype).eps * right[name].abs().max().item()
        # 1e-6: what float32 leaves of a gradient that cancels to 0 (one key has weight 1).
        assert error <= times * max(plain_error, last_bit / 2) + 1e-6, name


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["both_sides", "causal"])
def test_padding_is_zero_and_never_nan(dtype: torch.dtype, backend: str, causal: bool) -> None:
    """Rows padded throughout, windows padded throughout, padding named as global."""
    case = make_case(AttentionPattern(3, causal=causal), batch=3, keys=50, slots=3, dtype=dtype)
    padding_BN = torch.zeros(3, 50, dtype=torch.bool)
    padding_BN[0] = True
    padding_BN[1, 20:] = True
    padding_BN[2, :15] = True
    index_BG = torch.tensor([[0, 1, 2], [5, 40, -1], [3, 30, -1]], dtype=torch.int32)
    large = {name: (x.detach() * 8).requires_grad_() for name, x in case.floats.items()}
    case = Case(case.pattern, large, {"padding_BN": padding_BN, "global_index_BG": index_BG})
    found = case.run(backend)
    for name, x in found.items():
        assert name == "lse" or torch.isfinite(x).all(), name
        if name in {"out", "dq_BNHD", "dk_BNHD", "dv_BNHD", "dk_global_BNHD", "dv_global_BNHD"}:
            assert (x[padding_BN] == 0).all(), name
    assert (found["lse"][padding_BN] == float("inf")).all()
    assert (found["dq_global_BGHD"][[0, 0, 0, 1, 1, 2], [0, 1, 2, 1, 2, 0]] == 0).all()


def test_whatever_arrives_at_padding_goes_no_further() -> None:
    """Not even an infinite gradient of a padding query's output."""
    case = make_case(AttentionPattern(3), keys=50, padding=True, slots=3)
    out, _ = case.forward()
    direction = output_gradient(out)
    spoiled = direction.masked_fill(case.masks["padding_BN"][:, :, None, None], float("inf"))
    wanted = list(case.floats.values())
    clean = torch.autograd.grad(out, wanted, direction, retain_graph=True)
    for got, expected in zip(torch.autograd.grad(out, wanted, spoiled), clean, strict=True):
        assert torch.equal(got, expected)


def test_a_query_without_any_key() -> None:
    """Below the operator: two sets of keys, all hidden from the second query."""
    key_SnD = torch.ones(1, 3, 2)
    hidden = torch.tensor([[0.0], [softmax.NOTHING]])
    source = softmax.Source(key_SnD, key_SnD)
    everything = (slice(None), slice(None))
    keys = softmax.Keys(source, everything, [(slice(None), hidden)], None, 0)
    work = softmax.Work(everything, (1, 1), [keys, keys])
    out_SmD, lse_Sm1 = softmax.attend(torch.zeros(1, 2, 2), work, 1.0)
    assert out_SmD.tolist() == [[[1.0, 1.0], [0.0, 0.0]]]
    assert lse_Sm1.flatten().tolist() == pytest.approx([math.log(6), softmax.NO_KEYS])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradcheck(dropout_p: float) -> None:
    case = make_case(
        AttentionPattern(2, (1, 3), causal=True),
        keys=11,
        q_offset=2,
        queries=8,
        head_size=3,
        padding=True,
        documents=True,
        slots=3,
        dropout_p=dropout_p,
        seed=3,
    )

    def out_of(*floats: Tensor) -> Tensor:
        named = dict(zip(case.floats, floats, strict=True))
        return Case(case.pattern, named, case.masks).forward()[0]

    assert torch.autograd.gradcheck(out_of, tuple(case.floats.values()))
