"""The card of an export: what was found of the model, its training and its checks, and no more."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from longpretrain.convert.source import Source
from longpretrain.convert.verify import VerifyReport
from longpretrain.data.manifest import Manifest
from longpretrain.errors import InputError
from longpretrain.model import ModelConfig

CARD_NAME = "README.md"
MARK = "<!-- longpretrain export -->"
"""Stands in every card, so that an export is known from a folder of somebody's."""
_TRANSFORMERS = """\
```python
from transformers import AutoModelForMaskedLM, AutoTokenizer

model = AutoModelForMaskedLM.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```"""
_ROBERTA = """\
```python
from fairseq.models.roberta import RobertaModel

roberta = RobertaModel.from_pretrained("{name}", checkpoint_file="model.pt")
```

Training goes on from it with `fairseq-train ... --finetune-from-model {name}/model.pt`: the
optimizer starts anew."""
_PLUGIN = """\
```bash
fairseq-train SHARDS --user-dir longpretrain --task long_masked_lm --criterion long_masked_lm \\
    --arch longformer {flags} \\
    --finetune-from-model {name}/model.pt ...
```

The optimizer starts anew. `longpretrain export {name}/model.pt FOLDER` makes of it, or of what such
a training leaves, a folder that transformers loads."""


def card(
    name: str, source: Source, *, parameters: int, report: VerifyReport | None, unchecked: str,
    notes: Sequence[str], library: str,
    global_tokens: str,
) -> str:  # fmt: skip
    """The text of a model card.

    Args:
        name: the folder's.
        source: what was exported.
        parameters: how many numbers its tensors hold.
        report: the checks that it passed, if they ran.
        unchecked: why they did not.
        notes: what is not as it was.
        library: "transformers" or "fairseq": who loads the folder.
        global_tokens: the policy to train on with, so that global projections stay as they are.
    """
    config = source.config
    sections = [
        _front_matter(config, library),
        f"# {name}",
        _model_section(source, parameters),
        *_note_section(source, notes),
        *_training_sections(source.state),
        *_score_sections(source.path, source.state),
        _check_section(report, unchecked, library),
        "## Use\n\n" + _use(name, config, library, global_tokens),
    ]
    return "\n\n".join(sections) + "\n"


def _note_section(source: Source, notes: Sequence[str]) -> Iterator[str]:
    if not notes:
        return
    text = "\n".join(f"* {note}" for note in notes)
    if source.model_path is not None:  # a card is for strangers
        text = text.replace(str(source.model_path.absolute()), source.model_path.name)
    yield "## Notes\n\n" + text


def _use(name: str, config: ModelConfig, library: str, global_tokens: str) -> str:
    if library == "transformers":
        return _TRANSFORMERS.format(name=name)
    if config.model_type == "roberta":
        return _ROBERTA.format(name=name)
    windows = config.attention_window
    flags = {
        "encoder-layers": config.num_layers,
        "encoder-embed-dim": config.hidden_size,
        "encoder-attention-heads": config.num_heads,
        "encoder-ffn-embed-dim": config.intermediate_size,
        "max-positions": config.max_tokens,
        "attention-window": ",".join(map(str, windows[:1] if len(set(windows)) == 1 else windows)),
    }
    if config.dilation:
        flags["dilation"] = ",".join(map(str, config.dilation))
    flags |= {
        "dropout": config.hidden_dropout,
        "attention-dropout": config.attention_dropout,
        "tokens-per-sample": config.max_tokens,
        "global-tokens": global_tokens,
    }
    return _PLUGIN.format(name=name, flags=" ".join(f"--{k} {v}" for k, v in flags.items()))


def _front_matter(config: ModelConfig, library: str) -> str:
    tree = {
        "library_name": library,
        "pipeline_tag": "fill-mask",
        "tags": [config.model_type, "longpretrain"],
    }
    return f"---\n{yaml.safe_dump(tree, sort_keys=False)}---\n\n{MARK}"


def _model_section(source: Source, parameters: int) -> str:
    config = source.config
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
    if tokenizer := source.tokenizer():
        facts["tokenizer fingerprint"] = f"`{tokenizer.fingerprint}`"
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


def _check_section(report: VerifyReport | None, unchecked: str, library: str) -> str:
    if report is None:
        return f"## Checks\n\nNot compared with transformers: {unchecked}."
    rows = [(row.check, row.got, row.limit) for row in report.rows]
    table = _table(("check", "found", "limit"), rows)
    how = ", by `longpretrain verify`" if library == "transformers" else ""
    return f"## Checks\n\nOf this folder at export{how}, all passed:\n\n{table}"


def _table(header: tuple[str, ...], rows: Any) -> str:
    ruler = tuple("---" for _ in header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ruler, *rows))
