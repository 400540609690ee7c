"""Every damage that is planted in a good conversion is found, by the check that is named here.

Three ways: the model alone; the model alone as somebody hands it on, without the record of its
conversion; and beside its source. Beside its source everything is found. Alone, without the record,
nobody can tell a transposed weight from one that was trained so: an empty list says it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import planted
import pytest
import torch
from family_models import make_family
from planted import DENSE, POSITIONS, QUERY, WORDS

from longpretrain.convert import VerifyReport, convert, verify
from longpretrain.convert.verify_ids import check_ids
from longpretrain.convert.verify_side import open_side
from longpretrain.data.tokenizer import load_tokenizer

FILES, RECORD = "files since the conversion", "length and windows of the conversion"
SUMMARIES = ("tensors that fit", "second, by itself")
QUERY_0, GLOBAL = QUERY.replace("layer.1", "layer.0"), QUERY.replace("query", "query_global")
INNER = f"{planted.LAYER}.0.intermediate.dense.weight"
EXTRA = f"{planted.LAYER}.2.attention.self.query.weight"
HEAD, BIAS = "lm_head.decoder.weight", "lm_head.decoder.bias"
ROWS, REPEAT, PADDING = (f"position rows {of}" for of in ("of tokens", "repeat", "of padding"))
GLOBALS, TIED, ODD = "global projections", "decoder tied", "tensors too many or misshapen"
SIZES = "sizes and arithmetic"

# What is planted -> checks that find it in the model alone, and those that find it beside the
# source; both without the record.
CASES: dict[str, tuple[planted.Plant, list[str], list[str]]] = {
    "two tensors swapped": (planted.swapped_tensors, [GLOBALS], [QUERY, QUERY_0, "logits"]),
    "table shifted": (planted.table_shifted, [ROWS, REPEAT], [POSITIONS, "logits"]),
    "tiles off by one": (planted.tiles_off_by_one, [ROWS], [POSITIONS, "logits"]),
    "row off by one": (planted.row_off_by_one, [REPEAT], [POSITIONS]),
    "untied head": (planted.untied_head, [HEAD, TIED], []),
    "untied bias": (planted.untied_bias, [BIAS, TIED], []),
    "transposed weight": (planted.transposed, [], [DENSE, "logits"]),
    "flipped sign": (planted.flipped_sign, [], [DENSE, "logits"]),
    "flipped bit": (planted.flipped_bit, [], [DENSE]),
    "rounded": (planted.rounded_tensor, [DENSE, "rounding of the weights"], [DENSE, "logits"]),
    "half": (planted.half_tensor, ["dtype of the weights"], ["types of numbers"]),
    "unfilled padding": (planted.unfilled_padding_row, [PADDING], [POSITIONS]),
    "huge padding": (planted.huge_padding_row, [PADDING], [POSITIONS]),
    "huge padding word": (
        planted.unfilled_padding_word, ["word row of padding", "logits"], [WORDS, "logits"],
    ),
    "global no copy": (planted.global_no_copy, [GLOBALS], [GLOBAL]),
    "swapped ids": (planted.swapped_ids, [], ["tokenizers"]),
    "swapped ids in one file": (planted.swapped_ids_in_one_file, ["vocabulary"], []),
    "wrong eos id": (planted.in_config(eos_token_id=3), ["special ids"], [SIZES]),
    "wrong pad id": (
        planted.in_config(pad_token_id=0), [REPEAT, "special ids"], [SIZES, "logits"],
    ),
    "other LayerNorm": (planted.in_config(layer_norm_eps=1e-12), [], [SIZES, "logits"]),
    "halved windows": (planted.in_config(attention_window=[8, 8]), [], []),
    "wrong learnt rows": (
        planted.in_config(longpretrain={"learnt_positions": 63}), [REPEAT], [SIZES],
    ),
    "merges swapped": (planted.swapped_merges, ["vocabulary"], ["tokenizers"]),
    "no merges in one file": (planted.cut_merges, ["vocabulary"], []),
    "too long texts": (planted.too_long_texts, ["longest text of the tokenizer"], []),
    "another class": (
        planted.in_config(architectures=["LongformerModel"]), ["class in config.json"], [],
    ),
    "missing": (planted.missing_tensor, [DENSE, "tensors missing"], [DENSE]),
    "extra": (planted.extra_tensor, [EXTRA, ODD], []),
    "other shape": (planted.other_shape, [INNER, ODD], [INNER]),
    "NaN": (planted.not_a_number, [DENSE, "weights finite", "logits"], [DENSE, "logits"]),
}  # fmt: skip
# Damage that the record itself shows, were it written after the damage was done.
IN_THE_RECORD = {"wrong pad id", "halved windows"}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small RoBERTa, and the long model made of it."""
    folder = tmp_path_factory.mktemp("good")
    short = make_family(folder / "short", "roberta")
    convert(short, folder / "long", positions=160, attention_window=16)
    return short, folder / "long"


