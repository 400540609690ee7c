"""fairseq checkpoints in and out: made and loaded by real fairseq, whatever their age."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fairseq import checkpoint_utils, options
from fairseq.data import Dictionary
from fairseq.models.roberta import RobertaModel
from fairseq_files import CFG, batch, make_dictionary, roberta_order, save, theirs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longpretrain.cli import main
from longpretrain.convert import convert, export
from longpretrain.convert.fairseq_file import Checkpoint
from longpretrain.convert.fairseq_model import from_checkpoint, to_checkpoint
from longpretrain.convert.source import Source, open_source
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.errors import InputError
from longpretrain.model import (
    LongformerForMaskedLM,
    ModelConfig,
    load_model,
    read_config,
    read_tensors,
    save_model,
)
from longpretrain.prepare import prepare
from longpretrain.tasks import fairseq_plugin  # noqa: F401  (registers the plugin's model)

# hydra speaks of its own past.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ROOT = Path(__file__).parents[1]
LONG = ModelConfig(
    vocab_size=50265, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48,
    max_position_embeddings=66, attention_window=(8, 12), initializer_range=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def dictionary() -> Dictionary:
    return make_dictionary(roberta_order())


def model_of(source: Source) -> LongformerForMaskedLM:
    model = LongformerForMaskedLM(source.config)
    model.load_state_dict(source.tensors(), strict=False)
    return model.eval()


def logits(model: LongformerForMaskedLM, tokens_BN: Tensor) -> Tensor:
    padding_BN = tokens_BN == 1
    with torch.no_grad():
        out: Tensor = model(tokens_BN, padding_BN=padding_BN)[~padding_BN]
    return out


@pytest.mark.parametrize("age", ["2019", "omegaconf", "dict"])
def test_every_generation_gives_fairseqs_logits(
    age: str, dictionary: Dictionary, tmp_path: Path
) -> None:
    model = save(tmp_path / "in", dictionary, age)
    source = open_source(tmp_path / "in" / "model.pt")
    assert source.notes == ()
    config = source.config
    assert (config.num_heads, config.max_tokens, config.model_type) == (4, 30, "roberta")
    tokens_BN = batch()
    wanted = theirs(model, tokens_BN)
    torch.testing.assert_close(logits(model_of(source), tokens_BN), wanted, rtol=0, atol=2e-5)
    tokenizer = source.tokenizer()
    assert tokenizer is not None
    assert tokenizer.encode("Hello world").tolist() == [31414, 232]


def test_there_and_back_changes_no_bit(dictionary: Dictionary, tmp_path: Path) -> None:
    model = save(tmp_path / "a", dictionary)
    checked = export(tmp_path / "a" / "model.pt", tmp_path / "hf")
    assert checked is not None
    assert checked.ok
    tokens_BN = batch()
    hugging_face = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        got = hugging_face(tokens_BN, attention_mask=(tokens_BN != 1).long()).logits
    wanted = theirs(model, tokens_BN)
    torch.testing.assert_close(got[tokens_BN != 1], wanted, rtol=0, atol=2e-5)
    report = export(tmp_path / "hf", tmp_path / "b", format="fairseq")
    assert report is not None
    assert report.ok
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "README.md", "dict.txt", "model.pt",
    ]  # fmt: skip
    back = torch.load(tmp_path / "b" / "model.pt", weights_only=True)["model"]
    assert back.keys() == model.state_dict().keys()
    assert all(tensor.equal(back[name]) for name, tensor in model.state_dict().items())
    lines = (tmp_path / "b" / "dict.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == roberta_order()
    assert lines[:3] == ["13 1", "262 1", "11 1"]  # '.', ' the', ',': the head of the published one
    again = open_source(tmp_path / "b" / "model.pt")
    assert again.config == read_config(tmp_path / "hf")
    stored = read_tensors(tmp_path / "hf")
    assert again.tensors().keys() == stored.keys()
    assert all(tensor.equal(stored[name]) for name, tensor in again.tensors().items())
    assert again.tokenizer() is load_tokenizer()  # RoBERTa's own
    first = (tmp_path / "b" / "model.pt").read_bytes()
    export(tmp_path / "hf", tmp_path / "b", format="fairseq")  # replaces itself, bit for bit
    assert (tmp_path / "b" / "model.pt").read_bytes() == first


def test_stock_fairseq_loads_what_we_write(tmp_path: Path) -> None:
    config = dataclasses.replace(
        LONG, model_type="roberta", attention_window=(), max_position_embeddings=32
    )
    torch.manual_seed(1)
    ours = LongformerForMaskedLM(config)
    types = ours.longformer.embeddings.token_type_embeddings.weight
    assert types.detach().any()  # fairseq has none: they move into the positions
    save_model(ours, tmp_path / "hf")
    load_tokenizer().save(tmp_path / "hf", 30)
    out = tmp_path / "out"
    assert main(["export", str(tmp_path / "hf"), str(out), "--format", "fairseq"]) == 0
    hub = RobertaModel.from_pretrained(str(out), checkpoint_file="model.pt", bpe="characters")
    tokens_BN = batch()
    wanted = logits(load_model(tmp_path / "hf"), tokens_BN)
    # Of logits up to about 1: their attention and ours add up in another order.
    torch.testing.assert_close(theirs(hub.model, tokens_BN), wanted, rtol=0, atol=2e-5)
    assert len(hub.task.source_dictionary) == 50265
    assert "token types: added to every position row" in (out / "README.md").read_text()


FAIRSEQ_TRAIN = """
--user-dir longpretrain --task long_masked_lm --criterion long_masked_lm
--optimizer longpretrain_adamw --lr-scheduler longpretrain_polynomial --lr 1e-3
--warmup-updates 1 --total-num-update 2 --max-update 1 --batch-size 1 --cpu
--tokens-per-sample 64 --disable-validation --arch longformer --max-positions 64
--encoder-layers 2 --encoder-embed-dim 32 --encoder-attention-heads 4 --encoder-ffn-embed-dim 48
--attention-window 8,8
"""


def fairseq_train(shards: Path, save_dir: Path, start: Path) -> Path:
    command = [str(Path(sys.executable).with_name("fairseq-train")), str(shards)]
    command += [*FAIRSEQ_TRAIN.split(), "--save-dir", str(save_dir)]
    command += ["--finetune-from-model", str(start)]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return save_dir / "checkpoint_last.pt"


def test_a_longformer_goes_to_fairseq_train_and_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = dataclasses.replace(LONG, dilation=(1, 1, 2, 3))
    save_model(LongformerForMaskedLM(config), tmp_path / "long")
    load_tokenizer().save(tmp_path / "long", config.max_tokens)
    out = tmp_path / "out"
    export(tmp_path / "long", out, format="fairseq")
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task([str(out / "model.pt")])
    wanted = load_model(tmp_path / "long").state_dict()
    got = models[0].model.state_dict()
    assert all(tensor.equal(got[name]) for name, tensor in wanted.items())
    assert models[0].model.config.dilation == (1, 1, 2, 3)
    with pytest.raises(InputError, match=r"dilation \[1, 1, 2, 3\]"):
        export(out / "model.pt", tmp_path / "hf")
    convert(out / "model.pt", tmp_path / "longer", positions=100, attention_window=8)
    assert read_config(tmp_path / "longer").dilation == (1, 1, 2, 3)

    (tmp_path / "text.txt").write_text("the state of the union and the people of the land " * 60)
    prepare([tmp_path / "text.txt"], tmp_path / "shards")
    trained = fairseq_train(tmp_path / "shards", tmp_path / "run", out / "model.pt")
    report = export(trained, tmp_path / "hf")
    assert report is not None
    assert report.ok
    tensors = torch.load(trained, weights_only=True)["model"]
    back = read_tensors(tmp_path / "hf")
    local = {name for name in back if "_global." not in name}
    assert all(back[name].equal(tensors[f"model.{name}"]) for name in local)
    moved = [name for name in local if not back[name].equal(wanted[name])]
    assert len(moved) == len(local)
    assert load_tokenizer(tmp_path / "hf").fingerprint == load_tokenizer().fingerprint
    assert read_config(tmp_path / "hf").attention_window == (8, 8)


def test_a_training_that_took_its_sizes_from_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(LongformerForMaskedLM(LONG), tmp_path / "start")
    load_tokenizer().save(tmp_path / "start", 64)
    export(tmp_path / "start", tmp_path / "out", format="fairseq")
    whole = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    whole["cfg"]["model"] = {"_name": "longformer", "attention_window": [16], "dropout": 0.25}
    torch.save(whole, tmp_path / "last.pt")
    monkeypatch.chdir(tmp_path)
    whole["cfg"]["task"]["model_path"] = "start"
    torch.save(whole, tmp_path / "last.pt")
    source = open_source(tmp_path / "last.pt")
    assert (source.config.attention_window, source.config.hidden_dropout) == ((16, 16), 0.25)
    note = f"sizes and tokenizer from model_path {tmp_path / 'start'}"
    assert source.notes == (note,)
    report = convert(tmp_path / "last.pt", tmp_path / "long", positions=64, attention_window=8)
    assert note in report.lines()
    export(tmp_path / "last.pt", tmp_path / "hf")
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "* sizes and tokenizer from model_path start\n" in card
    assert str(tmp_path) not in card
    (tmp_path / "start").rename(tmp_path / "gone")
    with pytest.raises(InputError, match=r"task\.model_path .*start, which is not here"):
        open_source(tmp_path / "last.pt")


def test_convert_from_the_command_line_twice(
    dictionary: Dictionary, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = {"classification_heads.mnli.dense.weight": torch.ones(3, 3)}
    save(tmp_path / "in", dictionary, "2019", edit=lambda whole: whole["model"].update(head))
    command = ["convert", str(tmp_path / "in" / "model.pt"), str(tmp_path / "long")]
    command += ["--positions", "100", "--attention-window", "8"]
    assert main(command) == 0
    assert "left out, no part of a masked-LM model" in capsys.readouterr().out
    record = json.loads((tmp_path / "long" / "conversion.json").read_text())
    assert record["source_files"].keys() == {"model.pt", "dict.txt"}
    assert main(command) == 0
    assert "up to date" in capsys.readouterr().out
    tokenizer = load_tokenizer(tmp_path / "long")
    assert tokenizer.encode("Hello world").tolist() == [31414, 232]
    (tmp_path / "in" / "dict.txt").write_text("\n".join(f"{i} 7" for i in roberta_order()) + "\n")
    assert main(command) == 2  # counts differ: another source
    assert "another conversion" in capsys.readouterr().err


def test_a_dictionary_in_another_order_makes_its_own_tokenizer(tmp_path: Path) -> None:
    order = [str(i) for i in range(50256)] + ["madeupword0000"]
    save(tmp_path / "in", make_dictionary(order))
    export(tmp_path / "in" / "model.pt", tmp_path / "out")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    # GPT-2's own ids of the text are 15496 and 995.
    assert fast("Hello world").input_ids == [0, 15496 + 4, 995 + 4, 2]
    assert fast.mask_token_id == 50261
    export(tmp_path / "out", tmp_path / "back", format="fairseq")
    lines = (tmp_path / "back" / "dict.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == order


def test_a_tokenizer_given_may_not_contradict_the_dictionary(tmp_path: Path) -> None:
    order = roberta_order()
    save(tmp_path, make_dictionary(order))
    (tmp_path / "bpe").mkdir()
    load_tokenizer().save(tmp_path / "bpe", 30)
    assert open_source(tmp_path / "model.pt", tokenizer=tmp_path / "bpe").has_tokenizer
    order[0], order[1] = order[1], order[0]
    make_dictionary(order).save(str(tmp_path / "dict.txt"))
    with pytest.raises(InputError, match=r"other ids than those of the dictionary; .*dict\.txt"):
        open_source(tmp_path / "model.pt", tokenizer=tmp_path / "bpe")
    (tmp_path / "dict.txt").write_text("of another kind\n")
    assert open_source(tmp_path / "model.pt", tokenizer=tmp_path / "bpe").has_tokenizer


def test_half_precision_and_heads_of_a_classifier(dictionary: Dictionary, tmp_path: Path) -> None:
    def edit(whole: dict[str, Any]) -> None:
        whole["model"] = {name: tensor.half() for name, tensor in whole["model"].items()}
        whole["model"]["classification_heads.mnli.dense.weight"] = torch.ones(3, 3)

    model = save(tmp_path / "in", dictionary, edit=edit, encoder_layerdrop=0.2)
    source = open_source(tmp_path / "in" / "model.pt")
    left_out = "left out, no part of a masked-LM model: classification_heads.mnli.dense.weight"
    assert source.notes[0] == left_out
    assert source.notes[1] == "options of its training that ours lacks: encoder_layerdrop 0.2"
    words = source.tensors()["longformer.embeddings.word_embeddings.weight"]
    assert words.equal(model.state_dict()[f"{CFG}embed_tokens.weight"].half())


def test_parameters_with_attributes_and_shared_memory(
    dictionary: Dictionary, tmp_path: Path
) -> None:
    """What a file hangs on a tensor is not called; two names on one memory both get it."""

    def edit(whole: dict[str, Any]) -> None:
        tensors = whole["model"]
        name = f"{CFG}layers.0.fc2.bias"
        tensors[name] = torch.nn.Parameter(tensors[name])
        tensors[name].__dict__ |= dict.fromkeys(["dim", "equal", "clone", "detach", "numel"], 1)
        tensors[f"{CFG}layers.1.fc2.bias"] = tensors[f"{CFG}layers.1.final_layer_norm.bias"]

    save(tmp_path / "in", dictionary, edit=edit)
    source = open_source(tmp_path / "in" / "model.pt")
    tensors = source.tensors()
    assert {type(tensor) for tensor in tensors.values()} == {Tensor}
    convert(tmp_path / "in" / "model.pt", tmp_path / "out", positions=30, attention_window=8)
    layer = "longformer.encoder.layer.1.output"
    out = read_tensors(tmp_path / "out")
    assert out[f"{layer}.dense.bias"].equal(out[f"{layer}.LayerNorm.bias"])


def test_the_command_of_the_card_keeps_trained_globals(tmp_path: Path) -> None:
    config = dataclasses.replace(LONG, hidden_dropout=0.25, attention_dropout=0.0)
    save_model(LongformerForMaskedLM(config), tmp_path / "long")
    load_tokenizer().save(tmp_path / "long", config.max_tokens)
    export(tmp_path / "long", tmp_path / "out", format="fairseq")
    card = (tmp_path / "out" / "README.md").read_text()
    flags = "--dropout 0.25 --attention-dropout 0.0 --tokens-per-sample 64 --global-tokens first"
    assert flags in card
    command = card.partition("```bash\n")[2].partition("```")[0].replace("\\\n", " ").split()
    parser = options.get_training_parser()
    args = options.parse_args_and_arch(parser, command[1 : command.index("--finetune-from-model")])
    assert (args.dropout, args.attention_dropout) == (0.25, 0.0)
    assert (args.tokens_per_sample, args.global_tokens) == (64, "first")
    whole = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    whole["cfg"]["task"]["global_tokens"] = "every_8"
    torch.save(whole, tmp_path / "last.pt")
    export(tmp_path / "last.pt", tmp_path / "again", format="fairseq")
    assert "--global-tokens every_8 \\" in (tmp_path / "again" / "README.md").read_text()
    whole["cfg"]["task"]["global_tokens"] = "first; rm x"
    torch.save(whole, tmp_path / "last.pt")
    with pytest.raises(InputError, match=r"task\.global_tokens in .*wanted none, first, every_K"):
        open_source(tmp_path / "last.pt")


def test_a_dictionary_of_many_fillers_reads_back(tmp_path: Path) -> None:
    config = dataclasses.replace(LONG, model_type="roberta", attention_window=(), vocab_size=65536)
    save_model(LongformerForMaskedLM(config), tmp_path / "a")
    load_tokenizer().save(tmp_path / "a", 64)
    report = export(tmp_path / "a", tmp_path / "b", format="fairseq")
    assert report is not None
    assert "read back: dictionary" in [row.check for row in report.rows]
    assert "madeupword10000 0" in (tmp_path / "b" / "dict.txt").read_text()
    tokenizer = open_source(tmp_path / "b" / "model.pt").tokenizer()
    assert tokenizer is not None
    assert tokenizer.vocab_size == 65536
    convert(tmp_path / "b" / "model.pt", tmp_path / "c", positions=64, attention_window=8)
    assert load_tokenizer(tmp_path / "c").fingerprint == tokenizer.fingerprint
    export(tmp_path / "c", tmp_path / "d")


@given(
    heads=st.integers(1, 4), width=st.integers(1, 5), layers=st.integers(1, 12),
    inner=st.integers(1, 9), positions=st.integers(1, 9), vocab=st.integers(5, 40),
    plugin=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
@settings(derandomize=True, deadline=None, max_examples=60)
def test_any_sizes_there_and_back(
    heads: int, width: int, layers: int, inner: int, positions: int, vocab: int, plugin: bool,
    seed: int,
) -> None:  # fmt: skip
    config = ModelConfig(
        model_type="roberta", vocab_size=vocab, hidden_size=heads * width, num_heads=heads,
        num_layers=layers, intermediate_size=inner, max_position_embeddings=positions + 2,
    )  # fmt: skip
    if plugin:
        windows = tuple(2 + 2 * (i % 3) for i in range(layers))
        config = dataclasses.replace(
            config, model_type="longformer", attention_window=windows, vocab_size=50265,
            hidden_size=heads, dilation=tuple(range(1, heads + 1)),
        )  # fmt: skip
    torch.manual_seed(seed)
    model = LongformerForMaskedLM(config)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    if not plugin:
        tensors["longformer.embeddings.token_type_embeddings.weight"].zero_()
    parts = to_checkpoint(config, tensors, global_tokens="none")
    back = from_checkpoint(
        Checkpoint(path=Path("x"), tensors=parts.tensors, model_options=parts.model,
                   task_options=parts.task)
    )  # fmt: skip
    assert back.config == dataclasses.replace(config, initializer_range=0.02)
    assert back.tensors.keys() == tensors.keys()
    assert all(tensor.equal(back.tensors[name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("value", ["positions", None, ["all"]])
def test_what_the_plugin_trained_is_checked(value: object) -> None:
    tensors = {name: p.detach() for name, p in LongformerForMaskedLM(LONG).named_parameters()}
    parts = to_checkpoint(LONG, tensors, global_tokens="first")
    task = parts.task | {"train_only": value}
    checkpoint = Checkpoint(
        path=Path("x"), tensors=parts.tensors, model_options=parts.model, task_options=task
    )
    with pytest.raises(InputError, match=r"task\.train_only in .*; wanted all or new_positions"):
        from_checkpoint(checkpoint)
    task["train_only"] = "new_positions"
    assert from_checkpoint(checkpoint).train_only == "new_positions"
