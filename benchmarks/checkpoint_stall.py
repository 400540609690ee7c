"""How long a checkpoint stops training: saved while training goes on, and waited for.

    python benchmarks/checkpoint_stall.py --sizes small,base --ranks 1,2 --stages 1,3

For each model size, number of ranks and ZeRO stage: ranks on this machine's CPU (gloo) make updates
of one sequence per rank; after some plain ones a checkpoint begins, updates go on until it is
written, then another one is waited for. Prints a Markdown table; seconds are rank 0's.

* update: median of the plain updates.
* pause: what one update waits for a checkpoint that is written meanwhile, the copy of weights and
  moments into host memory; also as a share of that update.
* slowed: what the updates beside the writing took longer, in all. Threads that exchange, write and
  hash share the processors with the updates; where these run on GPUs, or on more cores, it is less.
* written: from the beginning of the save to the renamed folder.
* waited for: the pause if ``checkpoint.asynchronous`` is false.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from longpretrain.engine import zero
from longpretrain.engine.saver import FLAGS, Saver
from longpretrain.engine.zero import ZeroEngine
from longpretrain.model.encoder import ModelConfig
from longpretrain.model.lm_head import LongformerForMaskedLM
from longpretrain.ranks import discover, free_port
from longpretrain.recipe import from_tree
from longpretrain.report.metrics import MetricsLog

ROOT = Path(__file__).resolve().parents[1]
# Hidden size, layers, heads; the vocabulary is RoBERTa's.
SIZES = {"tiny": (32, 2, 2), "small": (256, 4, 4), "medium": (512, 8, 8), "base": (768, 12, 12)}
COLUMNS = (
    ("model", "size"), ("parameters", "parameters"), ("ranks", "ranks"), ("ZeRO", "stage"),
    ("update, s", "update_s"), ("pause, s", "pause_s"), ("pause, %", "pause_percent"),
    ("slowed, s", "slowed_s"), ("updates meanwhile", "updates"), ("written, s", "written_s"),
    ("MB", "megabytes"), ("waited for, s", "waited_for_s"),
)  # fmt: skip


class ModelFiles:
    """What a checkpoint asks of a task."""

    @staticmethod
    def stored_names(parameter: str) -> tuple[str, ...]:
        """As they are."""
        return (parameter,)

    @staticmethod
    def stored(parameter: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
        """As it is."""
        return {parameter: value}

    @staticmethod
    def write_model_files(folder: Path) -> None:
        """Small files."""
        (folder / "config.json").write_text("{}", encoding="utf-8")


class Training:
    """One rank: a model, its engine and its saver."""

    def __init__(self, options: argparse.Namespace, run_dir: Path) -> None:
        hidden, layers, heads = SIZES[options.size]
        self.tokens, self.rank = options.tokens, dist.get_rank()
        torch.manual_seed(1)
        model = LongformerForMaskedLM(
            ModelConfig(
                vocab_size=50265, hidden_size=hidden, num_layers=layers, num_heads=heads,
                intermediate_size=4 * hidden, max_position_embeddings=self.tokens + 2,
                attention_window=(256,) * layers,
            )
        )  # fmt: skip
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("_global" not in name)  # as in a run without global tokens
        config = from_tree(
            {
                "run": {"dir": str(run_dir)},
                "zero": {"config": str(ROOT / "ds_configs" / f"zero{options.stage}.json")},
                "precision": options.precision,
                "checkpoint": {"keep": 1},
            }
        )
        self.engine = ZeroEngine(model, config, accumulation=1)
        metrics = MetricsLog(
            run_dir, total_steps=10**6, tensorboard=False, is_writer=self.rank == 0,
            console=sys.stderr,
        )  # fmt: skip
        self.saver = Saver(config, self.engine, ModelFiles(), metrics, step=0)  # type: ignore[arg-type]
        self.step = 0

    def update(self) -> float:
        """One update with what rides in its all-reduce; returns its seconds."""
        began = time.perf_counter()
        self.step += 1
        tokens_BN = torch.randint(5, 50000, (1, self.tokens))
        index_M = torch.arange(0, self.tokens, 7)
        seed_B = torch.tensor([self.step])
        logits_MV = self.engine(tokens_BN, predict_index_M=index_M, dropout_seed_B=seed_B)
        targets_M = tokens_BN.flatten()[index_M]
        loss = F.cross_entropy(logits_MV.float(), targets_M)
        self.engine.backward(loss / dist.get_world_size())
        self.engine.step()
        flags = torch.tensor(self.saver.flags(), dtype=torch.float64)
        dist.all_reduce(flags)
        assert len(flags) == FLAGS
        self.saver.advance(flags.tolist())
        return time.perf_counter() - began

    def state(self) -> dict[str, Any]:
        """What state.json needs."""
        counts = {"step": self.step, "samples_done": self.step, "skipped": 0}
        return {**counts, "updates_applied": self.engine.updates_applied, "task": {}}


def measure(options: argparse.Namespace, run_dir: Path) -> dict[str, Any]:
    """The numbers of one rank."""
    training = Training(options, run_dir)
    for _ in range(2):
        training.update()
    training.saver.begin(training.state())  # the first one also gets its memory: not counted
    training.saver.finish()
    plain = [training.update() for _ in range(options.updates)]
    update_s = statistics.median(plain)
    dist.barrier()
    began = time.perf_counter()
    training.saver.begin(training.state())
    pause_s = time.perf_counter() - began
    wanted, meanwhile = training.step, []
    while training.saver.saved_step != wanted:
        meanwhile.append(training.update())
    written_s = time.perf_counter() - began
    training.update()
    dist.barrier()
    began = time.perf_counter()
    training.saver.begin(training.state())
    training.saver.finish()
    waited_for_s = time.perf_counter() - began
    folder = next((run_dir / "checkpoints").glob("step-*"))
    size = sum(path.stat().st_size for path in folder.iterdir())
    shapes = (training.engine.whole_shape(name) for name in training.engine.trained_names)
    parameters = sum(shape.numel() for shape in shapes)
    return {
        "size": options.size, "parameters": f"{parameters / 1e6:.0f} M", "stage": options.stage,
        "ranks": dist.get_world_size(), "update_s": update_s, "pause_s": pause_s,
        "pause_percent": 100 * pause_s / update_s,
        "slowed_s": sum(meanwhile) - len(meanwhile) * update_s, "updates": len(meanwhile),
        "written_s": written_s, "megabytes": size / 1e6, "waited_for_s": waited_for_s,
    }  # fmt: skip


def run_ranks(options: argparse.Namespace, size: str, ranks: int, stage: int) -> dict[str, Any]:
    """Starts the ranks of one row and returns what rank 0 measured."""
    place = Path(tempfile.mkdtemp(prefix="checkpoint-stall-", dir=options.place))
    words = [sys.executable, __file__, "--rank-of", str(place), "--size", size]
    words += ["--stage", str(stage), "--tokens", str(options.tokens)]
    words += ["--updates", str(options.updates), "--precision", options.precision]
    ours = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ours |= {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
    }
    ours |= {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    processes = [
        subprocess.Popen(
            words,
            env=os.environ | ours | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
            stderr=subprocess.DEVNULL if options.quiet else None,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        output, _ = processes[0].communicate()
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            process.kill()
            process.wait()
        shutil.rmtree(place)
    if any(process.returncode for process in processes):
        raise SystemExit(f"{size}, {ranks} ranks, ZeRO {stage}: a rank failed")
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""

    def shown(key: str, value: Any) -> str:
        if not isinstance(value, float):
            return str(value)
        return f"{value:.0f}" if key == "megabytes" else f"{value:.3g}"

    lines = [[title for title, _ in COLUMNS], ["---"] + ["---:"] * (len(COLUMNS) - 1)]
    lines += [[shown(key, row[key]) for _, key in COLUMNS] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="small,medium,base", help=f"of {', '.join(SIZES)}")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--stages", default="1,3")
    parser.add_argument("--tokens", type=int, default=512, help="of one sequence (512)")
    parser.add_argument("--updates", type=int, default=5, help="plain updates for the median (5)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--place", help="folder on the disk to measure (the system's own)")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    parser.add_argument("--quiet", action="store_true", help="hide what the ranks print")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Prints the table, or is one of its ranks."""
    options = parse(words)
    if options.rank_of:
        zero.start_ranks(discover(), torch.device("cpu"))
        found = measure(options, options.rank_of / "run")
        print(json.dumps(found), flush=True)
        dist.barrier()
        os._exit(0)  # DeepSpeed's hooks keep large engines alive
    rows = []
    for size in options.sizes.split(","):
        for ranks in map(int, options.ranks.split(",")):
            for stage in map(int, options.stages.split(",")):
                rows.append(run_ranks(options, size, ranks, stage))
                print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
