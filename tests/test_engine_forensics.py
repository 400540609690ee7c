"""Updates that are not finite, in real runs: skipped, repeated, dumped, and no bit of the others is
changed.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_helper import Finished, drive
from safetensors.torch import load_file, save_file
from torch import nn

from longpretrain.engine.forensics import FP16_PATIENCE, MOST_DUMPS, Forensics
from longpretrain.engine.saver import Saver
from longpretrain.engine.signals import StopRequest
from longpretrain.engine.update import update_all
from longpretrain.engine.zero import ZeroEngine
from longpretrain.prepare import prepare
from longpretrain.ranks import Ranks
from longpretrain.recipe import load_recipe
from longpretrain.report.metrics import MetricsLog, read_metrics
from longpretrain.schedule import update_numbers
from longpretrain.tasks.masked_lm import MaskedLMTask

STEPS = 8
SEQUENCES = 4
ONE = "batch.global_sequences=1"
LONG = 100
"""Tokens from which on a sequence reaches the row of the position table that is no number."""
POSITIONS = "longformer.embeddings.position_embeddings"
LAYER = "longformer.encoder.layer.1.intermediate.dense"


@pytest.fixture(scope="module")
def place(small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, a corpus of short documents and a few long ones, and two damaged models: one in a
    row that only the long ones reach, one in a layer that all sequences pass.
    """
    folder = tmp_path_factory.mktemp("forensics")
    (folder / "text").mkdir()
    for number in range(40):
        text = "work and labor " * (40 if number % 13 == 5 else 6)
        (folder / "text" / f"{number:02d}.txt").write_text(text, encoding="utf-8")
    prepare([folder / "text"], folder / "data")
    shutil.copy(small_run / "recipe.yaml", folder)
    shutil.copytree(small_run / "models" / "long", folder / "sound")
    damage(folder, "positions", f"{POSITIONS}.weight", LONG + 1, float("nan"))
    damage(folder, "layer", f"{LAYER}.weight", 7, 3e38)
    return folder


def damage(folder: Path, name: str, tensor: str, row: int, value: float) -> None:
    """A copy of the sound model with one row of one tensor spoilt."""
    shutil.copytree(folder / "sound", folder / name)
    path = folder / name / "model.safetensors"
    tensors = load_file(path)
    tensors[tensor][row] = value
    save_file(tensors, path, metadata={"format": "pt"})


def overrides(place: Path, model: str, run_dir: Path, *more: str) -> list[str]:
    return [
        f"run.dir={run_dir}",
        f"model.path={place / model}",
        f"data.train={place / 'data'}",
        "data.blocks=document",
        "evaluate.every_steps=0",
        f"batch.global_sequences={SEQUENCES}",
        f"schedule.total_steps={STEPS}",
        *more,
    ]


def long_samples(place: Path, run_dir: Path) -> list[int]:
    """Numbers of the samples that the damaged row is in."""
    config = load_recipe(str(place / "recipe.yaml"), overrides(place, "sound", run_dir))
    task = MaskedLMTask(config, place / "sound")
    lengths = [len(task.sample(number).tokens_N) for number in range(STEPS * SEQUENCES)]
    return [number for number, length in enumerate(lengths) if length >= LONG]


def dumps(run_dir: Path) -> dict[int, dict[str, Any]]:
    """By step."""
    found = [json.loads(path.read_text()) for path in sorted(run_dir.glob("forensics/*"))]
    return {dump["step"]: dump for dump in found}


def events(run_dir: Path) -> list[dict[str, Any]]:
    """Those of forensics."""
    return [line for line in read_metrics(run_dir / "metrics.jsonl") if "forensics" in line]


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in run_dir.glob("checkpoints/step-*"))


@pytest.fixture(scope="module")
def runs(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Finished]:
    """Two ranks, two micro-batches each: a run that skips some updates, one that diverges, and one
    that never had a finite update, stopped by a signal on the way and started again.
    """
    folder = tmp_path_factory.mktemp("runs")

    def command(run: str, model: str, *more: str, stop_after: int | None = None) -> dict[str, Any]:
        words = overrides(place, model, folder / run, *more)
        return {"arguments": [str(place / "recipe.yaml"), *words], "stop_after": stop_after}

    every = ("checkpoint.every_steps=1", "checkpoint.keep=0")
    commands = [
        command("some", "positions", "zero.config=ds_configs/zero3.json", "precision=bf16", *every),
        command("diverges", "sound", "optim.lr=1e30", "optim.max_skipped=3", *every),
        command("never", "layer", "optim.max_skipped=5", stop_after=2),
        command("never", "layer", "optim.max_skipped=5"),
    ]
    return folder, drive(folder / "drive", 2, commands)


