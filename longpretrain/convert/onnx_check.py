"""Proof that an ONNX file computes what the model does, at lengths that exports get wrong.

The only file that imports onnxruntime.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longpretrain.convert.onnx_file import MODEL_NAME, OPSET, check_file
from longpretrain.convert.onnx_graph import input_names, output_name
from longpretrain.convert.verify_outputs import OurModel
from longpretrain.convert.verify_report import LOGIT_LIMIT, VerifyRow
from longpretrain.convert.verify_text import tokens
from longpretrain.data.tokenizer import Tokenizer
from longpretrain.model import ModelConfig

_LENGTHS = (1, 511, 512, 513, 4096)
"""Beside the longest. Around 512 lie seams of blocks, and the end of a short model's positions."""
_BATCH_LENGTH = 600
"""Tokens of a row of the batches: more than a block, and no multiple of one."""
_MOST_NUMBERS = 1 << 30
"""Of logits, of one input: 4 GiB, and the runtime makes them twice."""
_PIECE = 512
"""Rows of logits compared at once: those of 4,096 tokens are 0.8 GB already."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One input."""

    name: str
    """What is special of it."""
    ids_BN: Tensor
    """int64."""
    mask_BN: Tensor
    """1 for tokens, 0 for padding; int64, as the graph takes it."""
    globals_BN: Tensor
    """1 for global tokens; int64."""


def check_onnx(
    folder: Path,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    *,
    dtype: torch.dtype,
    tokenizer: Tokenizer | None,
) -> Iterator[VerifyRow]:
    """Runs model.onnx of a folder and our model side by side, on real text if there is a tokenizer.

    Args:
        folder: holds model.onnx.
        config: the model's.
        weights: of the source, by their names in memory.
        dtype: what the file's weights are rounded to; so are those that it is compared with.
        tokenizer: the model's.

    Raises:
        RuntimeError: the file is no ONNX model.
    """
    import onnxruntime

    check_file(folder / MODEL_NAME)
    session = _session(folder / MODEL_NAME)
    fixed = [
        value.name
        for value in session.get_inputs()
        if value.name not in input_names(config) or value.shape != ["batch", "sequence"]
    ]
    yield VerifyRow(
        check=f"onnx.checker passes, onnxruntime {onnxruntime.__version__} loads",
        got=f"other inputs: {', '.join(fixed)}" if fixed else f"opset {OPSET}",
        limit="[batch, sequence] free", ok=not fixed,
    )  # fmt: skip
    model = OurModel(config, {name: tensor.to(dtype) for name, tensor in weights.items()})
    for case in cases(tokenizer, config):
        theirs_TV = _run(session, case)
        if isinstance(theirs_TV, str):
            got, ok = theirs_TV, False
        else:
            difference = _difference(model, case, theirs_TV)
            got, ok = f"{difference:.1e}", difference <= LOGIT_LIMIT
        yield VerifyRow(
            check=f"{output_name(config).replace('_', ' ')}, {case.name}", got=got,
            limit=f"{LOGIT_LIMIT:.0e}", ok=ok,
        )  # fmt: skip


def cases(tokenizer: Tokenizer | None, config: ModelConfig) -> Iterator[Case]:
    """Every length, padding, and global tokens where the model has any.

    A long model of many words is compared as far as its logits fit into memory.
    """
    longest = config.max_tokens
    if config.has_lm_head:
        longest = min(longest, max(1, _MOST_NUMBERS // config.vocab_size))
    for length in sorted({*(n for n in _LENGTHS if n <= longest), longest}):
        name = f"{length} token" if length == 1 else f"{length} tokens"
        if length == longest < config.max_tokens:
            name += f" (of {config.max_tokens}: logits of more take too much memory)"
        yield _case(tokenizer, config, name, [length], [])
    length = min(_BATCH_LENGTH, longest)
    lengths = [length, length // 2 + 1]
    yield _case(tokenizer, config, f"2 rows of {length} tokens, one padded", lengths, [])
    if config.model_type == "longformer":
        name = f"{length} tokens, the first global"
        yield _case(tokenizer, config, name, [length], [[0]])
        several = sorted({0, length // 7, length // 3, length // 3 + 1, length - 1})
        # The last row's flag lies on padding, which it does not make a token.
        ragged = [several, [length // 2], [], [length - 1]]
        name = f"4 rows of {length} tokens with {len(several)}, 1, 0 and 0 global ones"
        yield _case(tokenizer, config, name, [length, length, *lengths], ragged)


def _case(
    tokenizer: Tokenizer | None,
    config: ModelConfig,
    name: str,
    lengths: list[int],
    global_tokens: list[list[int]],
) -> Case:
    text_1N = tokens(tokenizer, config, max(lengths))
    ids_BN = torch.cat([text_1N.roll(7 * row, dims=1) for row in range(len(lengths))])
    mask_BN = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    globals_BN = torch.zeros_like(mask_BN)
    for row, chosen in enumerate(global_tokens):
        globals_BN[row, chosen] = 1
    ids_BN = ids_BN.masked_fill(mask_BN == 0, config.pad_id)
    return Case(name=name, ids_BN=ids_BN, mask_BN=mask_BN, globals_BN=globals_BN)


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # what it cannot do it raises
    options.enable_cpu_mem_arena = False  # else it holds what the longest input took
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(session: Any, case: Case) -> Tensor | str:
    """The output, a row per token, or what onnxruntime says where it fails."""
    whole = (case.ids_BN, case.mask_BN, case.globals_BN)
    names = [value.name for value in session.get_inputs()]
    fed = {name: tensor.numpy() for name, tensor in zip(names, whole, strict=False)}
    try:
        (output,) = session.run(None, fed)
    except Exception as error:  # its errors have no base of their own
        return f"onnxruntime fails: {' '.join(str(error).split())[-160:]}"
    if output.shape[:2] != case.ids_BN.shape:
        return f"an output of {output.shape[:2]}"
    return torch.from_numpy(output).flatten(0, 1)


def _difference(model: OurModel, case: Case, theirs_TV: Tensor) -> float:
    """The largest absolute one, of all rows: padding too. NaN if either has one."""
    with torch.no_grad():
        x_BNC = model.encoder(
            case.ids_BN, padding_BN=case.mask_BN == 0, global_index_BG=_global_index(case)
        )
        x_TC = x_BNC.flatten(0, 1)
        pieces = []
        for ours, theirs in zip(_pieces(x_TC), _pieces(theirs_TV), strict=True):
            pieces.append((model.head(ours) - theirs).abs().max())
    return float(torch.stack(pieces).max())


def _pieces(x_TC: Tensor) -> tuple[Tensor, ...]:
    return torch.split(x_TC, _PIECE)


def _global_index(case: Case) -> Tensor | None:
    """Positions of the global tokens of each row, -1 where another row has more: int32 BG."""
    is_global_BN = (case.globals_BN * case.mask_BN) != 0
    count_B = is_global_BN.sum(1)
    if not count_B.any():
        return None
    index_BG = torch.full((len(count_B), int(count_B.max())), -1, dtype=torch.int32)
    for row, found in enumerate(is_global_BN):
        index_BG[row, : int(count_B[row])] = found.nonzero()[:, 0].int()
    return index_BG
