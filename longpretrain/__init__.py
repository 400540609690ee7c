"""Longformer pretraining: long attention, exact distributed training, conversion."""
