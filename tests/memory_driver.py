"""As rank_driver.py; beside each checkpoint, what DeepSpeed itself says that the weights are then.

Rank 0 writes RUN/memory/step-N.pt: every parameter that trains, by its name in the model, gathered
by DeepSpeed and not by our code of checkpoints.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from rank_driver import drive

from longpretrain.engine.saver import Saver


def watched(begin: Any) -> Any:
    """Saver.begin, and the weights of the moment in a file of their own."""

    def began(self: Any, state: dict[str, Any]) -> None:
        engine = self._engine
        weights = {name: engine.full_state(name) for name in engine.trained_names}
        if dist.get_rank() == 0:
            folder = Path(self._config.run_dir) / "memory"
            folder.mkdir(exist_ok=True)
            torch.save(weights, folder / f"step-{state['step']:06d}.pt")
        begin(self, state)

    return began


if __name__ == "__main__":
    Saver.begin = watched(Saver.begin)  # type: ignore[method-assign]
    listing = Path(sys.argv[1])
    exit_codes = drive(json.loads(listing.read_text(encoding="utf-8")))
    if os.environ["RANK"] == "0":
        listing.with_suffix(".codes").write_text(json.dumps(exit_codes), encoding="utf-8")
