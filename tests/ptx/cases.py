"""What the PTX of the CUDA kernels is run on: each case in each dtype and head size, forward and
backward. Together they reach every basic block but those of OUT_OF_REACH.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from attention_cases import Case, make_case
from kernel_cases import BF16, F16, F32, INDEX, with_slots
from operator_cases import leaves, with_masks

from longpretrain.attention import AttentionPattern

DTYPES = {"fp32": F32, "bf16": BF16, "fp16": F16}
HEAD_SIZES = [32, 64, 128]
LARGE = "large scores"  # names of cases begin so where softmax.h takes its branch for them

# Of kernels whose name holds this: how many basic blocks no call can reach, and why
OUT_OF_REACH = {
    "nothing": (1, "only asked about, to see whether the GPU is new enough; never launched"),
    "sum_rows": (2, "64-bit divisions of more than 2^32 rows"),
    "global_columns_kernel": (2, "a chunk without a query: every chunk has one"),
    "sum_key_gradients_kernel": (2, "no chunk at all: there is at least one"),
}


def cases(head_size: int, dtype: torch.dtype) -> dict[str, tuple[str, Case]]:
    """Layout (see calls.py) and numbers. Tiles are of 64 queries or keys, in the forward pass of 32
    keys, and of 16 slots; chunks of 128 tokens.
    """

    def case(
        window: int,
        dilation: int | tuple[int, ...] = 1,
        *,
        causal: bool = False,
        scale: float | None = None,
        **changes: Any,
    ) -> Case:
        pattern = AttentionPattern(window, dilation, causal)
        made = make_case(pattern, head_size=head_size, **({"batch": 1, "heads": 1} | changes))
        return with_masks(made, scale=scale).to(dtype)

    everything = {"padding": True, "documents": True, "dropout_p": 0.2, "slots": 5}
    chunks = case(60, 2, causal=True, keys=640, slots=20, padding=True, dropout_p=0.1)
    few = {"batch": 2, "keys": 40, "q_offset": 5, "slots": 3, "padding": True}
    large = {"scale": 30_000 * head_size**-0.5, "slots": 12}
    return {
        "everything": ("far", case(30, (1, 3), batch=2, heads=2, keys=150, **everything)),
        "tiles without a mask": ("plain", case(130, keys=200)),
        "with dropout": ("plain", case(130, keys=200, dropout_p=0.3)),
        "causal": (
            "heads_first",
            case(100, (1, 2), causal=True, scale=-0.7, heads=2, keys=300, slots=20, documents=True),
        ),
        "queries in the middle": (
            "gaps",
            case(40, keys=330, q_offset=70, queries=200, slots=40, dropout_p=0.5),
        ),
        "several chunks": ("plain", with_idle_parts(chunks)),
        "few tokens": ("plain", with_padding_alone(case(9, **few))),
        "many slots": ("plain", case(9, keys=60, slots=40)),
        "and dropout": ("plain", with_padding_alone(case(9, scale=-0.3, dropout_p=0.5, **few))),
        LARGE: (
            "plain",
            with_small_rows(case(70, keys=560, q_offset=460, **large), range(512, 560, 4)),
        ),
        f"{LARGE}, dropout": (
            "plain",
            with_small_rows(case(70, keys=100, dropout_p=0.2, **large), range(64, 100, 3)),
        ),
    }


def with_idle_parts(case: Case) -> Case:
    """Tiles of nothing but padding, and queries before all global tokens."""
    padding_BN = case.masks["padding_BN"].clone()
    padding_BN[:, -130:-2] = True
    return with_slots(with_masks(case, padding_BN=padding_BN), list(range(70, 510, 40)))


def with_padding_alone(case: Case) -> Case:
    """In the second row, so that its blocks have no query to compute. A slot is unused."""
    padding_BN = case.masks["padding_BN"].clone()
    padding_BN[0, [11, 30]], padding_BN[1] = False, True
    return with_slots(with_masks(case, padding_BN=padding_BN), [11, 30], [7])


def with_small_rows(case: Case, slots: range) -> Case:
    """Greatest scores of odd rows are below softmax.h's kLargestBase, in base 2; others beyond."""
    floats = {name: x.detach().clone() for name, x in case.floats.items()}
    for name in ("q_BNHD", "q_global_BGHD"):
        floats[name][:, 1::2] *= 0.1
    return with_slots(replace(case, floats=leaves(floats)), list(slots))


def with_a_name_twice(case: Case) -> Case:
    """What only the kernels may get (the operator refuses it, and so does its reference): an unused
    slot names a token that an earlier one has named. It stays unused.
    """
    if INDEX not in case.masks:
        return case
    index_BG = case.masks[INDEX].clone()
    for index_G in index_BG:
        used, unused = (index_G >= 0).nonzero(), (index_G < 0).nonzero()
        if len(used) and len(unused) and used[0] < unused[-1]:
            index_G[unused[-1]] = index_G[used[0]]
    return with_masks(case, **{INDEX: index_BG})
