"""``make fault-check``: every fault in full, printed and written as a page of the docs.

    python -m faults [--seed N] [--page docs/faults.md] [PART ...]

Everything is drawn from the seed, which the page names: the same seed makes the same plan. Exit
code 1 if anything was lost, or came out otherwise than wanted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from page_head import made_on
from ranks_helper import ROOT, rank_environment
from small_run import make_small_run

from faults.attempt import WAYS
from faults.corruptions import Corruptions
from faults.deaths import Deaths
from faults.disks import Disks
from faults.kills import SETTINGS, Chains, make_plan
from faults.mishaps import Mishaps
from faults.nursery import Nursery
from faults.preemptions import preempted
from faults.starts import Starts
from faults.steps import Steps
from faults.stops import Stops
from faults.stops import make_plan as make_stops
from faults.table import Row, markdown

KILLS, KILLS_EACH = 60, 6
"""In all, over both settings, and in one run."""
STOPS, STOPS_EACH = 24, 6
CORRUPTIONS, END_TO_END = 150, 5
PREEMPTIONS = 10


class Parts:
    """The parts of the page; each returns its rows."""

    def __init__(self, work: Path, nursery: Nursery, seed: int) -> None:
        self._work, self._nursery, self._seed = work, nursery, seed
        self._recipe = make_small_run(work / "small") / "recipe.yaml"
        self.by_name: dict[str, Callable[[], list[Row]]] = {
            "kills": self.kills,
            "starts": self.starts,
            "signals": self.signals,
            "steps": self.steps,
            "corruptions": self.corruptions,
            "deaths": self.deaths,
            "disks": self.disks,
            "mishaps": self.mishaps,
            "slurm": self.slurm,
        }

    def kills(self) -> list[Row]:
        """Chains of kills until there were enough of each setting."""
        rows = []
        for setting in SETTINGS:
            chains = Chains(self._work / "kills", self._recipe, self._nursery, setting)
            for number in range(2 * KILLS // KILLS_EACH):
                if chains.row.tried >= KILLS / len(SETTINGS):
                    break
                name = f"chain-{number}"
                chains.chain(name, make_plan(f"{self._seed}/{setting}/{name}", KILLS_EACH))
            rows.append(chains.finish())
        return rows

    def starts(self) -> list[Row]:
        """A rank lost before training begins."""
        starts = Starts(self._work / "starts", self._recipe, self._nursery)
        return [starts.killed(), starts.stopped()]

    def signals(self) -> list[Row]:
        """The same, asked to stop."""
        rows = []
        for setting in SETTINGS:
            stops = Stops(self._work / "signals", self._recipe, self._nursery, setting)
            for number in range(2 * STOPS // STOPS_EACH):
                if stops.row.tried >= STOPS / len(SETTINGS):
                    break
                name = f"chain-{number}"
                plan = make_stops(f"{self._seed}/{setting}/{name}", STOPS_EACH)
                stops.chain_of_stops(name, plan)
            rows.append(stops.finish())
        return rows

    def steps(self) -> list[Row]:
        """Every step of a save on the disk."""
        steps = Steps(self._work / "steps", self._recipe, self._nursery)
        return [steps.kills(), steps.refusals()]

    def corruptions(self) -> list[Row]:
        """In this process, and a few by real ranks."""
        found = Corruptions(self._work / "corruptions", self._recipe, self._nursery)
        seed = f"{self._seed}"
        return [*found.in_process(seed, CORRUPTIONS), found.end_to_end(seed, END_TO_END)]

    def deaths(self) -> list[Row]:
        """Of a rank, under each way to start."""
        deaths = Deaths(self._work / "deaths", self._recipe, self._nursery)
        return [deaths.dead(f"{self._seed}/{way}", way) for way in WAYS]

    def disks(self) -> list[Row]:
        """Full, or dumb."""
        return Disks(self._work / "disks", self._recipe, self._nursery).rows()

    def mishaps(self) -> list[Row]:
        """Whatever else."""
        work = self._work / "mishaps"
        return Mishaps(work, self._recipe, self._nursery, f"{self._seed}").rows()

    def slurm(self) -> list[Row]:
        """On a testbed."""
        return [preempted(self._work, self._recipe, self._seed, PREEMPTIONS)]


def main() -> int:
    """Runs the parts and writes the page; a part that breaks is a row that is not met."""
    parser = argparse.ArgumentParser(prog="faults")
    parser.add_argument("--seed", type=int, default=int(time.time()) % 100_000)
    parser.add_argument("--page", type=Path)
    parser.add_argument("parts", nargs="*")
    asked = parser.parse_args()
    started = time.monotonic()
    print(f"seed {asked.seed}: make fault-check FAULT_SEED={asked.seed} repeats it", flush=True)
    rows: list[Row] = []
    with (
        tempfile.TemporaryDirectory(prefix="faults-") as folder,
        Nursery(rank_environment(), ROOT) as nursery,
    ):
        parts = Parts(Path(folder), nursery, asked.seed)
        for name in asked.parts or parts.by_name:
            began = time.monotonic()
            found = _run(name, parts.by_name[name])
            print(markdown(found), flush=True)
            print(f"{name}: {(time.monotonic() - began) / 60:.1f} minutes\n", flush=True)
            rows += found
    lost, missed = sum(row.lost for row in rows), sum(not row.ok for row in rows)
    took_min = (time.monotonic() - started) / 60
    summary = f"{sum(row.tried for row in rows)} faults tried, lost = {lost}, "
    skipped = sum(row.is_skipped for row in rows)
    summary += f"{missed} of {len(rows)} kinds not met, " + f"{skipped} not tried, " * (skipped > 0)
    summary += f"{took_min:.0f} minutes, seed {asked.seed}"
    print(summary)
    if asked.page:
        asked.page.write_text(_head(summary) + markdown(rows), encoding="utf-8")
    return 1 if missed or lost else 0


def _run(name: str, part: Callable[[], list[Row]]) -> list[Row]:
    try:
        return part()
    except Exception as error:
        import traceback

        traceback.print_exc()
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return [Row(section=name, fault="all", wanted="-", problems=[what])]


def _head(summary: str) -> str:
    where = f"{made_on()}, no GPU"
    return f"""# Faults: what was done to runs on purpose, and what it cost them

Generated by `make fault-check`; do not edit. {where}: {summary}.

Real processes, real files: each run is a model of 2 layers with RoBERTa's vocabulary on real ranks
(checkpoints of 19 MB), and is compared with one that nothing happened to: weights and moments to
the bit, all repeatable fields of metrics.jsonl, and which samples each update took. `lost` counts
what was not as wanted, whatever it was. "Plain processes" are ranks that no launcher started.

"""


if __name__ == "__main__":
    sys.exit(main())
