"""The card of an export: what was found of the model, its training and its checks, and no more."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from longpretrain.convert.card_use import use
from longpretrain.convert.read import RECORD_NAME, STATE_NAME
from longpretrain.convert.source import Source
from longpretrain.convert.verify import VerifyReport
from longpretrain.data.manifest import Manifest
from longpretrain.errors import InputError
from longpretrain.files import read_json_object
from longpretrain.model import ModelConfig
from longpretrain.model.families import POOLER

CARD_NAME = "README.md"
MARK = "<!-- longpretrain export -->"
"""Stands in every card, so that an export is known from a folder of somebody's."""
# A row of the table on training -> where a recipe has it.
_ASKED = {
    "sequences per update": ("batch", "global_sequences"),
    "tokens per sequence, at most": ("data", "max_tokens"),
    "learning rate, at its peak": ("optim", "lr"),
    "precision": ("precision",),
}


def card(
    name: str,
    source: Source,
    *,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype | None,
    report: VerifyReport | None,
    unchecked: str,
    notes: Sequence[str],
    library: str,
    global_tokens: str,
) -> str:
    """The text of a model card.

    Args:
        name: the folder's.
        source: what was exported.
        config: the model in the folder.
        tensors: its tensors, by their names in memory.
        dtype: what they were rounded to.
        report: the checks that it passed, if they ran.
        unchecked: why they did not.
        notes: what is not as it was.
        library: "transformers" or "fairseq": who loads the folder.
        global_tokens: the policy to train on with, so that global projections stay as they are.
    """
    kinds = sorted({str(dtype or t.dtype).removeprefix("torch.") for t in tensors.values()})
    stored = ", ".join(kinds)
    how = use(
        name, config, library=library, global_tokens=global_tokens,
        has_pooler=POOLER[0] in tensors, dtype=None if stored == "float32" else stored,
        has_tokenizer=source.tokenizer() is not None,
    )  # fmt: skip
    parameters = sum(tensor.numel() for tensor in tensors.values())
    sections = [
        _front_matter(config, library),
        f"# {name}",
        _model_section(source, config, f"{parameters:,}, in {stored}"),
        *_note_section(source, notes),
        *_training_sections(source.state),
        *_score_sections(source.path, source.state),
        _check_section(report, unchecked, library),
        _source_section(source),
        "## Use\n\n" + how,
    ]
    return "\n\n".join(sections) + "\n"


def _note_section(source: Source, notes: Sequence[str]) -> Iterator[str]:
    if not notes:
        return
    text = "\n".join(f"* {note}" for note in notes)
    if source.model_path is not None:  # a card is for strangers
        text = text.replace(str(source.model_path.absolute()), source.model_path.name)
    yield "## Notes\n\n" + text


def _front_matter(config: ModelConfig, library: str) -> str:
    tree = {
        "library_name": library,
        "pipeline_tag": "fill-mask" if config.has_lm_head else "feature-extraction",
        "tags": [config.model_type, "longpretrain"],
    }
    return f"---\n{yaml.safe_dump(tree, sort_keys=False)}---\n\n{MARK}"


def _model_section(source: Source, config: ModelConfig, parameters: str) -> str:
    head = "masked-LM head" if config.has_lm_head else "the bare encoder"
    facts = {
        "type": f"{config.model_type}, {head}",
        "parameters": parameters,
        "layers, heads, channels": f"{config.num_layers}, {config.num_heads}, {config.hidden_size}",
        "longest input": f"{config.max_tokens:,} tokens",
        "vocabulary": f"{config.vocab_size:,}",
    }
    if config.attention_window:
        windows = sorted(set(config.attention_window))
        same = len(windows) == 1
        facts["attention window, both sides"] = str(
            windows[0] if same else [*config.attention_window]
        )
    if tokenizer := source.tokenizer():
        facts["tokenizer fingerprint"] = f"`{tokenizer.fingerprint}`"
    return "## Model\n\n" + _table(("", ""), facts.items())


def _training_sections(state: Mapping[str, Any]) -> Iterator[str]:
    """What state.json tells of the training; nothing for a folder that is no checkpoint."""
    if not state:
        return
    recipe: Mapping[str, Any] = state.get("recipe") or {}
    total = (recipe.get("schedule") or {}).get("total_steps")
    asked = {key: _at(recipe, *place) for key, place in _ASKED.items()}
    facts: dict[str, str] = {}
    if "step" in state:
        facts["updates"] = f"{state['step']:,}" + (f" of {total:,}" if total else "")
    if "samples_done" in state:
        facts["sequences seen"] = f"{state['samples_done']:,}"
    facts |= {key: str(value) for key, value in asked.items() if value not in (None, "")}
    if "global_tokens" in state:
        facts["global tokens"] = str(state["global_tokens"])
    if state.get("train_only", "all") != "all":
        facts["what trained"] = "the position rows beyond the learnt ones, nothing else"
    for what, fingerprint in (state.get("task") or {}).items():
        facts[f"fingerprint of the {what}"] = f"`{fingerprint}`"
    for name, version in (state.get("versions") or {}).items():
        facts[name] = str(version)
    data = recipe.get("data") or {}
    sources: Mapping[str, Any] = data.get("mix") or {}
    mix = {name: source.get("path") for name, source in sources.items()}
    for split, path in {"train": data.get("train"), **mix, "valid": data.get("valid")}.items():
        facts |= _corpus_facts(split, path)
    yield "## Training\n\n" + _table(("", ""), facts.items())
    if recipe:
        text = yaml.safe_dump(_without_folders(recipe), sort_keys=False, allow_unicode=True)
        yield f"The recipe `{recipe.get('name', '')}`, resolved:\n\n```yaml\n{text}```"


