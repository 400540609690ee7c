"""Tokenizers of every family: transformers' ids from the family's own files and, carried over by
convert, from the Longformer folder, whichever transformers runs these tests.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_models import FAMILIES, HARD_TEXT, make_family, sample_text, write_tokenizer
from transformers import AutoTokenizer

from longpretrain.convert.lengthen import convert
from longpretrain.data import load_tokenizer, tokenizer_files
from longpretrain.data.sentence_piece import SentencePieceTokenizer
from longpretrain.data.tokenizer import Tokenizer
from longpretrain.errors import InputError

FORMS = ("published", "files", "json")
POSITIONS = 128
# A character of each few of Unicode, between letters and after a space; none that is unassigned in
# one of the libraries' tables and not in the other's.
EVERYWHERE = "".join(
    f"a{chr(i)}1 {chr(i)}."
    for i in (*range(0x20, 0x3000, 7), *range(0x3000, 0xD800, 97), *range(0xE000, 0x20000, 101))
)
TEXTS = {**HARD_TEXT, "prose": sample_text()[:20_000], "everywhere": EVERYWHERE}

NAMES = {
    "roberta": "RoBERTa", "distilroberta": "DistilRoBERTa", "camembert": "CamemBERT",
    "xlm-roberta": "XLM-RoBERTa", "bert": "BERT", "minilm": "MiniLM", "longformer": "Longformer",
}  # fmt: skip
proves = {
    family: pytest.mark.conversion(
        family=name, direction="tokenizer -> Longformer",
        checked="ids, special ids and length as transformers' own, on hard text",
    )
    for family, name in NAMES.items()
}  # fmt: skip


def named(model_type: str, folder: Path) -> Path:
    """The folder, with as much of a config.json as AutoTokenizer looks at."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def theirs_of(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def without_special(theirs: Any, text: str) -> list[int]:
    return list(theirs(text, add_special_tokens=False).input_ids)


def need_same_ids(ours: Tokenizer, theirs: Any, texts: Sequence[str] = tuple(TEXTS)) -> None:
    for name in texts:
        assert ours.encode(TEXTS[name]).tolist() == without_special(theirs, TEXTS[name]), name


def need_same_special_ids(ours: Tokenizer, theirs: Any) -> None:
    roles = {"bos": "cls", "eos": "sep", "pad": "pad", "mask": "mask", "unk": "unk"}
    found = {role: getattr(ours, f"{role}_id") for role in roles}
    assert found == {role: getattr(theirs, f"{name}_token_id") for role, name in roles.items()}


def save_as_longformer(tokenizer: Tokenizer, folder: Path, max_tokens: int = POSITIONS) -> Path:
    folder.mkdir()
    tokenizer.save(folder, max_tokens)
    return named("longformer", folder)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", [pytest.param(name, marks=proves[name]) for name in FAMILIES])
def test_ids_before_and_after_convert(tmp_path: Path, family: str, form: Any) -> None:
    source = make_family(tmp_path / "source", family, tokenizer=form, hidden=8, layers=1)
    convert(source, tmp_path / "long", positions=POSITIONS, attention_window=8)
    assert json.loads((tmp_path / "long/config.json").read_text())["model_type"] == "longformer"
    ours, again = load_tokenizer(source), load_tokenizer(tmp_path / "long")
    before, after = theirs_of(source), theirs_of(tmp_path / "long")
    need_same_ids(ours, before)
    need_same_special_ids(ours, before)
    need_same_ids(again, after)
    need_same_special_ids(again, after)
    assert (again.fingerprint, again.vocab) == (ours.fingerprint, ours.vocab)
    # What a user of the new folder gets is what the source gave, but for its length.
    assert (before.model_max_length, after.model_max_length) == (64, POSITIONS)
    assert len(after) == len(before) == ours.vocab_size
    assert (after.bos_token_id, after.eos_token_id) == (after.cls_token_id, after.sep_token_id)
    for text in HARD_TEXT.values():
        assert after(text).input_ids == before(text).input_ids
    # Without tokenizer.json transformers 5 forgets that RoBERTa's mask takes the space before it.
    write_tokenizer(named(FAMILIES[family].model_type, tmp_path), family)
    text = f"The {before.mask_token}. People"
    assert after(text).input_ids == theirs_of(tmp_path)(text).input_ids
    pair, wanted = (dict(theirs("the people", "1776")) for theirs in (after, before))
    assert pair["input_ids"] == wanted["input_ids"]
    assert pair.get("token_type_ids") == wanted.get("token_type_ids")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["roberta", "camembert", "xlm-roberta", "bert", "longformer"])
