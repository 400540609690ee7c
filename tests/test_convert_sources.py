"""Sources that are no folder of Hugging Face's: fairseq files of every age, checkpoints of ours."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from fairseq_files import batch, fairseq_model, make_dictionary, roberta_order, save, theirs
from family_models import make_family, write_tokenizer

from longpretrain.cli import main
from longpretrain.convert import convert
from longpretrain.convert.lengthen import POSITIONS
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.files import sha256
from longpretrain.model import load_model, read_config, read_tensors, save_model

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.mark.parametrize("age", ["2019", "omegaconf", "dict"])
@pytest.mark.conversion(
    family="RoBERTa",
    direction="fairseq .pt ({age}) -> Longformer",
    checked="logits equal to those of fairseq's RobertaModel (1e-4) at 7 and 30 tokens, covering "
    "window",
)
def test_a_long_model_computes_what_fairseq_does(age: str, tmp_path: Path) -> None:
    model = save(tmp_path / "in", make_dictionary(roberta_order()), age)
    convert(tmp_path / "in" / "model.pt", tmp_path / "long", positions=100, attention_window=60)
    ours = load_model(tmp_path / "long")
    for length in (7, 30):
        tokens_BN = batch(length)
        padding_BN = tokens_BN == 1
        wanted = theirs(model, tokens_BN)
        with torch.no_grad():
            found = ours(tokens_BN, padding_BN=padding_BN)[~padding_BN]
        assert wanted.std() > 0.1
        assert (found - wanted).abs().max() <= 1e-4
    assert load_tokenizer(tmp_path / "long").encode("Hello world").tolist() == [31414, 232]


@pytest.mark.conversion(
    family="XLM-RoBERTa",
    direction="fairseq .pt (dict) -> Longformer",
    checked="logits equal to those of fairseq's RobertaModel (1e-4) at 30 tokens, covering window",
)
def test_a_fairseq_model_with_pieces_for_words_takes_its_tokenizer_from_a_folder(
    tmp_path: Path,
) -> None:
    """XLM-R's dict.txt lists SentencePiece's pieces, which no GPT-2 ids are."""
    size = write_tokenizer(tmp_path / "words", "xlm-roberta")
    pieces = [f"▁piece{number}" for number in range(size - 5)]
    model = save(tmp_path / "in", make_dictionary(pieces))
    path = str(tmp_path / "in" / "model.pt")
    words = ["--positions", "100", "--attention-window", "60"]
    assert main(["convert", path, str(tmp_path / "a"), *words]) == 2
    given = ["--tokenizer", str(tmp_path / "words")]
    assert main(["convert", path, str(tmp_path / "a"), *words, *given]) == 0
    assert main(["convert", path, str(tmp_path / "b"), *words, "--no-tokenizer"]) == 0
    wanted = load_tokenizer(tmp_path / "words").fingerprint
    assert load_tokenizer(tmp_path / "a").fingerprint == wanted
    tokens_BN = batch().clamp(max=size - 1)
    padding_BN = tokens_BN == 1
    for name in "ab":
        with torch.no_grad():
            found = load_model(tmp_path / name)(tokens_BN, padding_BN=padding_BN)[~padding_BN]
        assert (found - theirs(model, tokens_BN)).abs().max() <= 1e-4


def test_a_fairseq_file_without_a_dictionary_needs_a_word(tmp_path: Path) -> None:
    save(tmp_path, None, seed=1)
    words = ["convert", str(tmp_path / "model.pt"), str(tmp_path / "a"), "--positions", "64"]
    assert main(words) == 2
    assert not (tmp_path / "a").exists()
    assert main([*words, "--no-tokenizer"]) == 0
    assert main([*words, "--no-tokenizer"]) == 0  # up to date
    model, _ = fairseq_model(make_dictionary(roberta_order()), seed=1)
    table = model.state_dict()["encoder.sentence_encoder.embed_positions.weight"]
    assert read_tensors(tmp_path / "a")[POSITIONS][:32].equal(table)


@pytest.mark.parametrize("policy", ["none", "first"])
@pytest.mark.conversion(
    family="Longformer",
    direction="run -> Longformer",
    checked="every tensor equal bit for bit; global projections by the run's policy",
)
def test_the_newest_checkpoint_of_a_run(policy: str, tmp_path: Path) -> None:
    start = make_family(tmp_path / "start", "longformer")
    tensors, config = read_tensors(start), read_config(start)
    run = tmp_path / "run" / "checkpoints"
    for step in (1, 2):
        folder = run / f"step-{step}"
        moved = {name: tensor + step for name, tensor in tensors.items()}
        save_model((dataclasses.replace(config, learnt_positions=7), moved), folder)
        load_tokenizer(start).save(folder, max_tokens=64)
        files = {path.name: sha256(path) for path in folder.iterdir()}
        state = {"step": step, "global_tokens": policy, "files": files}
        (folder / "state.json").write_text(json.dumps(state))
    (run / "latest").write_text("step-2\n")
    convert(tmp_path / "run", tmp_path / "long", positions=150)
    new = read_tensors(tmp_path / "long")
    assert new.keys() == tensors.keys()
    for name, tensor in new.items():
        own = policy == "first"
        old = tensors[name if own else name.replace("_global.", ".")] + 2
        assert tensor[:66].equal(old[:66]) if name == POSITIONS else tensor.equal(old), name
    config = read_config(tmp_path / "long")
    assert (config.max_tokens, config.learnt_positions) == (150, 64)
    (run / "step-2" / "model.safetensors").write_bytes(b"x")
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "b")]) == 2
