"""What a job of Slurm becomes after an attempt; test_slurm.py lets a real Slurm do it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from longpretrain import requeue
from longpretrain.config import Config
from longpretrain.engine import names
from longpretrain.engine.run_folder import check_run_dir
from longpretrain.errors import InputError
from longpretrain.recipe import from_tree
from longpretrain.requeue import Standing, begin, decide, end

JOB = {"SLURM_JOB_ID": "7"}
BUSY = "Unable to contact slurm controller (connect failure)"
RUNNING, ENDED = Standing(), Standing(is_running=False)
WARNED = Standing(is_warned=True)
REQUEUED = Standing(is_running=False, is_requeued=True)
UNKNOWN = Standing(is_known=False)
DIED = {"state": "failed", "reason": "rank 1 (process 5 on n2) died"}


@pytest.mark.parametrize(
    ("status", "code", "standing", "why_not", "ends_with"),
    [
        pytest.param({"state": "done"}, 1, RUNNING, "the run is done", 0, id="done"),
        pytest.param({"state": "preempted", "reason": "SIGUSR1"}, 1, RUNNING, "", 75, id="USR1"),
        pytest.param(
            {"state": "preempted", "reason": "SIGTERM"}, 143, RUNNING, "SIGTERM asked", 75,
            id="somebody's TERM",
        ),
        pytest.param(
            {"state": "preempted", "reason": "SIGTERM"}, 143, WARNED, "", 75,
            id="TERM as Slurm gives the place to another job",
        ),
        pytest.param(
            {"state": "preempted", "reason": "SIGTERM"}, 143, ENDED, "it was cancelled", 75,
            id="scancel",
        ),
        pytest.param({}, 143, ENDED, "it was cancelled", 143, id="scancel before the ranks ran"),
        pytest.param(
            {"state": "preempted", "reason": "SIGTERM"}, 143, REQUEUED, "", 75, id="a node was lost"
        ),
        pytest.param(
            {"state": "preempted", "reason": "SIGTERM"}, 143, UNKNOWN, "", 75,
            id="TERM, and Slurm does not say why",
        ),
        pytest.param(
            {"state": "preempted", "reason": "SIGINT"}, 130, UNKNOWN, "SIGINT asked", 75,
            id="INT, which Slurm gives to nobody",
        ),
        pytest.param({}, 75, WARNED, "", 75, id="stopped before the ranks ran"),
        pytest.param({}, 2, RUNNING, "would fail again", 2, id="bad input"),
        pytest.param(
            {"state": "running"}, 2, RUNNING, "would fail again", 2, id="the run of another job"
        ),
        pytest.param(DIED, 137, RUNNING, "", 137, id="a rank died"),
        pytest.param({"state": "running"}, 0, RUNNING, "", 1, id="all ranks were killed"),
        pytest.param(
            {"state": "failed", "reason": "rank 0: InputError: loader worker: got an end"},
            2, RUNNING, "", 2, id="an input that was fine at the start",
        ),
        pytest.param(
            {"state": "failed", "reason": "rank 0: FloatingPointError: gradient: got 20"},
            1, RUNNING, "would fail again", 1, id="diverged",
        ),
    ],
)  # fmt: skip
def test_decide(
    status: dict[str, Any], code: int, standing: Standing, why_not: str, ends_with: int
) -> None:
    told, found = decide(status, code, standing)
    assert (told == "") == (why_not == "")
    assert why_not in told
    assert found == ends_with


class Job:
    """A run folder, and a scontrol that answers as Slurm 22 does and notes what it is asked."""

    def __init__(self, folder: Path) -> None:
        self.run_dir = folder / "run"
        self.config: Config = from_tree({"run": {"dir": str(self.run_dir)}})
        self.asked = folder / "asked"
        self.answer = folder / "answer"
        self.failures = folder / "failures"
        self.failures.mkdir()
        self.pauses: list[float] = []
        self.says("JobState=RUNNING Reason=None Restarts=0 PreemptTime=None")
        tool = folder / "bin" / "scontrol"
        tool.parent.mkdir()
        tool.write_text(
            f"#!/bin/sh\necho \"$@\" >> '{self.asked}'\n"
            f"[ $1 = -o ] && shift\nfile='{self.failures}'/$1\n"
            "if [ -s $file ]; then head -1 $file >&2; sed -i 1d $file; exit 1; fi\n"
            f"cat '{self.answer}'\n"
        )
        tool.chmod(0o755)

    def says(self, text: str) -> None:
        self.answer.write_text(f"JobId=7 {text}\n")

    def fails(self, question: str, *errors: str) -> None:
        """What scontrol ends with, in this order, before it answers."""
        (self.failures / question).write_text("".join(f"{error}\n" for error in errors))

    def leaves(self, state: str, reason: str = "", *, step: int = 0, time: float = 4e9) -> None:
        """What the ranks of an attempt leave."""
        folder = self.run_dir / "checkpoints"
        folder.mkdir(parents=True, exist_ok=True)
        (self.run_dir / names.CONFIG).write_text(yaml.safe_dump({}))
        if step:
            (folder / names.LATEST).write_text(f"step-{step:06d}\n")
        status = {"state": state, "reason": reason, "step": step, "time": time}
        (self.run_dir / names.STATUS).write_text(json.dumps(status))

    def begin(self, restarts: int, *, fresh: bool = False) -> int:
        environment = {**JOB, "SLURM_RESTART_COUNT": str(restarts)}
        return begin(self.config, fresh=fresh, environment=environment)

    def end(self, code: int = 1, *, warned: bool = False, **environment: str) -> int:
        return end(self.config, code, warned=warned, environment={**JOB, **environment})

    def is_requeued(self) -> bool:
        """Since it was asked last."""
        asked = self.asked.read_text() if self.asked.exists() else ""
        self.asked.write_text("")
        return "requeue 7\n" in asked


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    found = Job(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(requeue, "_pause", found.pauses.append)
    before = signal.getsignal(signal.SIGTERM)
    yield found
    signal.signal(signal.SIGTERM, before)


def test_a_crash_is_requeued_three_times_and_anew_after_a_new_checkpoint(job: Job) -> None:
    assert job.begin(0) == 0
    for restarts in (1, 2, 3):
        job.leaves("failed", "rank 1 died")
        assert job.end(137) == 0
        assert job.is_requeued()
        assert job.begin(restarts) == 0
    job.leaves("failed", "rank 1 died", step=5)  # this one left a checkpoint
    for restarts in (4, 5, 6):
        assert job.end(137) == 0
        assert job.is_requeued()
        assert job.begin(restarts) == 0
    assert job.end(137) == 137
    assert not job.is_requeued()


def test_the_limit_is_a_setting(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    job.begin(0)
    job.leaves("failed", "rank 1 died", step=5)
    assert job.end(137, LONGPRETRAIN_MAX_RESTARTS="0") == 137
    assert "0 restarts brought no new checkpoint after that of step 5" in capsys.readouterr().err
    job.leaves("preempted", "SIGUSR1", step=6)  # no crash
    assert job.end(1, LONGPRETRAIN_MAX_RESTARTS="0") == 0
    with pytest.raises(InputError, match="MAX_RESTARTS: got many; wanted a whole number"):
        job.leaves("failed", "rank 1 died")
        job.end(137, LONGPRETRAIN_MAX_RESTARTS="many")


def test_attempts_that_end_without_a_word_count_as_well(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their batch script died with its node, and Slurm requeued the job."""
    job.begin(0)
    job.leaves("running")
    assert [job.begin(restarts) for restarts in (1, 2, 3, 4)] == [0, 0, 0, 1]
    assert "job 7 is given up: 3 restarts brought no new checkpoint" in capsys.readouterr().err
    job.leaves("running", step=9)
    assert job.begin(5) == 0