def test_what_transformers_saved(tmp_path: Path, family: str, form: Any) -> None:
    """transformers 4 and 5 write other files, and other settings in them, than the hub has."""
    write_tokenizer(tmp_path / "hub", family, form=form)
    source = tmp_path / "source"
    theirs_of(named(FAMILIES[family].model_type, tmp_path / "hub")).save_pretrained(source)
    ours = load_tokenizer(named(FAMILIES[family].model_type, source))
    need_same_ids(ours, theirs_of(source), tuple(HARD_TEXT))
    after = theirs_of(save_as_longformer(ours, tmp_path / "saved"))
    need_same_ids(ours, after, tuple(HARD_TEXT))
    need_same_special_ids(ours, after)


OTHERS_SETTINGS = {
    "of transformers 5": {
        "tokenizer_class": "TokenizersBackend", "backend": "tokenizers", "is_local": True,
        "extra_special_tokens": ["<s>NOTUSED", "</s>NOTUSED"],
    },
    "of transformers 4": {"tokenizer_class": "CamembertTokenizerFast", "extra_special_tokens": {}},
    "code of a stranger": {"auto_map": {"AutoTokenizer": [None, "theirs.Tokenizer"]}},
}  # fmt: skip


@pytest.mark.parametrize("settings", OTHERS_SETTINGS.values(), ids=OTHERS_SETTINGS)
def test_settings_that_only_one_transformers_reads_are_not_carried(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    write_tokenizer(tmp_path / "hub", "camembert", form="json")
    path = tmp_path / "hub" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    ours = load_tokenizer(named("camembert", tmp_path / "hub"))
    after = theirs_of(save_as_longformer(ours, tmp_path / "saved"))
    need_same_ids(ours, after, tuple(HARD_TEXT))
    need_same_special_ids(ours, after)
    assert after.model_max_length == POSITIONS


BERTS_SETTINGS: dict[str, dict[str, Any]] = {
    "uncased": {},
    "cased": {"do_lower_case": False},
    "accents kept": {"strip_accents": False},
    "accents of cased stripped": {"do_lower_case": False, "strip_accents": True},
    "chinese words": {"tokenize_chinese_chars": False},
    "nulls": {"strip_accents": None, "never_split": None},
}


class TestBert:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize("settings", BERTS_SETTINGS.values(), ids=BERTS_SETTINGS)
    def test_settings_count_above_tokenizer_json(
        self, tmp_path: Path, settings: dict[str, Any], form: Any
    ) -> None:
        folder = self.with_settings(tmp_path / "bert", settings, form)
        ours, before = load_tokenizer(folder), theirs_of(folder)
        need_same_ids(ours, before)
        after = theirs_of(save_as_longformer(ours, tmp_path / "saved"))
        need_same_ids(ours, after)
        assert load_tokenizer(tmp_path / "saved").fingerprint == ours.fingerprint
        plain = load_tokenizer(self.with_settings(tmp_path / "plain", {}, form))
        changed = any(
            not np.array_equal(ours.encode(text), plain.encode(text)) for text in TEXTS.values()
        )
        assert changed == any(value is not None for value in settings.values())

    @pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "BertTokenizer", None])
    def test_only_berts_class_has_them(self, tmp_path: Path, kind: str | None) -> None:
        settings = {"do_lower_case": False, "tokenizer_class": kind}
        folder = self.with_settings(tmp_path / "bert", settings, "json")
        ours = load_tokenizer(named("bert", folder))
        need_same_ids(ours, theirs_of(folder))
        upper = ours.encode("PEOPLE").tolist()
        assert (upper == ours.encode("people").tolist()) == (kind == "PreTrainedTokenizerFast")

    def test_vocab_txt_alone_is_the_same_tokenizer(self, tmp_path: Path) -> None:
        alone, whole = (
            load_tokenizer(self.with_settings(tmp_path / form, {}, form))
            for form in ("files", "published")
        )
        assert alone.fingerprint == whole.fingerprint
        assert (alone.special_ids, alone.bos_id, alone.eos_id) == (whole.special_ids, 4, 5)
        assert np.array_equal(alone.real_ids, whole.real_ids)
        assert not {1, 2} & {*alone.real_ids.tolist()}  # [unused0], [unused1]
        assert alone.decode(alone.encode("the people")) == "the people"

    def test_special_names_in_text_are_text(self, tmp_path: Path) -> None:
        ours = load_tokenizer(self.with_settings(tmp_path, {}, "files"))
        found = set(ours.encode("[MASK] the [SEP] people [PAD][CLS]").tolist())
        assert not found & (ours.special_ids - {ours.unk_id})

    @pytest.mark.parametrize("end", ["\n", "\r\n", ""])
    def test_lines_of_vocab_txt(self, tmp_path: Path, end: str) -> None:
        self.with_settings(tmp_path, {}, "files")
        path = tmp_path / "vocab.txt"
        path.write_bytes(path.read_text().strip().replace("\n", end or "\n").encode())
        need_same_ids(load_tokenizer(tmp_path), theirs_of(tmp_path), tuple(HARD_TEXT))

    def test_tokens_added_to_the_vocabulary(self, tmp_path: Path) -> None:
        folder = self.with_settings(tmp_path / "bert", {}, "files")
        size = load_tokenizer(folder).vocab_size
        (folder / "added_tokens.json").write_text(json.dumps({"longpre": size}))
        ours, before = load_tokenizer(folder), theirs_of(folder)
        assert ours.vocab_size == size + 1
        text = "the longpre people"
        assert ours.encode(text).tolist() == without_special(before, text)
        assert size in ours.encode(text)
        after = theirs_of(save_as_longformer(ours, tmp_path / "saved"))
        assert without_special(after, text) == ours.encode(text).tolist()
        (folder / "added_tokens.json").write_text(json.dumps({"longpre": size + 1}))
        with pytest.raises(
            InputError, match=rf"added token 'longpre' cannot have the id {size + 1}"
        ):
            load_tokenizer(folder)

    @pytest.mark.parametrize(
        ("settings", "config", "got"),
        [
            (
                {"tokenizer_class": "BertJapaneseTokenizer"},
                {},
                "the tokenizer BertJapaneseTokenizer",
            ),
            (
                {"tokenizer_class": None},
                {"tokenizer_class": "PhobertTokenizer"},
                "PhobertTokenizer",
            ),
            ({"tokenizer_class": None}, {"model_type": "roberta"}, "the tokenizer that of roberta"),
        ],
    )
    def test_vocab_txt_of_another_tokenizer(
        self, tmp_path: Path, settings: dict[str, Any], config: dict[str, Any], got: str
    ) -> None:
        self.with_settings(tmp_path, settings, "files")
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(InputError, match=f"{got}; wanted BERT's WordPiece .* --tokenizer"):
            load_tokenizer(tmp_path)

    def test_vocab_txt_beside_codes_of_a_bpe(self, tmp_path: Path) -> None:
        self.with_settings(tmp_path, {"tokenizer_class": None}, "files")
        (tmp_path / "bpe.codes").touch()
        with pytest.raises(InputError, match=r"got vocab.txt beside bpe.codes; wanted BERT's"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("name", ["[UNK]", "[SEP]"])
    def test_vocab_txt_without_a_special_token(self, tmp_path: Path, name: str) -> None:
        self.with_settings(tmp_path, {}, "files")
        path = tmp_path / "vocab.txt"
        path.write_text(path.read_text().replace(name, "word"))
        role = {"[UNK]": "unk", "[SEP]": "eos"}[name]
        with pytest.raises(InputError, match=f"got ValueError no {role} token in vocab.txt of"):
            load_tokenizer(tmp_path)

    def test_a_truncation_of_the_source_is_not_the_long_models(self, tmp_path: Path) -> None:
        """all-MiniLM's tokenizer.json cuts every text at 128 tokens and pads to it."""
        import tokenizers

        folder = self.with_settings(tmp_path / "bert", {}, "json")
        whole = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        whole.enable_truncation(8)
        whole.enable_padding(length=8)
        whole.save(str(folder / "tokenizer.json"))
        save_as_longformer(load_tokenizer(folder), tmp_path / "saved")
        saved = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
        assert (saved.truncation, saved.padding) == (None, None)
        assert len(saved.encode("the people " * 50).ids) > 100

    @staticmethod
    def with_settings(folder: Path, settings: dict[str, Any], form: Any) -> Path:
        write_tokenizer(folder, "bert", form=form)
        path = folder / "tokenizer_config.json"
        whole = json.loads(path.read_text()) | settings
        if "tokenizer_class" in settings and settings["tokenizer_class"] is None:
            del whole["tokenizer_class"]
        path.write_text(json.dumps(whole))
        return folder


@proves["xlm-roberta"]
@pytest.mark.parametrize("form", ["files", "json"])
def test_xlm_r_of_250_002_ids(tmp_path: Path, form: str) -> None:
    """The published size: ids beyond 65,535 and the mask behind them all."""
    from sentencepiece import sentencepiece_model_pb2 as model_proto

    source = tmp_path / "source"
    write_tokenizer(source, "xlm-roberta", form="published")
    model, library = source / "sentencepiece.bpe.model", source / "tokenizer.json"
    proto = model_proto.ModelProto.FromString(model.read_bytes())
    more = [f"\u2581n{number}" for number in range(len(proto.pieces), 250_000)]
    if form == "files":
        for name in more:
            proto.pieces.add(piece=name, score=-20.0)
        model.write_bytes(proto.SerializeToString())
        library.unlink()
    else:
        tree = json.loads(library.read_text())
        vocab = tree["model"]["vocab"]
        tree["model"]["vocab"] = [*vocab[:-1], *([name, -20.0] for name in more), vocab[-1]]
        tree["added_tokens"][-1]["id"] = 250_001
        library.write_text(json.dumps(tree))
        model.unlink()
    ours = load_tokenizer(named("xlm-roberta", source))
    assert (ours.vocab_size, ours.mask_id, ours.id_dtype) == (250_002, 250_001, np.uint32)
    assert isinstance(ours, SentencePieceTokenizer) == (form == "files")
    after = theirs_of(save_as_longformer(ours, tmp_path / "saved", 4096))
    assert (len(after), after.model_max_length) == (250_002, 4096)
    need_same_special_ids(ours, after)
    need_same_ids(ours, after, ("accents", "cjk", "prose"))
    text = "the n249999 people n70000"
    assert 250_000 in ours.encode(text)
    assert ours.encode(text).tolist() == without_special(after, text)


def test_a_folder_keeps_its_vocabulary_for_other_tools(tmp_path: Path) -> None:
    kept = {
        "bert": {"vocab.txt"},
        "camembert": {"sentencepiece.bpe.model"},
        "roberta": {"vocab.json", "merges.txt"},
    }
    for family, names in kept.items():
        write_tokenizer(tmp_path / family, family)
        saved = save_as_longformer(load_tokenizer(tmp_path / family), tmp_path / f"{family} saved")
        found = {path.name for path in saved.iterdir()} & {*tokenizer_files.ALL}
        assert found - {"special_tokens_map.json"} == {*names, "tokenizer.json"}
