"""fairseq checkpoints of every age for tests, made by fairseq itself."""

from __future__ import annotations

import struct
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from fairseq import options
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe import GPT2BPEConfig
from fairseq.data.encoders.gpt2_bpe_utils import bytes_to_unicode
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models.roberta import RobertaModel
from omegaconf import OmegaConf
from torch import Tensor

from longpretrain.data.tokenizer import ByteLevelBPE, load_tokenizer

SIZES = {
    "encoder_layers": 2, "encoder_embed_dim": 32, "encoder_attention_heads": 4,
    "encoder_ffn_embed_dim": 48, "max_positions": 30,
}  # fmt: skip
CFG, ARGS = "encoder.sentence_encoder.", "decoder.sentence_encoder."


def roberta_order() -> list[str]:
    """The lines of RoBERTa's dict.txt, found through the vocabulary of the shipped tokenizer."""
    tokenizer = load_tokenizer()
    assert isinstance(tokenizer, ByteLevelBPE)
    joined = [left + right for left, right in tokenizer.merges]
    names = [*bytes_to_unicode().values(), *joined, "<|endoftext|>"]
    number = {name: str(i) for i, name in enumerate(names)}
    by_id = sorted(tokenizer.vocab, key=tokenizer.vocab.__getitem__)
    return [number.get(name, name) for name in by_id[4:-1]]


class Evil:
    """Unpickled the ordinary way, it calls what it was told to."""

    def __init__(self, function: Callable[..., Any], *arguments: str) -> None:
        self.call: tuple[Any, ...] = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Raw:
    """A pickle written by hand, op by op: what no honest program would write."""

    def __init__(self) -> None:
        self.code = b"\x80\x02"

    def name(self, module: str, name: str) -> Raw:
        self.code += b"c" + module.encode() + b"\n" + name.encode() + b"\n"
        return self

    def text(self, text: str) -> Raw:
        self.code += b"X" + struct.pack("<I", len(text.encode())) + text.encode()
        return self

    def op(self, code: bytes) -> Raw:
        self.code += code
        return self

    def write(self, path: Path) -> Path:
        """A zip as torch's, of this pickle and no tensors."""
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", self.code + b".")
            file.writestr("archive/version", "3\n")
            file.writestr("archive/byteorder", "little")
        return path


def make_dictionary(symbols: list[str]) -> Dictionary:
    dictionary = Dictionary()
    for symbol in symbols:
        dictionary.add_symbol(symbol)
    return dictionary


def fairseq_model(dictionary: Dictionary, seed: int = 1, **changes: Any) -> tuple[Any, Namespace]:
    """A RoBERTa that fairseq built, with well spread weights, and its options."""
    argv = ["DATA", "--task", "masked_lm", "--arch", "roberta_base", "--criterion", "masked_lm"]
    for name, value in (SIZES | changes).items():
        argv += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    args = options.parse_args_and_arch(options.get_training_parser(), argv)
    torch.manual_seed(seed)
    whole = make_dictionary(dictionary.symbols[4:])
    whole.add_symbol("<mask>")
    model = RobertaModel.build_model(args, SimpleNamespace(source_dictionary=whole))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model.eval(), args


def of_2019(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that the released files have."""
    old = {}
    for now, tensor in state.items():
        name = now.replace(CFG, ARGS).replace("encoder.lm_head", "decoder.lm_head")
        old[name.replace("layernorm_embedding", "emb_layer_norm")] = tensor
    for layer in range(SIZES["encoder_layers"]):
        start = f"{ARGS}layers.{layer}.self_attn."
        for kind in ("weight", "bias"):
            parts = [old.pop(f"{start}{part}_proj.{kind}") for part in "qkv"]
            old[f"{start}in_proj_{kind}"] = torch.cat(parts)
    return old


def save(folder: Path, dictionary: Dictionary | None, age: str = "dict", **changes: Any) -> Any:
    """Writes folder/model.pt and dict.txt as fairseq of some age does; returns its model."""
    edit: Callable[[dict[str, Any]], None] = changes.pop("edit", lambda whole: None)
    model, args = fairseq_model(dictionary or make_dictionary(roberta_order()), **changes)
    folder.mkdir(exist_ok=True)
    meters = {"best": np.float64(3.5), "val": [torch.tensor(1.0)]}
    whole: dict[str, Any] = {"args": None, "model": model.state_dict(), "extra_state": meters}
    cfg = convert_namespace_to_omegaconf(args)
    if age == "2019":
        whole |= {"args": args, "model": of_2019(whole["model"])}
    elif age == "omegaconf":
        cfg.task.tokens_per_sample = args.max_positions
        places = {"max_positions": "${task.tokens_per_sample}"}
        cfg.bpe, cfg.model = OmegaConf.structured(GPT2BPEConfig()), vars(args) | places
        whole["cfg"] = cfg
    else:
        whole["cfg"] = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    edit(whole)
    path = folder / "model.pt"
    torch.save(whole, path, _use_new_zipfile_serialization=age != "2019")
    if dictionary:
        dictionary.save(str(folder / "dict.txt"))
    return model


def theirs(model: Any, tokens_BN: Tensor) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(tokens_BN)[0][tokens_BN != 1]
    return out


def batch(length: int = 30) -> Tensor:
    """Two sequences of <s> ... </s>, the second one with padding."""
    generator = torch.Generator().manual_seed(4)
    tokens_BN = torch.randint(4, 50264, (2, length), generator=generator)
    tokens_BN[:, 0], tokens_BN[0, -1], tokens_BN[1, length // 2 :] = 0, 2, 1
    return tokens_BN
