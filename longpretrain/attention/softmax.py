"""One softmax of a block of queries over the union of several sets of keys, and its gradient.

What must not count is a number, never a branch: NOTHING is added to a score, and the log-sum-exp of
a row that receives nothing is +inf, which makes its weights exp(score - inf) = 0 in the backward
pass without a further case.

Letters: B batch row, H head, D number of a head, S stream (batch row x head), M key of a stream,
m and n the queries and keys of one block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

NOTHING = float("-inf")
NO_KEYS = float("inf")
SIXTEEN = 16  # matrices are filled up to multiples of it: see ``blocks``


@dataclass(frozen=True)
class Source:
    """Streams of keys and values, and in the backward pass what collects their gradients."""

    k_SMD: Tensor
    v_SMD: Tensor
    dk_SMD: Tensor | None = None
    dv_SMD: Tensor | None = None


@dataclass(frozen=True)
class Keys:
    """A slice of a source that a block of queries attends to."""

    source: Source
    where: tuple[slice, slice]  # streams, tokens
    biases: list[tuple[slice, Tensor]]  # to add to these columns of the scores [B, H, m, n]
    byte_BHmn: Tensor | None  # of dropout
    drop_below: int
    num_missing: int = 0  # keys of zeros at the end that the source has no row for

    def taken(self, x_SMD: Tensor) -> Tensor:
        """The slice of the keys or the values."""
        x_SnD = x_SMD[self.where]
        return pad(x_SnD, (0, 0, 0, self.num_missing)) if self.num_missing else x_SnD

    def add_product(self, into_SMD: Tensor, x_Snm: Tensor, y_SmD: Tensor) -> None:
        """Add a product to the slice of the keys' or the values' gradient."""
        into_SnD = into_SMD[self.where]
        if self.num_missing:
            into_SnD += torch.bmm(x_Snm, y_SmD)[:, : -self.num_missing]
        else:
            into_SnD.baddbmm_(x_Snm, y_SmD)

    def scores(self, q_SmD: Tensor, shape: tuple[int, int]) -> Tensor:
        score_Smn = _product(q_SmD, self.taken(self.source.k_SMD).transpose(1, 2))
        score_BHmn = score_Smn.view(*shape, *score_Smn.shape[1:])
        for columns, bias in self.biases:
            score_BHmn[..., columns].add_(bias)
        return score_Smn

    def kept(self, dtype: torch.dtype) -> Tensor | None:
        """1 for survivors of dropout, else 0."""
        if self.byte_BHmn is None:
            return None
        # In a floating type from the start: several times quicker than by way of bool.
        return self.byte_BHmn.flatten(0, 1).to(dtype).ge_(self.drop_below)


@dataclass(frozen=True)
class Work:
    """One block: some rows of some streams, and the sets of keys their softmax runs over."""

    where: tuple[slice, slice]  # streams, rows
    shape: tuple[int, int]  # the streams as batch rows x heads
    sets: list[Keys]


def _product(x_Smn: Tensor, y_SnD: Tensor) -> Tensor:
    """Multiply, the queries filled up; only the last block of a class has a fill."""
    num_queries = x_Smn.shape[1]
    fill = -num_queries % SIXTEEN
    if fill == 0:
        return torch.bmm(x_Smn, y_SnD)
    return torch.bmm(pad(x_Smn, (0, 0, 0, fill)), y_SnD)[:, :num_queries]


def _add_product(into_SmD: Tensor, x_Smn: Tensor, y_SnD: Tensor) -> None:
    if x_Smn.shape[1] % SIXTEEN == 0:
        into_SmD.baddbmm_(x_Smn, y_SnD)
    else:
        into_SmD += _product(x_Smn, y_SnD)


def attend(q_SmD: Tensor, work: Work, kept_scale: float) -> tuple[Tensor, Tensor]:
    """One softmax over the union of the block's keys: out_SmD and lse_Sm1."""
    scores = [keys.scores(q_SmD, work.shape) for keys in work.sets]
    highest_Sm1 = scores[0].amax(dim=-1, keepdim=True)
    for score_Smn in scores[1:]:
        highest_Sm1 = torch.maximum(highest_Sm1, score_Smn.amax(dim=-1, keepdim=True))
    # A finite maximum keeps rows without keys from NaN: their weights are exp(-inf) = 0.
    highest_Sm1.clamp_(min=torch.finfo(highest_Sm1.dtype).min)
    sum_Sm1, out_SmD = torch.zeros_like(highest_Sm1), torch.zeros_like(q_SmD)
    for keys, score_Smn in zip(work.sets, scores, strict=True):
        weight_Smn = score_Smn.sub_(highest_Sm1).exp_()
        sum_Sm1 += weight_Smn.sum(dim=-1, keepdim=True)
        kept_Smn = keys.kept(weight_Smn.dtype)
        if kept_Smn is not None:
            weight_Smn.mul_(kept_Smn)
        _add_product(out_SmD, weight_Smn, keys.taken(keys.source.v_SMD))
    # The highest score adds 1 to the sum, so this minimum changes only rows without keys.
    out_SmD.mul_(kept_scale / sum_Sm1.clamp(min=1))
    lse_Sm1 = (highest_Sm1 + sum_Sm1.log()).masked_fill_(sum_Sm1 == 0, NO_KEYS)
    return out_SmD, lse_Sm1


def attend_backward(
    work: Work, q_SmD: Tensor, dout_SmD: Tensor, lse_Sm1: Tensor, delta_Sm1: Tensor
) -> Tensor:
    """The gradient of the queries; that of the keys and values is added to their sources.

    ``dout_SmD`` is the output's gradient times ``kept_scale``; ``delta_Sm1`` is the sum over D of
    the output's gradient times the output, which is the sum of weight times weight's gradient.
    """
    dq_SmD = torch.zeros_like(q_SmD)
    for keys in work.sets:
        source = keys.source
        assert source.dk_SMD is not None and source.dv_SMD is not None
        weight_Smn = keys.scores(q_SmD, work.shape).sub_(lse_Sm1).exp_()
        dscore_Smn = _product(dout_SmD, keys.taken(source.v_SMD).transpose(1, 2))
        kept_weight_Smn, kept_Smn = weight_Smn, keys.kept(weight_Smn.dtype)
        if kept_Smn is not None:
            dscore_Smn.mul_(kept_Smn)
            kept_weight_Smn = kept_Smn.mul_(weight_Smn)
        keys.add_product(source.dv_SMD, kept_weight_Smn.transpose(1, 2), dout_SmD)
        dscore_Smn.sub_(delta_Sm1).mul_(weight_Smn)
        _add_product(dq_SmD, dscore_Smn, keys.taken(source.k_SMD))
        keys.add_product(source.dk_SMD, dscore_Smn.transpose(1, 2), q_SmD)
    return dq_SmD
