"""What the PTX interpreter executes is PTX for sm_80. The library holds PTX for sm_90 as well, for
it and later chips: the two are the same, so that one stands for both.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from ptx.build import KEPT, code_of, nvcc, of_one_kind, ptx_of

pytestmark = pytest.mark.skipif(nvcc() is None, reason="needs nvcc 12, on PATH or in CUDACXX")


@pytest.mark.parametrize("name", ["prepare", "forward", "backward_keys", "global_rows"])
def test_ptx_for_sm_90_differs_in_its_target_alone(name: str, tmp_path: Path) -> None:
    source = of_one_kind(tmp_path, "BFloat16") / f"{name}.cu"
    sm_80, sm_90 = (ptx_of(source, KEPT, arch) for arch in (80, 90))
    assert ".target sm_80" in sm_80
    assert ".target sm_90" in sm_90
    assert code_of(sm_80) == code_of(sm_90)


def test_a_changed_instruction_is_seen(tmp_path: Path) -> None:
    text = ptx_of(of_one_kind(tmp_path, "BFloat16") / "prepare.cu", KEPT)
    changed = text.replace("add.s32", "sub.s32", 1)
    assert code_of(changed) != code_of(text)
