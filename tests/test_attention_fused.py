"""The public operator: what it refuses, which backend it picks, and how it lives with the rest of
PyTorch. How the compiled library is loaded: test_attention_library.py; what guards it:
test_attention_seam.py; derivatives: test_attention_gradient.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import Case, assert_equal_to, make_case, output_gradient
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from longpretrain.attention import AttentionPattern, backends, sliding_attention

CASES = {
    "window_only": make_case(AttentionPattern(5), keys=70),
    "masks": make_case(AttentionPattern(5, causal=True), keys=70, padding=True, documents=True),
    "everything": make_case(
        AttentionPattern(4, (1, 3)),
        keys=70,
        q_offset=6,
        padding=True,
        slots=3,
        documents=True,
        dropout_p=0.2,
    ),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def suited(case: Case, backend: str) -> Case:
    """In the widest dtype that the backend knows."""
    return case.to(torch.float32) if backend == "fused" else case


def assert_same_bits(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert found.keys() == right.keys()
    for name, x in right.items():
        assert torch.equal(found[name], x), name


def good() -> dict[str, Any]:
    """Arguments that pass: 2 rows, 10 queries from position 2 on, 12 keys, 3 heads of size 4."""
    return {
        "q_BNHD": torch.zeros(2, 10, 3, 4),
        "k_BNHD": torch.zeros(2, 12, 3, 4),
        "v_BNHD": torch.zeros(2, 12, 3, 4),
        "pattern": AttentionPattern(2, (1, 1, 2)),
        "q_offset": 2,
        "padding_BN": torch.zeros(2, 12, dtype=torch.bool),
        "global_index_BG": torch.tensor([[0, 11], [5, -1]], dtype=torch.int32),
        "q_global_BGHD": torch.zeros(2, 2, 3, 4),
        "k_global_BNHD": torch.zeros(2, 12, 3, 4),
        "v_global_BNHD": torch.zeros(2, 12, 3, 4),
        "document_BN": torch.zeros(2, 12, dtype=torch.int32),
        "dropout_p": 0.1,
        "dropout_seed_B": torch.zeros(2, dtype=torch.int64),
    }


@pytest.mark.parametrize("backend", ["auto", "portable", "reference"])
def test_the_good_arguments_pass(backend: str) -> None:
    out = sliding_attention(**good(), backend=backend)
    assert out.shape == (2, 10, 3, 4)
    assert out.is_contiguous()


INDEX = torch.int32
BAD = {
    "q_dimensions": ({"q_BNHD": torch.zeros(2, 10, 12)}, r"q and k: got shapes \[2, 10, 12\]"),
    "no_tokens": ({"q_BNHD": torch.zeros(2, 0, 3, 4)}, r"all but the batch at least 1"),
    "k_heads": (
        {"k_BNHD": torch.zeros(2, 12, 2, 4)},
        r"k: got float32 \[2, 12, 2, 4\] on cpu; wanted float32 \[2, 12, 3, 4\]",
    ),
    "v_dtype": ({"v_BNHD": torch.zeros(2, 12, 3, 4).half()}, r"v: got float16 .* wanted float32"),
    "v_device": ({"v_BNHD": torch.zeros(2, 12, 3, 4, device="meta")}, r"v: got .* on meta"),
    "integers": ({"q_BNHD": torch.zeros(2, 10, 3, 4, dtype=torch.int64)}, r"q: got int64"),
    "dilations": ({"pattern": AttentionPattern(2, (1, 2))}, r"dilation: got 2 numbers for 3 heads"),
    "no_tensor": ({"q_BNHD": [1.0, 2.0]}, r"q: got list; wanted a tensor"),
    "nothing": ({"k_BNHD": None}, r"k: got None; wanted a tensor"),
    "no_mask": ({"padding_BN": [True]}, r"padding_BN: got list; wanted a tensor or None"),
    "no_pattern": ({"pattern": 2}, r"pattern: got int; wanted an AttentionPattern"),
    "sparse": ({"q_BNHD": torch.zeros(2, 10, 3, 4).to_sparse()}, r"q: got sparse_coo float32"),
    "batch": (
        {"v_BNHD": torch.zeros(3, 12, 3, 4)},
        r"v: got float32 \[3, 12, 3, 4\] on cpu; wanted float32 \[2, 12, 3, 4\]",
    ),
    "head_size": (
        {"k_BNHD": torch.zeros(2, 12, 3, 5)},
        r"k: got float32 \[2, 12, 3, 5\] on cpu; wanted float32 \[2, 12, 3, 4\]",
    ),
    "offset": ({"q_offset": 3}, r"q_offset: got 3 with 10 queries and 12 keys; wanted 0 to 2"),
    "broken_offset": ({"q_offset": 0.5}, r"q_offset: got 0.5"),
    "negative_offset": ({"q_offset": -1}, r"q_offset: got -1"),
    "padding_length": (
        {"padding_BN": torch.zeros(2, 10, dtype=torch.bool)},
        r"padding_BN: got bool \[2, 10\] on cpu; wanted bool \[2, 12\]",
    ),
    "padding_dtype": ({"padding_BN": torch.zeros(2, 12)}, r"padding_BN: got float32"),
    "index_rows": ({"global_index_BG": torch.zeros(1, 2, dtype=INDEX)}, r"global_index_BG: got"),
    "index_dimensions": ({"global_index_BG": torch.zeros(2, dtype=INDEX)}, r"global_index_BG: got"),
    "index_too_high": (
        {"global_index_BG": torch.tensor([[0, 12], [5, -1]], dtype=INDEX)},
        r"global_index_BG: got values from 0 to 12; wanted positions from 0 to 11",
    ),
    "index_too_low": (
        {"global_index_BG": torch.tensor([[0, 1], [5, -2]], dtype=INDEX)},
        r"global_index_BG: got values from -2",
    ),
    "index_twice": (
        {"global_index_BG": torch.tensor([[0, 1], [5, 5]], dtype=INDEX)},
        r"global_index_BG: got position 5 twice",
    ),
    "q_global_slots": (
        {"q_global_BGHD": torch.zeros(2, 3, 3, 4)},
        r"q_global: got float32 \[2, 3, 3, 4\] on cpu; wanted float32 \[2, 2, 3, 4\]",
    ),
    "projections_alone": ({"global_index_BG": None}, r"global projections: got 3 of"),
    "document_falls": (
        {"document_BN": torch.arange(12, dtype=INDEX).flip(0).repeat(2, 1)},
        r"document_BN: got a smaller number after token 0 of row 0",
    ),
    "p_too_high": ({"dropout_p": 0.999}, r"dropout_p: got 0.999"),
    "p_negative": ({"dropout_p": -0.1}, r"dropout_p: got -0.1"),
    "p_nan": ({"dropout_p": float("nan")}, r"dropout_p: got nan"),
    "p_text": ({"dropout_p": "much"}, r"dropout_p: got 'much'"),
    "p_huge": ({"dropout_p": 10**5000}, r"dropout_p: got an integer of 16610 bits"),
    "p_tensor": ({"dropout_p": torch.tensor(0.1)}, r"dropout_p: got a tensor"),
    "p_none": ({"dropout_p": None}, r"dropout_p: got None"),
    "scale_nan": ({"scale": float("nan")}, r"scale: got nan; wanted a number"),
    "scale_beyond_float32": ({"scale": 1e39}, r"scale: got 1e\+39; .* from -3.4e\+38 to 3.4e\+38"),
    "scale_huge": ({"scale": 10**400}, r"scale: got an integer of 1329 bits; wanted a number"),
    "scale_parameter": (
        {"scale": torch.nn.Parameter(torch.ones(()))},
        r"scale: got a tensor \(Parameter\); wanted a number .* Multiply the queries",
    ),
    "scale_text": ({"scale": "1"}, r"scale: got '1'"),
    "no_seed": ({"dropout_seed_B": None}, r"dropout_seed_B: got none with dropout_p=0.1"),
    "seed_dtype": ({"dropout_seed_B": torch.zeros(2)}, r"dropout_seed_B: got float32"),
    "backend": ({"backend": "quick"}, r"backend: got 'quick'; wanted auto or fused"),
    "backend_list": ({"backend": ["fused"]}, r"backend: got \['fused'\]; wanted auto or fused"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sliding_attention(**(good() | change))


def test_too_many_heads_for_the_counter() -> None:
    x = torch.zeros(1, 1, 1 << 16, 1)
    with pytest.raises(ValueError, match="heads: got 65536"):
        sliding_attention(x, x, x, AttentionPattern(1))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_too_many_keys(backend: str, device: str) -> None:
    """All one number in memory."""
    x = torch.zeros(1, 1, 1, 1, device=device).expand(1, 2**29 + 1, 1, 1)
    with pytest.raises(ValueError, match=r"keys: got 536870913; wanted at most 2\*\*29"):
        sliding_attention(x[:, :1], x, x, AttentionPattern(1), backend=backend)


def test_float64_takes_any_scale_of_its_own() -> None:
    x = torch.zeros(1, 3, 1, 2, dtype=torch.float64)
    assert (sliding_attention(x, x, x, AttentionPattern(1), scale=1e39) == 0).all()


def test_dropout_that_rounds_to_nothing_needs_no_seed() -> None:
    arguments = good() | {"dropout_p": 0.001, "dropout_seed_B": None}
    assert torch.equal(
        sliding_attention(**arguments), sliding_attention(**(arguments | {"dropout_p": 0.0}))
    )


def test_no_slots_are_no_global_tokens() -> None:
    case = CASES["masks"]
    empty = torch.zeros(2, 0, dtype=torch.int32)
    assert torch.equal(case.forward(global_index_BG=empty)[0], case.forward()[0])


def test_int64_index_and_documents_are_as_good() -> None:
    case = CASES["everything"]
    wider = {name: case.masks[name].long() for name in ("global_index_BG", "document_BN")}
    assert torch.equal(case.forward(**wider)[0], case.forward()[0])


def test_default_scale() -> None:
    case = CASES["window_only"]
    assert torch.equal(case.forward(scale=0.5)[0], case.forward()[0])  # D = 4
    assert not torch.equal(case.forward(scale=1.0)[0], case.forward()[0])


def operands(case: Case, **changes: Any) -> tuple[Any, ...]:
    """What the operators below the checks are called with."""
    values = case.floats | case.masks
    names = ("q_BNHD", "k_BNHD", "v_BNHD", "q_global_BGHD", "k_global_BNHD", "v_global_BNHD")
    masks = ("padding_BN", "document_BN", "global_index_BG", "dropout_seed_B")
    given = {name: values.get(name) for name in names + masks}
    for name in ("document_BN", "global_index_BG"):
        given[name] = None if given[name] is None else given[name].long()
    given |= {
        "one_sided_window": case.pattern.one_sided_window,
        "dilation_of_heads": list(case.pattern.dilation_of_heads(2)),
        "causal": case.pattern.causal,
        "drop_below": round(256 * values.get("dropout_p", 0.0)),
        "scale": 0.5,
        "q_offset": values["q_offset"],
    }
    return tuple((given | changes).values())


@each_case
def test_opcheck(case: Case, backend: str) -> None:
    operator = getattr(torch.ops.longpretrain, f"sliding_attention_{backend}").default
    torch.library.opcheck(operator, operands(suited(case, backend)))


@each_case
def test_opcheck_of_the_backward(case: Case, backend: str) -> None:
    forward = getattr(torch.ops.longpretrain, f"sliding_attention_{backend}")
    backward = getattr(torch.ops.longpretrain, f"sliding_attention_{backend}_backward").default
    given = operands(suited(case, backend))
    inputs = tuple(x.detach() if isinstance(x, Tensor) else x for x in given)
    out, lse = forward(*inputs)
    torch.library.opcheck(backward, (torch.ones_like(out), out, lse, *inputs))


@each_case
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_into_one_graph(case: Case, backend: str, dynamic: bool) -> None:
    torch.compiler.reset()
    case = suited(case, backend)
    names = list(case.floats)

    @torch.compile(backend="aot_eager", fullgraph=True, dynamic=dynamic)
    def compiled(*floats: Tensor) -> tuple[Tensor, Tensor]:
        named = dict(zip(names, floats, strict=True))
        return sliding_attention(**named, **case.masks, pattern=case.pattern, return_lse=True)

    out, lse = compiled(*case.floats.values())
    found = {"out": out.detach(), "lse": lse} | case.gradients(out)
    assert_same_bits(found, case.run(backend))


@each_case
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved", "reentrant"])
def test_checkpointing_changes_nothing(case: Case, backend: str, use_reentrant: bool) -> None:
    case = suited(case, backend)

    def forward(*floats: Tensor) -> Tensor:
        named = dict(zip(case.floats, floats, strict=True))
        return Case(case.pattern, named, case.masks).forward(backend)[0]

    floats = {name: x.detach().requires_grad_() for name, x in case.floats.items()}
    out = checkpoint(forward, *floats.values(), use_reentrant=use_reentrant)
    out.backward(output_gradient(out))  # the reentrant kind knows no torch.autograd.grad
    plain = case.run(backend)
    for name, x in floats.items():
        assert x.grad is not None
        assert torch.equal(x.grad, plain[f"d{name}"]), name


@each_case
def test_backward_twice_over_one_graph(case: Case, backend: str) -> None:
    case = suited(case, backend)
    out, _ = case.forward(backend)
    leaves, ones = list(case.floats.values()), torch.ones_like(out)
    first, second = (torch.autograd.grad(out, leaves, ones, retain_graph=True) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", ["auto", "portable", "reference"])
def test_autocast_casts_and_computes_in_float32(backend: str) -> None:
    case = CASES["everything"].to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = case.forward(backend)
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    low = case.to(torch.bfloat16)
    plain = low.run(backend)
    assert torch.equal(out, plain["out"])
    for name, x in case.gradients(out).items():
        assert x.dtype == torch.float32
        assert torch.equal(x, plain[name].float()), name


def test_autocast_leaves_float64_alone() -> None:
    case = CASES["window_only"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert case.forward()[0].dtype == torch.float64


@each_case
def test_lse_is_not_differentiable_and_outputs_are_fresh(case: Case, backend: str) -> None:
    case = suited(case, backend)
    out, lse = case.forward(backend)
    assert out.requires_grad
    assert not lse.requires_grad
    inputs = {x.untyped_storage().data_ptr() for x in case.floats.values()}
    assert out.untyped_storage().data_ptr() not in inputs


def test_frozen_inputs_get_no_gradient(backend: str) -> None:
    case = suited(CASES["everything"], backend)
    floats = {k: x.detach() for k, x in case.floats.items()}
    floats["q_BNHD"].requires_grad_()
    out, _ = Case(case.pattern, floats, case.masks).forward(backend)
    out.sum().backward()
    assert floats["q_BNHD"].grad is not None
    assert all(x.grad is None for name, x in floats.items() if name != "q_BNHD")


def test_default_projections_are_the_ordinary_ones() -> None:
    case = make_case(AttentionPattern(3), keys=30, slots=3, own_projections=False)
    row_BG = case.masks["global_index_BG"].long().clamp(min=0)
    q_global = case.floats["q_BNHD"][torch.arange(2)[:, None], row_BG]
    given = case.run(
        q_global_BGHD=q_global,
        k_global_BNHD=case.floats["k_BNHD"],
        v_global_BNHD=case.floats["v_BNHD"],
    )
    assert_equal_to(case.run(), given, 1e-14)


@pytest.mark.parametrize("backend", ["auto", "portable", "reference"])
def test_a_batch_of_no_rows(backend: str) -> None:
    arguments = good()
    for name, x in arguments.items():
        if isinstance(x, Tensor):
            arguments[name] = x[:0].requires_grad_(x.is_floating_point())
    out, lse = sliding_attention(**arguments, backend=backend, return_lse=True)
    assert (out.shape, lse.shape) == ((0, 10, 3, 4), (0, 10, 3))
    out.sum().backward()
    assert arguments["k_BNHD"].grad.shape == (0, 12, 3, 4)


def test_shapes_without_numbers(backend: str) -> None:
    case = CASES["everything"].to(torch.bfloat16)
    with FakeTensorMode() as mode:
        floats = {k: mode.from_tensor(x) for k, x in case.floats.items()}
        masks = {
            k: mode.from_tensor(x) if isinstance(x, Tensor) else x for k, x in case.masks.items()
        }
        fake = Case(case.pattern, floats, masks).run(backend)
    for name, x in case.run(backend).items():
        assert (fake[name].shape, fake[name].dtype) == (x.shape, x.dtype), name
        assert fake[name].stride() == x.stride(), name
    x = torch.zeros(2, 100, 3, 8, device="meta", dtype=torch.bfloat16)
    out, lse = sliding_attention(x, x, x, AttentionPattern(4), return_lse=True, backend=backend)
    assert (out.shape, out.dtype) == (x.shape, torch.bfloat16)
    assert (lse.shape, lse.dtype) == ((2, 100, 3), torch.float32)
