"""Shared by all tests: no network, fixed threads, the compiled library, small corpora and models to
train, and how hard property tests search.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

# HYPOTHESIS_PROFILE=default: few examples, the same ones in every run. thorough: ten times as many
# in every property test, other ones in every run. A failure prints the line that reproduces it.
THOROUGH = 10
settings.register_profile(
    "default",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("thorough", settings.get_profile("default"), derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# Tests of the CUDA kernels on the emulator, which only `make emulate` has built and named.
collect_ignore = [] if "emulated" in os.environ.get("LONGPRETRAIN_LIBRARY", "") else ["emulated"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """GPU tests name their reason when there is no GPU."""
    import torch

    gpus = torch.cuda.device_count()
    for item in items:
        if settings.get_current_profile_name() == "thorough":
            _search_thoroughly(item)
        if item.get_closest_marker("gpu") and gpus < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU; this machine has none"))
        if item.get_closest_marker("multi_gpu") and gpus < 2:
            item.add_marker(pytest.mark.skip(reason=f"needs 2 CUDA GPUs; this machine has {gpus}"))


def _search_thoroughly(item: pytest.Item) -> None:
    """Also a test that names its number of examples; a profile alone reaches only the others."""
    function = getattr(item, "function", None)
    own = getattr(function, "_hypothesis_internal_use_settings", None)
    if own is not None and not hasattr(function, "searches_thoroughly"):
        function.searches_thoroughly = True  # one function may be several items
        function._hypothesis_internal_use_settings = settings(
            own, max_examples=THOROUGH * own.max_examples, derandomize=False, print_blob=True
        )


@pytest.fixture(scope="session")
def library() -> None:
    """For tests of the compiled kernels; without them each says why it is left out."""
    from longpretrain.attention import why_not

    if reason := why_not("fused"):
        pytest.skip(reason)


@pytest.fixture(params=["portable", "fused"])
def backend(request: pytest.FixtureRequest) -> str:
    """Each attention backend that is an operator to PyTorch; the reference is plain PyTorch."""
    from longpretrain.attention import why_not

    if reason := why_not(request.param):
        pytest.skip(reason)
    return str(request.param)


@pytest.fixture
def conversion_report(request: pytest.FixtureRequest) -> Callable[[str, object], None]:
    """Takes a figure that a test marked ``conversion`` measured, for docs/conversions.md: its name,
    and a number or text.
    """

    def report(name: str, figure: object) -> None:
        text = f"{figure:.3g}" if isinstance(figure, float) else str(figure)
        request.node.user_properties.append(("conversion", (name, text)))

    return report


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, taken back at the end."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
