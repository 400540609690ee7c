"""DeepSpeed, behind the few things the loop needs. The only file that imports deepspeed.

What is ours here and not left to DeepSpeed (0.19.8; each has a test):

* Master weights start from the folder's fp32 values. DeepSpeed starts them from the rounded bf16
  copy.
* Moments are restored through its per-parameter functions, so stage and world size may change.
  Its stage 3 cannot take a whole tensor whose size is no multiple of the number of ranks.
* A non-finite gradient is never applied. DeepSpeed does apply one in fp32 at stage 0.
* Only parameters that train are handed over: others would be decayed.
* bf16 at stage 0 is refused: it runs a hidden optimizer step when it starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import nn

from longpretrain.config import Config
from longpretrain.engine.adam import make_adam
from longpretrain.engine.loss_scale import LossScale
from longpretrain.engine.meeting import Watch, meet
from longpretrain.engine.uncompiled import uncompiled
from longpretrain.engine.zero_config import read_zero_config, settings_of_recipe
from longpretrain.errors import InputError
from longpretrain.ranks import Ranks, free_port, publish

_JOIN_TIMEOUT = timedelta(minutes=10)
_NO_TIMEOUT = timedelta(days=30)
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What an update did: whether it reached the weights, the norm of the whole gradient before
    clipping, and in fp16 what its loss was multiplied with.
    """

    applied: bool
    grad_norm: float
    loss_scale: float | None = None


def start_ranks(
    ranks: Ranks,
    device: torch.device,
    is_stopped: Callable[[], bool] = lambda: False,
    *,
    timeout: timedelta = _NO_TIMEOUT,
    watch: Watch | None = None,
) -> None:
    """Joins the process group (gloo on CPUs, nccl on GPUs); also for a run of one rank.

    ``timeout`` ends a collective that does not: above the watchdog's, whose verdict names the rank.
    ``watch`` is that watchdog; it is up before the group is formed.

    Raises:
        InputError: ranks that do not fit together, or that did not come.
        RuntimeError: the group could not be formed, or rank 0 left before it was.
        KeyboardInterrupt: ``is_stopped`` (a signal asked to stop) before all ranks were there.
    """
    local_rank = device.index if device.type == "cuda" else ranks.local_rank
    port = ranks.master_port or free_port()
    ranks = dataclasses.replace(ranks, local_rank=local_rank, master_port=port)
    publish(ranks, os.environ)
    os.environ["DS_ACCELERATOR"] = device.type  # another machine's may have come with the job
    deepspeed = _deepspeed()
    # Its shared-memory collectives are compiled at first start, which takes a minute and kills the
    # rank where there is no compiler. gloo alone does the job.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = None if torch.distributed.is_initialized() else meet(ranks, is_stopped, watch)
    # The watchdog tells a rank that is gone; this timeout, a network that lets ranks meet only.
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=_JOIN_TIMEOUT
    )
    del store  # until here it kept the port: the group meets in it, too
    torch.distributed.distributed_c10d._set_pg_timeout(timeout)
    for name in ("default_pg_timeout", "default_pg_nccl_timeout"):  # of DeepSpeed's own groups
        setattr(torch.distributed.distributed_c10d, name, timeout)


