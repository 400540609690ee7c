"""Stopping is nothing: resumed runs are the same bits, and ranks, stages and splits may change."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

from exactness.plain_loop import plain_loop
from exactness.runs import NO_DROPOUT, Chain, Leg, curve, differences, resumed_at, run_chains
from exactness.table import Row, equal, within
from longpretrain.recipe import load_recipe
from longpretrain.report.metrics import read_metrics

STEPS = 10
CURVE = 20
LIMIT = 1e-5
COMMON = ("evaluate.every_steps=5", "evaluate.batches=1", "checkpoint.every_steps=4")
PAIRS = tuple(
    (zero, precision)
    for zero, precision in product(
        ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"), ("fp32", "bf16")
    )
    if (zero, precision) != ("zero0", "bf16")  # refused: test_engine_zero.py
)
VARIANTS = {
    "mid-epoch": ("batch.micro_sequences=2",),
    "across an epoch's end": ("batch.micro_sequences=2", "data.train={valid}"),
    "accumulation 3": ("batch.global_sequences=6",),
    "activation checkpointing": ("activation_checkpointing=true",),
}
QUICK = [
    ("zero0", "fp32", "mid-epoch"),
    ("zero1", "bf16", "across an epoch's end"),
    ("zero2_offload", "fp32", "accumulation 3"),
    ("zero3", "bf16", "activation checkpointing"),
]
RESUME = f"Resume: {STEPS} updates, dropout on, 2 ranks, stopped twice by SIGUSR1"


def resume_rows(work: Path, recipe: Path, *, quick: bool = False) -> list[Row]:
    """Metrics, weights and moments of a run stopped twice against one that never stopped."""
    cells = QUICK if quick else [(*pair, variant) for pair in PAIRS for variant in VARIANTS]
    stop_steps = (4,) if quick else (2, 5)
    valid = load_recipe(str(recipe)).data.valid
    chains = []
    for number, (zero, precision, variant) in enumerate(cells):
        how = (
            f"schedule.total_steps={STEPS}",
            f"zero.config=ds_configs/{zero}.json",
            f"precision={precision}",
            *COMMON,
            *(word.format(valid=valid) for word in VARIANTS[variant]),
        )
        chains.append(Chain(f"{number}-whole", (Leg(2, how),)))
        stops = [Leg(2, how, stop_after=step) for step in stop_steps]
        chains.append(Chain(f"{number}-stopped", (*stops, Leg(2, how))))
    run_chains(work, recipe, chains)
    rows = []
    for number, (zero, precision, variant) in enumerate(cells):
        whole, stopped = work / f"{number}-whole", work / f"{number}-stopped"
        different = differences(whole, stopped)
        found = resumed_at(stopped)
        places = [0, *found, STEPS]
        if len(found) != len(stop_steps) or any(a >= b for a, b in pairwise(places)):
            different.append(f"it was not stopped as planned but at {found}")
        elif variant == "across an epoch's end" and not _crosses(stopped, found):
            different.append(f"no epoch ended after each of the stops at {found}")
        rows.append(equal(RESUME, f"{zero}, {precision}, {variant}", "never stopped", different))
    return rows


def _crosses(run_dir: Path, stops: list[int]) -> bool:
    """Whether an epoch ended after each of the stops."""
    lines = read_metrics(run_dir / "metrics.jsonl")
    epoch = {line["step"]: line["epoch"] for line in lines if line["kind"] == "train"}
    places = [*stops, STEPS]
    return all(epoch[stop] < epoch[later] for stop, later in pairwise(places))


@dataclass(frozen=True)
class Setup:
    """How one leg of a moving run is cut."""

    zero: str
    ranks: int
    micro: int

    def overrides(self) -> tuple[str, ...]:
        return (f"zero.config=ds_configs/{self.zero}.json", f"batch.micro_sequences={self.micro}")

    def __str__(self) -> str:
        return f"{self.zero} {self.ranks} x {self.micro}"


# Every ordered pair of stages, each with one of the six ordered pairs of rank counts, in turn;
# micro-batches change too.
_RANKS = ((1, 4, 2, 1), (2, 1, 1, 4), (2, 2, 4, 1), (4, 1, 2, 1), (1, 2, 4, 1), (4, 1, 1, 2))
MOVES = (
    *(
        (Setup(f"zero{old}", before, micro), Setup(f"zero{new}", after, other))
        for number, (old, new) in enumerate(product(range(4), repeat=2))
        for before, micro, after, other in [_RANKS[(number + number // 4) % len(_RANKS)]]
    ),
    (Setup("zero1", 1, 2), Setup("zero2_offload", 4, 1), Setup("zero3", 2, 2)),
    (Setup("zero3_offload", 4, 1), Setup("zero0", 2, 1), Setup("zero2", 1, 4)),
    (Setup("zero2", 2, 2), Setup("zero3_offload", 1, 1), Setup("zero1", 4, 1)),
)
# Both chains take the same ranks at each leg: three starts in all.
QUICK_MOVES = (
    (Setup("zero1", 2, 2), Setup("zero3", 4, 1), Setup("zero2_offload", 1, 4)),
    (Setup("zero3", 2, 1), Setup("zero0", 4, 1), Setup("zero1", 1, 2)),
)
MOVED = f"Resume elsewhere: {CURVE} updates, fp32, dropout off; stage, ranks x micro-batch"


def move_rows(work: Path, recipe: Path, *, quick: bool = False) -> list[Row]:
    """Runs that go on with other ranks, stages and micro-batches against the plain loop."""
    common = (
        f"schedule.total_steps={CURVE}",
        "schedule.warmup_steps=4",
        "optim.lr=3e-3",
        "optim.weight_decay=0.1",
        "precision=fp32",
        "log.sample_ids=true",
        "evaluate.every_steps=0",
        *NO_DROPOUT,
    )
    truth = plain_loop(load_recipe(str(recipe), common), CURVE)
    moves = QUICK_MOVES if quick else MOVES
    chains = []
    for number, setups in enumerate(moves):
        legs = [
            Leg(setup.ranks, (*common, *setup.overrides()), stop_after=6 * place)
            for place, setup in enumerate(setups, 1)
        ]
        legs[-1] = Leg(legs[-1].ranks, legs[-1].overrides)
        chains.append(Chain(f"move-{number}", tuple(legs)))
    run_chains(work, recipe, chains)
    rows = []
    for chain, setups in zip(chains, moves, strict=True):
        found = curve(work / chain.name)
        cell = " -> ".join(map(str, setups))
        row = within(MOVED, cell, "plain loop", found.losses, truth.losses, LIMIT)
        if found.sample_ids != truth.sample_ids:
            row = equal(MOVED, cell, "plain loop", ["samples or their order"])
        if len(resumed_at(work / chain.name)) != len(setups) - 1:
            row = equal(MOVED, cell, "plain loop", ["it did not move as planned"])
        rows.append(row)
    return rows
