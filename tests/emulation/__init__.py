"""Small programs on the emulator of csrc/emulation, and kernels with planted bugs."""
