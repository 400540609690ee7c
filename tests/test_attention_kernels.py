"""The numbers of the compiled kernels: against the reference and, where that would take long,
against the portable backend in float64, which test_attention_portable.py holds to the reference.

Lengths and windows lie around what the kernels cut by (csrc/cpu/plan.h, tile.h): 32 queries, 64 and
16 keys, chunks of 1,024 or 2,048 queries whose gradients meet at their edges.

Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention_cases import Case, assert_equal_to, make_case, output_gradient
from operator_cases import batch_rows, leaves, with_masks
from test_attention_fused import assert_same_bits
from test_attention_main import run_python
from torch import Tensor
from torch.nn.functional import pad
from torch.profiler import ProfilerActivity, profile

from longpretrain.attention import AttentionPattern, fused, sliding_attention, why_not
from longpretrain.attention.reference import reference_attention

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
EPS = torch.finfo(F32).eps
LIMIT = 1e-5  # docs/numerics.md
INDEX = "global_index_BG"
HERE = Path(__file__).parent


@pytest.fixture(autouse=True, scope="module")
def library() -> None:
    if reason := why_not("fused"):
        pytest.skip(reason)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def note(what: str, value: float | Tensor) -> None:
    """Shown by pytest -rP: the figures of docs/numerics.md."""
    print(f"{what}: {float(value):.2g}")


def right_of(case: Case) -> dict[str, Tensor]:
    """In float64, from the very numbers that the kernels get."""
    dense = case.floats["k_BNHD"].shape[1] <= 700
    return case.to(F64).run("reference" if dense else "portable")


def assert_right(
    found: dict[str, Tensor], right: dict[str, Tensor], tolerance: float = LIMIT
) -> None:
    """Relative to the scale of the tensor, and for heads of 32 numbers and more to that of each row
    (at least a tenth of the tensor's): of fewer numbers a row may be small by chance.
    """
    assert not any(x.isnan().any() for x in found.values())
    assert_equal_to(found, right, tolerance)
    assert (found["out"][right["lse"].isinf()] == 0).all()
    assert (found["dq_BNHD"][right["lse"].isinf()] == 0).all()
    largest = max(x.abs().max().item() for name, x in right.items() if name.startswith("d"))
    for name, x in right.items():
        if name == "lse" or x.shape[-1] < 32:
            continue
        scale = x.abs().amax(dim=-1).clamp(min=max(0.1 * x.abs().max().item(), 0.01 * largest))
        error = ((found[name].double() - x).abs().amax(dim=-1) / scale).max()
        note(f"{name}, a row, of its scale", error)
        assert error <= tolerance, f"{name}: a row is off by {error:.3g} of its scale"


def check(case: Case, tolerance: float = LIMIT) -> dict[str, Tensor]:
    case = case.to(F32)
    found = case.run("fused")
    assert_right(found, right_of(case), tolerance)
    return found


def check_cancelled(case: Case, tolerance: float = LIMIT) -> dict[str, Tensor]:
    """Where gradients of q and k are small beside the terms that they are sums of (0 for a query
    that reaches one key), and measured by those terms.
    """
    case = case.to(F32)
    found, right = case.run("fused"), right_of(case)
    own_scale = [name for name in right if not name.startswith(("dq", "dk"))]
    assert_equal_to(*({name: x[name] for name in own_scale} for x in (found, right)), tolerance)
    direction = output_gradient(found["out"]).abs().sum(dim=-1).max()
    size = {name: x.abs().max() for name, x in case.floats.items()}
    scale = case.masks.get("scale", case.floats["q_BNHD"].shape[3] ** -0.5)
    for name in right.keys() - set(own_scale):
        own = "_global" in name
        value = size["v_global_BNHD" if own else "v_BNHD"]
        if name.startswith("dq"):
            other = size["k_global_BNHD" if own else "k_BNHD"]
        else:
            other = size["q_global_BGHD" if own else "q_BNHD"]
        error = (found[name].double() - right[name]).abs().max()
        assert error <= tolerance * scale * direction * value * other, name
    return found


# Shapes


@pytest.mark.parametrize(
    "tokens",
    [1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1023, 1024, 1025, 2047, 2048, 2049, 3100, 4097],
)
def test_lengths(tokens: int) -> None:
    """Two rows: what is written beyond the end of one would spoil the other."""
    right = check if tokens > 1 else check_cancelled
    right(make_case(AttentionPattern(20), heads=1, head_size=3, keys=tokens, seed=tokens))
    masked = make_case(
        AttentionPattern(13, (1, 3), causal=tokens % 2 == 0),
        head_size=2,
        keys=tokens,
        padding=tokens > 1,
        slots=min(tokens, 3),
        documents=tokens > 60,
        dropout_p=0.25,
        seed=tokens,
    )
    right(masked)


WINDOWS = [
    0, 1, 14, 15, 16, 17, 30, 31, 32, 33, 62, 63, 64, 65, 254, 255, 256, 512, 699, 700, 2**31 - 1
]  # fmt: skip


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [False, True], ids=["both_sides", "causal"])
def test_windows(window: int, causal: bool) -> None:
    pattern = AttentionPattern(window, (1, 2), causal)
    check(make_case(pattern, batch=1, head_size=3, keys=700, slots=2, seed=window % 1000))


HEAD_SIZES = [1, 7, 31, 32, 33, 64, 65, 96, 127, 128]
some_of_all = functools.partial(
    make_case, keys=150, padding=True, slots=5, documents=True, dropout_p=0.2
)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_head_sizes(head_size: int) -> None:
    check(some_of_all(AttentionPattern(30, (1, 3)), head_size=head_size, seed=head_size))
    check(make_case(AttentionPattern(30), batch=1, head_size=head_size, keys=150))


def test_larger_heads_are_for_the_portable_backend() -> None:
    case = some_of_all(AttentionPattern(30), head_size=129, dtype=F32)
    assert_same_bits(case.run("auto"), case.run("portable"))
    with pytest.raises(ValueError, match="heads of up to 128, not 129"):
        case.forward("fused")


LONG = {
    "both_sides": (AttentionPattern(100), {}),
    "causal": (AttentionPattern(100, causal=True), {}),
    "wide": (AttentionPattern(600), {}),  # the last chunk is shorter than the window
    "wider_than_half_a_chunk": (AttentionPattern(1500), {"heads": 1}),
    "wide_and_causal": (AttentionPattern(2500, causal=True), {"heads": 1}),
    "documents": (AttentionPattern(100), {"documents": True, "padding": True}),
    "dilated": (AttentionPattern(30, (2, 3)), {"padding": True, "slots": 3}),
    "dilated_causal": (AttentionPattern(400, (2, 1), causal=True), {"documents": True}),
    "many_classes": (
        AttentionPattern(3, (40, 300)),
        {"keys": 1300, "slots": 3, "dropout_p": 0.1},
    ),
    "dropout": (AttentionPattern(70), {"dropout_p": 0.3, "slots": 40}),
    "later_queries": (AttentionPattern(100), {"q_offset": 700, "slots": 5}),
    "keys_on_both_sides": (
        AttentionPattern(100, (1, 2)),
        {"q_offset": 313, "queries": 2500, "padding": True, "slots": 5},
    ),
    "few_queries": (AttentionPattern(300, (1, 3)), {"q_offset": 2040, "queries": 17, "slots": 3}),
}


@pytest.mark.parametrize(("pattern", "changes"), LONG.values(), ids=LONG.keys())
def test_chunks_meet(pattern: AttentionPattern, changes: dict[str, Any]) -> None:
    check(make_case(pattern, **({"heads": 2, "head_size": 4, "keys": 4300} | changes)))


def test_a_window_of_one_key() -> None:
    for window, slots in ((0, 0), (0, 3), (1, 0)):
        check_cancelled(make_case(AttentionPattern(window), head_size=5, keys=4300, slots=slots))


def test_documents_that_end_where_chunks_do() -> None:
    case = make_case(AttentionPattern(50, (1, 2)), batch=1, keys=4200, slots=4, head_size=3)
    starts = torch.zeros(1, 4200, dtype=torch.int32)
    starts[:, [16, 64, 1023, 1024, 1025, 2048, 4095, 4096]] = 1
    check(with_masks(case, document_BN=starts.cumsum(dim=1)))


# Global tokens and padding


def with_slots(case: Case, *rows: list[int]) -> Case:
    """These positions in the slots of each row; the rest are unused."""
    index_BG = torch.full_like(case.masks[INDEX], -1)
    for index_G, row in zip(index_BG, rows, strict=True):
        index_G[: len(row)] = torch.tensor(row, dtype=index_G.dtype)
    return with_masks(case, **{INDEX: index_BG})


@pytest.mark.parametrize("causal", [False, True], ids=["both_sides", "causal"])
def test_global_tokens_where_chunks_end(causal: bool) -> None:
    pattern = AttentionPattern(40, (1, 2), causal)
    case = make_case(pattern, keys=4200, slots=9, head_size=3, dropout_p=0.1)
    edges = [1023, 4199, 0, 2048, 1024, 4096, 2047, 4095]
    found = check(with_slots(case, edges, [2048]))
    assert (found["dq_global_BGHD"][0, 8] == 0).all()
    assert (found["dq_global_BGHD"][1, 1:] == 0).all()


@pytest.mark.parametrize("slots", [16, 17, 33, 64, 65, 90])
@pytest.mark.parametrize("own_projections", [False, True], ids=["shared", "own"])
def test_many_global_tokens(slots: int, own_projections: bool) -> None:
    case = make_case(
        AttentionPattern(5, (1, 3)), keys=130, slots=slots, own_projections=own_projections,
        padding=slots % 2 == 0, seed=slots,
    )  # fmt: skip
    check(with_slots(case, list(range(0, slots)), list(range(120, 120 - slots, -1))))


def test_all_tokens_are_global() -> None:
    case = make_case(AttentionPattern(4), keys=50, slots=50, dropout_p=0.2)
    found = check(with_slots(case, list(range(50)), list(range(49, -1, -1))))
    # Nobody reads the ordinary projections.
    assert all((found[name] == 0).all() for name in ("dq_BNHD", "dk_BNHD", "dv_BNHD"))


def test_no_slot_is_used() -> None:
    case = make_case(AttentionPattern(4), keys=50, slots=3)
    found = check(with_slots(case, [], []))
    assert all((x == 0).all() for name, x in found.items() if "_global_" in name)


def test_global_queries_of_another_part() -> None:
    """Their slots write nothing, as keys they are there."""
    case = make_case(AttentionPattern(4), q_offset=60, queries=40, keys=150, slots=4)
    found = check(with_slots(case, [0, 59, 60, 99], [100, 149, 3, 80]))
    assert (found["dq_global_BGHD"][0, :2] == 0).all()
    assert (found["dq_global_BGHD"][1, :3] == 0).all()


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["both_sides", "causal"])
def test_padding_is_zero_and_never_nan(dtype: torch.dtype, causal: bool) -> None:
    """A row of nothing else, windows of nothing else, and padding that is named global."""
    case = make_case(AttentionPattern(3, causal=causal), batch=3, keys=150, slots=3, dtype=dtype)
    padding_BN = torch.zeros(3, 150, dtype=torch.bool)
    padding_BN[0] = True
    padding_BN[1, 20:] = True
    padding_BN[2, 64:130] = True
    case = with_masks(with_slots(case, [0, 1, 2], [5, 40], [3, 64]), padding_BN=padding_BN)
    found = case.run("fused")
    assert_right(found, right_of(case), LIMIT if dtype == F32 else 8 * torch.finfo(dtype).eps)
    for name in ("out", "dq_BNHD", "dk_BNHD", "dv_BNHD", "dk_global_BNHD", "dv_global_BNHD"):
        assert (found[name][padding_BN] == 0).all(), name
    assert (found["lse"][padding_BN] == math.inf).all()
    # Nor does what comes back to padding go any further.
    out, _ = case.forward("fused")
    direction = output_gradient(out)
    direction[padding_BN] = math.nan
    spoiled = torch.autograd.grad(out, list(case.floats.values()), direction)
    for name, x in zip(case.floats, spoiled, strict=True):
        assert torch.equal(found[f"d{name}"], x), name


# 16 bits


def plain_pytorch(case: Case, patch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The dense maths with every operation in the dtype of the inputs."""
    dtype = case.floats["q_BNHD"].dtype
    with patch.context() as within:
        in_dtype = functools.partial(reference_attention, compute_dtype=dtype)
        within.setattr(fused, "reference_attention", in_dtype)
        return case.run("reference")


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_error_in_16_bits(
    head_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most twice (gradients three times) what plain PyTorch loses in that dtype: at the worst
    number and on average.
    """
    masked = some_of_all(AttentionPattern(30, (1, 3)), head_size=head_size, seed=head_size)
    free = make_case(AttentionPattern(60), batch=1, head_size=head_size, keys=301, slots=2)
    for case in (masked.to(dtype), free.to(dtype)):
        found, right, plain = case.run("fused"), right_of(case), plain_pytorch(case, monkeypatch)
        for name, x in right.items():
            last_bit = (torch.finfo(F32) if name == "lse" else torch.finfo(dtype)).eps
            ours, theirs = (
                (y.double() - x).nan_to_num(posinf=0.0).abs() for y in (found[name], plain[name])
            )
            assert not found[name].isnan().any(), name
            assert torch.equal(found[name].isinf(), x.isinf()), name
            times = 2 if name in {"out", "lse"} else 3
            # Both may round every number right: then the last bit of the largest is the measure.
            least = last_bit / 2 * x.nan_to_num(posinf=0.0).abs().max().item()
            note(f"{name}, times plain PyTorch", ours.max() / max(theirs.max().item(), least))
            assert ours.max() <= times * max(theirs.max().item(), least), name
            assert ours.mean() <= times * max(theirs.mean().item(), least / 100), name


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_16_bits_over_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What both chunks at an edge find is added up before it is rounded."""
    case = make_case(AttentionPattern(70), batch=1, heads=1, head_size=8, keys=4300, slots=3)
    case = case.to(dtype)
    found, right = case.run("fused"), right_of(case)
    for name in ("out", "dq_BNHD", "dk_BNHD", "dv_BNHD"):
        error = (found[name].double() - right[name]).abs().flatten()
        assert error.max() <= 3 * torch.finfo(dtype).eps * right[name].abs().max()
        near = (found[name].double() - right[name])[0, 1990:2110].abs().mean()
        assert near <= 1.5 * error.mean(), name


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_results_are_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    """A mean of three values, of which only the division and the last step round anything."""
    v_BNHD = torch.randn(1, 3, 9, 128, generator=torch.Generator().manual_seed(0)).to(dtype)
    zero = torch.zeros_like(v_BNHD)
    out = sliding_attention(zero, zero, v_BNHD, AttentionPattern(2), backend="fused")
    right = v_BNHD.double().mean(dim=1, keepdim=True)
    half_a_bit = torch.finfo(dtype).eps / 2 * 2.0 ** right.abs().log2().floor()
    assert ((out.double() - right).abs() <= half_a_bit + EPS * v_BNHD.abs().max()).all()


# Dropout


def uniform_case(pattern: AttentionPattern, dtype: torch.dtype, **changes: Any) -> Case:
    """Queries are 0, so that all keys of a row weigh the same; keys and values are one-hot."""
    case = make_case(pattern, head_size=128, dtype=dtype, **changes)
    floats = {name: torch.zeros_like(x) for name, x in case.floats.items()}
    for name, x in floats.items():
        if not name.startswith("q"):
            tokens = torch.arange(x.shape[1])
            x[:, tokens, :, tokens % 128] = 1.0
    return replace(case, floats=leaves(floats))


def weight_by_weight(case: Case, backend: str) -> dict[str, Tensor]:
    """What each weight brings to the output; to dv, by one-hot gradients of the output; and to the
    gradient of its score, which is less where the weight is dropped.
    """
    queries = case.floats["q_BNHD"].shape[1]
    out, lse = case.forward(backend)
    one_hot = torch.eye(128, dtype=out.dtype)[:queries, None].expand_as(out)
    inputs = list(case.floats.values())
    forward = torch.autograd.grad(out, inputs, one_hot, retain_graph=True)
    scores = torch.autograd.grad(out, inputs, torch.ones_like(out))
    found = {"out": out.detach(), "lse": lse}
    for name, of_value, of_score in zip(case.floats, forward, scores, strict=True):
        if name.startswith("v"):
            found[name] = of_value
        elif name.startswith("q"):
            found[name] = of_score
    return found


UNIFORM = {
    "near": ((1, 3), {"keys": 128, "padding": True, "slots": 20, "documents": True}),
    "dilated": ((2, 50), {"keys": 128, "padding": True, "slots": 3}),
    "far": ((1, 3), {"batch": 1, "keys": 2300, "q_offset": 2190, "queries": 100}),
}


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("dilation", "changes"), UNIFORM.values(), ids=UNIFORM.keys())
def test_dropped_weights_are_those_of_the_reference(
    dilation: tuple[int, int], changes: dict[str, Any], dtype: torch.dtype
) -> None:
    """Every single one, forward and backward: no number is off by a quarter of a weight."""
    for dropout_p in (1 / 256, 0.1, 0.5, 255 / 256):
        pattern = AttentionPattern(20, dilation)
        case = uniform_case(pattern, dtype, dropout_p=dropout_p, **changes)
        if dropout_p == 0.5:
            extreme = torch.tensor([2**63 - 1, -(2**63)])[: len(case.masks["dropout_seed_B"])]
            case = with_masks(case, dropout_seed_B=extreme)
        found = weight_by_weight(case, "fused")
        right = weight_by_weight(case.to(F64), "reference")
        assert torch.allclose(found["lse"].double(), right["lse"], atol=1e-6)
        # A kept weight of each row: [B, H, N], and 0 where a row has none.
        weight = (-right["lse"]).exp().transpose(1, 2) * 256 / (256 - round(256 * dropout_p))
        for name, x in right.items():
            if name == "lse":
                continue
            error = (found[name].double() - x).abs().transpose(1, 2)
            if name.startswith("v"):  # [B, H, key, query]
                limit = pad(weight, (0, 128 - weight.shape[2]))[:, :, None]
            elif name == "q_global_BGHD":
                slot_BHG = case.masks[INDEX].long().clamp(min=0)[:, None].expand(-1, 2, -1)
                limit = 128**-0.5 * weight.gather(2, slot_BHG)[..., None]
            else:
                limit = (1.0 if name == "out" else 128**-0.5) * weight[..., None]
            is_near = bool((error <= 0.25 * limit).all())
            assert is_near, name


# Equal bits


MIXED = make_case(
    AttentionPattern(100, (1, 2, 3)), heads=3, head_size=33, keys=4300, padding=True, slots=20,
    dropout_p=0.1, dtype=F32,
)  # fmt: skip
each_dtype = pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=["fp32", "bf16", "fp16"])


