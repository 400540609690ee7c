"""Times of the attention operator and of its peers on a GPU, by CUDA events.

Letters: B batch row, N query or key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from longpretrain.attention import AttentionPattern, sliding_attention

CALLS = ("forward", "forward+backward")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WARM_UP = 5
METHOD = (
    "CUDA events around each call, after five calls that do not count; medians of as many calls "
    "as fit into half a second, 10 to 200. All in one process on the default stream, one case "
    "after the other, twice; caches are as the calls before left them. Forward runs under "
    "no_grad; forward+backward is one autograd step, its gradients freed outside of the clock. "
    "Ours has one global token at position 0 with projections of its own; SDPA with a dense mask "
    "and FlexAttention (compiled, block mask of 128) let it share q, k and v; flash-attn's window"
    " and NATTEN have no global token, and NATTEN's window does not shrink at the ends of the "
    "sequence. Useful operations: 4 * D for each reached pair forward, 10 * D backward."
)


@dataclass(frozen=True)
class Shape:
    """One layer's attention."""

    batch: int
    tokens: int
    heads: int
    head_size: int
    one_sided_window: int
    dtype: str = "bf16"
    dilation: int = 1
    dropout_p: float = 0.0

    def __str__(self) -> str:
        text = (
            f"B{self.batch} N{self.tokens} H{self.heads} D{self.head_size} "
            f"w{self.one_sided_window} {self.dtype}"
        )
        text += f" dilation {self.dilation}" if self.dilation > 1 else ""
        return text + (f" dropout {self.dropout_p}" if self.dropout_p else "")

    def useful_operations(self, call: str) -> int:
        """Multiplications and additions that the definition asks for, of a token at position 0."""
        pattern = AttentionPattern(self.one_sided_window, self.dilation)
        pairs = pattern.num_pairs(self.tokens, self.dilation)
        reach = sum(pattern.reaches(0, key, self.dilation) for key in range(self.tokens))
        # The global token's row and column, but for what its window reaches anyway.
        pairs += 2 * (self.tokens - reach)
        products = {"forward": 2, "forward+backward": 7}[call]
        return products * 2 * self.head_size * pairs * self.heads * self.batch


HEADLINE = Shape(1, 4096, 16, 64, 256)
SHAPES = (
    HEADLINE,
    Shape(4, 4096, 16, 64, 256),
    Shape(8, 4096, 12, 64, 256),
    Shape(1, 16_384, 16, 64, 256),
    Shape(1, 65_536, 16, 64, 256),
    Shape(4, 4096, 16, 64, 64),
    Shape(4, 4096, 16, 32, 256),
    Shape(4, 4096, 8, 128, 256),
    Shape(4, 4096, 16, 64, 256, dtype="fp16"),
    Shape(4, 4096, 16, 64, 256, dtype="fp32"),
    Shape(4, 4096, 16, 64, 256, dropout_p=0.1),
    Shape(4, 4096, 16, 64, 256, dilation=2),
)
QUICK_SHAPES = (Shape(1, 512, 2, 64, 64), Shape(1, 512, 2, 64, 64, dropout_p=0.1))
MOST_DENSE_TOKENS = 4096


@dataclass(frozen=True)
class Runnable:
    """A forward pass on its inputs, the leaves that want gradients, and its output's gradient."""

    forward: Callable[[], Tensor]
    leaves: Sequence[Tensor]
    grad: Tensor

    def run_forward(self) -> None:
        """Inference."""
        with torch.no_grad():
            self.forward()

    def run_both(self) -> None:
        """One autograd step."""
        self.forward().backward(self.grad)

    def reset(self) -> None:
        """Frees the gradients."""
        for leaf in self.leaves:
            leaf.grad = None


def _normal(*sizes: int, dtype: str, leaf: bool = True) -> Tensor:
    return torch.randn(*sizes, device="cuda").to(DTYPES[dtype]).requires_grad_(leaf)


def build_ours(shape: Shape) -> Runnable:
    """The compiled operator; it would raise rather than run anything else."""
    sizes = (shape.batch, shape.tokens, shape.heads, shape.head_size)
    q, k, v, k_global, v_global = (_normal(*sizes, dtype=shape.dtype) for _ in range(5))
    q_global = _normal(shape.batch, 1, *sizes[2:], dtype=shape.dtype)
    index_BG = torch.zeros(shape.batch, 1, dtype=torch.int32, device="cuda")
    pattern = AttentionPattern(shape.one_sided_window, shape.dilation)
    options: dict[str, Any] = {}
    if shape.dropout_p:
        seeds = torch.arange(shape.batch, device="cuda")
        options = {"dropout_p": shape.dropout_p, "dropout_seed_B": seeds}

    def forward() -> Tensor:
        return sliding_attention(
            q, k, v, pattern, global_index_BG=index_BG, q_global_BGHD=q_global,
            k_global_BNHD=k_global, v_global_BNHD=v_global, backend="fused", **options,
        )  # fmt: skip

    leaves = [q, k, v, k_global, v_global, q_global]
    return Runnable(forward, leaves, _normal(*sizes, dtype=shape.dtype, leaf=False))


def _heads_first(shape: Shape) -> list[Tensor]:
    sizes = (shape.batch, shape.heads, shape.tokens, shape.head_size)
    leaves = [_normal(*sizes, dtype=shape.dtype) for _ in range(3)]
    return [*leaves, _normal(*sizes, dtype=shape.dtype, leaf=False)]


def build_sdpa(shape: Shape) -> Runnable:
    """Scores of all pairs, masked."""
    q, k, v, grad = _heads_first(shape)
    position = torch.arange(shape.tokens, device="cuda")
    distance = (position[:, None] - position).abs()
    mask_NM = distance <= shape.one_sided_window * shape.dilation
    mask_NM &= distance % shape.dilation == 0
    mask_NM[0], mask_NM[:, 0] = True, True
    attend = torch.nn.functional.scaled_dot_product_attention
    return Runnable(
        lambda: attend(q, k, v, attn_mask=mask_NM, dropout_p=shape.dropout_p), [q, k, v], grad
    )


def build_flex(shape: Shape) -> Runnable:
    """Compiled FlexAttention with a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v, grad = _heads_first(shape)
    reach, dilation = shape.one_sided_window * shape.dilation, shape.dilation

    def reaches(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_window = ((query - key).abs() <= reach) & ((query - key) % dilation == 0)
        return in_window | (query == 0) | (key == 0)

    mask = create_block_mask(reaches, None, None, shape.tokens, shape.tokens, device="cuda")
    compiled = torch.compile(flex_attention, dynamic=False)
    return Runnable(lambda: compiled(q, k, v, block_mask=mask), [q, k, v], grad)


def build_flash(shape: Shape) -> Runnable:
    """flash-attn's sliding window."""
    from flash_attn import flash_attn_func

    sizes = (shape.batch, shape.tokens, shape.heads, shape.head_size)
    q, k, v = (_normal(*sizes, dtype=shape.dtype) for _ in range(3))
    window = (shape.one_sided_window, shape.one_sided_window)
    grad = _normal(*sizes, dtype=shape.dtype, leaf=False)
    return Runnable(
        lambda: flash_attn_func(q, k, v, dropout_p=shape.dropout_p, window_size=window),
        [q, k, v],
        grad,
    )


def build_natten(shape: Shape) -> Runnable:
    """NATTEN's neighbourhood attention in one dimension."""
    from natten import na1d

    sizes = (shape.batch, shape.tokens, shape.heads, shape.head_size)
    q, k, v = (_normal(*sizes, dtype=shape.dtype) for _ in range(3))
    kernel_size = 2 * shape.one_sided_window + 1
    grad = _normal(*sizes, dtype=shape.dtype, leaf=False)
    return Runnable(
        lambda: na1d(q, k, v, kernel_size=kernel_size, dilation=shape.dilation), [q, k, v], grad
    )


@dataclass(frozen=True)
class Peer:
    """An implementation, and what it can do."""

    label: str
    build: Callable[[Shape], Runnable]
    package: str | None = None
    most_tokens: int = 2**30
    dtypes: Sequence[str] = tuple(DTYPES)
    dilates: bool = True
    drops: bool = True

    def why_not(self, shape: Shape) -> str | None:
        """Why it cannot run that shape; None when it can."""
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if shape.tokens > self.most_tokens:
            return f"not set up beyond {self.most_tokens:,} tokens"
        if shape.dtype not in self.dtypes:
            return f"has no {shape.dtype}"
        if shape.dilation > 1 and not self.dilates:
            return "has no dilation"
        if shape.dropout_p and not self.drops:
            return "has no dropout"
        return None


OURS = "ours"
PEERS: Mapping[str, Peer] = {
    OURS: Peer("ours", build_ours),
    "flex": Peer("FlexAttention", build_flex, drops=False),
    "sdpa": Peer("SDPA, dense mask", build_sdpa, most_tokens=MOST_DENSE_TOKENS),
    "flash": Peer(
        "flash-attn, window only", build_flash, "flash_attn", dtypes=("bf16", "fp16"), dilates=False
    ),
    "natten": Peer("NATTEN, window only", build_natten, "natten", drops=False),
}


def measure(shapes: Sequence[Shape], peers: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each shape, peer and call; one that cannot run says why."""
    rows = []
    for shape in shapes:
        for name in peers:
            reason = PEERS[name].why_not(shape)
            times_ms = {} if reason else _times_of(name, shape)
            reason = reason or times_ms.pop("error", None)
            for call in CALLS:
                samples_ms = times_ms.get(call, [])
                row = {**asdict(shape), "shape": str(shape), "case": name, "call": call}
                row["median_ms"] = statistics.median(samples_ms) if samples_ms else None
                row["samples"], row["why_not"] = len(samples_ms), reason
                row["useful_operations"] = shape.useful_operations(call)
                rows.append(row)
            print(f"  {shape} {name}: {_shown(rows[-2:])}", flush=True)
    return rows


def _shown(rows: Sequence[dict[str, Any]]) -> str:
    if rows[0]["why_not"]:
        return str(rows[0]["why_not"])
    return ", ".join(f"{row['call']} {row['median_ms']:.3f} ms" for row in rows)


def _times_of(name: str, shape: Shape) -> dict[str, Any]:
    """Samples of both calls; under "error" why there are none. A peer's failure is a result."""
    torch.manual_seed(0)
    try:
        runnable = PEERS[name].build(shape)
        times_ms: dict[str, list[float]] = {call: [] for call in CALLS}
        for _ in range(2):
            times_ms["forward"] += samples_ms(runnable.run_forward, lambda: None)
            times_ms["forward+backward"] += samples_ms(runnable.run_both, runnable.reset)
        return times_ms
    except Exception as error:
        if name == OURS:
            raise
        return {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"}
    finally:
        torch.cuda.empty_cache()


def samples_ms(call: Callable[[], None], reset: Callable[[], None]) -> list[float]:
    """Times of single calls on the device."""
    for _ in range(WARM_UP):
        call()
        reset()
    one_ms = _timed_ms(call, reset, 1)[0]
    return _timed_ms(call, reset, number_of_samples(one_ms))


def number_of_samples(one_ms: float) -> int:
    """As many as fit into a quarter of a second, 5 to 100: it is done twice."""
    return max(5, min(100, int(250 / max(one_ms, 1e-3))))


def _timed_ms(call: Callable[[], None], reset: Callable[[], None], times: int) -> list[float]:
    pairs = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        reset()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]
