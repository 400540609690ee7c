"""The seam between PyTorch and the compiled kernels: dispatch, guards, and how the fused backend
lives with layouts, torch.compile, threads and forks. Loading: test_attention_library.py.

Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

import logging
import sysconfig
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_attention_fused as operator_tests
import torch
from attention_cases import Case, assert_equal_to, make_case, output_gradient
from test_attention_fused import assert_same_bits, operands
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.data import DataLoader, Dataset

from longpretrain.attention import AttentionPattern, backends, library, sliding_attention
from longpretrain.model.encoder import Layer, ModelConfig

F32 = torch.float32
CASES = {name: case.to(F32) for name, case in operator_tests.CASES.items()}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
needs_library = pytest.mark.usefixtures("library")


# Which backend


BEYOND = {
    "float64": ({"dtype": torch.float64}, "float32, bfloat16 and float16, not float64"),
    "head_size": ({"head_size": 1000}, r"heads of up to \d+, not 1000"),
}


@needs_library
@pytest.mark.parametrize(("changes", "reason"), BEYOND.values(), ids=BEYOND.keys())
def test_what_the_kernels_cannot_take(
    changes: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    case = make_case(AttentionPattern(2), **({"keys": 9, "dtype": F32} | changes))
    backends._announce_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="longpretrain.attention"):
        for _ in range(2):
            assert_same_bits(case.run("auto"), case.run("portable"))
    (record,) = caplog.records
    assert record.message.startswith("attention runs on the portable backend: the compiled kernels")
    with pytest.raises(ValueError, match=f"backend: got 'fused', but the compiled .* {reason}"):
        case.forward("fused")


@needs_library
def test_cuda_tensors_without_cuda_kernels_are_for_the_portable_backend() -> None:
    if library.kernel_facts()["cuda"] != "none":
        pytest.skip("this library has CUDA kernels")
    with FakeTensorMode():
        x = torch.empty(1, 8, 2, 32, device="cuda")
        assert sliding_attention(x, x, x, AttentionPattern(2)).device.type == "cuda"
        with pytest.raises(ValueError, match=r"no CUDA kernels: .*LONGPRETRAIN_CUDA=1"):
            sliding_attention(x, x, x, AttentionPattern(2), backend="fused")


@needs_library
def test_other_devices_are_for_the_portable_backend() -> None:
    with FakeTensorMode():
        x = torch.empty(1, 8, 2, 32, device="xpu")
        assert sliding_attention(x, x, x, AttentionPattern(2)).device.type == "xpu"
        with pytest.raises(ValueError, match="run on the CPU and on CUDA, not on xpu"):
            sliding_attention(x, x, x, AttentionPattern(2), backend="fused")


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_auto_is_fused_and_right(dtype: torch.dtype) -> None:
    """That the operands arrive in their places; the kernels' numbers have tests of their own."""
    for case in (case.to(dtype) for case in CASES.values()):
        found = case.run("auto")
        assert_same_bits(found, case.run("fused"))
        tolerance = 1e-5 if dtype == F32 else 8 * torch.finfo(dtype).eps
        assert_equal_to(found, case.to(torch.float64).run("reference"), tolerance)


# What C++ refuses, should it ever be called around the checks: memory would be at stake.


