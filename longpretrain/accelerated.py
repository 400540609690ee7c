"""A loaded Longformer of Hugging Face's transformers, with our attention in the place of theirs.

Every module keeps its identity, parameters, hooks and the name of its class; it becomes an instance
of a subclass of its own class, so state dicts, ``save_pretrained`` and copies are as before;
pickles, too, but they need this package where they are loaded. transformers is not imported: its
classes are found on the model.

Letters: B batch row, N token, C hidden channel, H head, D number of a head, G slot of a global
token.
"""

from __future__ import annotations

import functools
import inspect
import logging
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from longpretrain.attention import AttentionPattern, sliding_attention, why_not
from longpretrain.errors import InputError

Model = TypeVar("Model", bound=nn.Module)

HOME = "transformers.models.longformer.modeling_longformer"
ATTENTION, ENCODER = "LongformerSelfAttention", "LongformerEncoder"
# What the forward methods of transformers 4.57 and 5.23 take. A name that is not here may mean
# arithmetic that we do not know of.
KNOWN = {
    ATTENTION: {
        *("hidden_states", "attention_mask", "layer_head_mask", "is_index_masked"),
        *("is_index_global_attn", "is_global_attn", "output_attentions"),
    },
    ENCODER: {
        *("hidden_states", "attention_mask", "head_mask", "padding_len", "output_attentions"),
        *("output_hidden_states", "return_dict"),
    },
}
TESTED = "the Longformer of transformers 4.57 to 5.23"

_log = logging.getLogger(__name__)


def accelerate(model: Model, *, backend: str = "auto") -> Model:
    """Has a Longformer of transformers attend with ``sliding_attention``: same outputs, less time.

    The model is changed in place. A call that asks for attention probabilities
    (``output_attentions=True``) or passes a head mask runs on their attention, which is announced
    once. In training, dropout draws other numbers than theirs: that of attention from seeds that
    torch's generator gives, all other dropout without the tokens that LongformerModel adds to fill
    a window; ``torch.manual_seed`` repeats both. ``torch.compile`` runs it, in several graphs;
    ``torch.jit.trace`` and its like do not: ``longpretrain export --format onnx`` makes an ONNX
    file.

    Args:
        model: any model around Longformer layers, such as LongformerForMaskedLM. Calling it again
            changes nothing but the backend.
        backend: of ``sliding_attention``: auto, fused, portable or reference.

    Returns:
        The same model.

    Raises:
        InputError: (a ``ValueError``) for anything else, a backend that cannot run here, and a
            Longformer whose code is not the one that is known.
    """
    _check_model(model)
    found = {
        module: (ours, theirs)
        for module in model.modules()
        for ours in (SlidingSelfAttention, UnpaddedEncoder)
        if (theirs := _theirs(module, ours.of))
    }
    for module, (ours, theirs) in found.items():
        _check_module(module, ours, theirs)
    _check_backend(backend, next(model.parameters()).device)
    for module, (ours, theirs) in found.items():
        module.__class__ = _subclass(ours, theirs)
        if isinstance(module, SlidingSelfAttention):
            module.attention_backend = backend
    return model


class _Swapped(nn.Module):
    """Comes before a class of transformers: ``_subclass`` makes the two one."""

    of: str
    """Name of their class."""
    theirs: type[nn.Module]
    names: tuple[str, ...]
    """Of their forward method's arguments, after the hidden states: 4.57 has others than 5.23."""

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        # The class is made, not imported: a copy or a pickle names the two that it is made of.
        ours = type(self).__bases__[0]
        return _new, (ours, self.theirs), vars(self)

    def _named(self, rest: tuple[Any, ...], named: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self.names, rest, strict=False)) | named


class SlidingSelfAttention(_Swapped):
    """In place of LongformerSelfAttention: its projections, and our operator between them."""

    of = ATTENTION
    num_heads: int
    head_dim: int
    one_sided_attn_window_size: int
    dropout: float
    attention_backend: str

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"attention of longpretrain, backend={self.attention_backend!r}"

    def forward(self, hidden_states: Tensor, *rest: Any, **named: Any) -> Any:
        """As theirs: a tuple with the heads' outputs side by side, BNC."""
        call = self._named(rest, named)
        if _wants_theirs(call, "layer_head_mask"):
            _announce_once()
            return super().forward(hidden_states, **call)
        x_BNC = hidden_states
        global_index_BG = q_global_BGHD = k_global_BNHD = v_global_BNHD = None
        if call["is_global_attn"]:
            global_index_BG = _global_index(call["is_index_global_attn"])
            slot_BG1 = global_index_BG.clamp(min=0)[..., None]
            global_BGC = x_BNC.gather(1, slot_BG1.expand(-1, -1, x_BNC.shape[-1]))
            q_global_BGHD = self._project("query_global", global_BGC)
            k_global_BNHD = self._project("key_global", x_BNC)
            v_global_BNHD = self._project("value_global", x_BNC)
        dropout_p = self.dropout if self.training else 0.0
        out_BNHD = sliding_attention(
            self._project("query", x_BNC),
            self._project("key", x_BNC),
            self._project("value", x_BNC),
            AttentionPattern(one_sided_window=self.one_sided_attn_window_size),
            padding_BN=call["is_index_masked"],
            global_index_BG=global_index_BG,
            q_global_BGHD=q_global_BGHD,
            k_global_BNHD=k_global_BNHD,
            v_global_BNHD=v_global_BNHD,
            dropout_p=dropout_p,
            dropout_seed_B=_seeds(x_BNC) if dropout_p else None,
            backend=self.attention_backend,
        )
        return (out_BNHD.flatten(2),)

    def _project(self, name: str, x_BNC: Tensor) -> Tensor:
        out_BNC: Tensor = getattr(self, name)(x_BNC)
        return out_BNC.reshape(*x_BNC.shape[:2], self.num_heads, self.head_dim)


