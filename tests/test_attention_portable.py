"""The portable backend against the dense reference, and the promises of its own."""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_cases import Case, assert_equal_to, make_case, output_gradient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longpretrain.attention import AttentionPattern, blocks, sliding_attention, softmax
from longpretrain.attention.portable import portable_attention, portable_attention_backward
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


@pytest.fixture
def restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("batch", "heads", "tokens", "window", "dilation", "dropout_p"),
    [
        (1, 1, 589, 100, 1, 0.1),
        (1, 12, 257, 64, 1, 0.0),
        (2, 3, 301, 30, (1, 2, 3), 0.0),
        (1, 2, 423, 500, 1, 0.0),
    ],
    ids=["one_head", "many_heads", "dilated", "covering"],
)
def test_bitwise_repeatable_for_any_thread_count(
    restore_threads: None,
    batch: int,
    heads: int,
    tokens: int,
    window: int,
    dilation: int | tuple[int, ...],
    dropout_p: float,
) -> None:
    case = make_case(
        AttentionPattern(window, dilation),
        batch=batch,
        heads=heads,
        head_size=64,
        keys=tokens,
        slots=5,
        dropout_p=dropout_p,
        dtype=torch.float32,
    )
    torch.set_num_threads(2)
    first, again = case.run(), case.run()
    torch.set_num_threads(1)
    alone = case.run()
    for name, x in first.items():
        assert torch.equal(x, again[name]), name
        assert torch.equal(x, alone[name]), f"{name} with one thread"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("head_size", "heads", "tokens", "dilation"),
    [(33, 1, 197, 1), (33, 1, 71, 10), (5, 2, 41, (2, 100)), (64, 1, 69, 1)],
    ids=["odd_head", "few_queries", "tiny_head", "few_queries_in_the_last_block"],
)
def test_odd_shapes_do_not_depend_on_threads(
    restore_threads: None,
    head_size: int,
    heads: int,
    tokens: int,
    dilation: int | tuple[int, ...],
    dtype: torch.dtype,
) -> None:
    """Shapes of which MKL's bare products do depend on the threads: rows of 5, 6, 7 or 9."""
    case = make_case(
        AttentionPattern(9, dilation),
        batch=1,
        heads=heads,
        head_size=head_size,
        keys=tokens,
        slots=5,
        padding=True,
        dropout_p=0.1,
        dtype=dtype,
    )
    found = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        found.append(case.run())
    for threads, other in enumerate(found[1:], start=2):
        for name, x in found[0].items():
            assert torch.equal(x, other[name]), f"{name} with {threads} threads"


@pytest.mark.parametrize("backend", ["portable", "reference"])
def test_rows_of_a_batch_do_not_know_each_other(backend: str) -> None:
    case = make_case(
        AttentionPattern(5, (1, 2)), batch=3, padding=True, slots=3, documents=True, dropout_p=0.4
    )
    together = case.run(backend)
    for row in range(3):
        floats = {k: x[row : row + 1].detach().requires_grad_() for k, x in case.floats.items()}
        masks = {k: x[row : row + 1] if isinstance(x, Tensor) else x for k, x in case.masks.items()}
        out, lse = Case(case.pattern, floats, masks).forward(backend)
        gradient = output_gradient(together["out"])[row : row + 1]
        found = torch.autograd.grad(out, list(floats.values()), gradient)
        assert_equal_to(
            {"out": out, "lse": lse} | dict(zip(floats, found, strict=True)),
            {name.removeprefix("d"): x[row : row + 1] for name, x in together.items()},
            1e-12,
        )


@pytest.mark.parametrize("backend", ["portable", "reference"])
@pytest.mark.parametrize("own_projections", [False, True], ids=["shared", "own"])
def test_split_sequence_equals_the_whole(backend: str, own_projections: bool) -> None:
    """Each part has its rows of q and all keys; dropout on; gradients of the keys add up."""
    case = make_case(
        AttentionPattern(6, (1, 3)),
        keys=97,
        padding=True,
        slots=4,
        own_projections=own_projections,
        documents=True,
        dropout_p=0.3,
    )
    whole = case.run(backend)
    direction = output_gradient(whole["out"])
    wanted = list(case.floats.values())
    parts, sums = [], [torch.zeros_like(x) for x in wanted]
    for start, stop in ((0, 30), (30, 31), (31, 97)):
        # The default for the global queries would be gathered from the part's own rows.
        q_BNHD = case.floats["q_BNHD"][:, start:stop]
        out, lse = case.forward(backend, q_BNHD=q_BNHD, q_offset=start)
        parts.append((out, lse))
        for total, x in zip(
            sums, torch.autograd.grad(out, wanted, direction[:, start:stop]), strict=True
        ):
            total.add_(x)
    joined = {
        "out": torch.cat([out for out, _ in parts], dim=1),
        "lse": torch.cat([lse for _, lse in parts], dim=1),
    }
    joined |= {f"d{name}": x for name, x in zip(case.floats, sums, strict=True)}
    assert_equal_to(joined, whole, 1e-12)


def test_dropout_keeps_the_mean_and_drops_the_share() -> None:
    tokens, p = 400, 0.25
    pattern = AttentionPattern(tokens)
    zero_BNHD = torch.zeros(1, tokens, 4, 1)
    out, lse = sliding_attention(
        zero_BNHD,
        zero_BNHD,
        torch.ones_like(zero_BNHD),
        pattern,
        dropout_p=p,
        dropout_seed_B=torch.tensor([7]),
        return_lse=True,
    )
    # Each output is (kept keys) / tokens / (1 - p); lse is taken before dropout.
    kept = out * (1 - p)
    assert kept.mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p)) ** 0.5 / tokens / 2)
    assert kept.std().item() == pytest.approx((p * (1 - p) / tokens) ** 0.5, rel=0.1)
    assert lse.exp().flatten().tolist() == pytest.approx([tokens] * tokens * 4)


class _Sizes(TorchDispatchMode):
    """Records the largest tensor that any operation returns, and the most bytes alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given | self._seen:
                self._note(x.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._seen.add(key)
        self.largest, self.alive = max(self.largest, size), self.alive + size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size


def _operands(
    tokens: int,
    window: int,
    dilations: tuple[int, int] = (1, 2),
    slots: int = 1,
    device: str = "cpu",
) -> tuple[Any, ...]:
    q = torch.zeros(1, tokens, 2, 8, device=device)
    index = torch.full((1, slots), -1, dtype=torch.int32, device=device)
    seed = torch.zeros(1, dtype=torch.int64, device=device)
    masks = (None, None, index, seed)
    return q, q, q, q[:, :slots], q, q, *masks, window, list(dilations), False, 26, 1.0, 0


def _backward_operands(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    q_BNHD = operands[0]
    return torch.zeros_like(q_BNHD), torch.zeros_like(q_BNHD), q_BNHD.sum(dim=-1), *operands


BOTH_WAYS = pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])


@BOTH_WAYS
@pytest.mark.parametrize(
    ("tokens", "window", "dilations", "slots"),
    [
        (8192, 500, (1, 2), 1),
        (32768, 500, (1, 2), 1),
        (8192, 500, (1, 2), 512),
        (8, 3, (1, 10**6), 1),
        (256, 3, (10**6, 255), 20),
    ],
    ids=["short", "long", "many_slots", "dilation_beyond_tokens", "dilation_near_tokens"],
)
def test_transient_memory_is_bounded(
    tokens: int, window: int, dilations: tuple[int, int], slots: int, backward: bool
) -> None:
    """No tensor holds more than a block's scores or counters, or twice an input (D filled to 16).

    All together: the inputs as streams, gradients and a few blocks, Philox's dozen words included.
    """
    operands = _operands(tokens, window, dilations, slots)
    function = portable_attention
    if backward:
        operands, function = _backward_operands(operands), portable_attention_backward
    with _Sizes() as sizes:
        function._init_fn(*operands)
    streams = 4 * (tokens + 16) * 2 * 16
    block = 4 * max(blocks.CPU_LIMITS.scores, 2 * blocks.CPU_LIMITS.counters)
    assert sizes.largest <= max(block, streams)
    assert sizes.peak <= 20 * streams + 8 * block
    if tokens < 100:
        assert sizes.peak < 1 << 20


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_kept_for_backward_is_linear_in_tokens(dropout_p: float) -> None:
    def kept_bytes(tokens: int, window: int) -> int:
        case = make_case(
            AttentionPattern(window, (1, 2)), keys=tokens, slots=2, dropout_p=dropout_p
        )
        seen: dict[int, int] = {}

        def note(x: Tensor) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            case.forward()
        return sum(seen.values())

    assert kept_bytes(512, 8) == kept_bytes(512, 400)
    assert kept_bytes(1024, 8) <= 2 * kept_bytes(512, 8)
    # q, k, v, own k and v, and the output, each [2, 512, 2, 4] float64, plus the log-sum-exp.
    assert kept_bytes(512, 8) <= (6 * 4 + 1) * 2 * 512 * 2 * 8 + 10_000


class _NoHostTensors(TorchDispatchMode):
    """Refuses every tensor of the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            assert not isinstance(x, Tensor) or x.device.type == "meta", f"{func} on {x.device}"
        return result


class _NoHostValues(TorchFunctionMode):
    """Refuses what makes a tensor of the host out of sight of a dispatch mode, and copies it."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        assert name not in {"tensor", "as_tensor", "new_tensor", "from_numpy"}, name
        if name in {"__getitem__", "__setitem__"}:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(isinstance(part, list) for part in index), "a list as an index"
        if name == "where":
            assert all(isinstance(x, Tensor) for x in args), "torch.where with a number"
        return func(*args, **(kwargs or {}))


@BOTH_WAYS
@pytest.mark.parametrize("causal", [False, True], ids=["both_sides", "causal"])
def test_no_value_is_looked_at_and_nothing_copied_to_the_device(
    causal: bool, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under fake tensors any step that depends on a value raises. The device is meta, since a build
    of PyTorch without CUDA cannot index fake CUDA tensors; it knows no autocast.
    """
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    with FakeTensorMode(), _NoHostTensors(), _NoHostValues():
        *tensors, window, dilations, _, drop, scale, offset = _operands(300, 20, device="meta")
        tensors[6] = torch.zeros(1, 300, dtype=torch.bool, device="meta")
        tensors[7] = torch.zeros(1, 300, dtype=torch.int32, device="meta")
        operands = (*tensors, window, dilations, causal, drop, scale, offset)
        if backward:
            found = portable_attention_backward._init_fn(*_backward_operands(operands))
            assert [x.shape for x in found] == [x.shape for x in tensors[:6]]
        else:
            out, lse = portable_attention._init_fn(*operands)
            assert out.shape == (1, 300, 2, 8)
            assert lse.shape == (1, 300, 2)
