"""Between model folders: longer models from short ones, a run's weights out, and the proof."""

from longpretrain.convert.lengthen import Report, convert
from longpretrain.convert.verify import VerifyReport, VerifyRow, verify
from longpretrain.convert.write import export

__all__ = ["Report", "VerifyReport", "VerifyRow", "convert", "export", "verify"]