@each_dtype
def test_threads_and_runs_change_no_bit(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    case, found = MIXED.to(dtype), []
    for number in (1, 2, 2, 3):
        threads(number)
        found.append(case.run("fused"))
    for other in found[1:]:
        assert_same_bits(other, found[0])


@each_dtype
def test_rows_alone_have_the_same_bits(dtype: torch.dtype) -> None:
    case = MIXED.to(dtype)
    out, lse = case.forward("fused")
    direction = output_gradient(out)
    both = torch.autograd.grad(out, list(case.floats.values()), direction)
    for row in range(2):
        alone = batch_rows(case, [row])
        its_out, its_lse = alone.forward("fused")
        assert torch.equal(its_out[0], out[row])
        assert torch.equal(its_lse[0], lse[row])
        found = torch.autograd.grad(its_out, list(alone.floats.values()), direction[row : row + 1])
        assert all(torch.equal(x[0], y[row]) for x, y in zip(found, both, strict=True))


def test_split_queries_are_the_whole() -> None:
    """Each part has its rows of q and all keys; gradients of the keys add up."""
    whole, wanted = MIXED.run("fused"), list(MIXED.floats.values())
    direction = output_gradient(whole["out"])
    parts, sums = [], [torch.zeros_like(x) for x in wanted]
    for start, stop in ((0, 1000), (1000, 1001), (1001, 4300)):
        q_BNHD = MIXED.floats["q_BNHD"][:, start:stop]
        parts.append(MIXED.forward("fused", q_BNHD=q_BNHD, q_offset=start))
        found = torch.autograd.grad(parts[-1][0], wanted, direction[:, start:stop])
        sums = [total + x for total, x in zip(sums, found, strict=True)]
    out, lse = (torch.cat(each, dim=1) for each in zip(*parts, strict=True))
    joined = {"out": out.detach(), "lse": lse}
    joined |= {f"d{name}": x for name, x in zip(MIXED.floats, sums, strict=True)}
    assert_equal_to(joined, whole, LIMIT)


def test_views_of_one_projection_are_read_in_place() -> None:
    qkv = torch.randn(2, 300, 3, 2, 40, generator=torch.Generator().manual_seed(0))
    views = dict(zip(("q_BNHD", "k_BNHD", "v_BNHD"), qkv.unbind(2), strict=True))
    gaps = {name: x.repeat_interleave(2, dim=-1)[..., ::2] for name, x in views.items()}
    found = []
    for floats, is_copied in ((views, False), (gaps, True)):
        case = Case(AttentionPattern(20), {name: x.requires_grad_() for name, x in floats.items()})
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            found.append(case.run("fused"))
        names = {event.name for event in seen.events()}
        assert "longpretrain::sliding_attention_fused_backward" in names
        assert ("aten::clone" in names) == is_copied
    assert_same_bits(*found)
    assert_same_bits(found[0], Case(AttentionPattern(20), leaves(views)).run("fused"))


def test_each_gradient_alone() -> None:
    case = some_of_all(AttentionPattern(9, (1, 2)), head_size=5, dtype=F32)
    right = case.run("fused")
    for name in case.floats:
        floats = {other: x.detach() for other, x in case.floats.items()}
        floats[name].requires_grad_()
        out, _ = replace(case, floats=floats).forward("fused")
        (found,) = torch.autograd.grad(out, [floats[name]], output_gradient(out))
        assert torch.equal(found, right[f"d{name}"]), name


# Large scores: where the softmax needs its running maximum


def scaled(case: Case, **factors: float | Tensor) -> Case:
    return replace(
        case, floats=leaves({k: x.detach() * factors.get(k, 1.0) for k, x in case.floats.items()})
    )


def of_scores(peak: float) -> float:
    """A weight is off by what its score is: a few roundings of the largest one."""
    return LIMIT + 4 * EPS * peak


def assert_lse(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    live = ~right["lse"].isinf()
    error = (found["lse"].double() - right["lse"])[live].abs()
    assert (error <= 8 * EPS * right["lse"][live].abs().clamp(min=1.0)).all()


@pytest.mark.parametrize("peak", [50, 300, 1e4])
@pytest.mark.parametrize("kind", ["plain", "masked"])
def test_large_scores(peak: float, kind: str) -> None:
    masks: dict[str, Any] = {}
    if kind == "masked":
        masks = {"padding": True, "slots": 3, "documents": True, "dropout_p": 0.2}
    case = make_case(AttentionPattern(40, (1, 2)), keys=300, seed=1, **masks)
    largest = max(
        (case.floats[q].norm(dim=-1).max() * case.floats[k].norm(dim=-1).max()).item() / 2
        for q, k in (("q_BNHD", "k_BNHD"), ("q_global_BGHD", "k_global_BNHD"))
        if q in case.floats
    )
    case = scaled(case, q_BNHD=peak / largest, q_global_BGHD=peak / largest)
    right, found = right_of(case.to(F32)), check(case, of_scores(peak))
    assert_lse(found, right)
    for name in ("out", "dq_BNHD", "dk_BNHD", "dv_BNHD"):
        error = (found[name].double() - right[name]).abs().max() / right[name].abs().max()
        note(f"{name}, of scale, in roundings of the largest score", error / (EPS / 2 * peak))


@pytest.mark.parametrize("peak", [1e6, 1e9, 1e14])
def test_absurd_scores_stay_finite(peak: float) -> None:
    """Float32 holds nothing of such a score's exponential but which one is the largest."""
    case = make_case(AttentionPattern(40, (1, 2)), keys=300, padding=True, slots=3)
    found = scaled(case, q_BNHD=peak, q_global_BGHD=-peak).to(F32).run("fused")
    assert not any(x.isnan().any() for x in found.values())
    largest = case.floats["v_BNHD"].abs().max(), case.floats["v_global_BNHD"].abs().max()
    assert found["out"].abs().max() <= 1.001 * max(largest)
    for name in ("dv_BNHD", "dv_global_BNHD"):
        assert found[name].abs().max() <= 300 * output_gradient(found["out"]).abs().max()
    assert all(x.isfinite().all() for name, x in found.items() if name != "lse")


@pytest.mark.parametrize("score", [-200, -88, -45, -42, -41, -20, 20, 27, 28, 38, 45, 88, 128, 200])
def test_all_scores_alike(score: float) -> None:
    """Around what sums of bare exponentials hold, of one key and of many."""
    for window in (0, 60):
        case = make_case(AttentionPattern(window), batch=1, keys=200, slots=2)
        case = scaled(case, v_BNHD=1e22) if window else case
        floats = {name: x.detach() for name, x in case.floats.items()}
        for name, x in floats.items():
            if not name.startswith("v"):
                x.mul_(0.01).add_(1.0 if name.startswith("q") else score / 4)
        case = with_masks(replace(case, floats=leaves(floats)), scale=1.0)
        assert_lse(check_cancelled(case, of_scores(abs(score))), right_of(case.to(F32)))


@pytest.mark.parametrize("where", ["q_BNHD", "k_BNHD", "q_global_BGHD", "k_global_BNHD"])
@pytest.mark.parametrize("row", [0, 2], ids=["first", "later"])
def test_one_outlier(where: str, row: int) -> None:
    """All of its tile, and all after it, go the other way; the numbers are the same."""
    case = make_case(AttentionPattern(40, (1, 2)), keys=300, slots=4, padding=True, seed=3)
    case = with_slots(case, [5, 200, 77, 150], [77, 3, 299, 0])
    factor = torch.ones_like(case.floats[where])
    factor[:, row if where == "q_global_BGHD" else 100 * row + 1] = 500.0
    check(scaled(case, **{where: factor}), of_scores(500 * 16 / 2))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "fp16"])
def test_large_scores_in_16_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(AttentionPattern(40), keys=300, head_size=16, slots=3, dropout_p=0.1)
    case = scaled(case, q_BNHD=30.0).to(dtype)
    found, right, plain = case.run("fused"), right_of(case), plain_pytorch(case, monkeypatch)
    for name, x in right.items():
        ours, theirs = ((y[name].double() - x).abs().max() for y in (found, plain))
        least = torch.finfo(dtype).eps * x.abs().max()
        assert ours <= 3 * max(theirs, least), name


@pytest.mark.parametrize("scale", [-1.3, 0.0, 1e-4, 20.0])
def test_any_scale(scale: float) -> None:
    case = make_case(AttentionPattern(20, (1, 2)), keys=150, slots=3, padding=True)
    found = check(with_masks(case, scale=scale), of_scores(abs(scale) * 16))
    if scale == 0.0:
        assert all((x == 0).all() for name, x in found.items() if name.startswith(("dq", "dk")))


def test_the_exponential() -> None:
    """A single key's log-sum-exp is its score: off by the exponential's relative error, of 3e-7 at
    most, and by roundings on both ways.
    """
    score_N = torch.linspace(-40.0, 44.0, 8001)
    one = torch.ones(1, 8001, 1, 1)
    q_BNHD = score_N.view_as(one)
    _, lse = sliding_attention(
        q_BNHD, one, one, AttentionPattern(0), scale=1.0, return_lse=True, backend="fused"
    )
    error = (lse.double().flatten() - score_N.double()).abs()
    note("log-sum-exp of one score below 1", error[score_N.abs() < 1].max())
    assert (error <= 3e-7 + EPS * (1 + score_N.abs())).all(), error.max()


