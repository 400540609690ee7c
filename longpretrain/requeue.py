"""A job of Slurm before and after its ranks: does it go on in the queue, and when is it given up?

slurm/pretrain.sbatch asks before and after each attempt. The count stands in the run folder, for an
attempt may end without a word, with the machine that it ran on. Restarts in a row that brought no
new checkpoint are limited, whoever requeued the job, and a job that is submitted anew counts from
zero. How an attempt ended is told by status.json: launchers change exit codes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from longpretrain.config import Config
from longpretrain.engine import names
from longpretrain.errors import InputError
from longpretrain.files import read_json_object, write_atomically
from longpretrain.terminal import BAD_INPUT, FAILED

MOST_RESTARTS = "LONGPRETRAIN_MAX_RESTARTS"
"""How many restarts in a row may bring no new checkpoint; slurm/env.sh sets it."""
PREEMPTED = 75
_DEFAULT_MOST = 3
_MOST_PAUSES, _PAUSE_S, _CALL_S = 5, 5.0, 15
"""A controller that is busy, or fails over, is asked again: so often in all, for a job whose time
is over has no more than KillWait (30 s by default).
"""
_REFUSALS = (
    "Requested operation is presently disabled",  # a job of --no-requeue
    "Requested operation not supported on this system",
    "Invalid job id specified",
    "Access/permission denied",
    "Only batch jobs are accepted or processed",
    "No such file or directory: 'scontrol'",
)
_IS_QUEUED = "Job is pending execution"


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """What a run folder remembers of one job's attempts: of each its own, for a job that is
    submitted twice by mistake must not change what is known of the first.
    """

    step: int = 0
    """Of the newest checkpoint, when they were counted last."""
    restarts: int = 0
    """Since then."""
    is_open: bool = False
    """An attempt began, and nobody has said how it ended."""
    began: float = 0.0
    fresh_is_due: bool = False
    """The job was given --fresh, and the folder is still the old run's."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What Slurm says of the job while its batch script still runs."""

    is_running: bool = True
    """Slurm has not ended it: what becomes of it is ours to say."""
    is_warned: bool = False
    """Its place is to be given to another job, or its time is over."""
    is_requeued: bool = False
    """By Slurm itself, as after the loss of a node."""
    is_known: bool = True
    """Slurm answered. Otherwise the rest is a guess."""


def begin(config: Config, *, fresh: bool, environment: Mapping[str, str]) -> int:
    """Before the ranks start. Prints ``--fresh`` if it counts in this attempt.

    Returns:
        0 to go on, 1 if the job was restarted in vain often enough.
    """
    run_dir, job = config.run_dir, environment["SLURM_JOB_ID"]
    seen = _read(run_dir, job)
    is_first = environment.get("SLURM_RESTART_COUNT", "0") == "0"
    if is_first:
        due = fresh and (run_dir / names.CONFIG).is_file()  # then this note moves aside, too
        seen = Attempts(step=_kept_step(run_dir), fresh_is_due=due)
    elif not seen or seen.is_open:  # the attempt before ended without a word
        seen, why_not = _counted(seen or Attempts(), run_dir, environment, crashed=False)
        if why_not:
            print(f"longpretrain train: job {job} is given up: {why_not}", file=sys.stderr)
            return FAILED
    if not is_first:  # a node that goes down at every start must be counted before there is a run
        with contextlib.suppress(OSError):  # what is wrong with the place is for the ranks to say
            run_dir.mkdir(parents=True, exist_ok=True)
    if fresh and (is_first or seen.fresh_is_due):
        print("--fresh")
    _write(run_dir, job, replace(seen, is_open=True, began=time.time()))
    return 0


