"""What a recipe does not train keeps its bits, at every ZeRO stage; what it trains does as one
process does, also where a rank has nothing to say about it.

Two ranks by torchrun, all of their runs in one start.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness.plain_loop import plain_loop
from exactness.runs import NO_DROPOUT, curve, differences, resumed_at
from exactness.runs import tensors as all_tensors
from exactness.table import relative_difference
from ranks_helper import drive
from safetensors.torch import load_file
from small_run import tiny_longformer

from longpretrain.cli import main
from longpretrain.convert.lengthen import convert
from longpretrain.convert.source import open_source
from longpretrain.engine import zero
from longpretrain.engine.zero import ZeroEngine
from longpretrain.errors import InputError
from longpretrain.model import load_model, read_config
from longpretrain.model.folder import save_model
from longpretrain.recipe import from_tree, load_recipe
from longpretrain.schedule import update_numbers
from longpretrain.tasks.masked_lm import MaskedLMTask

LIMIT, NORM_LIMIT = 1e-5, 1e-3  # as in tests/exactness
STEPS = 6
REAL = [("fp32", 0), ("bf16", 1), ("fp32", 2), ("bf16", 3)]
STOPPED = [("fp32", 0), ("bf16", 3)]
PAIRS = [(p, s) for p in ("fp32", "bf16") for s in (0, 1, 2, 3) if (p, s) != ("bf16", 0)]
TABLE = "longformer.embeddings.position_embeddings.weight"
NEW_ROWS = "longformer.embeddings.position_embeddings.new_rows"
FIRST_NEW = 66  # 64 learnt positions behind two rows of padding
COMMON = (
    f"schedule.total_steps={STEPS}",
    "schedule.warmup_steps=1",
    "optim.lr=1e-2",
    "optim.eps=1e-3",  # or Adam would make steps of the roundings of gradients of zero
    "optim.weight_decay=0.5",  # would show on what should stand still
    "checkpoint.every_steps=0",
    "evaluate.every_steps=0",
)
NEW_ONLY = "model.train_only=new_positions"


def stage(number: int, precision: str = "fp32") -> tuple[str, str]:
    return f"zero.config=ds_configs/zero{number}.json", f"precision={precision}"


@pytest.fixture(scope="module")
def source(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long model whose global projections are its own, with the recipe's tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "long"
    model = load_model(small_run / "models" / "long")
    torch.manual_seed(9)
    for name, parameter in model.named_parameters():
        if "_global." in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_model(model, folder)
    config = load_recipe(str(small_run / "recipe.yaml"))
    MaskedLMTask(config, small_run / "models" / "long").tokenizer.save(folder, 128)
    return folder


@pytest.fixture(scope="module")
def rare_id(small_run: Path) -> int:
    """An id that, in one update, rank 0 reads and rank 1 does not, and in one nobody does."""
    config = load_recipe(str(small_run / "recipe.yaml"), COMMON)
    task = MaskedLMTask(config, Path(config.model.path))
    read: list[list[set[int]]] = []
    for update in range(1, STEPS + 1):
        by_rank = []
        for rank in range(2):
            how = {"global_sequences": 4, "micro_sequences": 1, "accumulation": 2}
            groups = update_numbers(update, **how, world_size=2, rank=rank)
            by_rank.append({int(i) for g in groups for n in g for i in task.sample(n).tokens_N})
        read.append(by_rank)
    for number in sorted(set.union(*(ids for by_rank in read for ids in by_rank))):
        who = [[number in ids for ids in by_rank] for by_rank in read]
        if [True, False] in who and [False, False] in who:
            return number
    raise AssertionError("no such id in the corpus")


@pytest.fixture(scope="module")
def runs(
    small_run: Path, source: Path, rare_id: int, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """All runs of two ranks, one after another in one start; a stopped one is taken up again."""
    work = tmp_path_factory.mktemp("runs")
    own = (*COMMON, f"model.path={source}")
    new = (*own, NEW_ONLY)
    commands: list[dict[str, Any]] = []

    def run(name: str, *overrides: str, stop_after: int | None = None) -> None:
        arguments = [str(small_run / "recipe.yaml"), f"run.dir={work / name}", *overrides]
        commands.append({"arguments": arguments, "stop_after": stop_after})

    for precision, number in REAL:
        how = (*new, *stage(number, precision), *recompute(number))
        run(f"new-{precision}-{number}", *how)
        if (precision, number) in STOPPED:
            run(f"stopped-{precision}-{number}", *how, stop_after=2)
            run(f"stopped-{precision}-{number}", *how)
    run("moved", *new, *NO_DROPOUT, *stage(1), stop_after=2)
    for number in (1, 2, 3):
        run(
            f"ids-{number}", *own, *NO_DROPOUT, *stage(number), f"model.global_tokens=ids_{rare_id}"
        )
    ends = ("model.global_tokens=sentence_ends", "schedule.total_steps=2")
    run("sentence-ends", *own, *stage(1, "bf16"), *ends)
    finished = drive(work / "ranks", 2, commands)
    wanted = [75 if command["stop_after"] else 0 for command in commands]
    assert finished.exit_codes == wanted, finished.output[-4000:]
    return work


def recompute(number: int) -> tuple[str, ...]:
    """Activation checkpointing, at the stages where it is most at risk."""
    return ("activation_checkpointing=true",) if number >= 2 else ()


def events(run_dir: Path) -> str:
    return (run_dir / "metrics.jsonl").read_text(encoding="utf-8")


class TestNewPositionsOnly:
    @pytest.mark.parametrize(("precision", "number"), REAL)
    def test_all_but_the_new_rows_keeps_its_bits(
        self, runs: Path, source: Path, precision: str, number: int
    ) -> None:
        before = load_file(source / "model.safetensors")
        after = all_tensors(runs / f"new-{precision}-{number}")
        moments = {name for name in after if name not in before}
        assert moments == {f"{NEW_ROWS}.exp_avg", f"{NEW_ROWS}.exp_avg_sq"}
        for name in moments:
            assert after[name].shape == (128 - 64, 32), name
        for name, tensor in before.items():
            kept = slice(FIRST_NEW) if name == TABLE else slice(None)
            assert after[name].dtype == torch.float32, name
            assert torch.equal(after[name][kept], tensor[kept]), name
        moved = (after[TABLE] != before[TABLE]).any(dim=1)
        assert moved[FIRST_NEW:].all(), "every row that the sequences reach"

    def test_a_checkpoint_is_the_same_kind_of_folder(self, runs: Path, source: Path) -> None:
        (folder,) = (runs / "new-bf16-3" / "checkpoints").glob("step-*")
        assert read_config(folder) == read_config(source)
        assert read_config(folder).learnt_positions == 64
        assert (folder / "config.json").read_text() == (source / "config.json").read_text()

    @pytest.mark.parametrize(("precision", "number"), STOPPED)
    def test_stopping_is_nothing(self, runs: Path, precision: str, number: int) -> None:
        """Dropout on, activation checkpointing too at stage 3: metrics, weights, moments."""
        stopped = runs / f"stopped-{precision}-{number}"
        assert len(resumed_at(stopped)) == 1
        assert not differences(runs / f"new-{precision}-{number}", stopped)

    def test_other_ranks_and_stage_go_on_as_the_plain_loop(
        self, runs: Path, small_run: Path, source: Path, process_group: None
    ) -> None:
        """Two ranks at stage 1, then one, in this process, at stage 3."""
        words = [*COMMON, *NO_DROPOUT, NEW_ONLY, f"model.path={source}", "precision=fp32"]
        recipe = str(small_run / "recipe.yaml")
        config = load_recipe(recipe, words)
        assert main(["train", recipe, f"run.dir={runs / 'moved'}", *words, stage(3)[0]]) == 0
        model = MaskedLMTask(config, source).build_model(source)
        truth = plain_loop(config, STEPS, model=model)
        assert len(resumed_at(runs / "moved")) == 1
        found = curve(runs / "moved")
        assert relative_difference(found.losses, truth.losses) < LIMIT
        assert relative_difference(found.grad_norms, truth.grad_norms) < LIMIT
        got, wanted = all_tensors(runs / "moved")[TABLE], model.state_dict()[TABLE]
        torch.testing.assert_close(got, wanted, rtol=0, atol=LIMIT)

    def test_the_console_says_how_much(self, runs: Path, small_run: Path) -> None:
        model = load_model(small_run / "models" / "long")
        count = sum(parameter.numel() for parameter in model.parameters())
        said = f"training 2,048 of {count:,} parameters: the position rows from number 64 on"
        assert said in events(runs / "new-bf16-1")

    def test_doors_out_keep_the_bits_and_count_all_rows_as_learnt(
        self, runs: Path, tmp_path: Path
    ) -> None:
        """Also its own global projections: the local ones have not moved on without them."""
        origin, trained = open_source(runs / "new-bf16-1"), all_tensors(runs / "new-bf16-1")
        out = origin.weights()
        assert any("_global." in name for name in out)
        assert not [name for name in out if not torch.equal(out[name], trained[name])]
        assert origin.config.learnt_positions == 0
        convert(runs / "new-bf16-1", tmp_path / "longer", positions=200, attention_window=16)
        assert read_config(tmp_path / "longer").learnt_positions == 128


FIRST_LAYER = [
    f"longformer.encoder.layer.0.attention.self.{name}_global.weight"
    for name in ("query", "key", "value")
]
"""In the last layer a global token would have to be guessed itself for a gradient."""


class TestGlobalProjections:
    def test_without_global_tokens_a_checkpoint_holds_the_local_ones(
        self, small_run: Path, source: Path, tmp_path: Path, process_group: None
    ) -> None:
        """Trained by one rank, in this process; at every stage, in memory: TestInMemory."""
        words = [*COMMON, f"model.path={source}", "schedule.total_steps=2", *stage(3, "bf16")]
        assert main(["train", str(small_run / "recipe.yaml"), f"run.dir={tmp_path}", *words]) == 0
        found = all_tensors(tmp_path)
        twins = [name for name in found if "_global." in name]
        assert len(twins) == 2 * 6, "no moments of any"
        for name in twins:
            assert torch.equal(found[name], found[name.replace("_global.", ".")]), name
        assert "; global projections, without global tokens, are stored" in events(tmp_path)

    @pytest.mark.parametrize("number", [1, 2, 3])
    def test_ranks_without_a_global_token(
        self, runs: Path, small_run: Path, source: Path, rare_id: int, number: int
    ) -> None:
        """As one process: losses, norms and weights; the global projections' too."""
        words = [*COMMON, *NO_DROPOUT, f"model.global_tokens=ids_{rare_id}", "precision=fp32"]
        config = load_recipe(str(small_run / "recipe.yaml"), [*words, f"model.path={source}"])
        model = MaskedLMTask(config, source).build_model(source)
        truth = plain_loop(config, STEPS, model=model)
        found = curve(runs / f"ids-{number}")
        assert relative_difference(found.losses, truth.losses) < LIMIT
        assert relative_difference(found.grad_norms, truth.grad_norms) < NORM_LIMIT
        got, before = all_tensors(runs / f"ids-{number}"), load_file(source / "model.safetensors")
        wanted = model.state_dict()
        for name in before:
            torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=1e-4, msg=name)
        for name in FIRST_LAYER:
            assert got[f"{name}.exp_avg"].any(), name

    def test_sentence_ends_are_told_and_train(self, runs: Path) -> None:
        said = events(runs / "sentence-ends")
        assert "of the tokenizer end a sentence: " in said
        found = all_tensors(runs / "sentence-ends")
        assert all(found[f"{name}.exp_avg"].any() for name in FIRST_LAYER)