def test_exit_codes(runs: tuple[Path, Finished]) -> None:
    assert runs[1].exit_codes == [0, 1, 75, 1], runs[1].output[-3000:]


def test_only_updates_with_a_bad_sample_are_skipped_and_it_is_named(
    runs: tuple[Path, Finished], place: Path
) -> None:
    run_dir = runs[0] / "some"
    bad = long_samples(place, run_dir)
    steps = {number // SEQUENCES + 1 for number in bad}
    assert 0 < len(steps) < min(STEPS, MOST_DUMPS)  # the corpus is made so
    found = dumps(run_dir)
    assert found.keys() == steps
    named: list[int] = []
    for step, dump in found.items():
        assert dump["samples_done"] == (step - 1) * SEQUENCES
        for of_rank in dump["ranks"]:
            for number, seen in enumerate(of_rank["micro_batches"]):
                taken = [sample["sample"] for sample in seen["samples"]]
                [numbers] = update_numbers(
                    step, global_sequences=SEQUENCES, micro_sequences=1, accumulation=2,
                    world_size=2, rank=of_rank["rank"],
                )[number : number + 1]  # fmt: skip
                assert taken == list(numbers)
                is_bad = bool(set(taken) & set(bad))
                assert seen["finite"] != is_bad
                assert (seen["loss"] == "NaN") == is_bad
                assert seen["loss"] == seen["loss_first_time"]
                named += [s["sample"] for s in seen["samples"] if not s["finite"]]
                if is_bad:
                    assert seen["first_output"]["module"] == POSITIONS
                    assert seen["first_output"]["nan"] == 32
        assert [row["name"] for row in dump["weights_not_finite"]] == [f"{POSITIONS}.weight"]
        assert dump["repeated"]["outcome"] == "not finite, and skipped"
    assert sorted(named) == bad


def test_ids_and_places_are_those_of_the_data(runs: tuple[Path, Finished], place: Path) -> None:
    run_dir = runs[0] / "some"
    config = load_recipe(str(place / "recipe.yaml"), overrides(place, "sound", run_dir))
    task = MaskedLMTask(config, place / "sound")
    for dump in dumps(run_dir).values():
        for of_rank in dump["ranks"]:
            for sample in (s for seen in of_rank["micro_batches"] for s in seen["samples"]):
                assert sample["id"] == task.sample(sample["sample"]).sample_id
                assert sample["source"] == "data.train"
                assert sample["folder"] == str(place / "data")
                blocks, epoch, block = task.sources.locate(sample["sample"])
                assert (sample["epoch"], sample["block"]) == (epoch, block)
                assert blocks.sample_id(block) == sample["id"]


def test_events_and_counts(runs: tuple[Path, Finished]) -> None:
    run_dir = runs[0] / "some"
    found = dumps(run_dir)
    told = events(run_dir)
    assert [line["step"] for line in told] == [*found]
    for line in told:
        assert line["skipped"] is True
        assert line["forensics"] == f"forensics/step-{line['step']:06d}.json"
        assert line["event"] == f"{found[line['step']]['summary']}; {line['forensics']}"
        assert line["event"].startswith(
            f"update skipped: loss not finite, first in the output of {POSITIONS}, at sample "
        )
    trained = [x for x in read_metrics(run_dir / "metrics.jsonl") if x["kind"] == "train"]
    for line in trained:
        assert line["skipped"] == sum(step <= line["step"] for step in found)
        assert (line["loss"] is None) == (line["step"] in found)


def test_checkpoints_wait_for_a_finite_update(runs: tuple[Path, Finished]) -> None:
    run_dir = runs[0] / "some"
    skipped = dumps(run_dir).keys()
    wanted = [step for step in range(1, STEPS + 1) if step not in skipped or step == STEPS]
    assert checkpoints(run_dir) == wanted


def test_a_run_that_diverges_ends_where_it_can_be_gone_on_from(
    runs: tuple[Path, Finished],
) -> None:
    run_dir = runs[0] / "diverges"
    status = json.loads((run_dir / "status.json").read_text())
    first = min(dumps(run_dir))
    assert list(dumps(run_dir)) == [first, first + 1, first + 2]
    assert (status["state"], status["step"]) == ("failed", first - 1)
    assert f"3 updates in a row that are not finite, to step {first + 2}" in status["reason"]
    assert f"the checkpoint of step {first - 1} holds those of before. See" in status["reason"]
    assert f"{run_dir}/forensics/step-{first + 2:06d}.json" in status["reason"]
    told = [line for line in runs[1].output.splitlines() if "3 updates in a row" in line]
    assert [line.partition(": ")[0] for line in told] == ["longpretrain train"]  # one rank's line
    assert checkpoints(run_dir) == [*range(1, first)]
    state = json.loads((run_dir / "checkpoints" / f"step-{first - 1:06d}/state.json").read_text())
    assert (state["step"], state["samples_done"]) == (first - 1, (first - 1) * SEQUENCES)
    assert state["skipped_in_a_row"] == 0
    for path in run_dir.glob("checkpoints/*/*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
    assert "Traceback" not in runs[1].output


def test_a_run_started_again_goes_on_counting(runs: tuple[Path, Finished]) -> None:
    run_dir = runs[0] / "never"
    [kept] = checkpoints(run_dir)  # of the signal
    assert 2 <= kept < 5
    assert list(dumps(run_dir)) == [1, 2, 3, 4, 5]
    assert "to step 5;" in json.loads((run_dir / "status.json").read_text())["reason"]
    for dump in dumps(run_dir).values():
        seen = [seen for of_rank in dump["ranks"] for seen in of_rank["micro_batches"]]
        assert {found["first_output"]["module"] for found in seen} == {LAYER}
        assert "and in 3 of 3 other micro-batches" in dump["summary"]


# In this process, on one rank: faults that pass, disks that are full, and fp16.


class Small:
    """The engine's updates on the small model, as the loop runs them."""

    def __init__(self, place: Path, model: str, run_dir: Path, *more: str) -> None:
        words = overrides(place, model, run_dir, *more)
        self.config = load_recipe(str(place / "recipe.yaml"), words)
        self.task = MaskedLMTask(self.config, place / model)
        self.sequences = self.config.batch.global_sequences
        self.engine = ZeroEngine(
            self.task.build_model(place / model), self.config, accumulation=self.sequences
        )
        self.engine.train()  # dropout
        self.marks: list[str] = []
        self.metrics = MetricsLog(
            run_dir, total_steps=STEPS, tensorboard=False, console=io.StringIO()
        )
        self.saver = Saver(self.config, self.engine, self.task, self.metrics, step=0)
        self.forensics = Forensics(
            self.config,
            self.task,
            self.engine,
            Ranks(),
            metrics=self.metrics,
            mark=self.marks.append,
        )
        self.skipped = 0

    def step(self, step: int) -> Any:
        numbers = range((step - 1) * self.sequences, step * self.sequences)
        batches = [self.task.collate([self.task.sample(number)]) for number in numbers]
        self.engine.set_learning_rate(1e-3)
        stop, cpu = StopRequest(), torch.device("cpu")
        attempt = partial(
            update_all,
            self.engine,
            self.task,
            batches,
            cpu,
            stop,
            saver=self.saver,
            seed=step,
            waited_s=0.0,
        )
        update = self.forensics.settle(
            attempt, step=step, micro_batches=batches, rate=1e-3, skipped_before=self.skipped
        )
        self.skipped = 0 if update.result.applied else self.skipped + 1
        return update

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: self.engine.full_state(name) for name in self.engine.trained_names}

    def close(self) -> None:
        self.metrics.close()
        self.engine._engine.destroy()


@pytest.fixture
def small(place: Path, process_group: None) -> Iterator[Callable[..., Small]]:
    started: list[Small] = []

    def start(*arguments: Any) -> Small:
        started.append(Small(place, *arguments))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture
def fp16_on_the_cpu(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed refuses fp16 there, though nothing in its way needs a GPU."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(type(get_accelerator()), "is_fp16_supported", lambda self: True)


def same(left: Small, right: Small) -> bool:
    others = right.weights()
    return all(torch.equal(x, others[name]) for name, x in left.weights().items())


def flip_once(module: nn.Module, call: int, tokens: slice) -> None:
    """Exponents in a module's output come out as all ones, at one call of it."""
    calls = 0

    def flip(module: nn.Module, inputs: Any, output_BNC: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            output_BNC.detach().view(torch.int32)[:, tokens, 0] |= 0x7F800000

    module.register_forward_hook(flip)


@pytest.mark.parametrize(
    ("stage", "tokens", "told"),
    [
        (0, slice(None), "the loss was another one at rank 0 on "),
        (1, slice(1), "the losses were the same"),  # <s> is never masked: its gradient alone tells
        (3, slice(None), "the loss was another one at rank 0 on "),
    ],
)
def test_a_fault_that_does_not_come_back_leaves_no_trace_in_the_run(
    small: Callable[..., Small], tmp_path: Path, stage: int, tokens: slice, told: str
) -> None:
    zero = f"zero.config=ds_configs/zero{stage}.json"
    hit, spared = (small("sound", tmp_path / name, zero) for name in ("hit", "spared"))
    layer = hit.engine.module.get_submodule(LAYER)
    flip_once(layer, SEQUENCES + 2, tokens)  # in the second update
    for step in (1, 2, 3):
        got, wanted = hit.step(step), spared.step(step)
        assert (got.loss, got.result) == (wanted.loss, wanted.result)
        assert got.result.applied
    assert same(hit, spared)
    [(step, dump)] = dumps(tmp_path / "hit").items()
    assert step == 2
    assert dump["repeated"]["outcome"] == "finite, and applied"
    seen = dump["ranks"][0]["micro_batches"]
    changed = [n for n, x in enumerate(seen) if x["loss_first_time"] != x["loss"]]
    assert changed == ([1] if tokens == slice(None) else [])
    assert hit.marks == ["step 2: repeating the update, which was not finite"]
    [line] = events(tmp_path / "hit")
    assert line["skipped"] is False
    assert "update repeated: loss or gradient was not finite" in line["event"]
    assert told in line["event"]
    assert not dumps(tmp_path / "spared")


def test_neither_the_repetition_nor_a_full_disk_changes_the_other_updates(
    small: Callable[..., Small], place: Path, tmp_path: Path
) -> None:
    """Beside a run that skips such updates and thinks no more of it."""
    zero = "zero.config=ds_configs/zero2.json"
    told, untold = (small("positions", tmp_path / name, zero) for name in ("told", "untold"))
    plain = small("positions", tmp_path / "plain", zero)
    plain.forensics.settle = lambda attempt, **keywords: attempt()  # type: ignore[assignment]
    (tmp_path / "untold" / "forensics").write_text("a file where the folder would be")
    for step in range(1, STEPS + 1):
        got, wanted, bare = (run.step(step) for run in (untold, told, plain))
        assert str(got.loss) == str(wanted.loss) == str(bare.loss)  # nan is not nan
        assert got.result.applied == wanted.result.applied == bare.result.applied
    steps = {number // SEQUENCES + 1 for number in long_samples(place, tmp_path)}
    assert dumps(tmp_path / "told").keys() == steps
    lines = events(tmp_path / "untold")
    assert [line["step"] for line in lines] == sorted(steps)
    for line in lines:
        assert line["forensics"] is None
        assert "; no dump: " in line["event"]
        assert POSITIONS in line["event"]
    wanted = told.weights()
    for name, value in [*untold.weights().items(), *plain.weights().items()]:
        assert torch.equal(value.nan_to_num(1e9), wanted[name].nan_to_num(1e9)), name


def test_dumps_are_few(small: Callable[..., Small], tmp_path: Path) -> None:
    run = small("layer", tmp_path / "run", ONE, "activation_checkpointing=true")
    last = MOST_DUMPS + 3
    for step in range(1, last + 1):
        assert not run.step(step).result.applied
    assert list(dumps(tmp_path / "run")) == [*range(1, MOST_DUMPS), last]
    with pytest.raises(FloatingPointError, match=f"run/forensics/step-{last:06d}.json: mend"):
        run.forensics.give_up(last, last, 0)


def test_fp16_may_overflow_some_times_and_is_repeated_at_the_same_scale(
    small: Callable[..., Small], tmp_path: Path, fp16_on_the_cpu: None
) -> None:
    """Beside a run that repeats nothing: the scale moves once for each update all the same."""
    run, plain = (
        small("sound", tmp_path / name, ONE, "precision=fp16") for name in ("run", "plain")
    )
    plain.forensics.settle = lambda attempt, **keywords: attempt()  # type: ignore[assignment]
    for each in (run, plain):
        each.engine.loss_scaling |= {"cur_scale": 2.0**40}
    for step in range(1, FP16_PATIENCE + 1):
        assert not dumps(tmp_path / "run")
        got, wanted = run.step(step), plain.step(step)
        assert (got.loss, got.result) == (wanted.loss, wanted.result)
        assert not got.result.applied
        assert run.engine.loss_scaling == plain.engine.loss_scaling
    [(step, dump)] = dumps(tmp_path / "run").items()
    assert step == FP16_PATIENCE
    assert dump["loss_scale"] == got.result.loss_scale > 2.0**30
    assert "update skipped: gradient not finite" in dump["summary"]


def test_a_loss_that_is_not_finite_is_none_of_the_scales_doing(
    small: Callable[..., Small], tmp_path: Path, fp16_on_the_cpu: None
) -> None:
    run = small("layer", tmp_path / "run", ONE, "precision=fp16")
    run.step(1)
    [dump] = dumps(tmp_path / "run").values()
    assert f"loss not finite, first in the output of {LAYER}" in dump["summary"]