def _corpus_facts(split: str, folder: str | None) -> dict[str, str]:
    """A corpus by its manifest, where that is still to be found."""
    if not folder or not Path(folder).is_dir():
        return {}
    try:
        manifest = Manifest.read(Path(folder))
    except InputError:
        return {}
    size = f"{manifest.documents:,} documents, {manifest.tokens:,} tokens"
    return {f"{split} data": f"{size}, fingerprint `{manifest.fingerprint}`"}


def _without_folders(tree: Any) -> Any:
    """A recipe in which absolute paths are cut to their last part: a card is for strangers."""
    if isinstance(tree, Mapping):
        return {key: _without_folders(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without_folders(value) for value in tree]
    if isinstance(tree, str) and Path(tree).is_absolute():
        return Path(tree).name
    return tree


def _score_sections(folder: Path, state: Mapping[str, Any]) -> Iterator[str]:
    """The run's own journal up to the checkpoint, if the checkpoint still lies in its run."""
    run = folder.resolve().parent.parent
    journal = run / "metrics.jsonl"
    if "step" not in state or not journal.is_file():
        return
    lines = [line for line in _json_lines(journal) if line.get("step", 0) <= state["step"]]
    train = [line for line in lines if line.get("kind") == "train"][-1:]
    scores = [line for line in lines if line.get("kind") == "evaluation"]
    rows = [
        (str(line["step"]), kind, _number(line.get("loss")), _number(line.get("bits")))
        for kind, chosen in (("training batch", train), ("held-out data", scores))
        for line in chosen
    ]
    rows += [
        (str(state["step"]), f"`longpretrain evaluate`, {tokens} tokens", nats, bits)
        for tokens, nats, bits in _evaluated(run, folder)
    ]
    if rows:
        header = ("update", "scored on", "nats per masked token", "bits per masked token")
        yield "## Scores\n\n" + _table(header, rows)


def _evaluated(run: Path, folder: Path) -> Iterator[tuple[object, str, str]]:
    """Tokens, nats and bits of the run's evaluation, if it is one of this checkpoint: made since,
    while this is the newest.
    """
    path, latest = run / "evaluation.json", run / "checkpoints" / "latest"
    if not path.is_file() or not latest.is_file():
        return
    is_newest = latest.read_text(encoding="utf-8", errors="replace").strip() == folder.name
    if not is_newest or path.stat().st_mtime < (folder / STATE_NAME).stat().st_mtime:
        return
    try:
        results = read_json_object(path).get("results")
    except InputError:
        return
    for result in results if isinstance(results, list) else ():
        bits = _at(result, "bits")
        if isinstance(bits, float):
            yield _at(result, "max_tokens"), _number(bits * math.log(2)), _number(bits)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # a crash may have cut the last line short
            continue
        if isinstance(line, dict):
            yield line


def _number(value: object) -> str:
    return f"{value:.4f}" if isinstance(value, float) else ""


def _check_section(report: VerifyReport | None, unchecked: str, library: str) -> str:
    if report is None:
        return f"## Checks\n\nNot compared with transformers: {unchecked}."
    rows = [(row.check, row.got, row.limit) for row in report.rows]
    table = _table(("check", "found", "limit"), rows)
    how = ", by `longpretrain verify`" if library == "transformers" else ""
    return f"## Checks\n\nOf this folder at export{how}, all passed:\n\n{table}"


def _table(header: tuple[str, ...], rows: Any) -> str:
    ruler = tuple("---" for _ in header)
    told = ([str(cell).replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ruler, *told))


def _source_section(source: Source) -> str:
    """Which files these weights came from; of a checkpoint's own, state.json names the hashes."""
    hashes = sorted(source.hashes().items())
    rows = [(f"`{name}`", f"`{digest}`") for name, digest in hashes]
    text = f"Made from `{source.path.absolute().name}`, by content:\n\n"
    text += _table(("file", "sha256 (of a tokenizer, its fingerprint)"), rows)
    started = _at(source.state, "recipe", "model", "path")
    for folder in (source.path, Path(started) if isinstance(started, str) else None):
        if folder is not None and (folder / RECORD_NAME).is_file():
            return f"## Source\n\n{text}\n\n{_lineage(folder / RECORD_NAME)}"
    return f"## Source\n\n{text}"


def _lineage(path: Path) -> str:
    """What the record of a conversion says of where its folder came from."""
    try:
        record = read_json_object(path)
    except InputError:
        return ""
    keys = ("source", "positions", "attention_window", "init")
    rows = [(key, f"`{json.dumps(record[key])}`") for key in keys if key in record]
    files = record.get("source_files")
    hashes = files.items() if isinstance(files, dict) else ()
    rows += [(f"`{name}`", f"`{digest}`") for name, digest in hashes]
    return f"`{path.parent.name}` was made by `longpretrain convert`:\n\n" + _table(("", ""), rows)


def _at(tree: Any, *keys: str) -> Any:
    """What stands in a tree at these keys; None where it has none."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree
