"""NVIDIA's apex: what of it can be used here, and why not where it cannot. The only file that
imports it.

PyPI's package ``apex`` is another one, of the web framework Pyramid: it is recognised by its files
and never imported. NVIDIA's is built from source, and useless here without its CUDA extensions.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

Part = Literal["layer_norm", "adam"]
LayerNormFunction = Callable[..., Tensor]
"""Takes input, weight, bias, normalized_shape and eps."""

HOW_TO_GET = (
    "Build NVIDIA's from https://github.com/NVIDIA/apex (APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install"
    " --no-build-isolation .), or leave the key at auto."
)
# The compiled module behind each part: without it, apex imports and then fails at first use.
_EXTENSION = {"layer_norm": "fused_layer_norm_cuda", "adam": "amp_C"}


def why_not(part: Part, device_type: str) -> str | None:
    """Why a part of apex cannot run, as words that follow "but"; None when it can."""
    reason = _why_not_installed(part)
    if reason is None and device_type != "cuda":
        reason = f"its kernels run on GPUs, and this is the {device_type.upper()}"
    return reason or _why_not_loaded(part)


def is_meant(part: Part) -> bool:
    """Whether anything of that name is installed: then it is worth a word that it is not used."""
    return _why_not_installed(part) != _MISSING


def version() -> str:
    """The version of the package called apex, whoever made it."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("apex")
    return "of unknown version"


def layer_norm() -> LayerNormFunction:
    """What ``FusedLayerNorm`` calls, for those whom ``why_not`` told no reason."""
    return _load("layer_norm")  # type: ignore[no-any-return]


def fused_adam(groups: list[dict[str, Any]], **options: Any) -> torch.optim.Optimizer:
    """``FusedAdam``, with the number of updates in each parameter's state, as torch's AdamW has it.

    apex counts per group and per call of ``step``. ZeRO 3 calls it once for each of its parts of a
    group, with nothing in the other groups: apex would count too many and then fail on an empty
    group. And a call without any gradient, which is how we skip an update at stage 0, would count.
    """
    return _adam_class()(groups, **options)  # type: ignore[no-any-return]


_MISSING = "no package of that name is installed"


@functools.cache
def _why_not_installed(part: Part) -> str | None:
    """Looks at files first, so that nobody else's package is imported."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return _MISSING
    if spec.origin is None:
        found = next(iter(spec.submodule_search_locations or ["somewhere"]))
        return (
            f"under that name Python finds only {found}, a folder without a package in it "
            "(sources that are not installed?)"
        )
    folder = Path(spec.origin).parent
    if not (folder / "normalization").is_dir():
        return _foreign(folder)
    if importlib.util.find_spec(_EXTENSION[part]) is None:
        return (
            f"NVIDIA's apex in {folder} was built without its CUDA extensions "
            f"(there is no module {_EXTENSION[part]})"
        )
    return None


def _foreign(folder: Path) -> str:
    """Words for a package of that name which is not NVIDIA's."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found = importlib.metadata.distribution("apex")
        if Path(str(found.locate_file("apex"))).resolve() == folder.resolve():
            summary = found.metadata["Summary"] or "no description"
            return (
                f"{folder} is not NVIDIA's but PyPI's package of that name: "
                f'version {found.version}, "{summary}"'
            )
    return f"{folder} is another package of that name, not NVIDIA's"


@functools.cache
def _why_not_loaded(part: Part) -> str | None:
    try:
        _load(part)
    except Exception as error:  # of any kind: apex follows torch's private names
        first_line = (str(error).splitlines() or [""])[0]
        return f"NVIDIA's apex does not load ({type(error).__name__}: {first_line})"
    return None


@functools.cache
def _load(part: Part) -> Any:
    importlib.import_module(_EXTENSION[part])
    if part == "layer_norm":
        from apex.normalization.fused_layer_norm import fused_layer_norm_affine

        return fused_layer_norm_affine
    from apex.optimizers import FusedAdam

    return FusedAdam


@functools.cache
def _adam_class() -> Any:
    class StepInState(_load("adam")):  # type: ignore[misc]
        """Hands apex the groups that have something to do, each with the count of its state."""

        param_groups: list[dict[str, Any]]

        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            everything = self.param_groups
            self.param_groups = [group for group in everything if _with_gradient(group)]
            for group in self.param_groups:
                group["step"] = _updates(self.state, group)
            try:
                loss = super().step(closure)
            finally:
                busy, self.param_groups = self.param_groups, everything
            for group in busy:
                for parameter in _with_gradient(group):
                    self.state[parameter]["step"] = torch.tensor(float(group["step"]))
            return loss

    return StepInState


def _with_gradient(group: dict[str, Any]) -> list[Tensor]:
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def _updates(state: Any, group: dict[str, Any]) -> int:
    """Updates that the parameters of a group have had."""
    counts = {int(state[p].get("step", 0)) for p in _with_gradient(group)}
    assert len(counts) == 1, f"parameters of one group had {sorted(counts)} updates"
    return counts.pop()
