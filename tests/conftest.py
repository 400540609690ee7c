"""Shared by all tests: no network, fixed threads, and small corpora and models to train."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests name their reason when there is no GPU."""
    import torch

    gpus = torch.cuda.device_count()
    for item in items:
        if item.get_closest_marker("gpu") and gpus < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; this machine has none"))
        if item.get_closest_marker("multi_gpu") and gpus < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs 2 CUDA GPUs; this machine has {gpus}"))


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """A process group of one, in this process; joined once, as DeepSpeed keeps its groups."""
    import torch

    from longpretrain.engine import zero
    from longpretrain.ranks import Ranks

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # so that what start_ranks sets is taken back
        patch.setenv("DS_ACCELERATOR", "cpu")
        zero.start_ranks(Ranks(), torch.device("cpu"))
        patch.setattr(zero, "stop_ranks", lambda: None)
        yield


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data/{train,valid} and models/{short,long}, small enough to train in
    seconds."""
    from small_run import make_small_run

    return make_small_run(tmp_path_factory.mktemp("small_run"))
