"""The fairseq plugin: through stock fairseq-train in other processes, and piece by piece here.

That it trains as our engine does: test_exactness.py.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from exactness.fairseq_runs import start_ranks
from exactness.plain_loop import plain_loop
from fairseq import options, tasks
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.distributed import utils as distributed_utils
from fairseq.optim import build_optimizer
from fairseq.optim.lr_scheduler import build_lr_scheduler

from longpretrain.config import BatchConfig, Config, DataConfig, OptimConfig, ScheduleConfig
from longpretrain.convert.source import open_source
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.errors import InputError
from longpretrain.model import LongformerForMaskedLM, ModelConfig, load_model, save_model
from longpretrain.prepare import prepare
from longpretrain.recipe import from_tree
from longpretrain.schedule import learning_rate
from longpretrain.tasks import fairseq_plugin
from longpretrain.tasks.masked_lm import MaskedLMTask

# hydra speaks of its own past.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ROOT = Path(__file__).parents[1]
PEAK, WARMUP, TOTAL = 1e-2, 2, 5
SCHEDULE = ScheduleConfig(warmup_steps=WARMUP, total_steps=TOTAL)
MICRO, ACCUMULATION = 2, 2
GLOBAL = MICRO * ACCUMULATION
SIZES = {
    "--encoder-layers": 2,
    "--encoder-embed-dim": 32,
    "--encoder-attention-heads": 2,
    "--encoder-ffn-embed-dim": 64,
    "--max-positions": 64,
}
WORDS = ["state", "union", "trade", "peace", "law", "people", "year", "war", "of", "the", "and"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(5)
    for number in range(10):
        text = " ".join(draw.choices(WORDS, k=draw.randint(30, 300)))
        (folder / f"{number}.txt").write_text(text + ".\n", encoding="utf-8")
    prepare([folder], folder / "shards")
    return folder / "shards"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model without dropout, as `longpretrain convert` would leave it."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(3)
    config = ModelConfig(
        vocab_size=50265, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64,
        max_position_embeddings=66, attention_window=(16, 16),
        hidden_dropout=0.0, attention_dropout=0.0,
    )  # fmt: skip
    save_model(LongformerForMaskedLM(config), folder)
    load_tokenizer().save(folder, config.max_tokens)
    return folder


def arguments(shards: Path, **changes: object) -> list[str]:
    """A command line; a keyword changes a flag (True: without a value; None: left out)."""
    flags: dict[str, object] = {
        "--user-dir": "longpretrain",
        "--task": "long_masked_lm",
        "--arch": "longformer_base",
        "--criterion": "long_masked_lm",
        "--optimizer": "longpretrain_adamw",
        "--lr-scheduler": "longpretrain_polynomial",
        "--lr": PEAK,
        "--warmup-updates": WARMUP,
        "--total-num-update": TOTAL,
        "--max-update": TOTAL,
        **SIZES,
        "--attention-window": 16,
        "--tokens-per-sample": 64,
        "--batch-size": MICRO,
        "--update-freq": ACCUMULATION,
        "--num-workers": 0,
        "--disable-validation": True,
        "--cpu": True,
        "--log-format": "json",
        "--log-interval": 1,
    }
    flags |= {f"--{name.replace('_', '-')}": value for name, value in changes.items()}
    argv = [str(shards)]
    for flag, value in flags.items():
        if value is not None:
            argv += [flag] if value is True else [flag, str(value)]
    return argv


NO_SIZES = dict.fromkeys((flag[2:].replace("-", "_") for flag in SIZES), None)


@dataclass
class Run:
    """What fairseq-train logged per update, its last checkpoint, and all it printed."""

    updates: list[dict[str, Any]]
    checkpoint: dict[str, Any]
    text: str

    def numbers(self, key: str) -> list[float]:
        return [float(update[key]) for update in self.updates]


def fairseq_train(argv: list[str], save_dir: Path) -> Run:
    (text,) = start_ranks([*argv, "--save-dir", str(save_dir)], save_dir, 1)
    lines = [line.split(" | ") for line in text.splitlines()]
    updates = [json.loads(line[3]) for line in lines if line[2:3] == ["train_inner"]]
    # What torch refuses here, stock fairseq could not resume from.
    checkpoint = torch.load(save_dir / "checkpoint_last.pt", weights_only=True)
    return Run(updates, checkpoint, text)


def setup(argv: list[str]) -> SimpleNamespace:
    """What fairseq-train makes of a command line, in this process."""
    parser = options.get_training_parser()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, argv))
    task = tasks.setup_task(cfg.task)
    model = task.build_model(cfg.model)
    return SimpleNamespace(
        cfg=cfg, task=task, model=model, criterion=task.build_criterion(cfg.criterion)
    )


def core_task(shards: Path, model_folder: Path, **data: Any) -> MaskedLMTask:
    """The engine's task with the same numbers."""
    config = Config(
        data=DataConfig(train=str(shards), max_tokens=64, **data),
        batch=BatchConfig(global_sequences=GLOBAL, micro_sequences=MICRO),
    )
    return MaskedLMTask(config, model_folder)


