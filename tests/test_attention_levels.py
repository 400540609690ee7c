"""The compiled kernels in processes of their own: other instruction sets, and memory.

Letters: B batch row, N query, M key, H head, D number of a head, G slot of a global token.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import test_attention_bits as bits
import test_attention_kernels as kernels
import test_attention_rounding as rounding
import torch
from kernel_cases import BF16, F16, F32, note
from test_attention_main import run_python

from longpretrain.attention import fused

HERE = Path(__file__).parent
pytestmark = pytest.mark.usefixtures("library")


def check_level() -> None:
    """Run by a child whose library uses another instruction set."""
    torch.set_num_threads(1)
    rounding.test_the_exponential()
    for head_size in (1, 33, 64, 127):
        kernels.test_head_sizes(head_size)
    kernels.test_chunks_meet(*kernels.LONG["dilated_causal"])
    kernels.test_chunks_meet(*kernels.LONG["dropout"])
    rounding.test_large_scores(300, "masked")
    rounding.test_all_scores_alike(-200)
    for dtype in (F32, BF16, F16):
        bits.test_dropped_weights_are_those_of_the_reference(*bits.UNIFORM["near"], dtype)
        kernels.test_padding_is_zero_and_never_nan(dtype, False)
    for dtype in (BF16, F16):
        with pytest.MonkeyPatch.context() as patch:
            rounding.test_error_in_16_bits(33, dtype, patch)
        rounding.test_results_are_rounded_to_the_nearest(dtype)
    for value in (math.nan, -math.inf):
        rounding.test_no_finite_answer_to_infinite_scores("q_BNHD", value)
        rounding.test_no_finite_answer_to_infinite_scores("k_BNHD", value)
    print(fused.kernel_facts()["used"])


@pytest.mark.parametrize("level", ["plain", "avx2", "avx512", "avx512_bf16"])
def test_every_instruction_set_that_runs_here(level: str) -> None:
    facts = fused.kernel_facts()
    if level == facts["used"]:
        pytest.skip("all other tests use it")
    if not all(level in facts[of].split(", ") for of in ("built", "machine")):
        pytest.skip(f"built: {facts['built']}; the processor runs: {facts['machine']}")
    code = "import test_attention_levels as tests; tests.check_level()"
    done = run_python("-c", code, LONGPRETRAIN_CPU_LEVEL=level, PYTHONPATH=str(HERE))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == level


# The first call leaves behind what threads and torch's allocator keep.
MEMORY = """
import torch
from pathlib import Path
from longpretrain.attention import AttentionPattern, sliding_attention
torch.set_num_threads(2)

def megabytes(name):
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(name)]
    return int(line.split()[1]) / 1024

def growth(tokens, dtype):
    x = [torch.ones(1, tokens, 4, 32, dtype=dtype) for _ in range(4)]
    [one.requires_grad_() for one in x[:3]]
    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is there now
    before = megabytes("VmRSS")
    out = sliding_attention(*x[:3], AttentionPattern(512), backend="fused")
    torch.autograd.grad(out, x[:3], x[3])
    return megabytes("VmHWM") - before

growth(3000, torch.float32)
print(growth(16384, torch.bfloat16), growth(16384, torch.float32))
"""


def test_no_memory_of_tokens_times_window() -> None:
    """How much the largest resident size of a process grows by a forward and backward pass of
    16,384 tokens: by less than three times q, k and v and 16 MiB for the threads' scratch. (The
    weights of all windows alone would be 128 MiB in 16 bits.)
    """
    if "asan" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("the address sanitizer keeps freed memory")
    done = run_python("-c", MEMORY)
    if "clear_refs" in done.stderr:
        pytest.skip("this system cannot reset the peak of /proc/self/status")
    assert done.returncode == 0, done.stderr
    for found, itemsize in zip(map(float, done.stdout.split()), (2, 4), strict=True):
        note("MiB", found)
        assert found < 3 * (3 * 16384 * 4 * 32 * itemsize / 2**20) + 16
