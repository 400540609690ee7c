"""Conversion as properties, through whole folders: any length, window, init and source.

The origin of each position row is computed here again, row by row and in float64.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longpretrain.convert import lengthen
from longpretrain.convert.lengthen import POSITIONS
from longpretrain.convert.position_rows import Init
from longpretrain.errors import InputError
from longpretrain.model import (
    LongformerForMaskedLM,
    ModelConfig,
    load_model,
    read_config,
    read_tensors,
    save_model,
)

convert = functools.partial(lengthen.convert, need_tokenizer=False)
VOCABULARY, LAYERS = 29, 2
LEARNT = st.sampled_from([1, 2, 5, 12, 17])
"""Lengths of sources; few, as each is written once."""
TARGETS = st.integers(2, 52)
INITS = st.sampled_from(get_args(Init))
KINDS = st.sampled_from(["roberta", "longformer"])
PADS = st.sampled_from([0, 1, 3])
LENGTHS = TARGETS.flatmap(lambda n: st.tuples(st.just(n), windows(n)))
"""Of a target, with windows that fit into it: one, or one per layer."""
ONE_WINDOW = TARGETS.flatmap(lambda n: st.tuples(st.just(n), window(n)))


def window(positions: int, least: int = 2) -> st.SearchStrategy[int]:
    return st.integers(-(-least // 2), positions // 2).map(lambda half: 2 * half)


def windows(positions: int, least: int = 2) -> st.SearchStrategy[Any]:
    one = window(positions, least)
    return one | st.lists(one, min_size=LAYERS, max_size=LAYERS)


class Folders:
    """Sources by what they are, and fresh names for targets."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = itertools.count()

    def new(self) -> Path:
        return self._folder / f"target-{next(self._count)}"

    @functools.cache  # noqa: B019 - lives as long as the module's tests
    def source(self, learnt: int, kind: Any, pad_id: int) -> Path:
        config = ModelConfig(
            model_type=kind, vocab_size=VOCABULARY, hidden_size=16, num_layers=LAYERS, num_heads=2,
            intermediate_size=24, max_position_embeddings=learnt + pad_id + 1, pad_id=pad_id,
            bos_id=27, eos_id=28, attention_window=(8,) * LAYERS if kind == "longformer" else (),
        )  # fmt: skip
        torch.manual_seed(learnt)
        model = LongformerForMaskedLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3)
        folder = self._folder / f"{kind}-{learnt}-{pad_id}"
        save_model(model, folder)
        return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("conversions"))


def expected_row(i: int, positions: int, learnt_PC: Tensor, init: str) -> Tensor | None:
    """Row i of the tokens; None where it is drawn."""
    learnt = len(learnt_PC)
    if init == "copy":
        return learnt_PC[i % learnt]
    if init == "random":
        return learnt_PC[i] if i < learnt else None
    place = i * (learnt - 1) / (positions - 1) if positions > 1 else 0.0
    low = min(int(place), learnt - 1)
    high = min(low + 1, learnt - 1)
    share = place - low
    return (1 - share) * learnt_PC[low] + share * learnt_PC[high]


@settings(max_examples=40)
@given(
    learnt=LEARNT, length=LENGTHS, init=INITS, kind=KINDS, pad_id=PADS,
    seed=st.integers(0, 2**32),
)  # fmt: skip
def test_where_every_number_comes_from(
    folders: Folders,
    learnt: int,
    length: Any,
    init: Any,
    kind: str,
    pad_id: int,
    seed: int,
) -> None:
    positions, chosen = length
    source, target = folders.source(learnt, kind, pad_id), folders.new()
    convert(source, target, positions=positions, attention_window=chosen, init=init, seed=seed)
    old, new = read_tensors(source), read_tensors(target)
    table_PC, kept = new.pop(POSITIONS), pad_id + 1
    assert table_PC.shape == (kept + positions, 16)
    assert table_PC[:kept].equal(old[POSITIONS][:kept])
    learnt_PC = old[POSITIONS][kept:].double()
    drawn = []
    for i, row_C in enumerate(table_PC[kept:].double()):
        wanted_C = expected_row(i, positions, learnt_PC, init)
        if wanted_C is None:
            drawn.append(row_C)
        elif init == "interpolate":
            assert (row_C - wanted_C).abs().max() <= 1e-6
        else:
            assert row_C.equal(wanted_C)
    if init == "interpolate":
        assert table_PC[kept].double().equal(learnt_PC[0])
        if positions > 1:
            assert table_PC[-1].double().equal(learnt_PC[-1])
    if drawn:
        values = torch.stack(drawn)
        assert 0 < values.abs().max() < 0.02 * 7
        assert not (values[:, None] == learnt_PC).all(dim=-1).any()
    for name, tensor in new.items():
        local = name if kind == "longformer" else name.replace("_global.", ".")
        assert tensor.equal(old[local]), name
    config = read_config(target)
    assert config.max_tokens == positions
    one_each = (chosen,) * LAYERS if isinstance(chosen, int) else tuple(chosen)
    assert config.attention_window == one_each
    assert config.learnt_positions == (0 if init == "interpolate" else min(learnt, positions))