def failed(report: VerifyReport) -> set[str]:
    """What fails: outputs of all lengths as one, without rows that only sum up."""
    names = [row.check for row in report.rows if not row.ok]
    return {"logits" if n.startswith("logits") else n for n in names if n not in SUMMARIES}


@pytest.mark.parametrize("case", CASES)
def test_planted_damage_is_found(case: str, good: tuple[Path, Path], tmp_path: Path) -> None:
    plant, alone, beside = CASES[case]
    short, bad = good[0], tmp_path / "bad"
    shutil.copytree(good[1], bad)
    plant(bad)
    of_record = {RECORD} if case in IN_THE_RECORD else set()
    assert failed(verify(bad)) == {*alone, FILES, *of_record}
    assert f"second: {FILES}" in failed(verify(short, bad))
    planted.forge_record(bad)
    # Of the model alone a pair has all that needs no transformers.
    own = {f"second: {n}" for n in {*alone, *of_record} - {"logits"}}
    found = failed(verify(short, bad))
    assert found == {*beside, *own}
    assert found, "beside its source everything is found"
    planted.forget_record(bad)
    assert failed(verify(bad)) == {*alone}


def test_nothing_is_found_in_the_good_ones(good: tuple[Path, Path]) -> None:
    for report in (verify(good[0]), verify(good[1]), verify(*good), verify(*good[::-1])):
        assert report.ok, report.lines()
    looked_for = {row.check for row in (*verify(good[1]).rows, *verify(*good).rows)}
    for _, alone, beside in CASES.values():
        named = {*alone, *beside} - {"logits"}
        assert all(name in looked_for or "." in name for name in named), named


def test_beside_its_source_a_tensor_tells_what_it_is(
    good: tuple[Path, Path], tmp_path: Path
) -> None:
    def told(plant: planted.Plant, name: str) -> tuple[str, str]:
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(good[1], tmp_path / "bad")
        plant(tmp_path / "bad")
        (row,) = (row for row in verify(good[0], tmp_path / "bad").tensors if row.name == name)
        assert not row.ok
        return row.origin, row.limit

    origin, limit = told(planted.swapped_tensors, QUERY)
    assert (origin[:10], limit) == ("differs by", "equal bit for bit")
    assert origin.endswith(f"it is the source's {QUERY_0}")
    assert told(planted.rounded_tensor, DENSE)[0].endswith("the new model is rounded to float16")
    assert told(planted.transposed, DENSE)[0].endswith("the one is the other transposed")
    assert " in 1 of 1,024 numbers" in told(planted.flipped_bit, DENSE)[0]
    origin, limit = told(planted.tiles_off_by_one, POSITIONS)
    assert "160 of 160 rows are wrong, shifted by -1: row 2 is the source's 1, not 2" in origin
    assert limit == "64 learnt rows copied end to end over 160, after the 2 of padding"
    wanted = "position rows: row 0 of padding is not the source's"
    assert told(planted.huge_padding_row, POSITIONS)[0] == wanted
    assert told(planted.missing_tensor, DENSE) == ("only in the source", "in both")
    limit = "a copy of the source's local projection"
    assert told(planted.global_no_copy, GLOBAL)[1] == limit


