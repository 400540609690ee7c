"""What the portable backend holds in memory, and that it never waits for a device."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import pytest
import torch
from attention_cases import make_case
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longpretrain.attention import AttentionPattern, blocks
from longpretrain.attention.portable import portable_attention, portable_attention_backward


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
