"""The operator on the CUDA kernels' source, run on the CPU by csrc/emulation: `make emulate`.

The library is the one named by LONGPRETRAIN_LIBRARY; with any other this folder is not collected.
The limits are those of the CPU's kernels. A case of a hundred tokens takes a tenth of a second.

Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import Case, make_case
from emulation.library import emulator
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    EPS,
    F32,
    F64,
    LIMIT,
    check,
    check_cancelled,
    each_dtype,
    in_16_bits,
    some_of_all,
)
from operator_cases import LAYOUTS, laid_out, operator_cases
from test_attention_bits import test_dropped_weights_are_those_of_the_reference as check_dropout
from test_attention_fused import assert_same_bits
from test_attention_kernels import test_scores_of_any_size as check_scores
from test_attention_rounding import test_error_in_16_bits as check_16_bits
from test_properties_attention import assert_equals_reference
from torch.nn.functional import pad

from longpretrain.attention import AttentionPattern, sliding_attention
from longpretrain.attention.fused import kernel_facts

HEAD_SIZES = [32, 64, 128]
each_head_size = pytest.mark.parametrize("head_size", HEAD_SIZES)
BOTH = AttentionPattern(40, (1, 3))
FEATURES: dict[str, tuple[AttentionPattern, dict[str, Any]]] = {
    "plain": (AttentionPattern(40), {}),
    "whole": (AttentionPattern(200), {"slots": 2}),
    "dilation": (AttentionPattern(20, (2, 5)), {"slots": 3}),
    "causal": (replace(BOTH, causal=True), {"slots": 3, "dropout_p": 0.1}),
    "padding": (BOTH, {"padding": True, "slots": 3}),
    "documents": (BOTH, {"documents": True, "slots": 3}),
    "many slots": (BOTH, {"slots": 40, "padding": True}),
    "shared projections": (BOTH, {"slots": 3, "own_projections": False}),
    "part of a sequence": (BOTH, {"q_offset": 70, "queries": 50, "slots": 5, "padding": True}),
    "all": (BOTH, {"padding": True, "slots": 5, "documents": True, "dropout_p": 0.2}),
}


@pytest.fixture
def schedule() -> Iterator[Any]:
    """Sets the order in which the emulator runs threads and blocks: a seed, 0 in order."""
    yield emulator().set_seed
    emulator().set_seed(0)


def test_it_is_the_emulated_library() -> None:
    assert kernel_facts()["cuda"] == "emulated"


@pytest.mark.parametrize(("pattern", "changes"), FEATURES.values(), ids=FEATURES.keys())
def test_features(pattern: AttentionPattern, changes: dict[str, Any]) -> None:
    check(make_case(pattern, head_size=64, **{"keys": 150, **changes}))


def test_a_window_of_one_key() -> None:
    check_cancelled(make_case(AttentionPattern(0), head_size=64, keys=150, padding=True))


@each_head_size
def test_head_sizes(head_size: int) -> None:
    check(some_of_all(AttentionPattern(30, (1, 3)), head_size=head_size, seed=head_size))


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300])
def test_lengths(tokens: int) -> None:
    pattern = AttentionPattern(20, (1, 2))
    case = make_case(pattern, batch=1, head_size=32, keys=tokens, slots=1, dropout_p=0.1)
    (check_cancelled if tokens == 1 else check)(case)


@in_16_bits
@each_head_size
def test_error_in_16_bits(
    head_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_16_bits(head_size, dtype, monkeypatch)


@pytest.mark.parametrize("size", [1e4, 2e9, -3e9, 1e25, -2e37])
def test_scores_of_any_size(size: float) -> None:
    check_scores(size)


@pytest.mark.parametrize("size", [1e6, 1e7, -1e7])
def test_large_scores_that_differ_by_little(size: float) -> None:
    """Products are exact; scaled, they would be rounded by up to half of a step between them. Rows
    of global tokens have keys in three chunks, to be brought to one greatest score.
    """
    case = make_case(BOTH, head_size=32, keys=300, slots=20, dtype=F32)
    for name, x in case.floats.items():
        if name.startswith(("q", "k")):
            number = 4.0 if name.startswith("q") else size - torch.randint(8, x.shape[:3])
            with torch.no_grad():
                x.zero_()[..., 0] = number
    out, lse = case.forward("fused")
    right, right_lse = case.to(F64).forward("reference")
    assert (out - right).abs().max() <= LIMIT
    assert ((lse - right_lse).abs() <= 4 * EPS * right_lse.abs()).all()


@each_dtype
def test_dropout_draws_the_bits_of_the_reference(dtype: torch.dtype) -> None:
    changes = {"keys": 128, "padding": True, "slots": 20, "documents": True}
    check_dropout((1, 3), changes, dtype)


@each_dtype
def test_no_order_of_threads_changes_a_bit(dtype: torch.dtype, schedule: Any) -> None:
    case = some_of_all(AttentionPattern(30, (1, 3)), head_size=64, dtype=dtype)
    schedule(0)
    right = case.run("fused")
    for seed in (1, 2):
        schedule(seed)
        assert_same_bits(case.run("fused"), right)


def to_head_size(case: Case, head_size: int) -> Case:
    """Numbers that the kernels do not know the count of are followed by zeros; the same scores."""
    own = case.floats["q_BNHD"].shape[3]
    floats = {k: pad(x.detach(), (0, head_size - own)) for k, x in case.floats.items()}
    masks = {**case.masks, "scale": case.masks.get("scale") or own**-0.5}
    return replace(case, floats={k: x.requires_grad_() for k, x in floats.items()}, masks=masks)


@settings(max_examples=100)
@given(
    case=operator_cases(max_keys=100),
    layout=st.sampled_from(LAYOUTS),
    head_size=st.sampled_from(HEAD_SIZES),
)
def test_fused_equals_reference(case: Case, layout: str, head_size: int) -> None:
    assert_equals_reference(to_head_size(case, head_size), "fused", F32, layout)


@settings(max_examples=30)
@given(case=operator_cases(max_keys=60), layout=st.sampled_from(LAYOUTS))
def test_layouts_change_no_bit(case: Case, layout: str) -> None:
    """Rows that are not aligned, expanded or permuted are copied first."""
    case = to_head_size(case, 32).to(torch.bfloat16)
    strided = replace(case, floats=laid_out(case.floats, layout))
    whole = replace(
        case,
        floats={k: x.detach().contiguous().requires_grad_() for k, x in strided.floats.items()},
    )
    assert_same_bits(strided.run("fused"), whole.run("fused"))


@pytest.mark.parametrize("head_size", [16, 48, 96])
def test_other_head_sizes_are_for_the_portable_backend(head_size: int) -> None:
    case = make_case(AttentionPattern(5), head_size=head_size, keys=20, dtype=F32)
    with pytest.raises(
        ValueError, match=f"the CUDA kernels take heads of 32, 64, 128, not {head_size}"
    ):
        case.run("fused")
    out, lse = case.forward("auto")
    assert torch.equal(out, case.forward("portable")[0]) and lse.isfinite().all()


def test_no_room_for_scratch_memory() -> None:
    """Partial results of very many slots, none of which is in use."""
    q = torch.zeros(128).expand(1, 1, 60_000, 128)
    index_BG = torch.full((1, 1 << 22), -1)
    own = torch.zeros(128).expand(1, 1 << 22, 60_000, 128)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"forward pass\): got no room for scratch memory, 119\.0 TiB"
    ):
        sliding_attention(
            q, q, q, AttentionPattern(1), global_index_BG=index_BG, q_global_BGHD=own,
            backend="fused",
        )  # fmt: skip


def test_an_empty_batch() -> None:
    q = torch.zeros(0, 5, 2, 32)
    assert sliding_attention(q, q, q, AttentionPattern(2), backend="fused").shape == q.shape