def test_robertas_own_vocabulary_with_two_ids_swapped_is_found_alone(tmp_path: Path) -> None:
    tokenizer = load_tokenizer()
    folder = make_family(
        tmp_path, "roberta", tokenizer=None, vocab_size=tokenizer.vocab_size, hidden=4
    )
    tokenizer.save(folder, max_tokens=64)
    planted.swapped_ids(folder)
    (row,) = (row for row in check_ids(open_side(folder)) if not row.ok)
    assert row.check == "vocabulary"
    assert row.got.startswith("RoBERTa's: 'e' is 90 and 242, 't' is 242 and 90")


def test_a_tokenizer_that_does_more_than_its_source(
    good: tuple[Path, Path], tmp_path: Path
) -> None:
    """With the same ids; alone it shows under transformers 5, which makes the tokenizer anew."""
    shutil.copytree(good[1], tmp_path / "bad")
    planted.lower_case(tmp_path / "bad")
    planted.forget_record(tmp_path / "bad")
    assert failed(verify(good[0], tmp_path / "bad")) == {"tokenizers"}


def test_a_prefix_that_transformers_does_not_know_is_found(
    good: tuple[Path, Path], tmp_path: Path
) -> None:
    """The commonest complaint: a long model under RoBERTa's names loads, with random weights."""
    shutil.copytree(good[1], tmp_path / "bad")

    @planted.in_tensors
    def rename(tensors: planted.Tensors) -> None:
        for name in [name for name in tensors if name.startswith("longformer.")]:
            tensors[name.replace("longformer.", "roberta.", 1)] = tensors.pop(name)

    rename(tmp_path / "bad")
    planted.forget_record(tmp_path / "bad")
    report = verify(tmp_path / "bad")
    (row,) = (row for row in report.rows if row.check.endswith("loads every tensor"))
    assert not row.ok
    if row.got.startswith("transformers fails"):  # 4.57 sees that something is wrong
        assert "is corrupted" in row.got
    else:
        assert "missing_keys longformer.embeddings.LayerNorm.bias" in row.got
        assert "logits" in failed(report)


def _of_odd_type(tensors: planted.Tensors) -> None:
    tensors[DENSE] = tensors[DENSE].to(torch.float8_e4m3fn)


def _of_odd_name(tensors: planted.Tensors) -> None:
    tensors["odd\x1b[31mname"] = torch.zeros(2, dtype=torch.complex64)


def _with_little_left(tensors: planted.Tensors) -> None:
    for name in [*tensors][1:]:
        del tensors[name]


def _in_record(**changes: object) -> planted.Plant:
    def plant(folder: Path) -> None:
        path = folder / "conversion.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return plant


ODD_FOLDERS = {
    "type of numbers": planted.in_tensors(_of_odd_type),
    "name": planted.in_tensors(_of_odd_name),
    "nothing left": planted.in_tensors(_with_little_left),
    "no files in the record": _in_record(files=[]),
    "files of no folder in the record": _in_record(files={"../x": 1, "a": None}),
    "seed of the record": _in_record(init="random", seed=1 << 80),
    "windows of the record": _in_record(attention_window={"\x1b[31m": 1}),
    "vocabulary": lambda folder: (folder / "vocab.json").write_text('{"a": "b"}') and None,
    "no tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}") and None,
}


@pytest.mark.parametrize("case", ODD_FOLDERS)
def test_odd_folders_are_reported(case: str, good: tuple[Path, Path], tmp_path: Path) -> None:
    """Nothing that a folder holds ends in a traceback, or reaches the terminal as it is."""
    shutil.copytree(good[1], tmp_path / "bad")
    ODD_FOLDERS[case](tmp_path / "bad")
    for report in (verify(good[0], tmp_path / "bad"), verify(tmp_path / "bad", good[0])):
        assert not report.ok
        assert "\x1b" not in str(report)
    report = verify(tmp_path / "bad")
    assert report.ok == (case == "seed of the record"), "which only its source can tell"
    assert json.loads(json.dumps(report.tree("a"), allow_nan=False))["tensors"]
