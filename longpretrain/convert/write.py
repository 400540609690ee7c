"""Weights out: a folder that transformers loads, checked, with a model card of facts found."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from longpretrain.convert.read import (
    carry_tokenizer,
    finite_tensors,
    has_tokenizer,
    model_folder,
    need_expressible,
    run_state,
)
from longpretrain.convert.verify import VerifyReport, verify, why_no_transformers
from longpretrain.data.shards import Manifest
from longpretrain.data.tokenizer import load_tokenizer
from longpretrain.errors import InputError
from longpretrain.files import fresh_folder
from longpretrain.model import ModelConfig, copy_local_to_global, read_config
from longpretrain.model.folder import holds_a_model_only, write_model

CARD_NAME = "README.md"
_MARK = "<!-- longpretrain export -->"
_USE = """\
```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

model = AutoModelForMaskedLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""


def export(source: Path | str, target: Path | str, *, format: str = "hf") -> VerifyReport | None:
    """Writes the weights of a run as a Hugging Face folder: whole and verified, or not at all.

    The files of a checkpoint are compared with their hashes first. The new folder is checked
    against transformers before it gets its name, and the model card holds the outcome.

    Args:
        source: a run (its newest checkpoint is taken), a checkpoint, or a model folder.
        target: the folder to make; an earlier export there, with no other files, is replaced.
        format: "hf".

    Returns:
        The checks that it passed, or None where transformers is not installed.

    Raises:
        InputError: a format that is not there yet, a model that Hugging Face's cannot express,
            damaged files, weights that are not finite, or a target that is something else.
        RuntimeError: transformers computes something else; the message has the table.
    """
    if format != "hf":
        raise InputError(
            "export format", got=format, wanted="hf", way_out="Other formats are not written yet."
        )
    source, target = Path(source), Path(target)
    folder = model_folder(source)
    config = read_config(folder)
    need_expressible(folder, config)
    state = run_state(folder)
    tensors = finite_tensors(folder)
    if state.get("global_tokens") == "none":
        copy_local_to_global(tensors)
    with fresh_folder(target, belongs=_is_export) as fresh:
        write_model((config, tensors), fresh)
        if has_tokenizer(folder):
            carry_tokenizer(folder, fresh, config)
        report = None if why_no_transformers() else verify(fresh)
        if report is not None and not report.ok:
            raise RuntimeError("\n".join(["the export fails its check:", *report.lines()]))
        parameters = sum(tensor.numel() for tensor in tensors.values())
        sections = [
            _front_matter(config),
            f"# {target.absolute().name}",
            _model_section(config, parameters, fresh),
            *_training_sections(state),
            *_score_sections(folder, state),
            _check_section(report),
            "## Use\n\n" + _USE.format(name=target.absolute().name),
        ]
        (fresh / CARD_NAME).write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    return report


def _is_export(folder: Path) -> bool:
    card = folder / CARD_NAME
    if not card.is_file() or not holds_a_model_only(folder):
        return False
    return _MARK in card.read_text(encoding="utf-8", errors="replace")


def _front_matter(config: ModelConfig) -> str:
    tree = {
        "library_name": "transformers",
        "pipeline_tag": "fill-mask",
        "tags": [config.model_type, "longpretrain"],
    }
    return f"---\n{yaml.safe_dump(tree, sort_keys=False)}---\n\n{_MARK}"


def _model_section(config: ModelConfig, parameters: int, folder: Path) -> str:
    facts = {
        "type": f"{config.model_type}, masked-LM head",
        "parameters": f"{parameters:,}",
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
    if has_tokenizer(folder):
        facts["tokenizer fingerprint"] = f"`{load_tokenizer(folder).fingerprint}`"
    return "## Model\n\n" + _table(("", ""), facts.items())


def _training_sections(state: Mapping[str, Any]) -> Iterator[str]:
    """What state.json tells of the training; nothing for a folder that is no checkpoint."""
    if not state:
        return
    recipe: Mapping[str, Any] = state.get("recipe") or {}
    total = (recipe.get("schedule") or {}).get("total_steps")
    facts: dict[str, str] = {}
    if "step" in state:
        facts["updates"] = f"{state['step']:,}" + (f" of {total:,}" if total else "")
    if "samples_done" in state:
        facts["sequences seen"] = f"{state['samples_done']:,}"
    if "global_tokens" in state:
        facts["global tokens"] = str(state["global_tokens"])
    for name, version in (state.get("versions") or {}).items():
        facts[name] = str(version)
    data = recipe.get("data") or {}
    for split in ("train", "valid"):
        facts |= _corpus_facts(split, data.get(split))
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
    if isinstance(tree, str) and Path(tree).is_absolute():
        return Path(tree).name
    return tree


def _score_sections(folder: Path, state: Mapping[str, Any]) -> Iterator[str]:
    """The run's own journal up to the checkpoint, if the checkpoint still lies in its run."""
    journal = folder.resolve().parent.parent / "metrics.jsonl"
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
    if rows:
        header = ("update", "scored on", "nats per masked token", "bits per masked token")
        yield "## Scores\n\n" + _table(header, rows)


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


def _check_section(report: VerifyReport | None) -> str:
    if report is None:
        return f"## Checks\n\nNot compared with transformers: {why_no_transformers()}."
    rows = [(row.check, row.got, row.limit) for row in report.rows]
    return (
        "## Checks\n\nOf this folder at export, by `longpretrain verify`, all passed:\n\n"
        + _table(("check", "found", "limit"), rows)
    )


def _table(header: tuple[str, ...], rows: Any) -> str:
    ruler = tuple("---" for _ in header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ruler, *rows))