# What is no number


SICK = make_case(AttentionPattern(10), batch=1, heads=1, keys=300, dtype=F32)


def reaches(n: int, window: int = 10) -> Tensor:
    return (torch.arange(300) - n).abs() <= window


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["q_BNHD", "k_BNHD"])
def test_no_finite_answer_to_infinite_scores(where: str, value: float) -> None:
    """Nor any harm to queries that do not reach them. A key of score -inf has a weight of 0."""
    spoilt = {name: x.detach().clone() for name, x in SICK.floats.items()}
    spoilt[where][0, 150, 0, 1] = value
    case = Case(SICK.pattern, leaves(spoilt))
    out, lse = (x.detach()[0, :, 0] for x in case.forward("fused"))
    right, right_lse = (x.detach()[0, :, 0] for x in case.to(F64).forward("reference"))
    assert torch.equal(out.isfinite(), right.isfinite())
    assert not right.isfinite().all()
    sound = right.isfinite().all(dim=-1)
    assert (out - right)[sound].abs().max() <= LIMIT
    assert (lse - right_lse)[sound].abs().max() <= LIMIT
    found = case.gradients(case.forward("fused")[0])
    if where == "q_BNHD":
        assert not found["dq_BNHD"][0, 150].isfinite().any()
        assert not found["dv_BNHD"][0, reaches(150)].isfinite().any()
    healthy, apart = SICK.run("fused"), ~reaches(150, 130)  # other tiles, other blocks
    for name in ("dq_BNHD", "dk_BNHD", "dv_BNHD"):
        error = (found[name] - healthy[name])[0, apart].abs().max()
        assert error <= LIMIT * healthy[name].abs().max(), name


