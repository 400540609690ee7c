"""What no test on CPU tensors sees: the same bits as the CPU, streams, CUDA graphs, a second GPU,
long tensors.

    python benchmarks/gpu_checks.py          # all of them
    python benchmarks/gpu_checks.py --small  # one small call of each kind: for compute-sanitizer

Letters: B batch row, N query or key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from longpretrain.attention import AttentionPattern, sliding_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _inputs(
    tokens: int, head_size: int, dtype: torch.dtype, *, heads: int = 2, slots: int = 3
) -> dict[str, Tensor]:
    """A call with everything: global tokens with projections of their own, padding, documents."""
    draw = torch.Generator().manual_seed(0)

    def normal(n: int) -> Tensor:
        return torch.randn(2, n, heads, head_size, generator=draw).to(dtype)

    names = ("q_BNHD", "k_BNHD", "v_BNHD", "k_global_BNHD", "v_global_BNHD")
    found = {name: normal(tokens) for name in names} | {"q_global_BGHD": normal(slots)}
    for x in found.values():
        x.requires_grad_()
    index_BG = torch.tensor([[0, tokens // 2, -1]] * 2)[:, :slots]
    found |= {
        "global_index_BG": index_BG,
        "padding_BN": torch.rand(2, tokens, generator=draw) < 0.1,
    }
    found["document_BN"] = (torch.arange(tokens) * 3 // tokens).expand(2, -1).contiguous()
    return found | {"dropout_seed_B": torch.tensor([5, -7])}


def _run(inputs: dict[str, Any], pattern: AttentionPattern, **options: Any) -> list[Tensor]:
    """Output and gradients."""
    out = sliding_attention(**inputs, pattern=pattern, backend="fused", **options)
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    return [out.detach(), *torch.autograd.grad(out.float().square().sum(), leaves)]


def _on_gpu(inputs: dict[str, Tensor], device: str = "cuda") -> dict[str, Tensor]:
    return {
        name: x.detach().to(device).requires_grad_(x.requires_grad) for name, x in inputs.items()
    }


def kept_weights(
    device: str, dtype: torch.dtype, dilation: int, *, causal: bool, is_global: bool
) -> Tensor:
    """[B, N, H, M]: whether dropout keeps the weight of a pair; read off from an output whose
    values are the unit vectors, with scores that are all 0.
    """
    tokens = head_size = 128
    zeros = torch.zeros(2, tokens, 3, head_size, dtype=dtype, device=device)
    v_BNHD = torch.eye(tokens, dtype=dtype, device=device)[None, :, None].expand_as(zeros)
    index_BG = torch.arange(tokens, device=device).expand(2, -1) if is_global else None
    out_BNHD = sliding_attention(
        zeros, zeros, v_BNHD, AttentionPattern(tokens, dilation, causal),
        global_index_BG=index_BG, dropout_p=0.3,
        dropout_seed_B=torch.tensor([11, -(2**62)], device=device), backend="fused",
    )  # fmt: skip
    return (out_BNHD != 0).cpu()


def check_dropout_bits() -> str:
    """The GPU drops the weights that the CPU drops, each of them."""
    pairs = 0
    for dtype, dilation, causal, is_global in itertools.product(
        DTYPES, (1, 3), (False, True), (False, True)
    ):
        options = {"causal": causal, "is_global": is_global}
        on_cpu = kept_weights("cpu", dtype, dilation, **options)
        on_gpu = kept_weights("cuda", dtype, dilation, **options)
        different = int((on_cpu != on_gpu).sum())
        case = f"{dtype} dilation {dilation} {options}"
        assert different == 0, f"{case}: {different} of {on_cpu.numel()} weights differ"
        assert 0.1 < on_cpu.float().mean() < 0.8, f"{case}: nothing was tested"
        pairs += on_cpu.numel()
    return f"{pairs:,} weights, all as on the CPU"


def check_repetition() -> str:
    """Twice the same call: the same bits, gradients included."""
    for dtype in DTYPES:
        inputs = _on_gpu(_inputs(3000, 64, dtype, heads=4))
        pattern = AttentionPattern(200, (1, 2, 1, 4))
        first = _run(inputs, pattern, dropout_p=0.1)
        for _ in range(20):
            for a, b in zip(first, _run(inputs, pattern, dropout_p=0.1), strict=True):
                assert torch.equal(a, b), f"{dtype}: another run, other bits"
    return "20 repetitions of forward and backward, equal bits"


def check_stream() -> str:
    """The kernels run on torch's current stream: behind what is queued there."""
    inputs, pattern = _on_gpu(_inputs(2000, 64, torch.bfloat16)), AttentionPattern(100)
    right = _run(inputs, pattern)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    late = {name: x.detach().clone() for name, x in inputs.items()}
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        late["q_BNHD"].zero_()
        torch.cuda._sleep(50_000_000)  # tens of milliseconds
        late["q_BNHD"].copy_(inputs["q_BNHD"])
        out = sliding_attention(**late, pattern=pattern, backend="fused")
    stream.synchronize()
    assert torch.equal(out, right[0]), "a call on a side stream did not wait for its inputs"
    return "a side stream's order is kept"


