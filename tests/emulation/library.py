"""The emulator inside the compiled library, where that was built with LONGPRETRAIN_EMULATED."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Emulator:
    library: ctypes.CDLL

    def set_seed(self, seed: int) -> None:
        """0: threads and blocks in order; else an order drawn from it."""
        self.library.longpretrain_emulation_set_seed(ctypes.c_uint64(seed))

    def set_threads(self, threads: int) -> None:
        """Of the operating system; 0: as many as it has cores."""
        self.library.longpretrain_emulation_set_threads(threads)

    def reset_counters(self) -> None:
        self.library.longpretrain_emulation_reset_counters()

    def counters(self) -> dict[str, dict[str, int]]:
        """By kernel; see csrc/emulation/runtime.h for what is counted."""
        lines = self.library.longpretrain_emulation_counters().decode().splitlines()
        found = {}
        for line in lines:
            words = line.split(" ")
            counts = [word.partition("=") for word in words if "=" in word]
            found[" ".join(word for word in words if "=" not in word)] = {
                what: int(count) for what, _, count in counts
            }
        return found


def emulator() -> Emulator:
    """Of the library that LONGPRETRAIN_LIBRARY names, which must have one."""
    library = ctypes.CDLL(os.environ["LONGPRETRAIN_LIBRARY"])
    library.longpretrain_emulation_counters.restype = ctypes.c_char_p
    return Emulator(library)