def test_a_value_that_is_no_number_reaches_all_who_attend() -> None:
    """Neighbours may get it too: they multiply it by 0."""
    spoilt = {name: x.detach().clone() for name, x in SICK.floats.items()}
    spoilt["v_BNHD"][0, 150, 0, 1] = math.nan
    out, _ = Case(SICK.pattern, leaves(spoilt)).forward("fused")
    healthy, _ = SICK.forward("fused")
    assert out[0, reaches(150), 0, 1].isnan().all()
    assert torch.equal(out[..., [0, 2, 3]], healthy[..., [0, 2, 3]])
    assert torch.equal(out[:, :20], healthy[:, :20])


# Instruction sets, and memory: in processes of their own


def check_level() -> None:
    """Run by a child whose library uses another instruction set."""
    torch.set_num_threads(1)
    test_the_exponential()
    for head_size in (1, 33, 64, 127):
        test_head_sizes(head_size)
    test_chunks_meet(*LONG["dilated_causal"])
    test_chunks_meet(*LONG["dropout"])
    test_large_scores(300, "masked")
    test_all_scores_alike(-200)
    for dtype in (F32, BF16, F16):
        test_dropped_weights_are_those_of_the_reference(*UNIFORM["near"], dtype)
        test_padding_is_zero_and_never_nan(dtype, False)
    for dtype in (BF16, F16):
        with pytest.MonkeyPatch.context() as patch:
            test_error_in_16_bits(33, dtype, patch)
        test_results_are_rounded_to_the_nearest(dtype)
    for value in (math.nan, -math.inf):
        test_no_finite_answer_to_infinite_scores("q_BNHD", value)
        test_no_finite_answer_to_infinite_scores("k_BNHD", value)
    print(fused.kernel_facts()["used"])


