"""AdamW by torch or by NVIDIA's apex, and which of the kernels with a choice a run uses.

torch's is what ``auto`` means: its fused kernel does what apex's does, and a resume from it was
compared bit for bit.
"""

from __future__ import annotations

import torch
from torch import nn

from longpretrain import nvidia_apex
from longpretrain.config import Config
from longpretrain.engine.zero_config import read_zero_config
from longpretrain.errors import InputError
from longpretrain.schedule import parameter_groups


def make_adam(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Over the parameters that train; both moments and the number of updates lie in its state."""
    optim = config.optim
    groups = parameter_groups(model.named_parameters(), optim)
    options = {"lr": optim.lr, "betas": (optim.betas[0], optim.betas[1]), "eps": optim.eps}
    if config.kernels.adam == "apex":
        return nvidia_apex.fused_adam(groups, adam_w_mode=True, **options)
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.AdamW(groups, fused=on_gpu or None, **options)  # type: ignore[arg-type]


def check_apex(config: Config, device_type: str) -> None:
    """Refuses kernels that cannot run here.

    Raises:
        InputError: apex is asked for and is missing, another package, or not built for GPUs; or
            the optimizer's state is to lie in CPU memory.
    """
    if config.kernels.layer_norm == "apex":
        _need_apex("layer_norm", device_type)
    if config.kernels.adam == "apex":
        _need_apex("adam", device_type)
        section = read_zero_config(config.zero.config)["zero_optimization"]
        if section.get("offload_optimizer", {}).get("device", "none") != "none":
            raise InputError(
                "recipe keys kernels.adam and zero.config",
                got="apex with the optimizer's state in CPU memory",
                wanted="torch, as apex's Adam runs on GPUs",
                way_out="Leave kernels.adam at auto.",
            )


def _need_apex(part: nvidia_apex.Part, device_type: str) -> None:
    reason = nvidia_apex.why_not(part, device_type)
    if reason is not None:
        raise InputError(
            f"recipe key kernels.{part}",
            got=f"apex, but {reason}",
            wanted="NVIDIA's apex with its CUDA extensions, and a GPU",
            way_out=nvidia_apex.HOW_TO_GET,
        )


def kernels_in_use(config: Config, device_type: str) -> dict[str, str]:
    """What ``auto`` came to, by the recipe's keys: the same on all ranks of a run that is to repeat
    itself.
    """
    has_layer_norm = nvidia_apex.why_not("layer_norm", device_type) is None
    by_apex = {
        "layer_norm": config.kernels.layer_norm != "torch" and has_layer_norm,
        "adam": config.kernels.adam == "apex",
    }
    apex = f"apex {nvidia_apex.version()}"
    return {name: apex if is_apex else "torch" for name, is_apex in by_apex.items()}
