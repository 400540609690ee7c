"""What every rank must have alike before the first update, and what a resume finds changed.

In two rounds: the code, its packages and the recipe before any input is opened, since ranks of
other code may not even get to the second; then checkpoint, data and weights as they were loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longpretrain.agreement import Fact
from longpretrain.code_version import code_version
from longpretrain.config import Config, flat, to_tree
from longpretrain.engine import candidates, checkpoint
from longpretrain.engine.adam import kernels_in_use
from longpretrain.engine.zero_config import read_zero_config
from longpretrain.files import sha256
from longpretrain.tasks.masked_lm import MaskedLMTask
from longpretrain.tasks.sources import open_corpus

_ONE_COMMAND = "Start all ranks by one command, in one folder that all nodes see."
_ONE_INSTALLATION = "Run all ranks from one checkout and environment that all nodes see."
_ONE_COPY = "Give all nodes the same files, or test the disk and memory of the odd node."
_WHAT = {
    "code": "code of longpretrain",
    "library": "compiled library",
}
"""Names of what ``code_version`` tells; the commit is left out, as equal files may come from two.
"""


def of_program(config: Config, device_type: str, *, fresh: bool) -> dict[str, Fact]:
    """What runs, and the recipe: known without opening anything of the run."""
    versions = checkpoint.versions()
    zero = json.dumps(read_zero_config(config.zero.config), sort_keys=True)
    recipe = {f"recipe key {key}": repr(value) for key, value in flat(to_tree(config))}
    kernels = kernels_in_use(config, device_type)
    return {
        **_facts({_WHAT[key]: versions[key] for key in _WHAT}, _ONE_INSTALLATION),
        **_facts({f"kernels.{key} as run": kernels[key] for key in kernels}, _ONE_INSTALLATION),
        **_facts(
            {
                f"version of {name}": version
                for name, version in versions.items()
                if name not in code_version()
            },
            _ONE_INSTALLATION,
        ),
        **_facts({**recipe, "--fresh": str(fresh), "settings of zero.config": zero}, _ONE_COMMAND),
    }


def of_checkpoints(config: Config) -> dict[str, Fact]:
    """Which checkpoints this rank sees: one that does not see them all would end the run's past."""
    return _facts({"checkpoints of the run": candidates.seen(config.run_dir)}, _ONE_COMMAND)


def of_inputs(
    config: Config, task: MaskedLMTask, model: nn.Module, resume_from: Path | None
) -> dict[str, Fact]:
    """What the run begins with, as this rank sees and has loaded it."""
    start = "none"
    if resume_from:
        start = f"{resume_from}, state.json {sha256(resume_from / checkpoint.STATE)[:12]}"
    data = dict(task.identity())
    if config.data.valid:
        data["held-out corpus"] = open_corpus(config, "valid").fingerprint
    return {
        **_facts({"checkpoint to go on from": start}, _ONE_COMMAND),
        **_facts({**data, "initial weights": hash_of_weights(model)}, _ONE_COPY),
    }


def _facts(values: Mapping[str, str], way_out: str) -> dict[str, Fact]:
    return {name: Fact(value=value, way_out=way_out) for name, value in values.items()}


def hash_of_weights(model: nn.Module) -> str:
    """sha256 over the names and bytes of all parameters and buffers, as they lie in memory.

    Of a file the hash would not do: another file may have been read, and memory fails as well.
    Every rank hashes all it has: less than a second for RoBERTa-base, two for RoBERTa-large, on one
    core.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # hashing lets go of Python's lock
        digests = list(pool.map(_digest, tensors))
    return hashlib.sha256(b"".join(digests)).hexdigest()[:16]


def _digest(named: tuple[str, torch.Tensor]) -> bytes:
    name, tensor = named
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    found = hashlib.sha256(f"{name} {tensor.dtype} {[*tensor.shape]}\0".encode())
    found.update(content.data)
    return found.digest()


def changed_since(state: Mapping[str, Any]) -> str:
    """How code and packages differ from those that wrote a checkpoint, in words; "" if not at all.

    Args:
        state: of the checkpoint; an older one tells less, and what it does not tell is left out.
    """
    before, now = state.get("versions", {}), checkpoint.versions()
    changed = [name for name in before if before[name] != now.get(name)]
    if changed == ["commit"]:  # none of the files that run
        return ""
    return ", ".join(f"{name} {before[name]} -> {now.get(name, 'none')}" for name in changed)