def logits(folder: Path, tokens_BN: Tensor, padding_BN: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return load_model(folder)(tokens_BN, padding_BN=padding_BN)


@settings(max_examples=40)
@given(
    learnt=LEARNT, more=st.integers(0, 40), init=INITS, pad_id=PADS, data=st.data(),
)  # fmt: skip
def test_within_its_length_the_source_is_unchanged(
    folders: Folders, learnt: int, more: int, init: Any, pad_id: int, data: Any
) -> None:
    """Given windows that cover the text; stretched positions are other ones."""
    source, target = folders.source(learnt, "roberta", pad_id), folders.new()
    positions = max(2, learnt) + (0 if init == "interpolate" else more)
    if init == "interpolate" and positions != learnt:
        init = "copy"
    chosen = data.draw(windows(positions))
    convert(source, target, positions=positions, attention_window=chosen, init=init)
    reach = chosen if isinstance(chosen, int) else min(chosen)
    tokens = data.draw(st.integers(1, min(learnt, reach // 2 + 1)))
    generator = torch.Generator().manual_seed(more)
    tokens_BN = torch.randint(pad_id + 1, VOCABULARY, (2, tokens), generator=generator)
    padding_BN = torch.zeros(2, tokens, dtype=torch.bool)
    padding_BN[1, data.draw(st.integers(1, tokens)) :] = True
    tokens_BN[padding_BN] = pad_id
    wanted, found = (logits(folder, tokens_BN, padding_BN) for folder in (source, target))
    assert (found - wanted)[~padding_BN].abs().max() <= 1e-5


@settings(max_examples=12)
@given(learnt=LEARNT, length=ONE_WINDOW, init=INITS, kind=KINDS)
def test_converting_again_to_the_same_length_changes_nothing(
    folders: Folders, learnt: int, length: Any, init: Any, kind: str
) -> None:
    """Whatever init the second conversion has; and the first one, repeated, is the same."""
    positions, chosen = length
    source = folders.source(learnt, kind, 1)
    once, repeated = folders.new(), folders.new()
    for target in (once, repeated):
        convert(source, target, positions=positions, attention_window=chosen, init=init)
    right = read_tensors(once)
    assert all(x.equal(right[name]) for name, x in read_tensors(repeated).items())
    for its_init in get_args(Init):
        twice = folders.new()
        convert(once, twice, positions=positions, attention_window=chosen, init=its_init)
        found = read_tensors(twice)
        assert found.keys() == right.keys()
        assert all(found[name].equal(x) for name, x in right.items()), its_init
        config, first = read_config(twice), read_config(once)
        assert config == dataclasses.replace(first, learnt_positions=config.learnt_positions)


@settings(max_examples=12)
@given(
    learnt=LEARNT, more=st.integers(2, 40), init=st.sampled_from(["copy", "random"]),
    data=st.data(),
)  # fmt: skip
def test_a_shortened_model_computes_as_before(
    folders: Folders, learnt: int, more: int, init: Any, data: Any
) -> None:
    """Up to its new length, that is; it refuses longer inputs. There and back is the source."""
    source, long, short = folders.source(learnt, "longformer", 1), folders.new(), folders.new()
    positions = data.draw(st.integers(2, learnt + more))
    chosen = data.draw(window(positions))
    convert(source, long, positions=learnt + more, attention_window=chosen, init=init)
    convert(long, short, positions=positions, attention_window=chosen, init=init)
    tokens_BN = torch.randint(2, VOCABULARY, (1, positions + 1))
    wanted, found = (logits(folder, tokens_BN[:, :positions]) for folder in (long, short))
    assert torch.equal(found, wanted)
    with pytest.raises(InputError, match="tokens of a sequence"):
        logits(short, tokens_BN)
    back = folders.new()
    convert(short, back, positions=min(positions, learnt), init=init)
    old, new = read_tensors(source), read_tensors(back)
    rows = 2 + min(positions, learnt)
    assert new[POSITIONS].equal(old[POSITIONS][:rows])
    assert all(new[name].equal(x) for name, x in old.items() if name != POSITIONS)
