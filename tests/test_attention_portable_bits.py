"""What changes no result of the portable backend: threads, company in a batch, how a sequence is
split. And that dropout draws what it should.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from attention_cases import Case, assert_equal_to, make_case, output_gradient
from torch import Tensor

from longpretrain.attention import AttentionPattern, sliding_attention


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
