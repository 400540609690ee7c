"""Longformer pretraining: long attention, exact distributed training, conversion."""

__version__ = "0.1.0"