def index(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


GUARDED = {
    "q_dimensions": {"q_BNHD": torch.zeros(2, 64, 8)},
    "no_tokens": {"q_BNHD": torch.zeros(2, 0, 2, 4)},
    "dtype": {"q_BNHD": torch.zeros(2, 64, 2, 4, dtype=torch.float64)},
    "mixed_dtypes": {"v_BNHD": torch.zeros(2, 70, 2, 4).half()},
    "heads": {"k_BNHD": torch.zeros(2, 70, 3, 4)},
    "batch": {"v_BNHD": torch.zeros(3, 70, 2, 4)},
    "head_size": {"q_BNHD": torch.zeros(2, 64, 2, 1000)},
    "missing_projection": {"q_global_BGHD": None},
    "slots": {"q_global_BGHD": torch.zeros(2, 4, 2, 4)},
    "padding_length": {"padding_BN": torch.zeros(2, 64, dtype=torch.bool)},
    "padding_dtype": {"padding_BN": torch.zeros(2, 70)},
    "index_too_high": {"global_index_BG": index([0, 1, 70], [0, 1, 2])},
    "index_too_low": {"global_index_BG": index([0, 1, 2], [0, 1, -2])},
    "index_twice": {"global_index_BG": index([0, 1, 2], [5, -1, 5])},
    "index_dtype": {"global_index_BG": index([0, 1, 2], [0, 1, 2]).int()},
    "documents_fall": {"document_BN": torch.arange(70).flip(0).repeat(2, 1)},
    "no_seeds": {"dropout_seed_B": None},
    "seeds": {"dropout_seed_B": torch.zeros(3, dtype=torch.int64)},
    "window": {"one_sided_window": -1},
    "huge_window": {"one_sided_window": 2**40},
    "dilations": {"dilation_of_heads": [1]},
    "dilation": {"dilation_of_heads": [1, 0]},
    "dropout": {"drop_below": 256},
    "offset": {"q_offset": 7},
}


@needs_library
@pytest.mark.parametrize("changes", GUARDED.values(), ids=GUARDED.keys())
def test_cpp_refuses_what_would_touch_foreign_memory(changes: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=r"bindings\.cpp"):
        torch.ops.longpretrain.sliding_attention_fused(*operands(CASES["everything"], **changes))


@needs_library
def test_a_bad_index_under_compile_is_an_error_too() -> None:
    """There nothing reads values before the operator runs."""
    torch.compiler.reset()
    compiled = torch.compile(sliding_attention, backend="aot_eager", fullgraph=True)
    x = torch.ones(1, 5, 1, 2)
    with pytest.raises(RuntimeError, match="global_index_BG names a position out of range"):
        compiled(x, x, x, AttentionPattern(1), global_index_BG=index([0, 5]), backend="fused")


# Layouts


@needs_library
def test_strides_of_one_element_are_never_taken() -> None:
    """Torch lets them be anything: after a slice, of a view, out of other libraries."""
    pattern = AttentionPattern(2)
    case = make_case(pattern, batch=1, heads=1, queries=1, keys=9, head_size=32, dtype=F32)
    q, k = case.floats["q_BNHD"].detach(), case.floats["k_BNHD"].detach()
    odd_q = q.as_strided(q.shape, (2**60 + 1, 2**59 + 3, 7, 1))
    odd_k = k.as_strided(k.shape, (2**60 + 1, 32, 5, 1))
    floats = {name: (odd_q if name == "q_BNHD" else odd_k) for name in ("q_BNHD", "k_BNHD")}
    strided = Case(pattern, {"v_BNHD": odd_k} | floats, {}).forward("fused")
    plain = Case(pattern, {"q_BNHD": q, "k_BNHD": k, "v_BNHD": k}, {}).forward("fused")
    assert all(torch.equal(x, y) for x, y in zip(strided, plain, strict=True))


@needs_library
def test_more_rows_or_slots_than_kernels_count() -> None:
    """All one row in memory."""
    x = torch.zeros(32).expand(1, 3, 1, 32)
    rows = torch.zeros(32).expand(2**31, 3, 1, 32)
    calls = {
        "too many rows in the batch: got 2147483648, wanted at most 2147483647": {
            "q_BNHD": rows, "k_BNHD": rows, "v_BNHD": rows,
        },
        "too many slots of global tokens: got 536870913, wanted at most 536870912": {
            "q_BNHD": x, "k_BNHD": x, "v_BNHD": x,
            "global_index_BG": torch.zeros(1, 1, dtype=torch.int64).expand(1, 2**29 + 1),
            "q_global_BGHD": torch.zeros(32).expand(1, 2**29 + 1, 1, 32),
            "k_global_BNHD": x, "v_global_BNHD": x,
        },
    }  # fmt: skip
    names = ("q_BNHD", "k_BNHD", "v_BNHD", "q_global_BGHD", "k_global_BNHD", "v_global_BNHD")
    for reason, given in calls.items():
        tensors = [given.get(name) for name in (*names, "padding", "document", "global_index_BG")]
        with pytest.raises(RuntimeError, match=reason):
            torch.ops.longpretrain.sliding_attention_fused(*tensors, None, 1, [1], False, 0, 1.0, 0)


@needs_library
@each_case
@pytest.mark.parametrize("layout", ["side_by_side", "one_row_for_all", "gaps", "heads_first"])
def test_strides_change_nothing_and_inputs_stay(case: Case, layout: str) -> None:
    def lay_out(x: Tensor) -> Tensor:
        match layout:
            case "side_by_side":  # as views of one projection
                return torch.cat([x, x, x], dim=-1).chunk(3, dim=-1)[1]
            case "one_row_for_all":
                return x[:1].expand_as(x)
            case "gaps":
                return x.repeat_interleave(2, dim=-1)[..., ::2]
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    floats = {name: lay_out(x.detach()).requires_grad_() for name, x in case.floats.items()}
    plain = {name: x.detach().clone().requires_grad_() for name, x in floats.items()}
    masks = {
        name: torch.stack([x, x], dim=-1)[..., 0] if isinstance(x, Tensor) else x
        for name, x in case.masks.items()
    }
    before = {name: x.detach().clone() for name, x in floats.items()}
    found = Case(case.pattern, floats, masks).run("fused")
    assert_same_bits(found, Case(case.pattern, plain, case.masks).run("fused"))
    assert_same_bits({k: x.detach() for k, x in floats.items()}, before)
    assert all(x.is_contiguous() for x in found.values())


@needs_library
@each_case
def test_any_strides_of_the_gradient(case: Case) -> None:
    """That of a sum is one number seen everywhere; that of a transposed output is transposed."""
    out, _ = case.forward("fused")
    leaves = list(case.floats.values())
    transposed = torch.linspace(-1, 1, out.numel()).view_as(out.transpose(1, 3)).transpose(1, 3)
    for gradient in (torch.ones(()).expand_as(out), transposed):
        found = torch.autograd.grad(out, leaves, gradient, retain_graph=True)
        right = torch.autograd.grad(out, leaves, gradient.contiguous(), retain_graph=True)
        assert all(torch.equal(x, y) for x, y in zip(found, right, strict=True))


# PyTorch


def encoder_layer() -> Layer:
    config = ModelConfig(
        vocab_size=50,
        hidden_size=32,
        num_layers=1,
        num_heads=2,
        intermediate_size=64,
        max_position_embeddings=300,
        attention_window=(16,),
        dilation=(1, 2),
        hidden_dropout=0.0,
        attention_backend="fused",
    )
    torch.manual_seed(0)
    return Layer(config, 0)


def layer_inputs(tokens: int) -> tuple[Any, ...]:
    x_BNC = torch.randn(2, tokens, 32, generator=torch.Generator().manual_seed(tokens))
    padding_BN = torch.arange(tokens) >= torch.tensor([[tokens], [tokens - 5]])
    return x_BNC.requires_grad_(), padding_BN, None, index([0, 3], [1, -1]), torch.arange(2)


@needs_library
def test_an_encoder_layer_compiles_once_for_all_lengths() -> None:
    torch.compiler.reset()
    layer = encoder_layer()
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, backend=counting, fullgraph=True)
    for tokens in (40, 64, 93):
        inputs = layer_inputs(tokens)
        torch._dynamo.mark_dynamic(inputs[0], 1)
        torch._dynamo.mark_dynamic(inputs[1], 1)
        found, right = (
            [out, *torch.autograd.grad(out.square().sum(), [inputs[0], *layer.parameters()])]
            for out in (compiled(*inputs), layer(*inputs))
        )
        assert all(torch.equal(x, y) for x, y in zip(found, right, strict=True))
    assert len(graphs) == 1