def test_a_run_folder_that_was_never_made_counts_too(job: Job) -> None:
    job.begin(0)
    assert not job.run_dir.exists()
    assert job.end(1) == 0  # srun itself failed, say
    assert job.is_requeued()
    assert [path.name for path in job.run_dir.iterdir()] == [names.ATTEMPTS]


def test_restarts_by_slurm_count_before_there_is_a_run_folder(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    """A node goes down at every start, and the batch script with it."""
    assert job.begin(0) == 0
    assert not job.run_dir.exists()
    assert [job.begin(restarts, fresh=True) for restarts in (1, 2, 3, 4)] == [0, 0, 0, 1]
    told = capsys.readouterr()
    assert "3 restarts brought no new checkpoint" in told.err
    assert "--fresh" not in told.out
    assert [path.name for path in job.run_dir.iterdir()] == [names.ATTEMPTS]
    for fresh in (False, True):  # to the ranks such a folder is a new one
        check_run_dir(job.config, fresh=fresh)


def test_a_place_that_takes_no_run_folder_is_left_to_the_ranks(job: Job) -> None:
    job.run_dir.write_text("a file")
    assert job.begin(1) == 0
    assert job.run_dir.read_text() == "a file"


def test_a_new_job_counts_from_zero(job: Job) -> None:
    job.leaves("failed", "rank 1 died")
    (job.run_dir / names.ATTEMPTS).write_text(json.dumps({"7": {"restarts": 3}}))
    assert job.begin(0) == 0  # its number was another's, long ago
    assert job.end(137) == 0
    assert job.is_requeued()


def test_what_an_older_attempt_left_does_not_count(job: Job) -> None:
    """It was preempted; this one was refused before its ranks said anything."""
    job.leaves("preempted", "SIGUSR1", step=3, time=1.0)
    job.begin(1)
    assert job.end(2) == 2
    assert not job.is_requeued()


def test_a_run_that_was_done_before_is_done(job: Job) -> None:
    job.leaves("done", step=3, time=1.0)
    job.begin(0)
    assert job.end(0) == 0
    assert not job.is_requeued()


@pytest.mark.parametrize(
    ("says", "requeued", "code"),
    [
        ("JobState=RUNNING Reason=None Restarts=0 PreemptTime=None", False, 75),
        ("JobState=RUNNING Reason=None Restarts=0 PreemptTime=2026-11-22T15:36:59", True, 0),
        ("JobState=COMPLETING Reason=None Restarts=0 PreemptTime=None", False, 75),
        ("JobState=COMPLETING Reason=TimeLimit Restarts=0 PreemptTime=None", True, 0),
        ("JobState=COMPLETING Reason=None Restarts=1", False, 75),  # by Slurm itself: a lost node
    ],
    ids=["kill", "preemption", "scancel", "end of time", "lost node"],
)
def test_sigterm_means_what_slurm_says(job: Job, says: str, requeued: bool, code: int) -> None:
    job.begin(0)
    job.leaves("preempted", "SIGTERM", step=4)
    job.says(says)
    assert job.end(143) == code
    assert job.is_requeued() == requeued


def test_a_requeued_job_may_get_fewer_nodes(job: Job) -> None:
    job.begin(0)
    job.leaves("preempted", "SIGUSR1", step=4)
    assert job.end(1, SLURM_NTASKS_PER_NODE="8") == 0
    asked = job.asked.read_text().splitlines()
    assert asked[-2:] == ["requeue 7", "update JobId=7 NumTasks=8"]


def test_fresh_counts_once(job: Job, capsys: pytest.CaptureFixture[str]) -> None:
    def counts(restarts: int) -> bool:
        assert job.begin(restarts, fresh=True) == 0
        return capsys.readouterr().out == "--fresh\n"

    job.leaves("done", step=8)
    assert counts(0)
    assert counts(1)  # the first attempt did not get so far as to move the old run
    job.run_dir.rename(job.run_dir.with_name("run.old-1"))
    job.leaves("running", step=2)
    assert not counts(2)
    shutil.rmtree(job.run_dir)
    assert counts(0)  # no old run
    job.leaves("running", step=2)
    assert not counts(1)


def test_a_second_job_does_not_change_the_note_of_the_first(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command, submitted twice by mistake: with --fresh, too."""
    second = {"SLURM_JOB_ID": "8"}
    job.begin(0, fresh=True)
    job.leaves("running")
    assert job.end(137) == 0
    job.begin(1, fresh=True)
    job.leaves("running", step=50, time=1.0)  # before the second
    begin(job.config, fresh=True, environment=second)
    assert end(job.config, 2, warned=False, environment=second) == 2  # refused by the lock
    job.leaves("preempted", "SIGUSR1", step=50)
    assert job.end(75) == 0
    capsys.readouterr()
    assert job.begin(2, fresh=True) == 0
    assert "--fresh" not in capsys.readouterr().out


def test_a_damaged_note_is_none(job: Job) -> None:
    job.leaves("failed", "rank 1 died")
    for note in ("", "[]", "{", "7", '{"more": 1}', '{"restarts": "3"}'):
        text = f'{{"7": {note}}}'
        (job.run_dir / names.ATTEMPTS).write_text(text)
        assert job.begin(1) == 0
        assert job.end(137) == 0
        assert job.is_requeued()


@pytest.mark.parametrize("question", ["show", "requeue"])
def test_a_controller_that_does_not_answer_is_asked_again(
    job: Job, capsys: pytest.CaptureFixture[str], question: str
) -> None:
    """As it is busy, for many jobs are preempted at once, or as it fails over."""
    job.begin(0)
    job.leaves("preempted", "SIGTERM", step=4)
    job.says("JobState=RUNNING Reason=None Restarts=0 PreemptTime=2026-11-22T15:36:59")
    later = "Job can not be altered now, try again later"
    job.fails(question, BUSY, BUSY, "Socket timed out on send/recv operation", later)
    assert job.end(143) == 0
    assert job.pauses == [5.0] * 4
    assert job.is_requeued()
    told = capsys.readouterr().err
    assert told.count(BUSY) == 1
    assert "asked again, up to 5 times, 5 s apart" in told


def test_a_controller_that_stays_silent_is_given_up(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    job.begin(0)
    job.leaves("preempted", "SIGUSR1", step=4)
    job.fails("show", BUSY, BUSY)
    job.fails("requeue", *[BUSY] * 9)
    assert job.end(75) == 75
    assert sum(job.pauses) <= 25  # for both questions together
    assert f"not requeued: scontrol: {BUSY}" in capsys.readouterr().err
    assert job.asked.read_text().count("requeue 7\n") == 4


def test_scancel_that_slurm_tells_of_late_is_still_one(job: Job) -> None:
    job.begin(0)
    job.leaves("preempted", "SIGTERM", step=4)
    job.says("JobState=CANCELLED Reason=None Restarts=0 PreemptTime=None")
    job.fails("show", BUSY, BUSY, BUSY)
    assert job.end(143) == 75
    assert not job.is_requeued()


def test_sigterm_of_unknown_cause_is_requeued(job: Job) -> None:
    """Slurm finds its words again after the last question of why."""
    job.begin(0)
    job.leaves("preempted", "SIGTERM", step=4)
    job.fails("show", *[BUSY] * 6)
    assert job.end(143) == 0
    assert job.is_requeued()


def test_a_requeue_whose_answer_was_lost_counts(job: Job) -> None:
    job.begin(0)
    job.leaves("preempted", "SIGUSR1", step=4)
    job.fails("requeue", "Socket timed out on send/recv operation", "Job is pending execution")
    assert job.end(75) == 0
    assert len(job.pauses) == 1


def test_a_sigterm_while_slurm_is_asked_ends_nothing(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's time is over in the pause."""
    job.begin(0)
    job.leaves("preempted", "SIGUSR1", step=4)
    job.fails("show", BUSY)
    found: list[object] = []
    monkeypatch.setattr(requeue, "_pause", lambda _: found.append(signal.getsignal(signal.SIGTERM)))
    assert job.end(75) == 0
    assert found == [signal.SIG_IGN]


def test_a_call_that_hangs_is_cut_off(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job.begin(0)
    job.leaves("preempted", "SIGUSR1", step=4)
    hangs = f"[ -e '{tmp_path}/hung' ] || {{ touch '{tmp_path}/hung'; exec sleep 60; }}"
    (tmp_path / "bin" / "scontrol").write_text(f"#!/bin/sh\n{hangs}\n")
    monkeypatch.setattr(requeue, "_CALL_S", 0.5)
    assert job.end(75) == 0
    assert "timed out after 0.5 seconds: asked again" in capsys.readouterr().err


@pytest.mark.parametrize(
    "refusal",
    [
        "Requested operation is presently disabled for job 7",
        "Invalid job id specified",
        "Access/permission denied",
    ],
)
def test_slurm_that_refuses_is_told(
    job: Job, capsys: pytest.CaptureFixture[str], refusal: str
) -> None:
    job.begin(0)
    job.leaves("preempted", "SIGUSR1", step=4)
    job.fails("requeue", refusal)
    assert job.end(1) == 75
    assert f"not requeued: scontrol: {refusal}" in capsys.readouterr().err
    assert not job.pauses


def test_where_there_is_no_scontrol_nobody_waits(job: Job, tmp_path: Path) -> None:
    job.begin(0)
    job.leaves("failed", "rank 1 died")
    (tmp_path / "bin" / "scontrol").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path / "bin"))
        assert job.end(137) == 137
    assert not job.pauses


def test_nothing_heavy_is_imported() -> None:
    """A job that is about to be ended has no seconds to spare."""
    code = "import sys, longpretrain.cli, longpretrain.requeue; print('torch' in sys.modules)"
    words = [sys.executable, "-c", code]
    assert subprocess.run(words, check=True, capture_output=True, text=True).stdout == "False\n"
