"""That transformers makes the same of a folder as we: every tensor, every output, every id."""

from __future__ import annotations

from collections.abc import Iterator

from longpretrain.convert import theirs
from longpretrain.convert.theirs import TheirModel
from longpretrain.convert.verify_ids import VECTORS, differing, some
from longpretrain.convert.verify_outputs import OurModel, compare, what
from longpretrain.convert.verify_report import VerifyRow
from longpretrain.convert.verify_side import Side
from longpretrain.convert.verify_text import LENGTHS, PADDED, TEXT, tokens, with_padding
from longpretrain.data.tokenizer import ByteLevelBPE, Tokenizer
from longpretrain.model import config_json, stored_names
from longpretrain.model.families import is_left_out, is_no_weight
from longpretrain.model.listing import listed


def check_with_transformers(side: Side) -> Iterator[VerifyRow]:
    """All checks against transformers, of a model whose tensors are all there."""
    model = _their_model(side)
    problem = model if isinstance(model, str) else listed(model.problems)
    yield VerifyRow(
        check=f"transformers {theirs.version()} loads every tensor",
        got=problem or getattr(model, "kind", ""),
        limit="no missing or unexpected key", ok=not problem,
    )  # fmt: skip
    if not isinstance(model, str):
        if side.config.has_lm_head:
            yield _check_ties(model)
        yield from _check_outputs(side, model)
    if side.tokenizer is not None and side.family:
        yield _check_tokenizer(side, side.tokenizer)


def _check_ties(model: TheirModel) -> VerifyRow:
    weight, bias = model.ties
    got = "yes" if weight and bias else f"weight {weight}, bias {bias}"
    return VerifyRow(
        check="tied in transformers", got=got, limit="decoder and its bias", ok=weight and bias
    )


def _their_model(side: Side) -> TheirModel | str:
    """The folder as transformers loads it; of a fairseq checkpoint, a model of its tensors."""
    masked_lm, family = side.config.has_lm_head, side.family
    if family is None:
        names = stored_names(side.config)
        tensors = {stored: side.tensors[name] for name, stored in names.items()}
        return theirs.build(config_json(side.config), tensors, masked_lm=masked_lm)

    def is_known(name: str) -> bool:
        # Of what it makes anew it tells the name in its own class, which may have no prefix.
        ours = {family.in_memory(name, prefix) for prefix in (side.prefix, family.prefix, "")}
        return any(is_left_out(one) or is_no_weight(one) for one in ours)

    return theirs.load(side.path, masked_lm=masked_lm, is_known=is_known)


def _check_outputs(side: Side, model: TheirModel) -> Iterator[VerifyRow]:
    config, name = side.config, what(side.config)
    ours = OurModel(config, side.tensors)
    for length in sorted({min(length, config.max_tokens) for length in LENGTHS}):
        tokens_BN = tokens(side.tokenizer, config, length)
        wanted = model.output(tokens_BN)
        yield compare(f"{name}, {length} tokens", ours.output(tokens_BN), wanted)
        if isinstance(wanted, str):
            return
    length = min(PADDED, config.max_tokens)
    tokens_BN, padding_BN = with_padding(tokens(side.tokenizer, config, length), config.pad_id)
    got, wanted = ours.output(tokens_BN, padding_BN), model.output(tokens_BN, padding_BN)
    if not isinstance(wanted, str):
        got, wanted = got[~padding_BN], wanted[~padding_BN]
    yield compare(f"{name}, {length} tokens with padding", got, wanted)
    if config.model_type == "longformer":
        got = ours.output(tokens_BN[:1], global_first=True)
        wanted = model.output(tokens_BN[:1], global_first=True)
        yield compare(f"{name}, {length} tokens, the first global", got, wanted)


def _check_tokenizer(side: Side, ours: Tokenizer) -> VerifyRow:
    check, limit = "tokenizers agree", "the same ids"
    their = theirs.load_tokenizer(side.path)
    if isinstance(their, str):
        return VerifyRow(check=check, got=their, limit=limit, ok=False)
    texts = {TEXT: "the text", **{text: repr(text) for text in VECTORS}}
    # Ours never puts a space there by itself; with it, the ids must be the same.
    prefix = " " if isinstance(ours, ByteLevelBPE) and ours.add_prefix_space else ""
    wrong = []
    for text, name in texts.items():
        ids = ours.encode(prefix * (text[0] != " ") + text).tolist()
        if ids != their.encode(text):
            wrong.append(name)
        elif [ours.bos_id, *ids, ours.eos_id] != their.encode(text, special=True):
            wrong.append(f"{name} between special tokens")
    special = {"bos": ours.bos_id, "eos": ours.eos_id}
    for role in ("pad", "mask"):
        if (name := getattr(ours.roles, role)) is not None:
            special[role] = ours.vocab[name]
    cls = {"bos": "cls", "eos": "sep"}
    wrong += [
        f"{role} token"
        for role, number in special.items()
        if number not in (their.id_of(role), their.id_of(cls.get(role, role)))
    ]
    vocab = their.vocab
    shared = {token: number for token, number in ours.vocab.items() if token in vocab}
    if different := differing(shared, {token: vocab[token] for token in shared}):
        wrong.append(some(different))
    count = len(ours.encode(TEXT))
    return VerifyRow(
        check=check, got=f"not on {', '.join(wrong)}" if wrong else f"{count} ids", limit=limit,
        ok=not wrong,
    )  # fmt: skip
