"""The model: a Longformer encoder and its masked-LM head, and Hugging Face folders in and out."""

from longpretrain.model.encoder import ModelConfig
from longpretrain.model.folder import (
    config_json,
    load_encoder,
    load_model,
    need_lm_head,
    read_config,
    read_tensors,
    save_model,
)
from longpretrain.model.lm_head import LongformerForMaskedLM
from longpretrain.model.weights import INDEX_NAME, WEIGHTS_NAME, copy_local_to_global, stored_names

__all__ = [
    "INDEX_NAME",
    "WEIGHTS_NAME",
    "LongformerForMaskedLM",
    "ModelConfig",
    "config_json",
    "copy_local_to_global",
    "load_encoder",
    "load_model",
    "need_lm_head",
    "read_config",
    "read_tensors",
    "save_model",
    "stored_names",
]
