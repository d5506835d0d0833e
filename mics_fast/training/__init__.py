"""Training: the trainer, stages and plans from options, run folders, the neighbour check."""
