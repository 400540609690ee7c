"""Two models: which relation holds between them, and whether everything fits it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from longpretrain.convert.read import RECORD_NAME
from longpretrain.convert.verify_alone import check_alone
from longpretrain.convert.verify_ids import VECTORS, differing, some
from longpretrain.convert.verify_origin import origins
from longpretrain.convert.verify_outputs import OurModel, compare, covering, what
from longpretrain.convert.verify_report import TensorRow, VerifyReport, VerifyRow, failing
from longpretrain.convert.verify_side import Side
from longpretrain.convert.verify_text import LENGTHS, PADDED, TEXT, tokens, with_padding
from longpretrain.data.tokenizer import ByteLevelBPE, Tokenizer
from longpretrain.model.listing import listed
from longpretrain.model.weights import POSITIONS, are_twins

_SIZES = ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size")
_ALWAYS_EQUAL = (*_SIZES, "layer_norm_eps", "pad_id", "bos_id", "eos_id", "causal")
# Of models that are one; a conversion sets them anew.
_OF_ONE_MODEL = ("model_type", "max_position_embeddings", "attention_window")


@dataclass(frozen=True, kw_only=True)
class Relation:
    """What two models are to each other."""

    told: str
    """In words."""
    old: Side
    """The source of a conversion, or the first."""
    new: Side
    """What was made of it, or the second."""
    is_lengthened: bool
    """A conversion lies between them; else they are one model, whatever the format."""


def check_pair(first: Side, second: Side) -> VerifyReport:
    """All checks of two models that need no transformers."""
    relation = find_relation(first, second)
    old, new = relation.old, relation.new
    rows = [*_by_itself("first", first), *_by_itself("second", second)]
    rows += _check_config(relation)
    if not _same_sizes(old, new):
        return VerifyReport(rows=tuple(rows), relation=relation.told)
    tensors = tuple(origins(old, new, is_lengthened=relation.is_lengthened))
    rows = [*failing(tensors), _count(tensors), *_check_casts(relation), *rows]
    rows += [*_check_tokenizers(relation), *_check_outputs(relation, _swaps(relation, tensors))]
    return VerifyReport(
        rows=tuple(rows), relation=_relation_of(relation, tensors), tensors=tensors,
        notes=tuple(_notes(relation)),
    )  # fmt: skip


def find_relation(first: Side, second: Side) -> Relation:
    """By their kinds, lengths and windows, and by the record of a conversion."""
    for old, new, order in ((first, second, "second"), (second, first, "first")):
        if old is new or not _is_made_of(old, new):
            continue
        other = "first" if order == "second" else "second"
        told = f"the {order} is a model of {new.config.max_tokens:,} tokens made from the {other}"
        return Relation(told=told, old=old, new=new, is_lengthened=True)
    told = "the same model" if _same_sizes(first, second) else "none: two models of other sizes"
    return Relation(told=told, old=first, new=second, is_lengthened=False)


def _is_made_of(old: Side, new: Side) -> bool:
    one, two = old.config, new.config
    if two.model_type != "longformer" or not _same_sizes(old, new):
        return False
    if one.model_type == "roberta":
        return True
    if one.max_tokens == two.max_tokens and one.attention_window == two.attention_window:
        return False
    # Between two Longformers a record tells; without one the longer was made of the shorter.
    if _names_as_source(new, old) or _names_as_source(old, new):
        return _names_as_source(new, old)
    return one.max_tokens < two.max_tokens


def _names_as_source(new: Side, old: Side) -> bool:
    """Whether the record of a conversion has the other's files as its source."""
    named = (new.record or {}).get("source_files")
    if not isinstance(named, dict):
        return False
    own = old.source.own_hashes()
    weights = [n for n in named if str(n).endswith((".safetensors", ".bin", ".pt"))]
    return bool(weights) and all(own.get(name) == named[name] for name in weights)


def _same_sizes(first: Side, second: Side) -> bool:
    return all(getattr(first.config, n) == getattr(second.config, n) for n in _SIZES)


def _by_itself(which: str, side: Side) -> Iterator[VerifyRow]:
    rows, tensors = check_alone(side)
    bad = [*failing(tensors), *(row for row in rows if not row.ok)]
    for row in bad:
        yield dataclasses.replace(row, check=f"{which}: {row.check}")
    yield VerifyRow(
        check=f"{which}, by itself", got=f"{len(bad)} of its checks fail" if bad else side.title,
        limit=f"all {len(rows)} checks hold", ok=not bad,
    )  # fmt: skip


