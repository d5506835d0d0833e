"""The training engine: loop, schedule, checkpoints, log; independent of models and operators."""
