"""Inside, a mark for torch.compile does nothing, with and without arguments; afterwards it is
torch's own again, after an error as well. That a rank's start needs it: test_benchmark_startup.py.
"""

from __future__ import annotations

import pytest
import torch

from longpretrain.engine.uncompiled import uncompiled


def test_marks_do_nothing_inside() -> None:
    own = torch.compile

    def function() -> int:
        return 1

    with uncompiled():
        assert torch.compile(function) is function
        assert torch.compile(backend="inductor", fullgraph=True)(function) is function
    assert torch.compile is own


def test_an_error_inside_leaves_torch_as_it_was() -> None:
    own = torch.compile
    with pytest.raises(KeyError), uncompiled():
        raise KeyError
    assert torch.compile is own
