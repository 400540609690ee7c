"""An ONNX export: the graph, what a tokenizer needs, and the checks that it passed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from longpretrain.convert.onnx_file import LARGEST_FILE_BYTES, STORED, why_no_onnx
from longpretrain.convert.onnx_graph import build_graph
from longpretrain.convert.source import Source
from longpretrain.convert.verify_report import VerifyReport
from longpretrain.errors import InputError
from longpretrain.model import ModelConfig
from longpretrain.model.folder import write_config


def need_onnx(path: Path, config: ModelConfig, dtype: torch.dtype | None) -> None:
    """Refuses what cannot be exported, before any weight is read.

    Args:
        path: the source, for the message.
        config: the model's.
        dtype: what the weights are to be rounded to; None: nothing else than what they are.

    Raises:
        InputError: no onnx or onnxruntime, dilation or causal attention, or a dtype that is neither
            fp32 nor fp16.
    """
    if reason := why_no_onnx():
        raise InputError(
            "export to onnx", got=reason, wanted="onnx to write the graph, onnxruntime to check it",
            way_out="pip install 'longpretrain[onnx]'.",
        )  # fmt: skip
    found = [f"dilation {list(config.dilation)}"] if set(config.dilation) - {1} else []
    found += ["causal attention"] if config.causal else []
    if found:
        raise InputError(
            f"model {path}", got=" and ".join(found), wanted="windows and global tokens alone",
            way_out="The ONNX graph has no more; use the folder with longpretrain.",
        )  # fmt: skip
    if dtype not in (None, *STORED):
        raise InputError(
            "dtype of an ONNX export", got=str(dtype).removeprefix("torch."),
            wanted=" or ".join(str(kind).removeprefix("torch.") for kind in STORED),
            way_out="Few runtimes take bf16 on a CPU: say --dtype fp32 or fp16.",
        )  # fmt: skip


def stored_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype | None) -> torch.dtype:
    """How the weights will lie in the file: as asked for, else as they are if that is fp16."""
    all_half = all(tensor.dtype == torch.float16 for tensor in tensors.values())
    return dtype or (torch.float16 if all_half else torch.float32)


def write_onnx(
    source: Source,
    model: tuple[ModelConfig, Mapping[str, Tensor]],
    folder: Path,
    *,
    dtype: torch.dtype,
    largest_file_bytes: int = LARGEST_FILE_BYTES,
) -> VerifyReport:
    """Writes model.onnx, config.json and the tokenizer into a folder, and checks the graph.

    Args:
        source: where the model comes from, and its tokenizer.
        model: what ``need_onnx`` let pass, and its tensors by their names in memory. Without a
            masked-LM head the graph gives out hidden states.
        folder: an empty one.
        dtype: of the stored weights, fp32 or fp16; all arithmetic is in fp32.
        largest_file_bytes: of weights inside model.onnx; more of them go to model.onnx.data.

    Returns:
        The checks, failed ones among them.

    Raises:
        RuntimeError: the graph is no ONNX model.
    """
    from longpretrain.convert.onnx_check import check_onnx  # it needs onnxruntime

    config, tensors = model
    notes = []
    if dtype == torch.float16:
        notes.append("weights are stored in fp16 and computed with in fp32")
    graph = build_graph(config, tensors, dtype=dtype)
    graph.save(folder, largest_file_bytes=largest_file_bytes)
    write_config(config, folder, dtype=str(dtype).removeprefix("torch."))
    source.carry_tokenizer(folder, config.max_tokens)
    rows = check_onnx(folder, config, tensors, dtype=dtype, tokenizer=source.tokenizer())
    return VerifyReport(rows=tuple(rows), notes=tuple(notes))
