"""Which id a SentencePiece piece has: its place in the model, or as XLM-R and CamemBERT have it.

fairseq put its own special tokens in front of the pieces and the mask behind them. XLM-R left the
model's three (``<unk> <s> </s>``) out, CamemBERT only the first:

              0          1      2           3      4               5     ...            last
    XLM-R     <s>        <pad>  </s>        <unk>  piece 3         piece 4              <mask>
    CamemBERT <s>NOTUSED <pad>  </s>NOTUSED <unk>  <unk>NOTUSED    piece 1 (its <s>)    <mask>
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from longpretrain.data.tokenizer_files import Roles

Layout = Literal["own", "xlm-r", "camembert"]
"""own: an id is a place in the model, which has all special tokens."""

_MASK = "<mask>"
_ROLES = Roles(bos="<s>", eos="</s>", pad="<pad>", mask=_MASK, unk="<unk>")
_FRONT = {
    "xlm-r": ("<s>", "<pad>", "</s>", "<unk>"),
    "camembert": ("<s>NOTUSED", "<pad>", "</s>NOTUSED", "<unk>", "<unk>NOTUSED"),
}
_UNK_ID = 3
_XLM_R_LEAVES = 3
_CAMEMBERT_LEAVES = 1


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """A model's vocabulary."""

    layout: Layout
    ids: dict[str, int]
    """Token -> id, special tokens included."""
    id_of_piece: list[int]
    """By place in the model; pieces that are left out have the id of <unk>."""
    special: frozenset[str]
    roles: Roles
    in_transformers: bool
    """transformers' class for this layout gives the pieces these ids."""


def lay_out(
    names: Sequence[str], apart: Sequence[bool], roles: Mapping[str, str], layout: Layout | None
) -> Vocabulary:
    """The vocabulary of a model.

    Args:
        names: the pieces.
        apart: whether a piece is none of text: a control, unknown or unused one.
        roles: the special tokens that the model has itself.
        layout: None: own if the model has all special tokens, else xlm-r.
    """
    complete = len(roles) == len(_ROLES.names)
    if layout == "own" or (layout is None and complete):
        special = {name for name, is_apart in zip(names, apart, strict=True) if is_apart}
        return Vocabulary(
            layout="own",
            ids={name: place for place, name in enumerate(names)},
            id_of_piece=list(range(len(names))),
            special=frozenset(special | set(roles.values())),
            roles=Roles(**roles),
            in_transformers=False,
        )
    return _fairseq(names, apart, layout or "xlm-r")


def _fairseq(names: Sequence[str], apart: Sequence[bool], layout: Layout) -> Vocabulary:
    leaves = _CAMEMBERT_LEAVES if layout == "camembert" else _XLM_R_LEAVES
    in_transformers = all(apart[:leaves])
    # A model without the usual first pieces: whatever is not of text goes, wherever it stands.
    left_out = set(range(leaves)) if in_transformers else {i for i, is_ in enumerate(apart) if is_}
    ids = {name: number for number, name in enumerate(_FRONT[layout])}
    special = {*ids, _MASK, *_ROLES.names}
    id_of_piece = []
    for place, (name, is_apart) in enumerate(zip(names, apart, strict=True)):
        if place in left_out:
            id_of_piece.append(_UNK_ID)
            continue
        # A model may have a <pad> or <mask> of its own without having all of them.
        free = name if name not in ids and name != _MASK else f"{name}NOTUSED"
        id_of_piece.append(len(ids))
        ids[free] = len(ids)
        if is_apart or free != name:
            special.add(free)
    ids[_MASK] = len(ids)
    return Vocabulary(
        layout=layout, ids=ids, id_of_piece=id_of_piece, special=frozenset(special),
        roles=_ROLES, in_transformers=in_transformers,
    )  # fmt: skip
