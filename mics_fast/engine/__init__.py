"""The loop, its schedule, checkpoints and log: knows neither a model nor an operator."""