def end(config: Config, code: int, *, warned: bool, environment: Mapping[str, str]) -> int:
    """After the ranks: requeues the job, or says why not.

    Args:
        config: the run.
        code: what the launcher ended with.
        warned: whether Slurm told the batch script that the job's time ends (SIGUSR1).
        environment: of the batch script.

    Returns:
        what the batch script should end with.
    """
    run_dir, job = config.run_dir, environment["SLURM_JOB_ID"]
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end of its time, or its requeue, as we ask
    seen = _read(run_dir, job) or Attempts()
    status = _status_of(run_dir, code, since=seen.began)
    controller = _Controller()
    standing = _standing(controller, job, environment)
    standing = replace(standing, is_warned=standing.is_warned or warned)
    why_not, code = decide(status, code, standing)
    if not why_not and standing.is_requeued:  # counted when it begins again
        print(f"longpretrain train: job {job} is requeued by Slurm", file=sys.stderr)
        _let_size_vary(job, environment)
        return code
    if not why_not:
        crashed = status.get("state") != "preempted"
        seen, why_not = _counted(seen, run_dir, environment, crashed=crashed)
    if not why_not:
        run_dir.mkdir(parents=True, exist_ok=True)
    _write(run_dir, job, replace(seen, is_open=False))
    if not why_not:  # told before, as Slurm then ends the batch script and its processes
        print(f"longpretrain train: job {job} is requeued", file=sys.stderr, flush=True)
        why_not = _requeue(controller, job)
        _let_size_vary(job, environment)
    if why_not:
        what = f"job {job} is not requeued: {why_not}"
        print(f"longpretrain train: {what}", file=sys.stderr, flush=True)
    return code if why_not else 0


def decide(status: Mapping[str, object], code: int, standing: Standing) -> tuple[str, int]:
    """Why a job should not go on, or ""; and what it ends with if it does not.

    Where Slurm does not answer, a SIGTERM is taken for a preemption, not for scancel: a restart too
    many is counted and can be cancelled, and a run that is not requeued loses days.

    Args:
        status: what this attempt left in status.json; empty if it did not get so far.
        code: what the launcher ended with.
        standing: of the job.
    """
    state, reason = status.get("state"), str(status.get("reason", ""))
    if state == "done":
        return "the run is done", 0
    code = PREEMPTED if state == "preempted" else code or FAILED
    if not (standing.is_running or standing.is_warned or standing.is_requeued):
        return "it was cancelled", code
    if state == "preempted":
        by_hand = ("SIGTERM", "SIGINT") if standing.is_known else ("SIGINT",)
        is_asked = reason in by_hand and standing == Standing(is_known=standing.is_known)
        return f"{reason} asked it to stop" if is_asked else "", code
    # Once it trains, a machine may be to blame, and it has failed; what runs is another job's.
    was_refused = code == BAD_INPUT and state in (None, "running")
    if was_refused or ": FloatingPointError: " in reason:
        return "it would fail again in the same way", code
    return "", code


def _counted(
    seen: Attempts, run_dir: Path, environment: Mapping[str, str], *, crashed: bool
) -> tuple[Attempts, str]:
    """With one more restart, if it counts; and why it is one too many, or ""."""
    step, most = _kept_step(run_dir), _most_restarts(environment)
    if step > seen.step:
        seen = replace(seen, step=step, restarts=0)
        if not crashed:
            return seen, ""
    if seen.restarts >= most:
        count = f"{seen.restarts} restart{'s' * (seen.restarts != 1)}"
        return seen, (
            f"{count} brought no new checkpoint after that of step {step}, and "
            f"{MOST_RESTARTS} is {most}; see {run_dir / names.STATUS}, and submit it again"
        )
    return replace(seen, restarts=seen.restarts + 1), ""


def _kept_step(run_dir: Path) -> int:
    """The step that ``latest`` names; whether that checkpoint is whole is for the ranks to find."""
    return names.step_of(Path(names.pointed_at(run_dir))) or 0


def _status_of(run_dir: Path, code: int, *, since: float) -> dict[str, object]:
    """status.json, if it is of this attempt: one that was refused at once leaves the old one."""
    with contextlib.suppress(InputError):
        status = names.read_status(run_dir)
        was_done = status.get("state") == "done" and code == 0  # and nothing was left to do
        if was_done or status.get("time", 0.0) >= round(since, 3):
            return status
    return {}