def check_graph() -> str:
    """Forward and backward are captured in a CUDA graph, which would refuse a synchronisation."""
    inputs, pattern = _on_gpu(_inputs(2000, 64, torch.bfloat16)), AttentionPattern(100)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        right = _run(inputs, pattern, dropout_p=0.1)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _run(inputs, pattern, dropout_p=0.1)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(right, captured, strict=True):
        assert torch.equal(a, b), "the graph's replay has other bits"
    return "captured and replayed, equal bits"


def check_second_gpu() -> str:
    """Tensors of cuda:1 are worked on there, while cuda:0 is the current device."""
    if torch.cuda.device_count() < 2:
        return "left out: torch sees one GPU"
    inputs, pattern = _inputs(2000, 64, torch.bfloat16), AttentionPattern(100)
    with torch.cuda.device(0):
        here = _run(_on_gpu(inputs, "cuda:0"), pattern, dropout_p=0.1)
        there = _run(_on_gpu(inputs, "cuda:1"), pattern, dropout_p=0.1)
        assert torch.cuda.current_device() == 0, "a call changed the current device"
    for a, b in zip(here, there, strict=True):
        assert b.device.index == 1, f"a result of cuda:1 is on {b.device}"
        error = _error(b.cpu(), a.cpu())
        assert error < 0.02, f"cuda:1 is off by {error:.3g} of the largest number"
    same = all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(here, there, strict=True))
    return f"right, with {'the same' if same else 'other'} bits as cuda:0"


def _error(found: Tensor, right: Tensor) -> float:
    """Of the largest number."""
    return ((found.float() - right.float()).abs().max() / right.float().abs().max()).item()


def errors_of_last_rows(device: str, tokens: int, heads: int, head_size: int) -> dict[str, float]:
    """Output and gradients of the last 1,000 tokens of a long sequence, of which only the last 800
    outputs have a gradient, against those 1,000 tokens by themselves.
    """
    q, k, v = (
        torch.randn(1, tokens, heads, head_size, device=device, dtype=torch.bfloat16)
        for _ in range(3)
    )
    last = torch.randn(1, 800, heads, head_size, device=device, dtype=torch.bfloat16)

    def run(*floats: Tensor) -> list[Tensor]:
        leaves = [x.requires_grad_() for x in floats]
        out = sliding_attention(*leaves, AttentionPattern(100), backend="fused")
        direction = torch.zeros_like(out)
        direction[:, -800:] = last
        gradients = torch.autograd.grad(out, leaves, direction)
        return [out.detach()[:, -800:].clone(), *(x[:, -1000:].clone() for x in gradients)]

    alone = run(*(x[:, -1000:].clone() for x in (q, k, v)))
    names = ("out", "dq", "dk", "dv")
    return {
        name: _error(a, b) for name, a, b in zip(names, run(q, k, v), alone, strict=True)
    }  # fmt: skip


def check_long() -> str:
    """Tensors of more than 2**31 numbers, forward and backward."""
    tokens, heads, head_size = 2_200_000, 16, 64
    # q, k, v, the output, the gradients of all four, and what is in between.
    needed_gib = 9 * tokens * heads * head_size * 2 / 2**30
    free_gib = torch.cuda.mem_get_info()[0] / 2**30
    if free_gib < needed_gib:
        return f"left out: needs {needed_gib:.0f} GiB, {free_gib:.0f} GiB are free"
    # Tiles begin elsewhere, so sums are rounded in another order.
    for name, error in errors_of_last_rows("cuda", tokens, heads, head_size).items():
        assert error < 0.02, f"{name} beyond 2**31 numbers is off by {error:.3g} of its largest"
    return f"{tokens * heads * head_size:,} numbers, the last rows and their gradients right"


def check_small() -> str:
    """Every kernel once, on shapes with odd ends: what compute-sanitizer watches."""
    for dtype, head_size in itertools.product(DTYPES, (32, 64, 128)):
        for causal, dropout_p in ((False, 0.1), (True, 0.0)):
            inputs = _on_gpu(_inputs(203, head_size, dtype))
            _run(inputs, AttentionPattern(37, (1, 3), causal), dropout_p=dropout_p)
    torch.cuda.synchronize()
    return "18 calls forward and backward"


CHECKS: dict[str, Callable[[], str]] = {
    "dropout bits as on the CPU": check_dropout_bits,
    "same bits in every run": check_repetition,
    "runs on the current stream": check_stream,
    "CUDA graph": check_graph,
    "a second GPU": check_second_gpu,
    "more than 2**31 numbers": check_long,
    "small calls of every kind": check_small,
}


def run_checks() -> Iterator[dict[str, Any]]:
    """A row for each check; one that fails says how, and the others go on."""
    for name, check in CHECKS.items():
        try:
            row = {"check": name, "ok": True, "found": check()}
        except Exception as error:
            row = {"check": name, "ok": False, "found": f"{type(error).__name__}: {error}"}
        torch.cuda.empty_cache()
        print(f"  {name}: {'ok' if row['ok'] else 'FAILED'}: {row['found']}", flush=True)
        yield row


def main() -> int:
    """Exit code 1 if a check fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--small", action="store_true", help="only the small calls")
    if parser.parse_args().small:
        print(check_small())
        return 0
    return 0 if all(row["ok"] for row in run_checks()) else 1


if __name__ == "__main__":
    sys.exit(main())
