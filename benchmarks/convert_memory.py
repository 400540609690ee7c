"""How much memory `longpretrain convert` and `export` take for a model of RoBERTa-large's size.

    python benchmarks/convert_memory.py                # all forms of a checkpoint: 2 minutes, 7 GB
    python benchmarks/convert_memory.py --layers 2 --hidden 256 --only safetensors

Makes a RoBERTa of random weights in a temporary folder, in every form that convert reads, runs each
verb in a process of its own, and prints that process's VmHWM, which is all that it ever held at
once: imports, its own memory, and pages of mapped files. The limit is 1.3 times the checkpoint.
`export` is shown without its check, which loads the model twice, and with it.

A benchmark does not fail: the exit code says whether it ran (2: it could not), never how much.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from machine import HERE, describe_machine, versions
from torch import Tensor

sys.path.insert(0, str(HERE.parent))

from longpretrain.convert.fairseq_dictionary import DICTIONARY_NAME, dictionary_text
from longpretrain.convert.fairseq_file import write_checkpoint
from longpretrain.convert.fairseq_model import to_checkpoint
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.model import LongformerForMaskedLM, ModelConfig, save_model
from longpretrain.model.folder import write_config
from longpretrain.model.skeleton import without_values

LIMIT = 1.3
"""Times the size of the checkpoint."""
CHILD = """
import re, sys
from longpretrain.cli import main
code = main(sys.argv[1:])
with open("/proc/self/status", encoding="utf-8") as file:
    print("VmHWM", re.search(r"VmHWM:\\s+(\\d+) kB", file.read())[1])
sys.exit(code)
"""
Model = tuple[ModelConfig, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What one process held."""

    verb: str
    form: str
    checkpoint_bytes: int
    peak_bytes: int
    seconds: float

    @property
    def ratio(self) -> float:
        """Times the size of the checkpoint."""
        return self.peak_bytes / self.checkpoint_bytes


def random_model(layers: int, hidden: int) -> Model:
    """Of RoBERTa's vocabulary and length; RoBERTa-large has 24 layers of 1,024 channels."""
    config = ModelConfig(
        model_type="roberta", vocab_size=50265, hidden_size=hidden, num_layers=layers,
        num_heads=hidden // 64, intermediate_size=4 * hidden, max_position_embeddings=514,
    )  # fmt: skip
    with without_values():
        shapes = {n: p.shape for n, p in LongformerForMaskedLM(config).named_parameters()}
    torch.manual_seed(1)
    return config, {name: torch.randn(shape) * 0.02 for name, shape in shapes.items()}


def safetensors(model: Model, folder: Path) -> Path:
    """One file."""
    save_model(model, folder)
    return folder


