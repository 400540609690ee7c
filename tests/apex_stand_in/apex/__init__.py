"""A stand-in for NVIDIA's apex where there is no GPU: its modules, signatures and bookkeeping, as
read in its sources (2026), over plain PyTorch. No kernel of its own is tested by it.
"""