class TestInMemory:
    """One rank, in this process: what the engine holds."""

    @pytest.fixture(autouse=True)
    def _group(self, process_group: None) -> Iterator[None]:
        self.engines: list[ZeroEngine] = []
        yield
        while self.engines:
            self.engines.pop()._engine.destroy()

    def start(self, precision: str, number: int, *, new_only: bool) -> ZeroEngine:
        torch.manual_seed(0)
        model = tiny_longformer()
        if new_only:
            model.train_new_positions_only()
        else:
            model.freeze_global_projections()
        tree = {
            "precision": precision,
            "zero": {"config": f"ds_configs/zero{number}.json"},
            "optim": {"lr": 0.1, "weight_decay": 0.5},
        }
        self.engines.append(ZeroEngine(model, from_tree(tree), accumulation=1))
        return self.engines[-1]

    @pytest.mark.parametrize("new_only", [True, False], ids=["new positions", "no global tokens"])
    @pytest.mark.parametrize(("precision", "number"), PAIRS)
    def test_nothing_else_has_state_or_moves(
        self, precision: str, number: int, new_only: bool
    ) -> None:
        engine = self.start(precision, number, new_only=new_only)
        before = frozen_bits(engine)
        trains = {n: engine.whole_shape(n).numel() for n in engine.trained_names}
        assert ([*trains] == [NEW_ROWS]) == new_only
        assert not any("_global." in name for name in trains)
        for _ in range(2):
            tokens_BN = torch.arange(5, 17)[None]
            engine.backward(engine(tokens_BN).float().square().mean())
            assert engine.step().applied
        assert before
        after = frozen_bits(engine)
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        state = engine._adam.state  # by fp32 master
        assert {parameter.dtype for parameter in state} == {torch.float32}
        for key in zero.MOMENTS:
            held = sum(of[key].numel() for of in state.values())
            assert held == sum(parameter.numel() for parameter in state)
            assert 0 <= held - sum(trains.values()) < 64, "DeepSpeed pads by a few"