def test_five_updates_and_resume(shards: Path, tmp_path: Path) -> None:
    """Stock fairseq-train, dropout on: 1-5 in one go is 1-3, then 4-5 from its own checkpoint."""
    whole = fairseq_train(arguments(shards), tmp_path / "whole")
    assert [update["num_updates"] for update in whole.updates] == list("12345")
    assert whole.numbers("lr") == pytest.approx(
        [learning_rate(n, PEAK, SCHEDULE) for n in range(1, 6)], rel=1e-5
    )
    losses = whole.numbers("loss")
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[0] == pytest.approx(math.log2(50265), abs=0.2)  # new weights know nothing

    begun = arguments(shards, max_update=3, valid_data=shards, disable_validation=None)
    first = fairseq_train(begun, tmp_path / "parts")
    assert "valid_loss" in first.text
    assert first.checkpoint["extra_state"]["train_iterator"]["samples_done"] == 3 * GLOBAL
    second = fairseq_train(arguments(shards, num_workers=1), tmp_path / "parts")
    for key in ("loss", "lr", "gnorm", "num_updates"):
        assert first.numbers(key) + second.numbers(key) == whole.numbers(key), key
    for name, tensor in whole.checkpoint["model"].items():
        assert torch.equal(tensor, second.checkpoint["model"][name]), name


