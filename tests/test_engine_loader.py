"""The loader: whoever makes the batches, they are the same bits in the same order, and it ends when
the loop ends, however the loop ends.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_helper import drive

from longpretrain.config import BatchConfig, Config, DataConfig, ScheduleConfig
from longpretrain.engine import loader
from longpretrain.engine.loader import Loader
from longpretrain.engine.loop import accumulation_steps
from longpretrain.errors import InputError
from longpretrain.ranks import Ranks
from longpretrain.recipe import load_recipe
from longpretrain.report.metrics import read_metrics
from longpretrain.tasks.masked_lm import MaskedLMTask

Batches = list[dict[str, torch.Tensor]]


def simple(workers: int, steps: int = 8) -> Config:
    """Updates of two micro-batches with two samples each."""
    return Config(
        data=DataConfig(loader_workers=workers),
        batch=BatchConfig(global_sequences=4, micro_sequences=2),
        schedule=ScheduleConfig(total_steps=steps, warmup_steps=1),
    )


class Numbers:
    """A task whose samples are their numbers, in tensors of several types and shapes."""

    def sample(self, number: int) -> int:
        return number

    def collate(self, samples: list[int]) -> dict[str, torch.Tensor]:
        long = torch.tensor(samples)
        return {
            "long": long,
            "odd": long[:1].bool(),
            "table": long.float()[:, None].expand(2, 3),
            "none": long[:0],
        }


class Failing(Numbers):
    """One of its samples is refused, one fails in a way that no other process could take apart."""

    def sample(self, number: int) -> int:
        if number == 8:
            raise InputError("shard X", got="less", wanted="more", way_out="Make it again.")
        if number == 12:
            raise UnportableError(number, "local")
        return number


class UnportableError(Exception):
    def __init__(self, number: int, place: str) -> None:
        super().__init__("does not travel")


class Stuck(Numbers):
    """Its fifth sample never comes."""

    def sample(self, number: int) -> int:
        while number == 4:
            time.sleep(0.01)
        return number


def same(left: Batches, right: Batches) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys()
        and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)
        for a, b in zip(left, right, strict=True)
    )


def processes() -> set[multiprocessing.process.BaseProcess]:
    return set(multiprocessing.active_children())


@pytest.fixture
def no_child_left() -> Iterator[None]:
    before = processes()
    yield
    assert processes() == before


@pytest.mark.usefixtures("no_child_left")
class TestWorkers:
    @pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
    def test_batches_are_the_same_bits(self, small_run: Path) -> None:
        """For 0, 1 and 3 workers: padded, packed, with global tokens, past the end of an epoch, and
        gone on with at another step.
        """
        found = {}
        for workers in (0, 1, 3):
            overrides = (
                "data.blocks=packed data.max_tokens=100 model.global_tokens=first "
                f"batch.micro_sequences=2 schedule.total_steps=60 data.loader_workers={workers}"
            )
            config = load_recipe(str(small_run / "recipe.yaml"), overrides.split())
            task = MaskedLMTask(config, Path(config.model.path))
            steps = [1, 2, 3, 4, 5, *range(57, 61)]
            with Loader(config, task, Ranks(), accumulation_steps(config, 1)) as batches:
                found[workers] = [batches.get(step) for step in steps]
            assert task.epoch(60 * 4) > 0
        assert all(same(a, b) for a, b in zip(found[0], found[1], strict=True))
        assert all(same(a, b) for a, b in zip(found[0], found[3], strict=True))
        names = {name for update in found[0] for batch in update for name in batch}
        assert {"padding_BN", "global_index_BG", "document_BN", "position_BN"} <= names

    def test_odd_tensors_and_a_restart_anywhere(self) -> None:
        config, alone = simple(2), simple(0)
        with (
            Loader(config, Numbers(), Ranks(rank=1, world_size=2), 1) as batches,
            Loader(alone, Numbers(), Ranks(rank=1, world_size=2), 1) as right,
        ):
            for step in (7, 8, 3, 4, 1):
                assert same(batches.get(step), right.get(step)), step

    def test_errors_arrive_as_they_are(self) -> None:
        with Loader(simple(1), Failing(), Ranks(), 2) as batches:
            batches.get(1)
            batches.get(2)
            with pytest.raises(InputError) as refused:
                batches.get(3)
            assert refused.value.way_out == "Make it again."
            assert "in sample" in refused.value.__notes__[0]
            with pytest.raises(RuntimeError, match="UnportableError: does not travel"):
                batches.get(4)
            assert batches.get(5)

    def test_a_killed_worker_is_told(self) -> None:
        before = processes()
        with Loader(simple(1, steps=1000), Numbers(), Ranks(), 2) as batches:
            batches.get(1)
            (worker,) = processes() - before
            os.kill(worker.pid or 0, signal.SIGKILL)
            with pytest.raises(InputError, match=r"got an end by signal 9; .*data\.loader_workers"):
                for step in range(2, 1000):
                    batches.get(step)

    def test_signals_are_the_ranks_affair(self) -> None:
        """A scheduler signals every process; the run takes its last batches all the same."""
        before = processes()
        with Loader(simple(2), Numbers(), Ranks(), 2) as batches:
            batches.get(1)
            for worker in processes() - before:
                for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                    os.kill(worker.pid or 0, number)
            for step in range(2, 9):
                assert int(batches.get(step)[0]["long"][0]) == 4 * (step - 1)
            started = time.monotonic()
        assert time.monotonic() - started < loader._PATIENCE_S / 2
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(loader.STOP_SIGNALS)

    def test_a_stuck_worker_does_not_hold_the_end_up(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(loader, "_PATIENCE_S", 0.1)
        with pytest.raises(KeyError), Loader(simple(1), Stuck(), Ranks(), 2) as batches:
            batches.get(1)
            started = time.monotonic()
            raise KeyError("the loop failed")
        assert time.monotonic() - started < 30


def test_the_runs_random_numbers_are_not_touched() -> None:
    torch.manual_seed(3)
    right = torch.rand(2)
    for workers in (0, 1):
        torch.manual_seed(3)
        with Loader(simple(workers), Numbers(), Ranks(), 2) as batches:
            batches.get(1)
        assert torch.equal(torch.rand(2), right)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
def test_pinned_memory(workers: int) -> None:
    with Loader(simple(workers), Numbers(), Ranks(), 2, pin=True) as batches:
        for step in (1, 2):
            for batch in batches.get(step):
                assert all(x.is_pinned() for x in batch.values() if x.numel())
                assert int(batch["long"].cuda(non_blocking=True)[0]) == int(batch["long"][0])


def endless() -> None:
    """A rank that says who works for it, and then hangs."""
    before = processes()
    with Loader(simple(2), Numbers(), Ranks(), 2) as batches:
        batches.get(1)
        print(*(worker.pid for worker in processes() - before), flush=True)
        time.sleep(1000)


def test_workers_end_with_a_killed_rank() -> None:
    """kill -9 leaves it no time to say so."""
    code = "import test_engine_loader as t; t.endless()"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    rank = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert rank.stdout is not None
    workers = [int(word) for word in rank.stdout.readline().split()]
    assert len(workers) == 2
    rank.kill()
    rank.wait()
    rank.stdout.close()
    deadline = time.monotonic() + 30
    while (
        left := [worker for worker in workers if _lives(worker)]
    ) and time.monotonic() < deadline:
        time.sleep(0.05)
    for worker in left:
        os.kill(worker, signal.SIGKILL)
    assert not left


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_packed_run_goes_on_with_another_number_of_workers(
    small_run: Path, tmp_path: Path
) -> None:
    """Real runs: by a thread; by a worker, stopped by a signal and gone on with by a thread."""
    settings = ["data.blocks=packed", "evaluate.every_steps=8", "schedule.total_steps=8"]

    def run(name: str, workers: int, stop_after: int | None = None) -> dict[str, Any]:
        words = [f"run.dir={tmp_path / name}", f"data.loader_workers={workers}"]
        arguments = [str(small_run / "recipe.yaml"), *settings, *words]
        return {"arguments": arguments, "stop_after": stop_after}

    runs = [run("whole", 0), run("parts", 1, stop_after=2), run("parts", 0)]
    finished = drive(tmp_path / "drive", 1, runs)
    assert finished.exit_codes == [0, 75, 0], finished.output[-3000:]
    (whole, whole_score), (parts, parts_score) = (
        [
            [
                line
                for line in read_metrics(tmp_path / name / "metrics.jsonl")
                if line["kind"] == kind
            ]
            for kind in ("train", "evaluation")
        ]
        for name in ("whole", "parts")
    )
    assert [line["loss"] for line in whole_score] == [line["loss"] for line in parts_score] != []
    assert [line["step"] for line in parts] == list(range(1, 9))
    for name in ("loss", "grad_norm", "masked_tokens", "tokens"):
        assert [line[name] for line in parts] == [line[name] for line in whole], name
    assert "% filled" in finished.output
