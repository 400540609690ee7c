"""Preempt, requeue, resume on a real Slurm of two nodes."""

from __future__ import annotations

from pathlib import Path

from slurm_runs import preempt
from slurm_testbed import testbed, why_no_slurm

from faults.table import Row

SECTION = "Slurm: two nodes, preempted, requeued, resumed"
STEPS_EACH = 12


def preempted(work: Path, recipe: Path, seed: int, times: int) -> Row:
    """One job, preempted this often at random moments."""
    row = Row(
        section=SECTION,
        fault="SIGUSR1 to the batch script, as before a preemption",
        wanted="requeued (in so long); goes on at the very update, every sample once, same bits",
    )
    if reason := why_no_slurm():
        row.is_skipped = True
        row.notes.append(f"not tried: {reason}")
        return row
    with testbed() as cluster:
        steps = STEPS_EACH * (times + 1)
        found = preempt(cluster, work / "slurm", recipe, times=times, seed=seed, steps=steps)
    row.tried, row.met, row.worst_s = found.tried, found.resumed, found.slowest_stop_s
    if not found.same_samples:
        row.problems.append("samples lost, twice, or in another order")
    if not found.same_bits:
        row.problems.append("the final weights or moments differ")
    row.lost = found.tried - found.resumed + len(row.problems)
    return row
