"""Runs the PTX that nvcc emitted, on numpy, with checks that no GPU makes.

Written from the PTX ISA alone: it shares nothing with csrc/emulation, so a fault in one of them
does not hide in the other.
"""
