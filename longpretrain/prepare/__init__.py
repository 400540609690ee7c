"""Text of any size and state -> a corpus of tokens: everything that writes one."""

from longpretrain.prepare.job import prepare

__all__ = ["prepare"]
