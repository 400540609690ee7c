"""Trainers agree: our engine at every ZeRO stage, stock fairseq-train, and a plain loop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from exactness.fairseq_runs import fairseq_curve
from exactness.hugging_face import HuggingFaceModel
from exactness.plain_loop import Curve, plain_loop
from exactness.runs import NO_DROPOUT, Chain, Leg, curve, differences, run_chains
from exactness.table import Row, equal, relative_difference, within
from longpretrain.recipe import load_recipe

UPDATES = 20
LIMIT = 1e-5
BASE = (
    f"schedule.total_steps={UPDATES}",
    "schedule.warmup_steps=4",
    "optim.lr=3e-3",
    "optim.weight_decay=0.1",
    "batch.global_sequences=4",
    "checkpoint.every_steps=0",
    "evaluate.every_steps=0",
    "log.sample_ids=true",
)
ZERO = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
SPLITS = ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1))
"""(ranks, sequences of a micro-batch); accumulation makes four sequences of them."""
QUICK = [
    ("zero0", 2, 1),
    ("zero1", 2, 2),
    ("zero2", 2, 1),
    ("zero3", 2, 2),
    ("zero3_offload", 2, 1),
]
SECTION = f"Trainers: {UPDATES} updates, fp32, dropout off"
BF16 = f"Trainers: {UPDATES} updates, bf16, dropout off"


def trainer_rows(work: Path, recipe: Path, *, quick: bool = False) -> list[Row]:
    """Losses, gradient norms and sample ids of each trainer against the plain loop's."""
    config = load_recipe(str(recipe), [*BASE, *NO_DROPOUT])
    truth = plain_loop(config, UPDATES)
    cells = QUICK if quick else [(zero, *split) for zero in ZERO for split in SPLITS]
    engine = _engine_curves(work, recipe, cells, "fp32")
    rows = [_against(cell, found, truth) for cell, found in engine.items()]
    for ranks, micro in ((1, 2), (2, 2)) if quick else ((1, 2), (1, 4), (2, 1), (2, 2)):
        found = fairseq_curve(
            work / f"fairseq-{ranks}x{micro}", config, ranks=ranks, micro=micro, updates=UPDATES
        )
        rows.append(_against(f"stock fairseq-train, {_split(ranks, micro)}", found, truth))
    found = plain_loop(config, UPDATES, model=HuggingFaceModel(Path(config.model.path)))
    rows.append(_against("plain loop over transformers' LongformerForMaskedLM", found, truth))
    return rows


def bf16_rows(work: Path, recipe: Path, *, quick: bool = False) -> list[Row]:
    """bf16 has no one truth: the band is twice what rounding costs the plain loop itself.

    fairseq-train is missing: this fairseq takes every --bf16 for a TPU's.
    """
    config = load_recipe(str(recipe), [*BASE, *NO_DROPOUT])
    truth = plain_loop(config, UPDATES)
    rounded = plain_loop(config, UPDATES, precision="bf16")
    band = 2 * relative_difference(rounded.losses, truth.losses)
    cells = [("zero1", 2, 2)] if quick else [(z, *s) for z in ZERO[1:] for s in ((1, 4), (2, 1))]
    engine = _engine_curves(work, recipe, cells, "bf16")
    rows = [
        Row(
            section=BF16,
            cell="plain loop in bf16",
            against="plain loop in fp32",
            wanted="sets the band: twice this",
            measured=f"{band / 2:.1e}",
            ok=0 < band < 1e-2,
        )
    ]
    against = "plain loop in fp32"
    for cell, found in engine.items():
        row = within(BF16, cell, against, found.losses, truth.losses, band)
        if relative_difference(found.losses, truth.losses) < band / 40:
            row = equal(BF16, cell, against, ["nothing was rounded: did it run in bf16?"])
        rows.append(row)
    return rows


def dropout_rows(work: Path, recipe: Path, *, quick: bool = False) -> list[Row]:
    """Both trainers drop the same: hidden dropout by the run's rule, attention's by Philox."""
    dropout = ("model.dropout=0.1", "model.attention_dropout=0.1")
    config = load_recipe(str(recipe), [*BASE, *dropout])
    rows = []
    for ranks, micro in ((2, 1),) if quick else ((1, 4), (1, 2), (2, 1), (2, 2)):
        name = f"dropout-{ranks}x{micro}"
        leg = Leg(ranks, (*BASE, *dropout, *_how("zero1", micro), "precision=fp32"))
        run_chains(work, recipe, [Chain(name, (leg,))])
        found = fairseq_curve(
            work / f"fairseq-{name}", config, ranks=ranks, micro=micro, updates=UPDATES
        )
        rows.append(
            within(
                f"Trainers: {UPDATES} updates, fp32, dropout on",
                f"stock fairseq-train, {_split(ranks, micro)}",
                "engine, zero1, the same",
                found.losses,
                curve(work / name).losses,
                LIMIT,
            )
        )
    return rows


def repeat_rows(work: Path, recipe: Path) -> list[Row]:
    """A run repeated is the same bits."""
    legs = (Leg(2, (*BASE, *_how("zero1", 1))),)
    run_chains(work, recipe, [Chain("once", legs), Chain("again", legs)])
    return [
        equal(
            "Repetition",
            "engine, zero1, bf16, dropout on, 2 ranks",
            "the same run before it",
            differences(work / "once", work / "again"),
        )
    ]


def _engine_curves(
    work: Path, recipe: Path, cells: Sequence[tuple[str, int, int]], precision: str
) -> dict[str, Curve]:
    """Our engine without dropout, by the names of the cells (stage, ranks, micro-batch)."""
    chains = {
        f"engine, {zero}, {_split(ranks, micro)}": Chain(
            f"{precision}-{zero}-{ranks}x{micro}",
            (Leg(ranks, (*BASE, *NO_DROPOUT, *_how(zero, micro), f"precision={precision}")),),
        )
        for zero, ranks, micro in cells
    }
    run_chains(work, recipe, list(chains.values()))
    return {cell: curve(work / chain.name) for cell, chain in chains.items()}


def _how(zero: str, micro: int) -> Sequence[str]:
    return (f"zero.config=ds_configs/{zero}.json", f"batch.micro_sequences={micro}")


def _split(ranks: int, micro: int) -> str:
    return f"{ranks} rank{'s' if ranks > 1 else ''} x {micro} x {4 // ranks // micro}"


def _against(cell: str, found: Curve, truth: Curve) -> Row:
    row = within(SECTION, cell, "plain loop", found.losses, truth.losses, LIMIT)
    # fairseq-train logs no ids, and its norms are rounded to three decimals
    if found.sample_ids and found.sample_ids != truth.sample_ids:
        return equal(SECTION, cell, "plain loop", ["order of samples"])
    if found.grad_norms and relative_difference(found.grad_norms, truth.grad_norms) > 1e-3:
        return equal(SECTION, cell, "plain loop", ["gradient norms"])
    return row
