"""The compiled kernels on all shapes of calls: lengths, windows, heads, global tokens, padding.

Lengths and windows lie around what the kernels cut by (csrc/cpu/plan.h, tile.h): 32 queries, 64 and
16 keys, chunks of 1,024 or 2,048 queries whose gradients meet at their edges.

Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from attention_cases import make_case, output_gradient
from kernel_cases import (
    BF16,
    EPS,
    F16,
    F32,
    F64,
    HEAD_SIZES,
    LIMIT,
    assert_right,
    check,
    check_cancelled,
    right_of,
    some_of_all,
    with_slots,
)
from operator_cases import with_masks
from test_attention_fused import assert_same_bits

from longpretrain.attention import AttentionPattern

pytestmark = pytest.mark.usefixtures("library")

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


@pytest.mark.parametrize("size", [1e4, 1e5, 2e9, -3e9, 1e12, 1e25, -2e37])
def test_scores_of_any_size(size: float) -> None:
    """Products are exact, so the greatest scores are equal to the last bit: their keys share the
    weight, and a scale's rounding must not blow that up or lose it. Of both kinds of queries.
    """
    case = make_case(AttentionPattern(70, (1, 2)), head_size=32, keys=300, slots=20, dtype=F32)
    for name, x in case.floats.items():
        if name.startswith(("q", "k")):
            with torch.no_grad():
                x.zero_()[..., 0] = (
                    size if name.startswith("q") else torch.randint(1, 5, x.shape[:3])
                )
    out, lse = case.forward("fused")
    right, right_lse = case.to(F64).forward("reference")
    assert (out - right).abs().max() <= LIMIT
    assert ((lse - right_lse).abs() <= LIMIT + 4 * EPS * right_lse.abs()).all()


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
