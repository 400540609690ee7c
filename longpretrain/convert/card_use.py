"""How a library loads an export: the part of its card that a user copies."""

from __future__ import annotations

from collections.abc import Mapping

from longpretrain.convert.onnx_graph import output_name
from longpretrain.model import ModelConfig

_MASKED_LM = """\
```python
from transformers import AutoModelForMaskedLM{imported}

model = AutoModelForMaskedLM.from_pretrained("{name}")
{tokenizer}logits = model({inputs}).logits
```"""
_BARE = """\
```python
from transformers import AutoModel{imported}

model = AutoModel.from_pretrained("{name}"{options})
{tokenizer}hidden = model({inputs}).last_hidden_state
```"""
_WITH_TOKENIZER = {
    "imported": ", AutoTokenizer",
    "tokenizer": 'tokenizer = AutoTokenizer.from_pretrained("{name}")\n',
    "inputs": '**tokenizer("A long document.", return_tensors="pt")',
}
_WITHOUT_TOKENIZER = {"imported": "", "tokenizer": "", "inputs": "input_ids"}
_NO_TOKENIZER = """

The folder has no tokenizer: `input_ids` `[batch, sequence]` come from the one that the model was
trained with."""
_NO_POOLER = """

`add_pooling_layer=False`: no pooler was trained, and transformers would draw a random one. Classes
for a task, such as `AutoModelForSequenceClassification`, load the folder as it is: they draw a head
of their own, which training then makes."""
_STORED = """

The numbers are stored in {dtype}. With `dtype="auto"` they stay so; without it transformers 4 makes
fp32 of them."""
_GLOBAL = """

Attention is local except for tokens that are made global: pass a `global_attention_mask` that is 1
there, as is usual for the first token in classification and for the question in answering one."""
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

_ONNX = """\
```python
import numpy as np
import onnxruntime
{imported}
{tokenizer}session = onnxruntime.InferenceSession("{name}/model.onnx")
{inputs}
{globals}({output},) = session.run(["{output}"], inputs)
```

Inputs are int64 `[batch, sequence]`, any number of rows of any length up to {tokens:,} tokens; of
more, the runtime says that an index is out of bounds. Nothing needs to be padded to the window.
{dtype}All arithmetic is in float32."""
_ONNX_WITH_TOKENIZER = {
    "imported": "from transformers import AutoTokenizer\n",
    "tokenizer": _WITH_TOKENIZER["tokenizer"],
    "inputs": """\
batch = tokenizer(["One text.", "Another, longer text."], padding=True, return_tensors="np")
inputs = {name: batch[name].astype(np.int64) for name in ("input_ids", "attention_mask")}""",
}
_ONNX_WITHOUT_TOKENIZER = {
    "imported": "",
    "tokenizer": "",
    "inputs": 'inputs = {"input_ids": input_ids, "attention_mask": np.ones_like(input_ids)}',
}
_ONNX_GLOBALS = """\
inputs["global_attention_mask"] = np.zeros_like(inputs["input_ids"])  # 1 makes a token global
"""


def use(
    name: str,
    config: ModelConfig,
    *,
    library: str,
    global_tokens: str,
    has_pooler: bool,
    dtype: str | None,
    has_tokenizer: bool,
) -> str:
    """The text of the section.

    Args:
        name: the folder's.
        config: the model in it.
        library: "transformers", "fairseq" or "onnx".
        global_tokens: the policy to train on with, so that global projections stay as they are.
        has_pooler: whether a model without a masked-LM head has a pooler.
        dtype: what the numbers are stored in, if that is not fp32.
        has_tokenizer: whether the folder has one.
    """
    if library == "transformers":
        text = _transformers(name, config, has_pooler, has_tokenizer)
        text += _STORED.format(dtype=dtype) if dtype else ""
        return text + (_GLOBAL if config.model_type == "longformer" else "")
    if library == "onnx":
        return _onnx(name, config, dtype, has_tokenizer)
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


def _transformers(name: str, config: ModelConfig, has_pooler: bool, has_tokenizer: bool) -> str:
    options = "" if has_pooler else ", add_pooling_layer=False"
    template = _MASKED_LM if config.has_lm_head else _BARE
    parts = _WITH_TOKENIZER if has_tokenizer else _WITHOUT_TOKENIZER
    text = template.format(name=name, options=options, **_filled(parts, name))
    text += "" if has_tokenizer else _NO_TOKENIZER
    return text + ("" if config.has_lm_head or has_pooler else _NO_POOLER)


def _onnx(name: str, config: ModelConfig, dtype: str | None, has_tokenizer: bool) -> str:
    parts = _ONNX_WITH_TOKENIZER if has_tokenizer else _ONNX_WITHOUT_TOKENIZER
    text = _ONNX.format(
        name=name, output=output_name(config), tokens=config.max_tokens,
        globals=_ONNX_GLOBALS if config.model_type == "longformer" else "",
        dtype=f"Weights are stored in {dtype}. " if dtype else "", **_filled(parts, name),
    )  # fmt: skip
    return text + ("" if has_tokenizer else _NO_TOKENIZER)


def _filled(parts: Mapping[str, str], name: str) -> dict[str, str]:
    return {key: text.replace("{name}", name) for key, text in parts.items()}