class UnpaddedEncoder(_Swapped):
    """In place of LongformerEncoder: leaves out what LongformerModel added to fill a window."""

    of = ENCODER
    config: Any

    def forward(self, hidden_states: Tensor, *rest: Any, **named: Any) -> Any:
        """As theirs, which cuts the added tokens off at its end; here they never go in."""
        call = self._named(rest, named)
        padding = call.get("padding_len", 0)
        kept = hidden_states.shape[1] - padding
        chunk = self.config.chunk_size_feed_forward
        fits_chunks = chunk == 0 or kept % chunk == 0
        if padding and fits_chunks and not _wants_theirs(call, "head_mask"):
            hidden_states = hidden_states[:, :kept]
            call |= {"attention_mask": call["attention_mask"][:, :kept], "padding_len": 0}
        return super().forward(hidden_states, **call)


def _wants_theirs(call: dict[str, Any], head_mask: str) -> bool:
    """Attention probabilities, which our operator never holds, or a change of them."""
    return bool(call.get("output_attentions")) or call.get(head_mask) is not None


@functools.cache
def _announce_once() -> None:
    _log.warning(
        "attention runs as transformers wrote it where a call asks for attention probabilities "
        "(output_attentions=True) or passes a head mask: sliding_attention has neither"
    )


def _global_index(is_global_BN: Tensor) -> Tensor:
    """Positions of the global tokens, -1 in unused slots: BG.

    All layers of a model get one and the same mask, and counting waits for the device: what the
    first layer finds is kept on the mask.
    """
    kept: Tensor | None = getattr(is_global_BN, "longpretrain_index", None)
    if kept is not None:
        return kept
    count_B1 = is_global_BN.sum(1, keepdim=True)
    first_BN = is_global_BN.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    slot_G = torch.arange(int(count_B1.max()), device=is_global_BN.device)
    index_BG = first_BN[:, : len(slot_G)].masked_fill(slot_G >= count_B1, -1)
    is_global_BN.longpretrain_index = index_BG  # type: ignore[attr-defined]
    return index_BG


def _seeds(x_BNC: Tensor) -> Tensor:
    # From the generator whose state a checkpointed layer restores: it draws the same ones again.
    return torch.randint(2**63 - 1, (len(x_BNC),), device=x_BNC.device)


def _subclass(ours: type[_Swapped], theirs: type[nn.Module]) -> type[_Swapped]:
    made: type[_Swapped] = _made(cast("Any", ours), cast("Any", theirs))
    return made


@functools.cache  # one class of each pair: type() of a copy is that of the original
def _made(ours: type[_Swapped], theirs: type[nn.Module]) -> type[_Swapped]:
    """Ours before theirs, under their name: other programs look for it."""
    names = list(inspect.signature(theirs.forward).parameters)
    body = {
        "__module__": theirs.__module__, "__qualname__": theirs.__qualname__,
        "__doc__": ours.__doc__, "theirs": theirs, "names": tuple(names[2:]),
    }  # fmt: skip
    return type(theirs.__name__, (ours, theirs), body)


def _new(ours: type[_Swapped], theirs: type[nn.Module]) -> _Swapped:
    """Empty, as ``copy`` and ``pickle`` fill it."""
    made = _subclass(ours, theirs)
    return made.__new__(made)


def _theirs(module: nn.Module, name: str) -> type[nn.Module] | None:
    """The class of transformers that a module is an instance of, if it has that name."""
    for base in type(module).__mro__:
        if base.__name__ == name and base.__module__ == HOME and not issubclass(base, _Swapped):
            assert issubclass(base, nn.Module)
            return base
    return None


def _check_model(model: object) -> None:
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise InputError(
            "model",
            got=f"{kind} {model!r:.80}",
            wanted=f"a loaded model, {TESTED}",
            way_out="Load it first: LongformerModel.from_pretrained(...).",
        )
    if not any(_theirs(module, ATTENTION) for module in model.modules()):
        others = {type(module).__name__ for module in model.modules()}
        shown = ", ".join(sorted(name for name in others if name.endswith("SelfAttention")))
        raise InputError(
            "model",
            got=f"{kind}, which has {shown or 'no attention that is known'}",
            wanted=TESTED,
            way_out="Make a Longformer of a RoBERTa or BERT: longpretrain convert.",
        )


def _check_module(module: nn.Module, ours: type[_Swapped], theirs: type[nn.Module]) -> None:
    if isinstance(module, ours):
        return
    kind = type(module).__name__
    if type(module) is not theirs or "forward" in vars(module):
        raise InputError(
            "model",
            got=f"{kind} that another program has wrapped or changed",
            wanted=f"{theirs.__name__} as {TESTED} has it",
            way_out="Call accelerate() before the model is wrapped.",
        )
    unknown = set(inspect.signature(theirs.forward).parameters) - {"self"} - KNOWN[ours.of]
    if unknown:
        raise InputError(
            "model",
            got=f"{kind} with arguments that are not known: {', '.join(sorted(unknown))}",
            wanted=TESTED,
            way_out="Use one of these versions, or the model as it is.",
        )


def _check_backend(backend: str, device: torch.device) -> None:
    reason = why_not(backend, device)
    if reason:
        raise InputError(
            "backend",
            got=f"{backend!r}, but {reason}",
            wanted="a backend that can run here",
            way_out="Use backend='auto'.",
        )