def frozen_bits(engine: ZeroEngine) -> dict[str, torch.Tensor]:
    """What does not train, as it lies in memory; of stage 3 this rank's part, which is all."""
    return {
        name: getattr(parameter, "ds_tensor", parameter).detach().clone()
        for name, parameter in engine.module.named_parameters()
        if name not in engine.trained_names
    }


REFUSED = {
    "unknown": ("model.path={interpolated}", "does not say how many of its positions are learnt"),
    "all are learnt": ("model.learnt_positions=128", "got 128 learnt of 128; wanted positions"),
    "too many": ("model.learnt_positions=129", "learnt_positions: got 129; wanted 0 to 128"),
    "negative": ("model.learnt_positions=-1", "learnt_positions: got -1; wanted 0 or more"),
    "short sequences": ("data.max_tokens=64", "max_tokens: got 64; wanted more than the 64 learnt"),
    "a typo": ("model.train_only=new", "model.train_only: got 'new'; wanted"),
}


@pytest.fixture(scope="module")
def interpolated(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interpolated") / "long"
    short = small_run / "models" / "short"
    convert(short, folder, positions=128, attention_window=16, init="interpolate")
    return folder


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str, small_run: Path, interpolated: Path) -> None:
    override, message = REFUSED[case]
    words = [NEW_ONLY, override.format(interpolated=interpolated)]
    with pytest.raises(InputError, match=re.escape(message)):
        config = load_recipe(str(small_run / "recipe.yaml"), words)
        MaskedLMTask(config, Path(config.model.path))


def test_a_recipe_may_say_how_many_are_learnt(small_run: Path, interpolated: Path) -> None:
    words = [NEW_ONLY, f"model.path={interpolated}", "model.learnt_positions=100"]
    config = load_recipe(str(small_run / "recipe.yaml"), words)
    task = MaskedLMTask(config, interpolated)
    model = task.build_model(interpolated)
    trained = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {NEW_ROWS: (28, 32)}
    assert task.model_config.learnt_positions == 100