@needs_library
def test_an_encoder_layer_is_exported() -> None:
    layer, tokens = encoder_layer().eval(), torch.export.Dim("tokens", min=20, max=300)
    shapes = ({1: tokens}, {1: tokens}, None, None, None)
    exported = torch.export.export(layer, layer_inputs(40), dynamic_shapes=shapes)
    inputs = layer_inputs(77)
    assert torch.equal(exported.module()(*inputs), layer(*inputs))


@needs_library
def test_an_encoder_layer_is_right_in_generated_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What surrounds the operator is fused and compiled by C++; sums are in another order there."""
    try:
        cpp_builder.get_cpp_compiler()
    except InvalidCxxCompiler as error:
        pytest.skip(f"torch.compile finds no C++ compiler: {error}")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        pytest.skip("torch.compile needs Python's headers")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    layer, inputs, found = encoder_layer(), layer_inputs(40), []
    wanted = {"x": inputs[0], **dict(layer.named_parameters())}
    with inductor_config.patch(compile_threads=1):  # its workers would outlive the test
        for run in (torch.compile(layer, backend="inductor", fullgraph=True), layer):
            out = run(*inputs)
            gradients = torch.autograd.grad(out, list(wanted.values()), output_gradient(out))
            of = {f"d{name}": x for name, x in zip(wanted, gradients, strict=True)}
            found.append({"out": out.detach()} | of)
    assert_equal_to(*found, 1e-5)


# Threads and processes


@needs_library
@each_case
def test_threads_change_no_bit(case: Case, threads: Callable[[int], None]) -> None:
    found = []
    for number in (1, 2):
        threads(number)
        found.append(case.run("fused"))
    assert_same_bits(*found)


@needs_library
def test_calls_from_several_python_threads(threads: Callable[[int], None]) -> None:
    threads(2)
    cases = list(CASES.values())
    right = [case.run("fused") for case in cases]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for _ in range(10):
                assert_same_bits(cases[number].run("fused"), right[number])
        except BaseException as failure:
            failures.append(failure)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    assert not failures
    assert not any(worker.is_alive() for worker in workers)


class Outputs(Dataset[Tensor]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, number: int) -> Tensor:
        return CASES["everything"].forward("fused")[0].detach()


@needs_library
def test_a_forked_data_worker_computes(threads: Callable[[int], None]) -> None:
    """Threads do not survive a fork; a worker runs on one, as torch tells it."""
    threads(2)
    right = Outputs()[0]
    loader = DataLoader(
        Outputs(), batch_size=None, num_workers=1, multiprocessing_context="fork", timeout=60
    )
    assert all(torch.equal(out, right) for out in loader)