@pytest.mark.parametrize("level", ["plain", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_that_runs_here(level: str) -> None:
    facts = fused.kernel_facts()
    if level == facts["used"]:
        pytest.skip("all other tests use it")
    if not all(level in facts[of].split(", ") for of in ("built", "machine")):
        pytest.skip(f"built: {facts['built']}; the processor runs: {facts['machine']}")
    code = "import test_attention_kernels as tests; tests.check_level()"
    done = run_python("-c", code, LONGPRETRAIN_CPU_LEVEL=level, PYTHONPATH=str(HERE))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == level


# The first call leaves behind what threads and torch's allocator keep.
MEMORY = """
import torch
from pathlib import Path
from longpretrain.attention import AttentionPattern, sliding_attention
torch.set_num_threads(2)

def megabytes(name):
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name)]
    return int(line.split()[1]) / 1024

def growth(tokens, dtype):
    x = [torch.ones(1, tokens, 4, 32, dtype=dtype) for _ in range(4)]
    [one.requires_grad_() for one in x[:3]]
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is there now
    before = megabytes("VmRSS")
    out = sliding_attention(*x[:3], AttentionPattern(512), backend="fused")
    torch.autograd.grad(out, x[:3], x[3])
    return megabytes("VmHWM") - before

growth(3000, torch.float32)
print(growth(16384, torch.bfloat16), growth(16384, torch.float32))
"""


def test_no_memory_of_tokens_times_window() -> None:
    """How much the largest resident size of a process grows by a forward and backward pass of
    16,384 tokens: by less than three times q, k and v and 16 MiB for the threads' scratch. (The
    weights of all windows alone would be 128 MiB in 16 bits.)
    """
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("the address sanitizer keeps freed memory")
    done = run_python("-c", MEMORY)
    if "clear_refs" in done.stderr:
        pytest.skip("this system cannot reset the peak of /proc/self/status")
    assert done.returncode == 0, done.stderr
    for found, itemsize in zip(map(float, done.stdout.split()), (2, 4), strict=True):
        note("MiB", found)
        assert found < 3 * (3 * 16384 * 4 * 32 * itemsize / 2**20) + 16