def _standing(controller: _Controller, job: str, environment: Mapping[str, str]) -> Standing:
    told = controller.ask("-o", "show", "job", job).stdout
    fields_of_job = dict(re.findall(r"(\w+)=(\S*)", told))
    restarts = int(fields_of_job.get("Restarts", "0"))
    return Standing(
        is_running=fields_of_job.get("JobState", "RUNNING") == "RUNNING",
        is_warned=fields_of_job.get("PreemptTime", "None") != "None"
        or fields_of_job.get("Reason") == "TimeLimit",
        is_requeued=restarts > int(environment.get("SLURM_RESTART_COUNT", "0")),
        is_known="JobState" in fields_of_job,
    )


def _requeue(controller: _Controller, job: str) -> str:
    """Puts the job back into the queue; returns what went wrong, or ""."""
    finished = controller.ask("requeue", job)
    is_queued = not finished.returncode or _IS_QUEUED in finished.stderr  # by a call timed out, say
    return "" if is_queued else f"scontrol: {finished.stderr.strip()}"


class _Controller:
    """Slurm's, which is asked again where it does not answer: many jobs may be preempted at once.

    The pauses are for all questions together, as the time to the end of the job is one.
    """

    def __init__(self) -> None:
        self._pauses = 0

    def ask(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The first answer, a refusal, or what the last attempt came to."""
        while True:
            finished = _scontrol(*words)
            is_answer = any(known in finished.stderr for known in (*_REFUSALS, _IS_QUEUED))
            if not finished.returncode or is_answer or self._pauses == _MOST_PAUSES:
                return finished
            if not self._pauses:
                again = f"asked again, up to {_MOST_PAUSES} times, {_PAUSE_S:g} s apart"
                what = f"scontrol {' '.join(words)}: {finished.stderr.strip()}"
                print(f"longpretrain train: {what}: {again}", file=sys.stderr, flush=True)
            self._pauses += 1
            _pause(_PAUSE_S)


def _pause(seconds: float) -> None:
    time.sleep(seconds)


def _let_size_vary(job: str, environment: Mapping[str, str]) -> None:
    """Slurm keeps the number of tasks that a job had, and with it the number of nodes: one that
    asked for --nodes=1-2 would wait for two. The least is enough to be given all that are free.
    """
    tasks = environment.get("SLURM_NTASKS_PER_NODE", "")
    if tasks.isdecimal():
        _scontrol("update", f"JobId={job}", f"NumTasks={tasks}")


def _scontrol(*words: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(  # noqa: S603
            ["scontrol", *words],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
            timeout=_CALL_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(words, FAILED, "", str(error))


def _most_restarts(environment: Mapping[str, str]) -> int:
    text = environment.get(MOST_RESTARTS) or str(_DEFAULT_MOST)
    if not text.isdecimal():
        raise InputError(
            f"environment variable {MOST_RESTARTS}",
            got=text,
            wanted="a whole number",
            way_out="Set it in slurm/env.sh, or leave it out.",
        )
    return int(text)


def _read(run_dir: Path, job: str) -> Attempts | None:
    """The job's note. One that is damaged is none."""
    with contextlib.suppress(TypeError):
        found = Attempts(**_notes(run_dir)[job]) if job in _notes(run_dir) else None
        kinds = {field: type(value) for field, value in vars(Attempts()).items()}
        if found and all(isinstance(value, kinds[field]) for field, value in vars(found).items()):
            return found
    return None


def _notes(run_dir: Path) -> dict[str, Any]:
    """Of all jobs."""
    with contextlib.suppress(InputError):
        return read_json_object(run_dir / names.ATTEMPTS)
    return {}


def _write(run_dir: Path, job: str, attempts: Attempts) -> None:
    if run_dir.is_dir():  # not made here: a job with bad input leaves no run folder
        notes = {**_notes(run_dir), job: dataclasses.asdict(attempts)}
        write_atomically(run_dir / names.ATTEMPTS, json.dumps(notes, indent=1) + "\n")
