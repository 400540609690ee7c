"""A small model three times over: ours, its ONNX file in onnxruntime, and inputs for both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import torch
from family_models import draw_weights
from torch import Tensor

from longpretrain.convert.onnx_file import MODEL_NAME
from longpretrain.convert.onnx_graph import build_graph
from longpretrain.model import LongformerForMaskedLM, ModelConfig


def small_config(*windows: int, tokens: int = 4096, **fields: Any) -> ModelConfig:
    """A Longformer of one layer per window; a RoBERTa of two layers without windows."""
    return ModelConfig(
        **{
            "model_type": "longformer" if windows else "roberta", "vocab_size": 41,
            "hidden_size": 16, "num_heads": 2, "intermediate_size": 24, "bos_id": 39, "eos_id": 40,
            "num_layers": len(windows) or 2, "max_position_embeddings": tokens + 2,
            "attention_window": windows,
        }
        | fields
    )  # fmt: skip


def draw_model(config: ModelConfig) -> LongformerForMaskedLM:
    """With no weight that would hide a mistake."""
    model = LongformerForMaskedLM(config).eval()
    draw_weights(model, seed=1)
    return model


class OnnxModel:
    """A model and the file made of it.

    Args:
        folder: gets the file.
        config: as ``small_config`` makes it.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.config, self.model = config, draw_model(config)
        self.weights = {name: p.detach() for name, p in self.model.named_parameters()}
        self.path = folder / MODEL_NAME
        build_graph(config, self.weights).save(folder)
        self.session = onnxruntime.InferenceSession(self.path, quiet())

    def run(self, ids_BN: Tensor, mask_BN: Tensor, globals_BN: Tensor | None = None) -> Tensor:
        """What onnxruntime makes of it."""
        return run(self.session, ids_BN, mask_BN, globals_BN)

    def ours(self, ids_BN: Tensor, mask_BN: Tensor, globals_BN: Tensor | None = None) -> Tensor:
        """What our model makes of it, with dense attention: no line of it is a graph's."""
        index_BG = None if globals_BN is None else global_index(globals_BN * mask_BN)
        output = self.model if self.config.has_lm_head else self.model.longformer
        with torch.no_grad():
            out: Tensor = output(ids_BN, padding_BN=mask_BN == 0, global_index_BG=index_BG)
        return out


def quiet() -> onnxruntime.SessionOptions:
    """One thread, and no warnings of what it is about to raise."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return options


def run(session: Any, ids_BN: Tensor, mask_BN: Tensor, globals_BN: Tensor | None = None) -> Tensor:
    """The one output."""
    named = {"input_ids": ids_BN, "attention_mask": mask_BN}
    if globals_BN is not None:
        named["global_attention_mask"] = globals_BN
    (output,) = session.run(None, {name: tensor.numpy() for name, tensor in named.items()})
    return torch.from_numpy(output)


def text(config: ModelConfig, rows: int, length: int) -> Tensor:
    """Drawn ids, no padding among them; the same ones for the same arguments."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(config.pad_id + 1, config.vocab_size, (rows, length), generator=generator)


def global_index(globals_BN: Tensor) -> Tensor | None:
    """Positions of each row's global tokens, -1 behind them."""
    found = [row.nonzero()[:, 0].int() for row in globals_BN != 0]
    if not any(len(positions) for positions in found):
        return None
    return torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-1)
