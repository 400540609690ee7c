"""The attention of Longformer: a sliding window, dilated per head, plus a few global tokens.

``sliding_attention`` is the only way in; it knows no model and no process group.

* ``pattern``: which keys a query reaches through its window.
* ``reference``: the definition of right, dense and slow, for reading and for tests.
* ``portable``: blocked PyTorch for any device, memory linear in the number of tokens.
* ``fused``: the public operator, over what checks a call and picks a backend.
* ``backends``: which backend runs; ``library``: the compiled kernels (``csrc/``); ``memory``: their
  errors where memory runs out.
* ``gradient``: how autograd and torch.func differentiate the portable and the compiled operators.
* ``checks``: what a user may pass.
* ``philox``: the random bits of dropout, the same on every backend.

``python -m longpretrain.attention`` says which backends run here and checks them.
"""

from longpretrain.attention.backends import why_not
from longpretrain.attention.fused import sliding_attention
from longpretrain.attention.library import library_path
from longpretrain.attention.pattern import AttentionPattern

__all__ = ["AttentionPattern", "library_path", "sliding_attention", "why_not"]