def _check_config(relation: Relation) -> Iterator[VerifyRow]:
    one, two = relation.old.config, relation.new.config
    names = [*_ALWAYS_EQUAL, *(() if relation.is_lengthened else _OF_ONE_MODEL)]
    wrong = [
        f"{name} {getattr(one, name)} and {getattr(two, name)}"
        for name in names
        if getattr(one, name) != getattr(two, name)
    ]
    dilations = [config.dilation for config in (one, two) if set(config.dilation) - {1}]
    if len(dilations) == 1 or len({*dilations}) > 1:
        wrong.append(f"dilation {list(one.dilation)} and {list(two.dilation)}")
    if relation.is_lengthened and two.learnt_positions:
        learnt = min(one.learnt_positions or one.max_tokens, two.max_tokens)
        if two.learnt_positions != learnt:
            wrong.append(f"learnt_positions {two.learnt_positions}, not {learnt}")
    yield VerifyRow(
        check="sizes and arithmetic", got="; ".join(wrong) or "equal",
        limit="equal but for length and windows" if relation.is_lengthened else "equal",
        ok=not wrong,
    )  # fmt: skip


def _count(tensors: tuple[TensorRow, ...]) -> VerifyRow:
    good = sum(row.ok for row in tensors)
    return VerifyRow(
        check="tensors that fit", got=str(good), limit=str(len(tensors)), ok=good == len(tensors)
    )


def _check_casts(relation: Relation) -> Iterator[VerifyRow]:
    """One type all through: a model of two is no cast of another."""
    one, two = relation.old.tensors, relation.new.tensors
    pairs = {(one[name].dtype, two[name].dtype) for name in one if name in two}
    names = [" to ".join(str(dtype).removeprefix("torch.") for dtype in pair) for pair in pairs]
    yield VerifyRow(
        check="types of numbers", got=", ".join(sorted(names)), limit="one pair", ok=len(pairs) == 1
    )


def _check_tokenizers(relation: Relation) -> Iterator[VerifyRow]:
    one, two = relation.old.tokenizer, relation.new.tokenizer
    if one is None and two is None:
        return
    if one is None or two is None:
        which = "source" if two is None else "new model" if relation.is_lengthened else "second"
        # A record of a conversion that brought none is the word of whoever made it.
        ok = one is None or relation.new.record is not None
        yield VerifyRow(
            check="tokenizers", got=f"only the {which} has one", limit="the same", ok=ok
        )
        return
    wrong = [] if one.fingerprint == two.fingerprint else _unlike(one, two)
    spaces = [getattr(tokenizer, "add_prefix_space", None) for tokenizer in (one, two)]
    if relation.old.family and relation.new.family and None not in spaces and len({*spaces}) > 1:
        wrong.append(f"add_prefix_space {spaces[0]} and {spaces[1]}")
    yield VerifyRow(
        check="tokenizers", got=some(wrong) or f"the same {len(two.vocab)} tokens",
        limit="the same", ok=not wrong,
    )  # fmt: skip


def _unlike(one: Tokenizer, two: Tokenizer) -> list[str]:
    """Of tokenizers that are not the same, to the byte: what they do otherwise.

    Rows without a token have names in some forms and none in others.
    """
    shared = one.vocab.keys() & two.vocab.keys()
    wrong = differing({n: one.vocab[n] for n in shared}, {n: two.vocab[n] for n in shared})
    if len(shared) < min(len(one.vocab), len(two.vocab)):
        wrong.append(f"{min(len(one.vocab), len(two.vocab)) - len(shared)} tokens only in one")
    if one.roles != two.roles:
        wrong.append(
            f"special tokens {', '.join(one.roles.names)} and {', '.join(two.roles.names)}"
        )
    if isinstance(one, ByteLevelBPE) and isinstance(two, ByteLevelBPE):
        applied = one.merges == two.merges
    else:  # one model in two forms: SentencePiece's own, and tokenizer.json
        applied = not isinstance(one, ByteLevelBPE) and not isinstance(two, ByteLevelBPE)
        applied = applied and (type(one) is not type(two) or len(one.vocab) != len(two.vocab))
        texts = (TEXT, *VECTORS)
        applied = applied and all((one.encode(t) == two.encode(t)).all() for t in texts)
    return [*wrong, "the same vocabulary, otherwise applied"] if not (wrong or applied) else wrong


