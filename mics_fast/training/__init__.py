"""The trainer: stages and plans from options, run folders, the nearest-neighbour check."""