def stop_ranks() -> None:
    """Leaves the process group, if it was joined."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


class ZeroEngine:
    """A model under DeepSpeed ZeRO with torch's AdamW and our numbers."""

    def __init__(self, model: nn.Module, config: Config, *, accumulation: int) -> None:
        settings = read_zero_config(config.zero.config)
        self.stage: int = settings["zero_optimization"]["stage"]
        self._clip_norm = config.optim.clip_norm
        self._adam = make_adam(model, config)
        settings |= settings_of_recipe(config, accumulation)
        deepspeed = _deepspeed()
        # Its BF16 optimizer prints eight lines of memory figures; refusals come as exceptions.
        with _hidden("fairseq"), uncompiled(), contextlib.redirect_stdout(io.StringIO()):
            self._engine, _, _, _ = deepspeed.initialize(
                model=model, optimizer=self._adam, config=settings
            )
        self.module: nn.Module = self._engine.module
        self._parameters = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        is_scaled = config.precision == "fp16"
        self._loss_scale = LossScale(self._engine.optimizer.loss_scaler) if is_scaled else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward pass."""
        return self._engine(*args, **kwargs)

    @property
    def trained_names(self) -> Sequence[str]:
        """Names of the parameters that train, in the model's order."""
        return list(self._parameters)

    def train(self, mode: bool = True) -> None:
        """Dropout on or off."""
        self._engine.train(mode)

    def set_learning_rate(self, rate: float) -> None:
        """The rate of the next update."""
        for group in self._adam.param_groups:
            group["lr"] = rate

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradient of ``loss``, already scaled for the whole step, to that of the other
        ranks.

        DeepSpeed divides by the accumulation count and averages over ranks; both are undone here,
        so that what is summed is exactly the gradient of the sum of the ranks' losses.
        """
        ranks = torch.distributed.get_world_size()
        # A non-finite loss must be seen in the gradient by every rank, even where its own is
        # finite.
        factor = torch.where(torch.isfinite(loss.detach()), float(ranks), float("nan"))
        self._engine.backward(loss * factor, scale_wrt_gas=False)

    def micro_step(self) -> None:
        """Ends a micro-batch that is not the last of its update."""
        self._engine.step()

    def step(self) -> StepResult:
        """Ends the last micro-batch of an update: applies it if the gradient is finite."""
        norm = self._plain_norm() if self.stage == 0 else None
        scale = self._loss_scale.value if self._loss_scale else None
        self._engine.step()
        if self._loss_scale:
            self._loss_scale.after_update()
        if norm is None:
            norm = float(self._engine.get_global_grad_norm())
        applied = bool(self._engine.was_step_applied()) if self.stage else _is_finite(norm)
        if applied and not _is_finite(norm):
            raise RuntimeError(
                f"DeepSpeed applied an update of gradient norm {norm} at stage {self.stage}; "
                "the run stops before a checkpoint holds it"
            )
        return StepResult(applied=applied, grad_norm=norm, loss_scale=scale)

    def _plain_norm(self) -> float:
        """Stage 0: the gradients are whole and reduced here. A non-finite one is dropped: AdamW
        then skips.
        """
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = float(nn.utils.get_total_norm(gradients))
        is_finite = _is_finite(norm)
        if not is_finite:
            for parameter in self._parameters.values():
                parameter.grad = None
        # DeepSpeed's clipping fails where there is nothing to clip.
        self._engine._config.gradient_clipping = self._clip_norm if is_finite else 0.0
        return norm

    def whole_shape(self, name: str) -> torch.Size:
        """The shape of a parameter that may be sharded."""
        return _whole_shape(self._parameters[name])

    def own_span(self, name: str) -> tuple[int, int]:
        """Which elements of a flattened parameter this rank holds in fp32: (first, how many)."""
        parameter = self._parameters[name]
        whole = _whole_shape(parameter).numel()
        if self.stage == 0:
            return 0, whole
        if self.stage == 3:
            start, size = _place_of_part(parameter)
            return min(start, whole), max(0, min(size, whole - start))
        fragment = parameter._hp_mapping
        address = fragment.lp_fragment_address if fragment else None
        return (address.start, address.numel) if address else (0, 0)

    def own_part(self, name: str, key: str | None = None) -> torch.Tensor:
        """The elements ``own_span`` of the fp32 master weight, or of a moment: flat, no copy where
        DeepSpeed gives none.
        """
        from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

        parameter = self._parameters[name]
        _, size = self.own_span(name)
        if size == 0 or (key is not None and not self.updates_applied):
            return torch.zeros(size)  # every update so far was skipped
        if self.stage == 0:
            value = parameter if key is None else self._adam.state[parameter][key]
        elif self.stage < 3:
            value = parameter._hp_mapping.get_hp_fragment(key)
        elif key is None:
            value = safe_get_local_fp32_param(parameter)
        else:
            value = safe_get_local_optimizer_state(parameter, key)
        return torch.as_tensor(value).detach().flatten()[:size]  # stage 3 pads the last part

    def full_state(self, name: str, key: str | None = None) -> torch.Tensor:
        """The whole fp32 master weight of a parameter, or one of its moments, on the CPU. All
        ranks must call it.
        """
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self._parameters[name]
        shape = _whole_shape(parameter)
        if key is not None and not self.updates_applied:
            return torch.zeros(shape)  # every update so far was skipped
        if self.stage == 0:
            value = parameter if key is None else self._adam.state[parameter][key]
        elif key is None:
            value = safe_get_full_fp32_param(parameter)
        else:
            value = safe_get_full_optimizer_state(parameter, key)
        return torch.as_tensor(value).detach().to("cpu", torch.float32, copy=True).reshape(shape)

    def full_gradient(self, name: str) -> torch.Tensor:
        """The whole gradient of a parameter over all ranks and micro-batches, as the step will see
        it: in fp32, still multiplied by the loss scale. All ranks must call it, between the last
        backward pass of an update and its step.
        """
        from deepspeed.utils import safe_get_full_grad

        parameter = self._parameters[name]
        value = parameter.grad if self.stage == 0 else safe_get_full_grad(parameter)
        if value is None:
            return torch.zeros(_whole_shape(parameter))
        return torch.as_tensor(value).detach().float().reshape(_whole_shape(parameter))

    @property
    def loss_scaling(self) -> dict[str, float]:
        """What moves in the loss scale of fp16; empty where nothing is scaled."""
        return self._loss_scale.state() if self._loss_scale else {}

    @loss_scaling.setter
    def loss_scaling(self, values: Mapping[str, float]) -> None:
        if self._loss_scale and values:  # a run may go on in another precision
            self._loss_scale.restore(values)

    def set_weights(self, read: Callable[[str], torch.Tensor]) -> None:
        """Sets every master weight, in fp32, from ``read(name)``. The working copies were loaded
        from the same.
        """
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        for name, parameter in self._parameters.items():
            value = read(name).to(parameter.device, torch.float32)
            _check_shape(name, parameter, value)
            if self.stage == 0:
                with torch.no_grad():
                    parameter.copy_(value)
            elif self.stage == 3:
                safe_set_local_fp32_param(parameter, _own_part(parameter, value))
            else:
                safe_set_full_fp32_param(parameter, value)

    def set_moments(self, read: Callable[[str, str], torch.Tensor], updates: int) -> None:
        """Sets both moments of every parameter from ``read(name, key)``, as after ``updates``
        updates.
        """
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self._create_moments(updates)
        for name, parameter in self._parameters.items():
            for key in MOMENTS:
                value = read(name, key).to(parameter.device)
                _check_shape(name, parameter, value)
                if self.stage == 0:
                    self._adam.state[parameter][key].copy_(value)
                elif self.stage == 3:
                    safe_set_local_optimizer_state(parameter, _own_part(parameter, value), key)
                else:
                    safe_set_full_optimizer_state(parameter, value, key)

    @property
    def updates_applied(self) -> int:
        """Updates that AdamW has counted: its bias correction depends on it."""
        for state in self._adam.state.values():
            return int(state["step"])
        return 0

    def _create_moments(self, updates: int) -> None:
        """Makes AdamW's state as its first update would: DeepSpeed links moments to parameters
        only then.
        """
        zero = self._engine.optimizer
        flat = (
            zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else [p for group in self._adam.param_groups for p in group["params"]]
        )
        for parameter in flat:
            step = torch.tensor(
                float(updates), device=parameter.device if parameter.is_cuda else "cpu"
            )
            self._adam.state[parameter] = {
                "step": step,
                **{key: torch.zeros_like(parameter.data) for key in MOMENTS},
            }
        if self.stage in (1, 2):
            zero._lazy_init_hp_params_optimizer_state()


def _whole_shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _check_shape(name: str, parameter: nn.Parameter, value: torch.Tensor) -> None:
    """A tensor of another shape could be broadcast at one stage and refused at another."""
    if value.shape != _whole_shape(parameter):
        raise InputError(
            f"tensor {name} of the checkpoint",
            got=f"shape {[*value.shape]}",
            wanted=f"{[*_whole_shape(parameter)]}, that of the model",
            way_out="The checkpoint is of another model: start anew with --fresh.",
        )


def _own_part(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor at stage 3, padded as DeepSpeed pads.

    Its function for whole tensors cuts them unpadded and fails where the number of elements, such
    as the 50,265 of RoBERTa's output bias, is no multiple of the number of ranks.
    """
    start, size = _place_of_part(parameter)
    flat = value.flatten()
    ranks = torch.distributed.get_world_size(parameter.ds_process_group)  # type: ignore[attr-defined]
    padded = nn.functional.pad(flat, (0, size * ranks - flat.numel()))
    return padded.narrow(0, start, size)


def _place_of_part(parameter: nn.Parameter) -> tuple[int, int]:
    """First element and size of this rank's part at stage 3, padding counted."""
    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    return size * torch.distributed.get_rank(parameter.ds_process_group), size  # type: ignore[attr-defined]


def _is_finite(number: float) -> bool:
    # DeepSpeed's norm of a non-finite gradient is -1 or inf.
    return 0.0 <= number < float("inf")


def _deepspeed() -> Any:
    """Imports deepspeed with its chatter below warnings off; our own lines say what matters."""
    with _hidden("apex"):  # whosever it is: DeepSpeed asks only whether it knows an optimizer
        import deepspeed
        import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # DeepSpeed calls a collective by its old name; nothing that a user could change.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.*", category=FutureWarning)
    return deepspeed


@contextlib.contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Hides a package from DeepSpeed, which imports it only to name a class of it: fairseq takes
    3 to 9 s, and the apex of PyPI is not the one that it means.
    """
    hidden: Mapping[str, Any] = {} if package in sys.modules else {package: None}
    sys.modules.update(hidden)
    try:
        yield
    finally:
        for name in hidden:
            sys.modules.pop(name, None)
