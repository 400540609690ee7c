"""The training engine: a loop over a task, DeepSpeed ZeRO, checkpoints, signals."""