def _swaps(relation: Relation, tensors: tuple[TensorRow, ...]) -> bool:
    """Whether outputs can only be equal on the source's position rows: they were interpolated."""
    fits = all(row.ok for row in tensors if row.name == POSITIONS)
    tables = [side.tensors.get(POSITIONS) for side in (relation.old, relation.new)]
    if not relation.is_lengthened or not fits or tables[0] is None or tables[1] is None:
        return False
    shorter = min(len(tables[0]), len(tables[1]))
    return not are_twins(tables[0][:shorter], tables[1][:shorter])


def _check_outputs(relation: Relation, swaps: bool) -> Iterator[VerifyRow]:
    """Up to the shorter one's length, with windows that see it all where they may differ."""
    old, new = relation.old, relation.new
    if not (old.is_whole and new.is_whole):
        return
    longest = min(old.config.max_tokens, new.config.max_tokens)
    lengths = sorted({min(length, longest) for length in LENGTHS})
    models = _in_memory(relation, lengths[-1], swaps)
    tokenizer, config = old.tokenizer or new.tokenizer, models[0].config
    name = what(config)
    window = ", windows over all" if relation.is_lengthened else ""
    window += " and the source's position rows" if swaps else ""
    for length in lengths:
        tokens_BN = tokens(tokenizer, config, length)
        got, wanted = (model.output(tokens_BN) for model in models)
        yield compare(f"{name}, {length} tokens{window}", got, wanted)
    length = min(PADDED, longest)
    tokens_BN, padding_BN = with_padding(tokens(tokenizer, config, length), config.pad_id)
    got, wanted = (model.output(tokens_BN, padding_BN)[~padding_BN] for model in models)
    yield compare(f"{name}, {length} tokens with padding", got, wanted)
    if {model.config.model_type for model in models} == {"longformer"}:
        got, wanted = (model.output(tokens_BN[:1], global_first=True) for model in models)
        yield compare(f"{name}, {length} tokens, the first global", got, wanted)


def _in_memory(relation: Relation, longest: int, swaps: bool) -> list[OurModel]:
    """Both as the narrower type has them: what rounding moves is no difference of theirs."""
    sides = (relation.old, relation.new)
    has_lm_head = all(side.config.has_lm_head for side in sides)
    models = []
    for side, other in (sides, sides[::-1]):
        config = dataclasses.replace(side.config, has_lm_head=has_lm_head)
        if relation.is_lengthened:
            config = covering(config, longest)
        dtypes = {tensor.dtype for tensor in (*side.tensors.values(), *other.tensors.values())}
        narrow = min(dtypes, key=lambda dtype: dtype.itemsize)
        tensors = {n: t.to(narrow) for n, t in side.weights().items()}
        if swaps:
            tables = [one.tensors[POSITIONS].to(narrow) for one in sides]
            shorter = min(map(len, tables))
            tensors[POSITIONS] = torch.cat([tables[0][:shorter], tensors[POSITIONS][shorter:]])
        models.append(OurModel(config, tensors))
    return models


def _notes(relation: Relation) -> Iterator[str]:
    old, new = relation.old, relation.new
    for side in (old, new):
        if side.left_out:
            yield f"{side.path.name}: left out {listed(side.left_out, ', ')}"
        yield from (f"{side.path.name}: {note}" for note in side.source.notes)
    if relation.is_lengthened and new.record is not None and not _names_as_source(new, old):
        yield f"{RECORD_NAME} names other files as its source: the same model in another form?"


def _relation_of(relation: Relation, tensors: tuple[TensorRow, ...]) -> str:
    """The relation that was looked for, or how far it is from holding."""
    wrong = sum(not row.ok for row in tensors)
    if not wrong:
        kinds = {row.dtype for row in tensors if "rounded" in row.origin}
        return relation.told + (f", rounded to {', '.join(map(str, kinds))}" if kinds else "")
    if 2 * wrong < len(tensors):
        return f"{relation.told}, but for {wrong} tensors"
    kind = "a conversion, then training" if relation.is_lengthened else "training"
    return f"none that verify can prove: {wrong} tensors differ, as after {kind}"