@pytest.mark.parametrize(
    ("ranks", "accumulation"), [(1, 2), (2, 1)], ids=["1 rank x 2", "2 ranks x 1"]
)
def test_batches_are_the_engines(
    ranks: int,
    accumulation: int,
    shards: Path,
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Micro-batch a of rank r of update u holds the samples that the engine's loop puts there."""
    monkeypatch.setattr(distributed_utils, "get_data_parallel_world_size", lambda: ranks)
    run = setup(arguments(shards, update_freq=accumulation, blocks="document"))
    run.task.load_dataset("train")
    core = core_task(shards, model_folder, blocks="document")
    for rank in range(ranks):
        iterator = run.task.get_batch_iterator(
            dataset=run.task.dataset("train"), max_sentences=MICRO, num_shards=ranks, shard_id=rank
        )
        batches = iterator.next_epoch_itr(shuffle=True)
        for update, number in itertools.product(range(1, 4), range(accumulation)):
            first = (update - 1) * GLOBAL + (number * ranks + rank) * MICRO
            expected = core.collate([core.sample(first + n) for n in range(MICRO)])
            found = next(batches)
            assert found["inputs"].keys() == expected.keys()
            for key, tensor in expected.items():
                assert torch.equal(found["inputs"][key], tensor), key
            assert found["ntokens"] == core.tokens(expected)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_held_out_samples_once(ranks: int, shards: Path) -> None:
    run = setup(arguments(shards, valid_data=shards))
    run.task.load_dataset("valid")
    samples = run.task.dataset("valid")
    rows, lengths = 0, set()
    for rank in range(ranks):
        iterator = run.task.get_batch_iterator(
            dataset=samples, max_sentences=3, num_shards=ranks, shard_id=rank
        )
        assert iterator.first_batch["nsentences"] == 1
        batches = list(iterator.next_epoch_itr(shuffle=False))
        rows += sum(batch.get("nsentences", 0) for batch in batches)
        lengths.add(len(batches))
    assert rows == len(samples)
    assert len(lengths) == 1  # all ranks take equally many steps


def test_rate_of_each_update(shards: Path) -> None:
    """Exactly learning_rate(n) while update n runs, in the order of fairseq's calls."""
    cfg = setup(arguments(shards)).cfg
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(cfg.optimizer, [weight])
    schedule = build_lr_scheduler(cfg.lr_scheduler, optimizer)
    schedule.step_update(0)
    schedule.step_begin_epoch(1)
    schedule.step_update(0)
    used = []
    for update in range(1, TOTAL + 1):
        used.append(optimizer.get_lr())
        assert schedule.step_update(update) == used[-1]  # what fairseq logs with this update
    assert used == [learning_rate(n, PEAK, SCHEDULE) for n in range(1, TOTAL + 1)]
    assert optimizer.optimizer.defaults["betas"] == (0.9, 0.98)
    assert optimizer.optimizer.defaults["eps"] == OptimConfig().eps
    assert optimizer.optimizer.defaults["weight_decay"] == OptimConfig().weight_decay


def test_total_is_max_update_by_default(shards: Path) -> None:
    cfg = setup(arguments(shards, total_num_update=None)).cfg
    optimizer = build_optimizer(cfg.optimizer, [torch.nn.Parameter(torch.ones(3))])
    schedule = build_lr_scheduler(cfg.lr_scheduler, optimizer)
    schedule.step_update(3)
    assert optimizer.get_lr() == learning_rate(4, PEAK, SCHEDULE)


@pytest.mark.parametrize(
    ("arch", "parameters"), [("longformer_base", 148_711_257), ("longformer_large", 434_653_273)]
)
def test_published_sizes(arch: str, parameters: int, shards: Path) -> None:
    argv = arguments(
        shards, **NO_SIZES, arch=arch, attention_window=None, tokens_per_sample=4096
    )  # fmt: skip
    with torch.device("meta"):
        model = setup(argv).model
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    config = model.model.config
    assert config.max_position_embeddings == 4098
    assert set(config.attention_window) == {512}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == 6 * config.num_layers


def test_model_folder_with_changes(shards: Path, model_folder: Path) -> None:
    argv = arguments(
        shards, **NO_SIZES, arch="longformer", model_path=model_folder, attention_window=32,
        dropout=0.2, attention_dropout=0.3, global_tokens="first",
    )  # fmt: skip
    run = setup(argv)
    config = run.model.model.config
    assert (config.hidden_size, config.attention_window) == (32, (32, 32))
    assert (config.hidden_dropout, config.attention_dropout) == (0.2, 0.3)
    assert all(parameter.requires_grad for parameter in run.model.parameters())
    stored = load_model(model_folder).state_dict()
    for name, tensor in run.model.model.state_dict().items():
        assert torch.equal(tensor, stored[name]), name
    run.task.load_dataset("train")
    batch = run.task.dataset("train").collater([run.task.dataset("train")[0]])
    assert batch["inputs"]["global_index_BG"].tolist() == [[0]]


def test_new_positions_only(shards: Path, model_folder: Path, tmp_path: Path) -> None:
    """As our engine does it, through fairseq-train: same losses, all else bit-unchanged, a whole
    position table in fairseq's checkpoint, moments of the new rows alone.
    """
    argv = arguments(
        shards, **NO_SIZES, arch="longformer", model_path=model_folder, train_only="new_positions",
        learnt_positions=40, weight_decay=0.5,
    )  # fmt: skip
    run = fairseq_train(argv, tmp_path / "run")
    tree = {
        "model": {
            "path": str(model_folder), "train_only": "new_positions", "learnt_positions": 40,
            "dropout": 0.0,
        },
        "data": {"train": str(shards), "max_tokens": 64},
        "batch": {"global_sequences": GLOBAL, "micro_sequences": MICRO},
        "optim": {"lr": PEAK, "weight_decay": 0.5},
        "schedule": {"warmup_steps": WARMUP, "total_steps": TOTAL},
    }  # fmt: skip
    config = from_tree(tree)
    model = MaskedLMTask(config, model_folder).build_model(model_folder)
    truth = plain_loop(config, TOTAL, model=model)
    nats = [loss * math.log(2) for loss in run.numbers("loss")]
    assert nats == pytest.approx(truth.losses, rel=1e-5)
    before, wanted = load_model(model_folder).state_dict(), model.state_dict()
    table = "longformer.embeddings.position_embeddings.weight"
    trained = {name.removeprefix("model."): t for name, t in run.checkpoint["model"].items()}
    assert trained.keys() == before.keys()
    for name, tensor in before.items():
        kept = slice(42) if name == table else slice(None)
        assert torch.equal(trained[name][kept], tensor[kept]), name
    torch.testing.assert_close(trained[table], wanted[table], rtol=0, atol=1e-5)
    assert not torch.equal(trained[table][42:], before[table][42:])
    (state,) = run.checkpoint["last_optimizer_state"]["state"].values()
    assert state["exp_avg"].shape == (24, 32)
    # Global projections stood still beside local ones that did: they stay the model's own.
    out = open_source(tmp_path / "run" / "checkpoint_last.pt")
    assert out.config.learnt_positions == 0
    assert not [name for name, t in out.weights().items() if not torch.equal(t, trained[name])]


BAD = {
    "train only": ({"train_only": "positions"}, "model.train_only: got 'positions'; wanted one of"),
    "nothing learnt": ({"train_only": "new_positions"}, "does not say how many of its positions"),
    "nothing new": (
        {"train_only": "new_positions", "learnt_positions": 40, "tokens_per_sample": 40},
        "data.max_tokens: got 40; wanted more than the 40 learnt positions",
    ),
    "criterion": ({"criterion": None}, "--criterion: got cross_entropy"),
    "batch size": ({"batch_size": None, "max_tokens": 128}, "--batch-size: got nothing"),
    "update freq": ({"update_freq": "2,4"}, r"--update-freq: got \[2, 4\]"),
    "no held-out data": ({}, "--valid-data: got nothing"),
    "no positions": ({"tokens_per_sample": 65}, "--tokens-per-sample: got 65; wanted at most 64"),
    "no sizes": ({"arch": "longformer", "max_positions": None}, "no --max-positions"),
    "odd window": ({"attention_window": 15}, "attention_window: got"),
    "blocks": ({"blocks": "words"}, "data.blocks: got 'words'"),
    "no shards": ({"data": "nowhere"}, "nowhere"),
    "another model": (
        {"arch": "roberta_base", "attention_window": None, **NO_SIZES},
        "--arch: got roberta_base",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, shards: Path) -> None:
    changes, message = BAD[case]
    changes = dict(changes)
    argv = arguments(Path(str(changes.pop("data", shards))), **changes)
    with pytest.raises(InputError, match=message):
        task = setup(argv).task
        task.load_dataset("train")
        task.get_batch_iterator(dataset=task.dataset("train"))
        task.load_dataset("valid")


def test_folder_of_another_size(shards: Path, model_folder: Path) -> None:
    argv = arguments(shards, **NO_SIZES, arch="longformer_large", model_path=model_folder)
    with pytest.raises(InputError, match=r"--encoder-layers .* got 24; wanted 2"):
        setup(argv)


def test_loss_is_logged_in_bits() -> None:
    from fairseq.logging import metrics

    logs = [{"loss": torch.tensor(8.0), "sample_size": 3}, {"loss": 4.0, "sample_size": 1}]
    with metrics.aggregate(new_root=True) as logged:
        fairseq_plugin.LongMaskedLMCriterion.reduce_metrics(logs)
    assert float(logged["loss"].avg) == pytest.approx(3 / math.log(2))