def shards(model: Model, folder: Path) -> Path:
    """Five files, and an index."""
    total = sum(tensor.nbytes for tensor in model[1].values())
    save_model(model, folder, shard_bytes=max(total // 4, 1))
    return folder


def pickled(model: Model, folder: Path, *, is_zip: bool = True) -> Path:
    """pytorch_model.bin, as transformers wrote it before safetensors."""
    config, tensors = model
    folder.mkdir()
    stored = {name.replace("longformer.", "roberta.", 1): t for name, t in tensors.items()}
    stored["lm_head.decoder.weight"] = stored["roberta.embeddings.word_embeddings.weight"]
    path = folder / "pytorch_model.bin"
    torch.save(stored, path, _use_new_zipfile_serialization=is_zip)
    write_config(config, folder)
    return folder


def legacy_pickled(model: Model, folder: Path) -> Path:
    """The same, of a torch before 1.6: it cannot be mapped."""
    return pickled(model, folder, is_zip=False)


def fairseq(model: Model, folder: Path) -> Path:
    """model.pt and dict.txt."""
    folder.mkdir()
    parts = to_checkpoint(*model, global_tokens="none")
    write_checkpoint(folder / "model.pt", parts.tensors, parts.model, parts.task)
    text = dictionary_text(load_tokenizer(), rows=model[0].vocab_size, where=folder)
    (folder / DICTIONARY_NAME).write_text(text, encoding="utf-8")
    return folder / "model.pt"


def legacy_fairseq(model: Model, folder: Path) -> Path:
    """The same, of a torch before 1.6, as the published files are."""
    path = fairseq(model, folder)
    whole = torch.load(path, weights_only=True)
    torch.save(whole, path, _use_new_zipfile_serialization=False)
    return path


FORMS: dict[str, Callable[[Model, Path], Path]] = {
    "safetensors": safetensors,
    "safetensors, shards": shards,
    "pytorch_model.bin": pickled,
    "pytorch_model.bin, torch < 1.6": legacy_pickled,
    "fairseq .pt": fairseq,
    "fairseq .pt, torch < 1.6": legacy_fairseq,
}


def measure(verb: str, form: str, source: Path, words: Sequence[str]) -> Peak:
    """Runs a verb to its end in a process of its own."""
    files = [source] if source.is_file() else list(source.iterdir())
    suffixes = (".safetensors", ".bin", ".pt")
    size = sum(file.stat().st_size for file in files if file.suffix in suffixes)
    began = time.monotonic()
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, *words], cwd=HERE.parent, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if ran.returncode:
        raise SystemExit(f"{verb} of {form} ended with code {ran.returncode}:\n{ran.stderr}")
    peak = int(ran.stdout.split()[-1]) * 1024
    return Peak(
        verb=verb, form=form, checkpoint_bytes=size, peak_bytes=peak,
        seconds=time.monotonic() - began,
    )  # fmt: skip


def measure_all(model: Model, place: Path, chosen: Sequence[str], *, check: bool) -> Iterator[Peak]:
    """Convert of every form, then export of what the first of them became."""
    for form in chosen:
        source, target = FORMS[form](model, place / "source"), place / "long"
        words = ["convert", str(source), str(target), "--positions", "4096"]
        words += ["--no-tokenizer"] if source.is_dir() else []
        yield measure("convert", form, source, words)
        shutil.rmtree(place / "source")
        if form == chosen[0]:
            target.rename(place / "exported from")
        else:
            shutil.rmtree(target)
    source = place / "exported from"
    options = {"export --no-check": ["--no-check"]}
    options["export --no-check --dtype bf16"] = ["--no-check", "--dtype", "bf16"]
    options |= {"export": []} if check else {}
    for verb, more in options.items():
        words = ["export", str(source), str(place / "out"), *more]
        yield measure(verb, "safetensors", source, words)
        shutil.rmtree(place / "out")


def row(peak: Peak) -> str:
    """Of the table, in Markdown."""
    return (
        f"| {peak.verb} | {peak.form} | {peak.checkpoint_bytes / 1e6:,.0f} MB "
        f"| {peak.peak_bytes / 1e6:,.0f} MB | {peak.ratio:.2f} | {peak.seconds:.0f} |"
    )


def main() -> int:
    """Measures, prints the table, and writes the numbers where they are asked for."""
    parser = argparse.ArgumentParser(description="Peak memory of convert and export.")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024, help="channels, a multiple of 64")
    parser.add_argument("--only", choices=FORMS, action="append", help="these forms")
    parser.add_argument("--no-check", action="store_true", help="leave out the export with check")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    if not Path("/proc/self/status").is_file():
        print("convert_memory: this system does not tell VmHWM", file=sys.stderr)
        return 2
    model = random_model(options.layers, options.hidden)
    count = sum(tensor.numel() for tensor in model[1].values())
    print(f"{count / 1e6:.0f} million parameters, fp32; limit {LIMIT} for convert\n")
    with tempfile.TemporaryDirectory(prefix="longpretrain-memory-") as place:
        chosen = options.only or list(FORMS)
        print("| verb | form | checkpoint | peak | of the checkpoint | seconds |")
        print("| --- | --- | --- | --- | --- | --- |")
        peaks = []
        for peak in measure_all(model, Path(place), chosen, check=not options.no_check):
            print(row(peak), flush=True)
            peaks.append(peak)
    if options.json:
        tree = {"machine": describe_machine(), "versions": versions()}
        tree["peaks"] = [asdict(peak) for peak in peaks]
        options.json.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
